"""Caching across steps: what is skipped, what comes out, and that nothing of one generation reaches another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import CheckpointError, ConfigurationError, InputError
from impasto.hooks import FirstBlockCacheConfig
from impasto.pipelines.pixart import DenoisingStep, PixArtSigmaPipeline
from impasto.schedulers.ddim import DDIMScheduler
from impasto.transforms.step_cache import METHODS, StepCache, cache_steps

from ..tiny import tiny_pipeline, tiny_transformer

LAYERS, STEPS = 4, 8
EVERYTHING: dict[str, dict[str, Any]] = {
    "first-block": {"threshold": 0.0},
    "interval": {"interval": 1},
    "taylor": {"interval": 1},
}
SOME: dict[str, dict[str, Any]] = {
    "first-block": {"threshold": 0.3},
    "interval": {"interval": 3},
    "taylor": {"interval": 2},
}


@pytest.fixture
def pipe() -> PixArtSigmaPipeline:
    return make()


def make(seed: int = 0) -> PixArtSigmaPipeline:
    return tiny_pipeline(
        PixArtSigmaPipeline, transformer=tiny_transformer(seed, num_layers=LAYERS), scheduler=DDIMScheduler()
    )


def generate(pipe: PixArtSigmaPipeline, seed: int = 0, **arguments: Any) -> Tensor:
    call = {"prompt": "a red cube", "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    prompts = len(call["prompt"]) if isinstance(call["prompt"], list) else 1
    images: Tensor = pipe(**call, generator=[torch.Generator().manual_seed(seed + i) for i in range(prompts)]).images
    return images


@contextmanager
def counting(pipe: PixArtSigmaPipeline) -> Iterator[list[int]]:
    """How often each block's forward runs."""
    counts = [0] * len(pipe.transformer.transformer_blocks)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    hooks = [block.register_forward_hook(count(i)) for i, block in enumerate(pipe.transformer.transformer_blocks)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def loop(pipe: PixArtSigmaPipeline, seed: int, prompt: str = "a red cube", steps: int = STEPS) -> Iterator[Any]:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return pipe.denoise(noise, pipe.encode_prompt(prompt), num_inference_steps=steps)


def last(steps: Iterator[DenoisingStep]) -> Tensor:
    return list(steps)[-1].latents


# --- what comes out ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arguments", [{}, {"prompt": ["a cat", "a dog", "sky"]}, {"guidance_scale": 1.0}])
def test_with_everything_computed_nothing_changes(
    pipe: PixArtSigmaPipeline, method: Any, arguments: dict[str, Any]
) -> None:
    plain = generate(pipe, **arguments)
    with cache_steps(pipe, method, **EVERYTHING[method]) as cache:
        assert torch.equal(generate(pipe, **arguments), plain)
        assert (cache.computed, cache.reused) == (STEPS, 0)


@pytest.mark.parametrize("method", ["interval", "taylor"])
def test_an_image_does_not_depend_on_its_batch(pipe: PixArtSigmaPipeline, method: Any) -> None:
    prompts = ["a cat", "a dog", "sky"]
    plain = generate(pipe, prompt=prompts)
    with cache_steps(pipe, method, **SOME[method]) as cache:
        together = generate(pipe, prompt=prompts)
        alone = torch.cat([generate(pipe, seed=i, prompt=prompt) for i, prompt in enumerate(prompts)])
    assert cache.reused == 4 * {"interval": 4, "taylor": 3}[method]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, plain, rtol=1e-2, atol=1e-2)  # it has an effect


def test_an_unchanging_input_costs_nothing() -> None:
    """Where the first block's residual does not change, a reused step is the computed one."""
    model = tiny_transformer(num_layers=LAYERS)
    latents, text, timestep = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([500])
    with torch.no_grad(), cache_steps(model, "first-block", threshold=1e-6) as cache, cache.generation():
        computed, reused = (model(latents, text, timestep, return_dict=False)[0] for _ in range(2))
    assert (cache.computed, cache.reused) == (1, 1)
    torch.testing.assert_close(reused, computed, rtol=1e-5, atol=1e-5)


def test_a_residual_along_a_line_is_extrapolated_exactly() -> None:
    """Blocks whose residual is linear in the step: "taylor" gives it exactly, from the third step on."""
    model = Line()
    with torch.no_grad(), cache_steps(model, "taylor", interval=2) as cache, cache.generation(9):
        outputs = [model(torch.zeros(1, 2, 3), step) for step in range(9)]
    assert cache.reused == 4
    assert [out[0, 0, 0].item() for out in outputs] == [0.0, 0.0, 6.0, 9.0, 12.0, 15.0, 18.0, 21.0, 24.0]


