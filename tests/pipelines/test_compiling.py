"""pipe.compile(): what it compiles, what a captured step consists of, and that none of it is ever stale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from impasto import cache_steps
from impasto.errors import ConfigurationError, InputError, ResourceError
from impasto.nn import changes, graphs
from impasto.nn.graphs import CapturedCalls
from impasto.pipelines.pixart import PixArtSigmaPipeline

from ..tiny import tiny_pipeline

pytestmark = pytest.mark.long

CALL = {"prompt": "a red cube", "num_inference_steps": 3, "output_type": "latent"}


def generate(pipe: Any, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **arguments}).images
    return images


def assert_rounded_differently(found: Tensor, expected: Tensor) -> None:
    """The same products by other kernels: these random weights make latents of up to 592."""
    largest = expected.abs().max()
    torch.testing.assert_close(found / largest, expected / largest)


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    """What is compiled, here or elsewhere, counts towards the number of graphs that a block may have in one process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Tape:
    """Captures as a CUDA graph does: operations on the tensors that there were, and nothing of the Python around."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1
        with torch.inference_mode(False), torch.no_grad():  # a graph writes its output's memory in any mode
            output = run().detach().clone()
        operations = make_fx(run)()

        def replay() -> Tensor:
            self.replayed += 1
            return output.copy_(operations())

        return replay


@pytest.fixture
def pipe() -> PixArtSigmaPipeline:
    return tiny_pipeline(PixArtSigmaPipeline)


@pytest.fixture
def tape(pipe: PixArtSigmaPipeline) -> Tape:
    """The pipeline captures its steps. Its blocks are plain: make_fx cannot trace compiled ones."""
    tape = Tape()
    handle = pipe.compile(backend="eager")
    for module in pipe.transformer.modules():
        module.__dict__.pop("_compiled_call_impl", None)
    handle.steps = CapturedCalls(lambda device: tape, device_type="cpu")
    return tape


def test_every_block_is_compiled_until_the_handle_is_removed(pipe: PixArtSigmaPipeline) -> None:
    expected = generate(pipe)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    with pipe.compile(backend=backend) as handle:
        assert pipe.compiled is handle
        assert_rounded_differently(generate(pipe), expected)
        # Blocks are alike: one graph serves all of them, or two where text is read row by row.
        assert 1 <= graphs <= 2
        with pytest.raises(ConfigurationError, match="already"):
            pipe.compile()
    assert pipe.compiled is None
    assert all("_compiled_call_impl" not in vars(module) for module in pipe.transformer.modules())
    assert torch.equal(generate(pipe), expected)


def test_compiled_blocks_take_prompts_and_images_of_any_size(pipe: PixArtSigmaPipeline) -> None:
    """More shapes than torch compiles a function for: from the second one on, sizes are variables of the graph."""
    plain = tiny_pipeline(PixArtSigmaPipeline)
    with pipe.compile(backend="eager"):
        for count in range(1, 12):
            assert_rounded_differently(
                generate(pipe, num_images_per_prompt=count), generate(plain, num_images_per_prompt=count)
            )
            call = {"prompt": "a cube " * count, "num_inference_steps": 1, "height": 16 * count, "width": 64}
            call |= {"use_resolution_binning": False}
            assert_rounded_differently(generate(pipe, **call), generate(plain, **call))


def test_the_decoder_is_compiled_where_asked(pipe: PixArtSigmaPipeline) -> None:
    expected = generate(pipe, output_type="pt")
    with pipe.compile(vae=True, backend="eager"):
        assert pipe.vae.decoder._compiled_call_impl is not None
        torch.testing.assert_close(generate(pipe, output_type="pt"), expected)
    assert pipe.vae.decoder._compiled_call_impl is None


def test_16_bit_blocks_are_compiled_on_a_cpu_too(pipe: PixArtSigmaPipeline) -> None:
    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    pipe.to(torch.bfloat16)
    block = pipe.transformer.transformer_blocks[0]
    expected = generate(pipe)
    with pipe.compile(backend="eager") as handle:
        assert [change.change for change in changes.of(block)] == ["compiled"]
        assert distance(generate(pipe), expected) < 0.02
        block.ff.net[2].weight.data.mul_(4)  # which leaves no trace but the numbers
        heavier = generate(pipe)
        assert distance(heavier, expected) > 0.05
        pipe.to(torch.float32)
        assert pipe.compiled is handle
        assert [change.change for change in changes.of(block)] == ["compiled"]
    pipe.to(torch.bfloat16)
    assert distance(generate(pipe), heavier) < 0.02


def test_a_copy_of_a_compiled_pipeline_is_not_compiled(pipe: PixArtSigmaPipeline) -> None:
    with pipe.compile(backend="eager"):
        copied = copy.deepcopy(pipe)
        assert copied.compiled is None
        assert not any(changes.of(block) for block in copied.transformer.transformer_blocks)
        with torch.no_grad():
            copied.transformer.proj_out.weight.mul_(2.0)
        assert not torch.equal(generate(copied), generate(pipe))
        with copied.compile(backend="eager"):
            assert copied.compiled is not pipe.compiled


def test_what_cannot_be_compiled_is_refused(pipe: PixArtSigmaPipeline) -> None:
    with pytest.raises(ResourceError, match=r"to\('cuda'\)"):
        pipe.compile(cuda_graphs=True)
    for options in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(ConfigurationError, match="max-autotune-no-cudagraphs"):
            pipe.compile(**options)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(ConfigurationError, match="already"):
        pipe.compile()
    plain = tiny_pipeline(PixArtSigmaPipeline)
    plain.transformer = torch.compile(plain.transformer, backend="eager")
    with pytest.raises(ConfigurationError, match="_orig_mod"):
        plain.compile()
    plain.transformer = None
    with pytest.raises(InputError, match="transformer"):
        plain.compile()
    assert plain.compiled is None


def test_one_graph_serves_all_steps_of_a_size(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    plain = tiny_pipeline(PixArtSigmaPipeline)
    for latents in torch.randn(2, 1, 4, 8, 8):
        torch.testing.assert_close(generate(pipe, latents=latents), generate(plain, latents=latents))
    assert (tape.captured, tape.replayed) == (1, 6)
    torch.testing.assert_close(generate(pipe, num_images_per_prompt=2), generate(plain, num_images_per_prompt=2))
    torch.testing.assert_close(generate(pipe, guidance_scale=1.0), generate(plain, guidance_scale=1.0))
    assert tape.captured == 3


def test_prompts_of_other_lengths_share_a_graph_on_accelerators(
    pipe: PixArtSigmaPipeline, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded keys instead of rows of their own lengths, as on a GPU; the padding is masked."""
    monkeypatch.setattr(type(pipe.transformer), "_keeps_rows", staticmethod(lambda text: False))
    plain = tiny_pipeline(PixArtSigmaPipeline)
    for prompt in ("a cube", "a very large red cube on a blue ball", ""):
        torch.testing.assert_close(generate(pipe, prompt=prompt), generate(plain, prompt=prompt), rtol=1e-4, atol=1e-5)
    assert tape.captured == 1
    with torch.no_grad():
        context = pipe.transformer.encode_context(torch.randn(1, 33, 32), torch.ones(1, 33)).padded(32)
    assert all(torch.equal(text.bias[0, 0, 0] == 0, torch.arange(64) < 33) for text in context.layers)


