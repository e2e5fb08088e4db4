"""GlmImageTransformer2DModel: its stages, a prompt's image whatever its batch, references, and what it refuses."""

from __future__ import annotations

import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from impasto import GlmImageKVCache, GlmImageTransformer2DModel
from impasto.errors import ConfigurationError, InputError
from impasto.models.glm_image.context import GlmImageContext, GlmImageModulation, GlmImageReferences

SMALL = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "text_embed_dim": 20,
    "time_embed_dim": 16,
    "condition_dim": 6,
    "prior_vq_quantizer_codebook_size": 32,
}


def small(**options: Any) -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    return GlmImageTransformer2DModel(**{**SMALL, **options}).eval()


@pytest.fixture
def model() -> GlmImageTransformer2DModel:
    return small()


def arguments(batch: int = 2, tokens: int = 7, height: int = 8, width: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    count = height // 2 * (width // 2)
    return {
        "hidden_states": torch.randn(batch, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, 20, generator=generator),
        "prior_token_id": torch.randint(0, 32, (batch, count), generator=generator),
        "prior_token_drop": torch.rand(batch, count, generator=generator) < 0.3,
        "timestep": torch.linspace(3, 998, batch),
        "target_size": torch.tensor([[1024.0, 768.0]]).repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }


def context_of(
    model: GlmImageTransformer2DModel, inputs: dict[str, Any], mask: Tensor | None = None
) -> GlmImageContext:
    height, width = inputs["hidden_states"].shape[2:]
    priors = inputs["prior_token_id"], inputs["prior_token_drop"]
    return model.encode_context(inputs["encoder_hidden_states"], mask, *priors, height, width)


def modulation_of(model: GlmImageTransformer2DModel, inputs: dict[str, Any]) -> GlmImageModulation:
    return model.modulate(inputs["timestep"], inputs["target_size"], inputs["crop_coords"])


def references_of(model: GlmImageTransformer2DModel, side: int, seed: int = 0) -> GlmImageReferences:
    inputs = arguments(batch=1, tokens=0, height=side, width=side)
    inputs["hidden_states"] = inputs["hidden_states"] + seed
    inputs["timestep"] = torch.zeros(1)
    return model.encode_references(inputs["hidden_states"], context_of(model, inputs), modulation_of(model, inputs))


@torch.no_grad()
def test_forward_takes_what_the_stages_made(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments()
    expected = model(**inputs).sample
    context, modulation = context_of(model, inputs), modulation_of(model, inputs)
    latents = inputs["hidden_states"]
    assert torch.equal(model(latents, context, timestep=modulation).sample, expected)
    assert torch.equal(model.denoise(latents, context, modulation), expected)
    all_steps = model.modulate(torch.tensor([5.0, 3.0, 998.0]), inputs["target_size"][:1], inputs["crop_coords"][:1])
    rows = GlmImageModulation.concat([all_steps.select([1]), all_steps.select(slice(2, 3))])
    torch.testing.assert_close(model(latents, context, timestep=rows, return_dict=False)[0], expected)
    swapped = model(latents[[1, 0]], context.select([1, 0]), timestep=modulation.select([1, 0])).sample
    torch.testing.assert_close(swapped[[1, 0]], expected)


@torch.no_grad()
def test_a_prompt_gives_its_image_whatever_its_batch_and_the_reference_does_not(
    model: GlmImageTransformer2DModel,
) -> None:
    inputs = arguments(batch=3)
    lengths = [7, 2, 0]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]  # [3, 7]
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] * mask[..., None]
    together = model(**inputs, attention_mask=mask).sample
    padded_left = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(1)}
    from_the_left = model(**padded_left, attention_mask=mask.flip(1)).sample

    reference: Any = diffusers.GlmImageTransformer2DModel(**SMALL).eval()
    reference.load_state_dict(model.state_dict())
    theirs = reference(**padded_left).sample  # as its pipeline does: padded with zeros on the left, and no mask

    alone, contexts = [], []
    for row, length in enumerate(lengths):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        single["encoder_hidden_states"] = single["encoder_hidden_states"][:, :length]
        alone.append(model(**single).sample)
        contexts.append(context_of(model, single))
        distance = ((theirs[row] - alone[-1][0]).norm() / alone[-1].norm()).item()
        assert distance > 1e-3 if length < 7 else distance < 1e-5
    expected = torch.cat(alone)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    joined = model(inputs["hidden_states"], GlmImageContext.concat(contexts), timestep=modulation_of(model, inputs))
    torch.testing.assert_close(joined.sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_the_left, expected, rtol=1e-4, atol=1e-5)  # text has no positions