def test_an_interval_repeats_the_last_residual() -> None:
    model = Line()
    with torch.no_grad(), cache_steps(model, "interval", interval=2) as cache, cache.generation(9):
        outputs = [model(torch.ones(1, 2, 3), step) for step in range(9)]
    assert [out[0, 0, 0].item() for out in outputs] == [1.0, 1.0, 7.0, 7.0, 13.0, 13.0, 19.0, 19.0, 25.0]


class Line(nn.Module):
    """Two blocks that add the step, and twice the step."""

    class Block(nn.Module):
        def __init__(self, factor: int):
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, step: int) -> Tensor:
            return x + self.factor * step

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([self.Block(1), self.Block(2)])

    def forward(self, x: Tensor, step: int) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x, step)
        return x


# --- what is skipped ---


@pytest.mark.parametrize(
    ("arguments", "computed"),
    [
        ({"interval": 2, "last": 0}, 4),  # 0 2 4 6
        ({"interval": 2}, 5),  # and 7, the last
        ({"interval": 3, "last": 0}, 3),  # 0 3 6
        ({"interval": 3, "first": 3, "last": 2}, 6),  # 0 1 2, 5, 6 7
        ({"interval": 100, "last": 0}, 1),
    ],
)
def test_an_interval_skips_the_documented_steps(
    pipe: PixArtSigmaPipeline, arguments: dict[str, int], computed: int
) -> None:
    with cache_steps(pipe, "interval", **arguments) as cache, counting(pipe) as counts:
        generate(pipe)
    assert counts == [computed] * LAYERS
    assert (cache.computed, cache.reused) == (computed, STEPS - computed)


def test_the_first_block_always_runs_and_a_high_threshold_skips_the_others(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "first-block", threshold=1e6), counting(pipe) as counts:
        generate(pipe)
    assert counts == [STEPS, 2, 2, 2]  # the first and the last step


def test_a_higher_threshold_skips_more(pipe: PixArtSigmaPipeline) -> None:
    computed = []
    for threshold in (0.0, 0.05, 0.2, 1e6):
        with cache_steps(pipe, "first-block", threshold=threshold) as cache:
            generate(pipe)
        computed.append(cache.computed)
    assert computed == sorted(computed, reverse=True)
    assert computed[0] == STEPS
    assert computed[-1] == 2


def test_not_a_number_is_never_reused(pipe: PixArtSigmaPipeline) -> None:
    nn.init.constant_(pipe.transformer.pos_embed.proj.weight, float("nan"))
    with (
        cache_steps(pipe, "first-block", threshold=1e6) as cache,
        pytest.raises(CheckpointError, match=r"pos_embed\.proj"),
    ):
        generate(pipe)
    assert cache.reused == 0


# --- generations ---


@pytest.mark.parametrize("method", METHODS)
def test_a_second_generation_is_that_of_a_fresh_pipeline(pipe: PixArtSigmaPipeline, method: Any) -> None:
    with cache_steps(pipe, method, **SOME[method]):
        generate(pipe, seed=7, prompt="a cat")
        second = generate(pipe, seed=3)
    fresh = make()
    with cache_steps(fresh, method, **SOME[method]):
        assert torch.equal(generate(fresh, seed=3), second)


@pytest.mark.parametrize("method", METHODS)
def test_generations_that_take_turns_do_not_mix(pipe: PixArtSigmaPipeline, method: Any) -> None:
    with cache_steps(pipe, method, **SOME[method]):
        alone = [last(loop(pipe, 1)), last(loop(pipe, 2, "a cat"))]
        first, second = loop(pipe, 1), loop(pipe, 2, "a cat")
        pairs = list(itertools.zip_longest(first, second))
    assert torch.equal(pairs[-1][0].latents, alone[0])
    assert torch.equal(pairs[-1][1].latents, alone[1])


def test_a_generation_that_is_given_up_leaves_nothing(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "interval", interval=100):
        alone = last(loop(pipe, 2))
        abandoned = loop(pipe, 1)
        next(abandoned)
        next(abandoned)
        assert torch.equal(last(loop(pipe, 2)), alone)
        abandoned.close()  # type: ignore[attr-defined]
        assert torch.equal(last(loop(pipe, 2)), alone)


