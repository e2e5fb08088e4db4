"""The prior's decoding against transformers' forward: the same scores, and from the same numbers the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.glm_image.modeling_glm_image import GlmImageRMSNorm

from impasto.models.glm_image.prior import PriorTokens, result_of, sample_prior
from impasto.models.glm_image.prior_decoder import PriorDecoder, Sampling, fast_norm

from ..tiny_glm import prior_parts

VOCABULARY = 32


def twice(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records as CUDA graphs do, after trials, and computes where those would replay."""
    for _ in range(3):
        run()
    return run


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    return prior_parts()


def inputs_of(components: dict[str, Any], text: str, height: int = 64, width: int = 96) -> Any:
    return components["processor"](text=[text], target_h=height, target_w=width, return_tensors="pt")


def scores_of(model: Any, given: Any, made: list[int]) -> Tensor:
    """transformers' own scores after a prompt and some tokens, without a cache."""
    model.model.rope_deltas = None
    positions, _ = model.model.get_rope_index(
        given["input_ids"], given["image_grid_thw"], given["images_per_sample"], given["attention_mask"]
    )
    following = model.model._cached_decode_position_ids[0, :, : len(made)]  # [3, tokens]
    ids = torch.cat([given["input_ids"], torch.tensor([made], dtype=torch.long)], dim=1)
    found = model(ids, position_ids=torch.cat([positions, following[:, None]], dim=2), use_cache=False)
    return found.logits[0, -1, :VOCABULARY]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
@torch.no_grad()
def test_norms_are_those_of_transformers(size: float, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GlmImageRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = size * (1 + torch.randn(2, 3, 48, generator=generator))  # with a mean
    norm, x = norm.to(device), x.to(device)
    torch.testing.assert_close(fast_norm(norm)(x), norm(x), rtol=1e-5, atol=1e-5)
    norm, x = norm.to(dtype), x.to(dtype)
    exact = deepcopy(norm).float()(x.float())
    torch.testing.assert_close(fast_norm(norm)(x).float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


class Shifted(GlmImageRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.0 + super().forward(hidden_states)


@torch.no_grad()
def test_norms_that_are_watched_or_something_else_are_called() -> None:
    x, calls = torch.randn(2, 8), []
    norm = GlmImageRMSNorm(8)
    handle = norm.register_forward_hook(lambda *given: calls.append(given))
    torch.testing.assert_close(fast_norm(norm)(x), norm(x))
    assert len(calls) == 2
    handle.remove()
    fast_norm(norm)(x)
    assert len(calls) == 2
    shifted = Shifted(8)
    assert torch.equal(fast_norm(shifted)(x), shifted(x))


@torch.no_grad()
def sampled(components: dict[str, Any], prompt: str, images: Any) -> PriorTokens:
    model, processor = components["vision_language_encoder"], components["processor"]
    rng = torch.Generator().manual_seed(0)
    return result_of(sample_prior(model, processor, [prompt], (64, 96), images, rng, 1, VOCABULARY))


def test_sampling_ends_early(components: dict[str, Any]) -> None:
    """Those that are missing are 0."""
    model, processor = components["vision_language_encoder"], components["processor"]
    steps = sample_prior(model, processor, ["a cube"], (64, 96), None, torch.Generator().manual_seed(0), 1, VOCABULARY)
    assert [next(steps), steps.send(True), next(steps)] == [1, 2, 3]
    with pytest.raises(StopIteration) as end:
        steps.send(False)
    assert not end.value.value.prior_token_ids.any()


def test_the_same_numbers_give_the_same_tokens(components: dict[str, Any]) -> None:
    model, given = components["vision_language_encoder"], inputs_of(components, "a cube")
    total = 2 * 3 + 13 * 19
    found = sampled(components, "a cube", None).prior_token_ids.view(4, 6)[::2, ::2]
    uniform = torch.rand(total, generator=torch.Generator().manual_seed(0))
    made: list[int] = []
    sampling = Sampling.of(model.generation_config)
    for number in uniform:
        made.append(int(sampling.choose(scores_of(model, given, made)[None], number[None])))
    assert found.flatten().tolist() == made[-6:]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"fixed": True}, {"fixed": True, "make_capture": lambda device: twice}])