@torch.no_grad()
def test_references_of_several_lengths_and_images_that_see_none(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments(batch=1)
    context, modulation = context_of(model, inputs), modulation_of(model, inputs)
    latents = inputs["hidden_states"]
    plain = model.denoise(latents, context, modulation)
    short, long = references_of(model, 2), references_of(model, 6, seed=1)
    apart = [model.denoise(latents, context, modulation, references) for references in (short, long)]
    assert not torch.allclose(apart[0], apart[1], rtol=1e-3)

    batch = GlmImageReferences.concat([short, long, short.unseen()])
    three = GlmImageContext.concat([context] * 3)
    found = model.denoise(latents.expand(3, -1, -1, -1), three, modulation, batch)
    torch.testing.assert_close(found, torch.cat([*apart, plain]), rtol=1e-4, atol=1e-5)

    both = GlmImageReferences.one_after_another([short, long])
    assert both.length == short.length + long.length
    padded = GlmImageReferences.one_after_another([batch.for_batch(3), batch.unseen()])
    found = model.denoise(latents.expand(3, -1, -1, -1), three, modulation, padded)
    torch.testing.assert_close(found, torch.cat([*apart, plain]), rtol=1e-4, atol=1e-5)
    repeated = GlmImageReferences.concat([short, long]).for_batch(4)
    assert repeated.rows == 4
    assert torch.equal(repeated.keys[0][0], repeated.keys[0][1])
    with pytest.raises(InputError, match="do not divide a batch of 3"):
        GlmImageReferences.concat([short, long]).for_batch(3)


@torch.no_grad()
def test_a_cache_counts_only_samples_that_were_written(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments(batch=1)
    plain = model(**inputs).sample
    cache = GlmImageKVCache(num_layers=2)
    assert torch.equal(model(**inputs, kv_caches=cache).sample, plain)  # no mode yet
    cache.set_mode("write")
    cache.next_sample()
    others = arguments(batch=1, height=4)
    assert torch.equal(model(**others, kv_caches=cache).sample, model(**others).sample)
    cache.next_sample()
    cache.next_sample()
    cache.set_mode("read")
    seen = cache.read()
    assert seen is not None
    assert (seen.rows, seen.length) == (1, 7 + 6)
    assert cache.read() is seen  # made once
    assert not torch.allclose(model(**inputs, kv_caches=cache).sample, plain, rtol=1e-3)
    cache.set_mode(None)
    assert torch.equal(model(**inputs, kv_caches=cache).sample, plain)
    with pytest.raises(InputError, match="write, read, skip"):
        cache.set_mode("append")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="num_layers"):
        GlmImageKVCache(0)
    wrong = GlmImageKVCache(num_layers=3)
    wrong.set_mode("write")
    with pytest.raises(InputError, match=r"GlmImageKVCache\(num_layers=2\)"):
        model(**inputs, kv_caches=wrong)


def test_checkpointed_gradients_are_the_same(model: GlmImageTransformer2DModel) -> None:
    """Of a image that refers to an image, whose keys and values come out of recomputed blocks too."""
    inputs = arguments()
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    calls: list[int] = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients, counts = [], []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        calls.clear()
        context = model.encode_context(text[:, :0], None, inputs["prior_token_id"], None, *latents.shape[-2:])
        still = model.modulate(torch.zeros(1), inputs["target_size"][:1], inputs["crop_coords"][:1])
        references = model.encode_references(latents.flip(0), context, still)
        model(**inputs, kv_caches=references).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        counts.append(len(calls))
    assert counts == [2, 4]  # each again in the backward pass
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float64_as_the_reference(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments()
    reference: Any = diffusers.GlmImageTransformer2DModel(**SMALL).eval()
    model.to(torch.bfloat16)
    reference.load_state_dict(model.state_dict())
    exact = small().double()
    exact.load_state_dict(model.state_dict())
    floats = ("hidden_states", "encoder_hidden_states")
    low = inputs | {name: inputs[name].to(torch.bfloat16) for name in floats}
    expected = exact(**(inputs | {name: low[name].double() for name in floats})).sample
    ours = (model(**low).sample.double() - expected).norm()
    theirs = (reference.to(torch.bfloat16)(**low).sample.double() - expected).norm()
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 5, 8, 6)}, r"\[batch, 4, height, width\]"),
        ({"hidden_states": torch.zeros(2, 4, 7, 6)}, "sides that 2 divides"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 21)}, r"\[batch, tokens, 20\]"),
        ({"encoder_hidden_states": torch.zeros(1, 7, 20)}, "of 1 images"),
        ({"prior_token_id": None}, "prior_token_drop of ones"),
        ({"prior_token_id": torch.zeros(2, 11, dtype=torch.long)}, r"4 x 3 tokens.*\[2, 12\]"),
        ({"prior_token_id": torch.zeros(2, 12)}, "numbers of tokens"),
        ({"prior_token_drop": torch.zeros(2, 3)}, r"\[2, 12\] or \[2\]"),
        ({"timestep": None}, "timestep is None"),
        ({"timestep": torch.zeros(3)}, "1 or 2"),
        ({"target_size": None}, "target_size is None"),
        ({"crop_coords": torch.zeros(2, 3)}, r"crop_coords has shape.*\[2, 2\]"),
        ({"attention_mask": torch.ones(2, 12)}, r"attention_mask has shape"),
        ({"attention_kwargs": {"gain": 2}}, "gain"),
        ({"image_rotary_emb": (torch.zeros(12, 4), torch.zeros(12, 4))}, r"\[12, 8\]"),
        ({"image_rotary_emb": [(torch.zeros(12, 8), torch.zeros(12, 8))] * 3}, "one for each of 2 images"),
    ],
)
def test_what_does_not_fit_is_refused(model: GlmImageTransformer2DModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(**(arguments() | change))


@torch.no_grad()
def test_what_a_context_holds_is_not_given_twice(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments()
    context, modulation, latents = context_of(model, inputs), modulation_of(model, inputs), inputs["hidden_states"]
    with pytest.raises(InputError, match="prior_token_id already"):
        model(latents, context, inputs["prior_token_id"], timestep=modulation)
    with pytest.raises(InputError, match="target_size already"):
        model(latents, context, timestep=modulation, target_size=inputs["target_size"])
    with pytest.raises(InputError, match="2 texts for 1 images"):
        model(latents[:1], context, timestep=modulation)
    with pytest.raises(InputError, match="of 12 image tokens"):
        model(torch.zeros(2, 4, 8, 8), context, timestep=modulation)
    mixed = GlmImageContext.concat([context, context_of(model, arguments(height=4))])
    with pytest.raises(InputError, match="of 12 image tokens, and latents of 4 x 6 are 6"):
        model([latents[0], *torch.zeros(3, 4, 4, 6)], mixed, timestep=modulation_of(model, arguments(batch=4)))


@pytest.mark.parametrize(
    "config", [{"attention_head_dim": 6}, {"time_embed_dim": 15}, {"condition_dim": 3}, {"num_layers": 0}]
)
def test_configs_that_cannot_be_used_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(config))):
        GlmImageTransformer2DModel(**{**SMALL, **config})