def test_other_embeddings_are_not_answered_from_the_cache(pipe: PixArtSigmaPipeline) -> None:
    """From where a callback changes the prompt, everything is computed anew."""
    cat = pipe.encode_prompt("a cat").prompt_embeds

    def change(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": cat} if index == 3 else {}

    with cache_steps(pipe, "interval", interval=100, last=0), counting(pipe) as counts:
        generate(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert counts == [2] * LAYERS


def test_another_shape_is_not_answered_from_the_cache() -> None:
    model = Line()
    with torch.no_grad(), cache_steps(model, "interval", interval=100) as cache, cache.generation():
        model(torch.zeros(2, 4, 3), 1)
        out = model(torch.zeros(1, 4, 3), 5)
    assert out[0, 0, 0].item() == 15.0
    assert cache.computed == 2


def test_calls_outside_of_a_generation_compute_everything(pipe: PixArtSigmaPipeline) -> None:
    arguments = (torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([500]))
    with torch.no_grad(), cache_steps(pipe, "interval", interval=100), counting(pipe) as counts:
        generate(pipe)
        counts[:] = [0] * LAYERS
        first, second = (pipe.transformer(*arguments, return_dict=False)[0] for _ in range(2))
    assert counts == [2] * LAYERS
    assert torch.equal(first, second)


def test_where_gradients_are_recorded_everything_is_computed() -> None:
    model = Line()
    with cache_steps(model, "interval", interval=100) as cache, cache.generation():
        outputs = [model(torch.zeros(1, 2, 3, requires_grad=True), step) for step in range(3)]
    assert [out[0, 0, 0].item() for out in outputs] == [0.0, 3.0, 6.0]
    assert cache.computed == 0


# --- what else happens to a pipeline ---


def test_removal_undoes_everything(pipe: PixArtSigmaPipeline) -> None:
    before = [set(vars(module)) for module in pipe.transformer.modules()], set(vars(pipe))
    keys = list(pipe.transformer.state_dict())
    plain = generate(pipe)
    cache = cache_steps(pipe, "interval", interval=3)
    assert list(pipe.transformer.state_dict()) == keys
    assert not torch.equal(generate(pipe), plain)
    cache.remove()
    assert ([set(vars(module)) for module in pipe.transformer.modules()], set(vars(pipe))) == before
    assert torch.equal(generate(pipe), plain)
    cache.remove()  # a second time does nothing
    assert torch.equal(generate(pipe), plain)


def test_new_weights_are_used(pipe: PixArtSigmaPipeline) -> None:
    other = make(seed=5)
    with cache_steps(pipe, "interval", interval=3), cache_steps(other, "interval", interval=3):
        generate(pipe)
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert torch.equal(generate(pipe), generate(other))


def test_a_reassigned_transformer_is_cached_and_the_old_one_is_not(pipe: PixArtSigmaPipeline) -> None:
    old, new = pipe.transformer, tiny_transformer(5, num_layers=3)
    with cache_steps(pipe, "interval", interval=100, last=0):
        generate(pipe)
        pipe.transformer = new
        with counting(pipe) as counts:
            generate(pipe)
        assert counts == [1] * 3
        assert all("_compiled_call_impl" not in vars(block) for block in old.transformer_blocks)


def test_a_reassigned_block_is_cached(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "interval", interval=100, last=0):
        generate(pipe)
        pipe.transformer.transformer_blocks[2] = copy.deepcopy(pipe.transformer.transformer_blocks[2])
        with counting(pipe) as counts:
            generate(pipe)
    assert counts == [1] * LAYERS


def test_a_copy_of_the_model_is_a_plain_one(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "interval", interval=100):
        copied = copy.deepcopy(pipe.transformer)
        for parameter in pipe.transformer.parameters():
            parameter.data.zero_()
    assert all("_compiled_call_impl" not in vars(block) for block in copied.transformer_blocks)
    out = copied(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.tensor([5]), return_dict=False)[0]
    assert out.abs().sum() > 0


def test_a_copy_of_the_pipeline_generates_with_its_own_components(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "interval", interval=3):
        expected = generate(pipe)
        copied = copy.deepcopy(pipe)
        for parameter in pipe.transformer.parameters():
            parameter.data.zero_()
        assert torch.equal(generate(copied), expected)


def test_two_pipelines_may_share_a_transformer(pipe: PixArtSigmaPipeline) -> None:
    other = PixArtSigmaPipeline.from_pipe(pipe)
    plain = generate(pipe)
    with cache_steps(pipe, "interval", interval=3) as mine:
        cached = generate(pipe)
        assert torch.equal(generate(other), plain)
        with cache_steps(other, "interval", interval=100, last=0) as theirs:
            generate(other)
            assert torch.equal(generate(pipe), cached)
        assert theirs.computed == 1
        assert mine.computed == 2 * 4  # of two generations: 0 3 6 7
        assert torch.equal(generate(other), plain)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_blocks_compiled_one_by_one_are_skipped_whole(pipe: PixArtSigmaPipeline, compiled_first: bool) -> None:
    with cache_steps(pipe, "interval", interval=3):
        expected = generate(pipe)
    traced = 0

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal traced
            traced += 1
            return graph(*arguments)

        return run

    def compile_blocks() -> None:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend=backend, fullgraph=True)

    if compiled_first:
        compile_blocks()
    with cache_steps(pipe, "interval", interval=3):
        if not compiled_first:  # takes the place around the blocks, which the next generation takes back
            compile_blocks()
        found = generate(pipe)
        assert traced == 4 * LAYERS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    generate(pipe)
    assert traced == (4 + STEPS) * LAYERS


def test_offloaded_blocks_are_cached_too(pipe: PixArtSigmaPipeline) -> None:
    with cache_steps(pipe, "interval", interval=3) as cache:
        expected = generate(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(generate(pipe), expected)
        assert cache.reused == 8


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "no method 'magic'; use one of first-block"),
        ({"method": "first-block", "interval": 2}, "has no interval"),
        ({"method": "interval", "threshold": 0.1}, "has no threshold"),
        ({"method": "interval", "interval": 0}, "interval must be a whole number of 1 or more"),
        ({"method": "interval", "interval": 2.5}, "interval must be a whole number of 1 or more"),
        ({"threshold": -1.0}, "threshold must be a number of 0 or more"),
        ({"threshold": float("nan")}, "threshold must be a number of 0 or more"),
        ({"first": 0}, "first must be a whole number of 1 or more"),
        ({"last": -1}, "last must be a whole number of 0 or more"),
    ],
)
def test_bad_arguments(pipe: PixArtSigmaPipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cache_steps(pipe, **arguments)
    assert "denoise" not in vars(pipe)


def test_what_cannot_be_cached(pipe: PixArtSigmaPipeline) -> None:
    with pytest.raises(ConfigurationError, match="no list transformer_blocks of 1 blocks"):
        cache_steps(nn.Linear(2, 2), "interval")
    with pytest.raises(InputError, match="takes a pipeline with a denoising loop"):
        cache_steps(object(), "interval")
    with cache_steps(pipe), pytest.raises(ConfigurationError, match="cached already"):
        cache_steps(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ConfigurationError, match="Compile the blocks one by one"):
        cache_steps(pipe)
    pipe.transformer = None
    with pytest.raises(InputError, match="has no transformer"):
        cache_steps(pipe)
    assert "denoise" not in vars(pipe)


def test_a_cache_of_the_transformer_and_one_of_the_pipeline_exclude_each_other(pipe: PixArtSigmaPipeline) -> None:
    config = FirstBlockCacheConfig(threshold=10.0)
    plain = generate(pipe)
    pipe.transformer.enable_cache(config)
    with pytest.raises(ConfigurationError, match=r"by enable_cache\(\); call pipe.transformer.disable_cache\(\) first"):
        cache_steps(pipe)
    assert pipe.step_cache is None
    pipe.transformer.disable_cache()
    with cache_steps(pipe):
        with pytest.raises(ConfigurationError, match=r"by cache_steps\(\); remove\(\) its handle first"):
            pipe.transformer.enable_cache(config)
        assert not pipe.transformer.is_cache_enabled
    pipe.transformer.enable_cache(config)
    assert not torch.equal(generate(pipe), plain)


def test_a_model_compiled_after_caching_is_refused_when_it_generates(pipe: PixArtSigmaPipeline) -> None:
    cache: StepCache = cache_steps(pipe)
    plain = pipe.transformer
    pipe.transformer = torch.compile(plain, backend="eager")
    with pytest.raises(ConfigurationError, match="remove\\(\\) the cache"):
        generate(pipe)
    cache.remove()
    assert all("_compiled_call_impl" not in vars(block) for block in plain.transformer_blocks)