def test_a_driver_may_write_into_the_latents(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    def doubled(pipe: Any) -> Tensor:
        embeds = pipe.encode_prompt("a red cube", do_classifier_free_guidance=False)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for step in pipe.denoise(noise, embeds, num_inference_steps=3, guidance_scale=1.0):
            step.latents.mul_(2.0)
        return step.latents

    torch.testing.assert_close(doubled(pipe), doubled(tiny_pipeline(PixArtSigmaPipeline)))
    assert tape.captured == 1


def test_graphs_of_other_weights_or_modules_are_forgotten(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    generate(pipe)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2.0)  # in its place: a replay reads it
    generate(pipe)
    assert tape.captured == 1
    pipe.transformer.proj_out.weight = nn.Parameter(3.0 * pipe.transformer.proj_out.weight.detach())
    expected = tiny_pipeline(PixArtSigmaPipeline)
    expected.transformer.load_state_dict(pipe.transformer.state_dict())
    torch.testing.assert_close(generate(pipe), generate(expected))
    assert tape.captured == 2
    pipe.transformer.double().float()  # storage of its own again
    torch.testing.assert_close(generate(pipe), generate(expected))
    assert tape.captured == 3
    pipe.transformer.transformer_blocks[0].ff.net[1] = nn.Identity()  # another module
    generate(pipe)
    assert tape.captured == 4
    pipe.to("cpu")
    assert not pipe.compiled.steps._graphs


def test_weights_in_turns_and_loops_in_turns(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    """Each loop replays the transformer that it began with."""
    embeds = pipe.encode_prompt("a red cube")
    noise = torch.randn(1, 4, 8, 8)
    other = tiny_pipeline(PixArtSigmaPipeline)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2.0)

    def loop(pipe: Any) -> Any:
        return pipe.denoise(noise, embeds, num_inference_steps=3)

    expected = [[step.latents for step in loop(p)] for p in (tiny_pipeline(PixArtSigmaPipeline), other)]
    first = loop(pipe)
    torch.testing.assert_close(next(first).latents, expected[0][0])
    schedulers = pipe.scheduler, other.scheduler
    pipe.transformer, pipe.scheduler = other.transformer, schedulers[1]
    second = loop(pipe)
    torch.testing.assert_close(next(second).latents, expected[1][0])
    pipe.compiled.steps.forget()
    torch.testing.assert_close(next(first).latents, expected[0][1])
    torch.testing.assert_close(next(second).latents, expected[1][1])


def test_graphs_are_made_in_inference_mode_and_outside_of_it(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    with torch.inference_mode():
        first = generate(pipe)
    torch.testing.assert_close(generate(pipe), first)
    assert tape.captured == 1


def test_an_offloaded_transformer_is_not_captured(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    generate(pipe)
    assert tape.captured == 0


def test_hooks_run_at_every_step(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    calls: list[int] = []
    handle = pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.append(1))
    generate(pipe)
    assert (len(calls), tape.captured) == (3, 0)
    handle.remove()
    generate(pipe)
    assert tape.captured == 1


def test_steps_that_are_decided_anew_are_not_captured(pipe: PixArtSigmaPipeline, tape: Tape) -> None:
    with cache_steps(pipe, "interval", interval=2) as cache:
        generate(pipe)
        assert cache.reused == 1
        assert tape.captured == 0
    generate(pipe)
    assert tape.captured == 1


def test_few_sizes_are_kept(pipe: PixArtSigmaPipeline, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    for count in (1, 2, 1, 3, 1):  # the second size was not used for longest
        generate(pipe, num_images_per_prompt=count)
    assert tape.captured == 3
    generate(pipe, num_images_per_prompt=2)
    assert tape.captured == 4


@pytest.mark.gpu
def test_replayed_steps_on_a_gpu_are_the_same(pipe: PixArtSigmaPipeline) -> None:
    pipe.to("cuda")
    expected = generate(pipe)
    with pipe.compile():
        for prompt in ("a red cube", "a blue ball", "a red cube"):
            generated = generate(pipe, prompt=prompt)
        assert (generated - expected).abs().max() < 1e-3