# Images of several sizes in one forward

SIZES = [(8, 6), (4, 12), (8, 6), (2, 2)]
MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1]])


def mixed() -> tuple[list[Tensor], dict[str, Any]]:
    """Latents of several sizes, and the other arguments."""
    generator = torch.Generator().manual_seed(3)
    counts = [height * width // 4 for height, width in SIZES]
    return [torch.randn(4, *size, generator=generator) for size in SIZES], {
        "encoder_hidden_states": torch.randn(4, 7, 20, generator=generator),
        "attention_mask": MASK,
        "prior_token_id": [torch.randint(0, 32, (count,), generator=generator) for count in counts],
        "prior_token_drop": torch.tensor([False, True, False, False]),
        "timestep": torch.tensor([3.0, 998.0, 500.0, 3.0]),
        "target_size": torch.tensor(SIZES) * 8.0,
        "crop_coords": torch.zeros(4, 2),
    }


def one_by_one(model: Any, latents: list[Tensor], inputs: dict[str, Any], references: Any = None) -> list[Tensor]:
    outputs = []
    for i, image in enumerate(latents):
        own = {name: value[i : i + 1] for name, value in inputs.items()}
        own["prior_token_id"] = inputs["prior_token_id"][i][None]
        outputs.append(model(image[None], **own, kv_caches=None if references is None else references[i]).sample[0])
    return outputs


def distance(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("few", [0, 128], ids=["by views", "by tensors"])
@torch.no_grad()
def test_images_of_several_sizes_share_a_forward(
    model: GlmImageTransformer2DModel, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("impasto.nn.tokens._FEW_TOKENS", few)
    latents, inputs = mixed()
    expected = one_by_one(model, latents, inputs)
    together = model(latents, **inputs).sample
    assert [output.shape for output in together] == [(4, *size) for size in SIZES]
    assert max(map(distance, together, expected)) <= 1e-6
    contexts = [context_of_row(model, latents, inputs, i) for i in range(4)]
    joined, modulation = GlmImageContext.concat([*contexts[2:], *contexts[:2]]), modulation_of(model, inputs)
    assert joined.rows == 4
    again = model.denoise(latents, joined.select([2, 3, 0, 1]), modulation)
    assert max(map(distance, again, expected)) <= 1e-6


def context_of_row(
    model: GlmImageTransformer2DModel, latents: list[Tensor], inputs: dict[str, Any], i: int
) -> GlmImageContext:
    rows = (inputs[name][i : i + 1] for name in ("encoder_hidden_states", "attention_mask"))
    return model.encode_context(
        *rows, inputs["prior_token_id"][i], inputs["prior_token_drop"][i : i + 1], *latents[i].shape[-2:]
    )


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled blocks"])
def test_images_of_a_mixed_batch_see_their_own_references(model: GlmImageTransformer2DModel, compiled: bool) -> None:
    latents, inputs = mixed()
    short, long = references_of(model, 2), references_of(model, 6, seed=1)
    each = [short, long, short.unseen(), GlmImageReferences.one_after_another([short, long])]
    expected = one_by_one(model, latents, inputs, each)
    assert distance(expected[0], one_by_one(model, latents, inputs)[0]) > 1e-3
    if compiled:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=True, backend="eager")
    together = model(latents, **inputs, kv_caches=GlmImageReferences.concat(each)).sample
    assert max(map(distance, together, expected)) <= 1e-5
    shared = model(latents, **inputs, kv_caches=short).sample  # one row serves all images
    assert max(map(distance, shared, one_by_one(model, latents, inputs, [short] * 4))) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled blocks"])
@torch.no_grad()
def test_a_mixed_batch_on_a_gpu(model: GlmImageTransformer2DModel, compiled: bool, dtype: torch.dtype) -> None:
    latents, inputs = mixed()
    expected = one_by_one(model, latents, inputs)
    model.to("cuda", dtype)
    moved = {
        name: [ids.cuda() for ids in x] if isinstance(x, list) else x.to("cuda", dtype if x.ndim == 3 else x.dtype)
        for name, x in inputs.items()
    }
    if compiled:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=True)
    for _ in range(2):
        together = model([image.to("cuda", dtype) for image in latents], **moved).sample
        assert max(distance(a.float().cpu(), b) for a, b in zip(together, expected, strict=True)) <= (
            1e-3 if dtype == torch.float32 else 3e-2
        )


@torch.no_grad()
def test_soft_biases_of_texts_and_references(model: GlmImageTransformer2DModel) -> None:
    latents, inputs = mixed()
    inputs["attention_mask"] = torch.randn(4, 1, 7).masked_fill(~MASK[:, None].bool(), -10000.0)
    rows = arguments(batch=1, tokens=3, height=4, width=4)
    context = context_of(model, rows, torch.tensor([[[0.5, -10000.0, -1.0]]]))
    soft = model.encode_references(rows["hidden_states"], context, modulation_of(model, rows))
    each = [references_of(model, 2), soft, soft.unseen(), soft]
    expected = one_by_one(model, latents, inputs, each)
    together = model(latents, **inputs, kv_caches=GlmImageReferences.concat(each)).sample
    assert max(map(distance, together, expected)) <= 1e-5


@pytest.mark.long
@torch.no_grad()
def test_compiled_blocks_may_run_eagerly_and_the_model_as_a_whole(model: GlmImageTransformer2DModel) -> None:
    latents, inputs = mixed()
    expected = one_by_one(model, latents, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert max(map(distance, compiled(latents, **inputs).sample, expected)) <= 1e-5
    context = GlmImageContext.concat([context_of_row(model, latents, inputs, i) for i in range(4)])
    staged = compiled(latents, context, timestep=modulation_of(model, inputs)).sample
    assert max(map(distance, staged, expected)) <= 1e-5
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    for few in (0, 128):
        with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
            patch.setattr("impasto.nn.tokens._FEW_TOKENS", few)
            assert max(map(distance, model(latents, **inputs).sample, expected)) <= 1e-6


@torch.no_grad()
def test_lists_of_one_size_take_every_documented_form(model: GlmImageTransformer2DModel) -> None:
    inputs = arguments()
    ids = inputs["prior_token_id"][0]
    rotary = tuple(torch.randn(12, 8) for _ in range(2))
    for change in ({"prior_token_id": ids}, {"image_rotary_emb": rotary}, {"image_rotary_emb": [rotary, rotary]}):
        expected = model(**inputs | change).sample
        listed = inputs | change | {"hidden_states": [*inputs["hidden_states"]]}
        assert distance(torch.stack(model(**listed).sample), expected) <= 1e-6


@torch.no_grad()
def test_a_cache_is_written_with_one_tensor(model: GlmImageTransformer2DModel) -> None:
    cache = GlmImageKVCache(num_layers=2)
    cache.set_mode("write")
    latents, inputs = mixed()
    with pytest.raises(InputError, match="give them as one tensor"):
        model(latents, **inputs, kv_caches=cache)
    assert cache.read() is None


@torch.no_grad()
def test_keys_and_values_are_kept_for_references_only(model: GlmImageTransformer2DModel) -> None:
    alive: list[Any] = []
    for block in model.transformer_blocks:
        block.attn1.register_forward_hook(lambda _, __, out: alive.append(weakref.ref(out[1].untyped_storage())))
    counts: list[int] = []
    model.norm_out.register_forward_pre_hook(lambda *_: counts.append(sum(ref() is not None for ref in alive)))
    model(**arguments())
    assert counts[0] < 2


def test_one_graph_serves_every_layout(model: GlmImageTransformer2DModel) -> None:
    latents, inputs = mixed()
    with torch.no_grad():
        expected = one_by_one(model, latents, inputs)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=True, backend=backend)
    counts = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 3, 2, 0], [2, 3, 1]):
        some = {name: [x[i] for i in order] if isinstance(x, list) else x[order] for name, x in inputs.items()}
        with torch.no_grad():
            together = model([latents[i] for i in order], **some).sample
        assert max(map(distance, together, [expected[i] for i in order])) <= 1e-5
        counts.append(len(graphs))
    assert counts[1:] == [counts[1]] * 3


@pytest.mark.parametrize("few", [0, 128], ids=["by views", "by tensors"])
def test_the_gradients_of_a_mixed_batch_are_those_of_its_images(
    model: GlmImageTransformer2DModel, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("impasto.nn.tokens._FEW_TOKENS", few)
    latents, inputs = mixed()

    def gradients(outputs: list[Tensor]) -> Tensor:
        model.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients(one_by_one(model, latents, inputs))
    for _ in range(2):
        assert distance(gradients(model(latents, **inputs).sample), expected) <= 1e-5
        model.enable_gradient_checkpointing()