def test_scores_of_prompts_of_different_lengths_are_those_that_each_has_alone(
    components: dict[str, Any], options: dict[str, Any]
) -> None:
    model = components["vision_language_encoder"]
    prompts = [inputs_of(components, "a cube"), inputs_of(components, "a red ball behind it")]
    longest = max(given["input_ids"].shape[1] for given in prompts)
    tokens, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    positions = torch.ones(3, 2, longest, dtype=torch.long)
    for row, given in enumerate(prompts):
        count = given["input_ids"].shape[1]
        tokens[row, -count:], mask[row, -count:] = given["input_ids"][0], 1
        positions[:, row, -count:] = torch.arange(count)
    decoder = PriorDecoder(model, 2, longest + 4, VOCABULARY, **options)
    for _ in range(2):  # a decoder can begin anew
        scores = decoder.prefill(tokens, positions, mask)
        made: list[list[int]] = [[], []]
        for i in range(4):
            for row, given in enumerate(prompts):
                expected = scores_of(model, given, made[row])
                assert ((scores[row] - expected).norm() / expected.norm()).item() <= 1e-5
            for row in range(2):
                made[row].append(3 * i + row)
            following = torch.stack([model.model._cached_decode_position_ids[0, :, i]] * 2, dim=1)
            following[:, 0] -= prompts[1]["input_ids"].shape[1] - prompts[0]["input_ids"].shape[1]
            scores = decoder.step(torch.tensor([row[-1] for row in made]), following)


def test_images_are_read_as_transformers_reads_them(components: dict[str, Any]) -> None:
    from PIL import Image

    model, processor = components["vision_language_encoder"], components["processor"]
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    made = sampled(components, "night", [[image]])
    assert made.prior_token_image_ids is not None
    assert made.source_image_grid_thw is not None
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "night"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    given = processor(images=[image], text=[text], target_h=64, target_w=96, return_tensors="pt")
    rows, columns = given["image_grid_thw"][0, 1:].tolist()
    assert made.source_image_grid_thw[0].tolist() == [[1, 2 * rows, 2 * columns]]
    with torch.no_grad():
        scores = model(**given).logits[0, -1, :VOCABULARY]
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(0))
    first = Sampling.of(model.generation_config).choose(scores[None], uniform[:1])
    assert int(made.prior_token_ids[0, 0]) == int(first)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 8, "top_p": 0.7, "temperature": 0.8}])
def test_choices_have_the_probabilities_of_transformers(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    scores = 2 * torch.randn(1, 20)
    expected = scores / settings.get("temperature", 1.0)
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    count = 20_000
    uniform = (torch.arange(count) + 0.5) / count
    chosen = Sampling(**settings).choose(scores.expand(count, -1), uniform)
    shares = torch.bincount(chosen, minlength=20) / count
    torch.testing.assert_close(shares, expected.softmax(-1)[0], atol=2e-4, rtol=0)
    highest = torch.tensor([torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))])
    for number in (torch.tensor([0.0]), highest):
        assert shares[int(Sampling(**settings).choose(scores, number))] > 0


def test_settings_are_the_checkpoints() -> None:
    assert Sampling.of(GenerationConfig(temperature=0.9, top_k=7, top_p=0.75)) == Sampling(0.9, 7, 0.75)
    assert Sampling.of(GenerationConfig(temperature=None, top_k=None, top_p=None)) == Sampling(1.0, 50, 1.0)


@torch.no_grad()
def test_quantized_layers_are_called(components: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    from impasto import quantize

    model = prior_parts()["vision_language_encoder"]
    with quantize(model, "nf4") as handle:
        assert not any("visual" in name or "lm_head" in name for name in handle.layers)
        given = inputs_of(components, "a cube")
        count = given["input_ids"].shape[1]
        decoder = PriorDecoder(model, 1, count + 2, VOCABULARY)
        made: list[int] = []
        scores = decoder.prefill(given["input_ids"], torch.arange(count).expand(3, 1, -1))
        torch.testing.assert_close(scores[0], scores_of(model, given, made), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_tokens_are_those_that_are_computed() -> None:
    model = prior_parts()["vision_language_encoder"].cuda()
    tokens = torch.randint(0, VOCABULARY, (2, 9), device="cuda")
    positions = torch.arange(9, device="cuda").expand(3, 2, -1)
    found = []
    for fixed in (False, True):
        decoder = PriorDecoder(model, 2, 40, VOCABULARY, fixed=fixed)
        for _ in range(2):  # begun anew
            scores = [decoder.prefill(tokens, positions)]
            for i in range(20):
                scores.append(decoder.step(scores[-1].argmax(-1), positions[..., -1] + i + 1).clone())
        found.append(torch.stack(scores))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
