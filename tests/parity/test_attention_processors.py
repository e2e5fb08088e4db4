"""Attention processors of diffusers, and of its users, on our models; and hooks, at every step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as theirs
from diffusers.models.transformers.transformer_glm_image import GlmImageAttnProcessor as TheirGlmProcessor
from torch import Tensor, nn

from impasto.errors import InputError
from impasto.models import attention_processor as ours
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.glm_image.context import GlmImageKVCache
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.pixart.model import PixArtTransformer2DModel

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def pixart(**options: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24}
    config |= {"caption_channels": 10, "sample_size": 8, "use_additional_conditions": False, **options}
    return PixArtTransformer2DModel(**config).eval()


def pixart_inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "encoder_attention_mask": MASK,
        "timestep": torch.tensor([7, 700]),
    }


def glm() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    return GlmImageTransformer2DModel(
        num_layers=2, attention_head_dim=8, num_attention_heads=3, text_embed_dim=10, time_embed_dim=12,
        condition_dim=4, prior_vq_quantizer_codebook_size=30,
    ).eval()  # fmt: skip


def glm_inputs(tokens: int = 5) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 8, 6),
        "encoder_hidden_states": torch.randn(2, tokens, 10),
        "prior_token_id": torch.randint(30, (2, 12)),
        "prior_token_drop": torch.rand(2, 12) > 0.5,
        "timestep": torch.tensor([7, 700]),
        "target_size": torch.tensor([[128.0, 96.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**blocks, block_out_channels=[8, 16], norm_num_groups=4).eval()


class Recording:
    """A user's processor: looks, and passes everything on to the one that was there."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.seen: list[Any] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> Any:
        shapes = [None if x is None else tuple(x.shape) for x in (hidden_states, encoder_hidden_states, attention_mask)]
        self.seen.append(shapes)
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **more)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize(
    "make",
    [theirs.AttnProcessor, theirs.AttnProcessor2_0, lambda: theirs.SlicedAttnProcessor(1), ours.AttnProcessor2_0],
    ids=["AttnProcessor", "AttnProcessor2_0", "Sliced", "ours"],
)
@pytest.mark.parametrize("upcast", [False, True])
def test_their_processors_on_pixart(make: Callable[[], Any], grad: bool, upcast: bool) -> None:
    model, inputs = pixart(upcast_attention=upcast), pixart_inputs()
    inputs["attention_mask"] = torch.rand(2, 16) > 0.3
    with torch.set_grad_enabled(grad):
        expected = model(**inputs).sample
        model.set_attn_processor(make())
        assert distance(model(**inputs).sample, expected) <= 1e-5


def test_a_processor_sees_every_call_whatever_was_prepared_before_it_was_set() -> None:
    model, inputs = pixart(), pixart_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        context = model.encode_context(inputs["encoder_hidden_states"], MASK)
        recording = Recording(model.transformer_blocks[0].attn2.processor)
        model.transformer_blocks[0].attn2.processor = recording
        prepared = {"encoder_hidden_states": context, "encoder_attention_mask": None}
        for arguments in (inputs, inputs | prepared):
            assert distance(model(**arguments).sample, expected) <= 1e-5
            assert recording.seen == [[(2, 16, 24), (2, 5, 24), (2, 1, 5)]]
            recording.seen.clear()
        model.fuse_qkv_projections()
        assert distance(model(**inputs).sample, expected) <= 1e-5
        assert len(recording.seen) == 1
        latents = [torch.randn(4, 8, 8), torch.randn(4, 4, 8)]
        model(**inputs | {"hidden_states": latents})
        assert [shapes[0] for shapes in recording.seen[1:]] == [(1, 16, 24), (1, 8, 24)]


def test_what_a_processor_returns_is_what_the_block_adds() -> None:
    model, inputs = pixart(), pixart_inputs()
    for block in model.transformer_blocks:
        block.attn2.set_processor(lambda attn, x, **_: torch.zeros_like(x))
    bare = pixart()
    for block in bare.transformer_blocks:
        for parameter in block.attn2.to_out.parameters():
            parameter.data.zero_()
    with torch.no_grad():
        assert distance(model(**inputs).sample, bare(**inputs).sample) <= 1e-6


@pytest.mark.parametrize(
    ("our", "their"),
    [
        (pixart, lambda: diffusers.PixArtTransformer2DModel(**dict(pixart().config))),
        (vae, lambda: diffusers.AutoencoderKL(**dict(vae().config))),
    ],
)
def test_names_getting_setting_and_the_default(our: Callable[[], Any], their: Callable[[], Any]) -> None:
    model = our()
    before = model.attn_processors
    try:
        reference = their()
    except TypeError:  # arguments that are ours alone
        reference = diffusers.PixArtTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=12)
    assert list(before) == list(reference.attn_processors)
    assert {type(processor).__name__ for processor in before.values()} == {"AttnProcessor2_0"}
    first = next(iter(before))
    recording = Recording(before[first])
    model.set_attn_processor({**before, first: recording})
    assert model.attn_processors[first] is recording
    assert model.get_submodule(first.removesuffix(".processor")).get_processor() is recording
    model.set_attn_processor(before)
    assert model.attn_processors == before
    model.set_attn_processor(theirs.AttnProcessor())
    model.set_default_attn_processor()
    assert not any(attention.is_processed for _, attention in model._attentions)
    with pytest.raises(InputError, match="one for each attention"):
        model.set_attn_processor({first: recording})
    with pytest.raises(InputError, match="an attention processor is called"):
        model.set_attn_processor(7)


def test_what_processors_read_of_an_attention() -> None:
    reference = diffusers.PixArtTransformer2DModel(**PIXART).transformer_blocks[0]
    block = PixArtTransformer2DModel(**PIXART).transformer_blocks[0]
    plain = (bool, int, float, str, type(None))
    for name in ("attn1", "attn2"):
        mine, other = getattr(block, name), getattr(reference, name)
        for key, value in vars(other).items():
            if not key.startswith("_") and isinstance(value, plain) and key != "training":
                assert getattr(mine, key) == value, (name, key)
    x = torch.randn(2, 6, 48)
    mask = torch.randn(2, 1, 6)
    for method, arguments in {
        "head_to_batch_dim": (x,),
        "batch_to_head_dim": (x,),
        "prepare_attention_mask": (mask, 6, 2),
        "get_attention_scores": (x, x),
    }.items():
        if method == "get_attention_scores":
            arguments = tuple(other.head_to_batch_dim(x) for _ in range(2))
            arguments = (*arguments, other.prepare_attention_mask(mask, 6, 2))
        torch.testing.assert_close(getattr(mine, method)(*arguments), getattr(other, method)(*arguments))
    four = [attn.prepare_attention_mask(mask, 6, 2, out_dim=4) for attn in (mine, other)]
    torch.testing.assert_close(*four)
    torch.testing.assert_close(mine.head_to_batch_dim(x, out_dim=4), other.head_to_batch_dim(x, out_dim=4))


PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "cross_attention_dim": 48, "sample_size": 8,
    "caption_channels": 20, "use_additional_conditions": False,
}  # fmt: skip


def test_keyword_arguments_reach_the_processors_that_take_them() -> None:
    given: list[Any] = []

    class Scaled:
        def __call__(
            self,
            attn: Any,
            x: Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            strength: float = 1.0,
        ) -> Any:
            given.append(strength)
            return strength * attn.compute(x, encoder_hidden_states, attention_mask)

    model, inputs = pixart(), pixart_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        with pytest.raises(InputError, match=r"strength.*takes none of them"):
            model(**inputs, cross_attention_kwargs={"strength": 0.5})
        model.transformer_blocks[0].attn1.set_processor(Scaled())
        assert distance(model(**inputs, cross_attention_kwargs={"scale": 1.0}).sample, expected) <= 1e-6
        assert distance(model(**inputs, cross_attention_kwargs={"strength": 0.5}).sample, expected) > 1e-3
    assert given == [1.0, 0.5]


def test_keyword_arguments_reach_the_processors_in_a_recomputation_too() -> None:
    model, inputs, gradients = pixart(), pixart_inputs(), []
    model.set_attn_processor(Gain())
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        model(**inputs, cross_attention_kwargs={"gain": 0.5}).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


class Gain:
    def __call__(
        self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, gain: float = 1.0
    ) -> Any:
        return gain * attn.compute(x, encoder_hidden_states, attention_mask)


@pytest.mark.long
@pytest.mark.parametrize("given", [None, {"scale": 1.0}, {"gain": 0.5}])
@pytest.mark.parametrize("of", ["model", "blocks"])
def test_processors_and_their_arguments_compile_as_one_graph(given: Any, of: str) -> None:
    torch._dynamo.reset()
    model, inputs = pixart(), pixart_inputs()
    if given != {"scale": 1.0}:
        model.set_attn_processor(Gain())
    with torch.no_grad():
        expected = [model(**inputs, cross_attention_kwargs=each).sample for each in (given, None, given)]
        if of == "model":
            model.compile(backend="eager", fullgraph=True)
        else:
            model.compile_repeated_blocks(backend="eager", fullgraph=True)
        for each, sample in zip((given, None, given), expected, strict=True):
            assert distance(model(**inputs, cross_attention_kwargs=each).sample, sample) <= 1e-5


def test_a_subclass_of_the_default_is_a_processor_of_its_own() -> None:
    class Silent(ours.AttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 0 * super().__call__(*args, **kwargs)

    model, inputs = pixart(), pixart_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        model.set_attn_processor(Silent())
        assert all(type(processor) is Silent for processor in model.attn_processors.values())
        assert distance(model(**inputs).sample, expected) > 1e-3
        model.set_attn_processor(ours.AttnProcessor())
        assert not any(attention.is_processed for _, attention in model._attentions)


def test_a_processor_that_is_empty_counts() -> None:
    model, inputs = pixart(), pixart_inputs()
    attention = model.transformer_blocks[0].attn1
    for empty in (nn.ModuleList(), type("Empty", (list,), {"__call__": lambda self, attn, x, *_, **__: 0 * x})()):
        attention.set_processor(empty)
        assert attention.processor is empty
    with torch.no_grad():
        assert distance(model(**inputs).sample, pixart()(**inputs).sample) > 1e-3


class WithWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Any:
        return self.gain * attn.compute(hidden_states, encoder_hidden_states, attention_mask)


def test_a_processor_that_is_a_module_has_its_weights_in_the_state_dict_and_survives_copies() -> None:
    model, inputs = pixart(), pixart_inputs()
    model.transformer_blocks[1].attn2.set_processor(WithWeights())
    assert "transformer_blocks.1.attn2.processor.gain" in model.state_dict()
    model(**inputs).sample.sum().backward()
    assert model.transformer_blocks[1].attn2.processor.gain.grad is not None
    with torch.no_grad():
        expected = model(**inputs).sample
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert again.transformer_blocks[1].attn2.processor is not model.transformer_blocks[1].attn2.processor
            assert distance(again(**inputs).sample, expected) == 0
    model.set_default_attn_processor()
    assert "transformer_blocks.1.attn2.processor.gain" not in model.state_dict()


@pytest.mark.parametrize("make", [theirs.AttnProcessor, theirs.AttnProcessor2_0, ours.AttnProcessor])
@pytest.mark.parametrize("tiled", [False, True])
def test_their_processors_on_the_autoencoder(make: Callable[[], Any], tiled: bool) -> None:
    model, image = vae(), torch.randn(2, 3, 16, 12)
    if tiled:
        model.enable_tiling(strip_bytes=1)
    with torch.no_grad():
        expected = model(image).sample
        recordings = {name: Recording(make()) for name in model.attn_processors}
        model.set_attn_processor(recordings)
        assert distance(model(image).sample, expected) <= 1e-5
    assert all(recording.seen for recording in recordings.values())
    assert list(recordings) == ["encoder.mid_block.attentions.0.processor", "decoder.mid_block.attentions.0.processor"]


def test_fused_projections_of_the_autoencoder() -> None:
    model, image = vae(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected, names = model(image).sample, list(model.state_dict())
        model.fuse_qkv_projections()
        assert model.decoder.mid_block.attentions[0].fused_projections
        assert list(model.state_dict()) == names
        assert distance(model(image).sample, expected) <= 1e-6
        assert distance(model.double()(image.double()).sample.float(), expected) <= 1e-5
        model.unfuse_qkv_projections()
    assert not model.decoder.mid_block.attentions[0].fused_projections


@pytest.mark.parametrize("make", [TheirGlmProcessor, lambda: Recording(TheirGlmProcessor())])
@pytest.mark.parametrize("kind", ["plain", "no text", "masked", "mixed", "gradients"])
def test_their_processor_on_glm_image(make: Callable[[], Any], kind: str) -> None:
    model, inputs = glm(), glm_inputs(0 if kind == "no text" else 5)
    if kind == "masked":
        inputs["attention_mask"] = MASK
    if kind == "mixed":
        inputs["hidden_states"] = [torch.randn(16, 8, 6), torch.randn(16, 4, 6)]
        inputs["prior_token_id"] = [torch.randint(30, (12,)), torch.randint(30, (6,))]
        inputs["prior_token_drop"] = torch.tensor([False, True])
    with torch.set_grad_enabled(kind == "gradients"):
        expected = model(**inputs).sample
        model.set_attn_processor(make())
        output = model(**inputs).sample
    for one, other in zip(output, expected, strict=True):
        assert distance(one, other) <= 1e-5


@pytest.mark.parametrize("make", [TheirGlmProcessor, lambda: glm().transformer_blocks[0].attn1.processor.__class__()])
def test_reference_images_with_a_processor(make: Callable[[], Any]) -> None:
    model, inputs = glm(), glm_inputs()
    reference = {name: value[:1] for name, value in inputs.items()} | {
        "encoder_hidden_states": torch.zeros(1, 0, 10),
        "timestep": torch.zeros(1),
    }

    def generate() -> Tensor:
        cache = GlmImageKVCache(2)
        cache.set_mode("write")
        model(**reference, kv_caches=cache)
        cache.set_mode("read")
        return model(**inputs, kv_caches=cache).sample

    with torch.no_grad():
        expected, without = generate(), model(**inputs).sample
        model.set_attn_processor(Recording(make()))
        assert distance(generate(), expected) <= 1e-5
        assert distance(expected, without) > 1e-3


def test_a_processor_that_reads_references_projects_keys_once() -> None:
    model, inputs, calls = glm(), glm_inputs(), []
    cache = GlmImageKVCache(2)
    model.set_attn_processor(TheirGlmProcessor())
    for block in model.transformer_blocks:
        block.attn1.to_k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for mode in ("write", "read"):
            cache.set_mode(mode)
            calls.clear()
            model(**inputs, kv_caches=cache)
            assert len(calls) == len(model.transformer_blocks), mode


def test_our_glm_processor_by_itself_takes_masks() -> None:
    model, inputs = glm(), glm_inputs()
    attention = model.transformer_blocks[0].attn1
    image, text = torch.randn(2, 12, 24), torch.randn(2, 5, 24)
    rotary = model.rope(inputs["hidden_states"])
    with torch.no_grad():
        out = attention.processor(attention, image, text, MASK, rotary)
        short = attention.processor(attention, image[:1], text[:1, :3], None, rotary)
        theirs_ = TheirGlmProcessor()(attention, image, text, None, rotary)
        mine = attention.processor(attention, image, text, None, rotary)
    assert distance(out[0][:1], short[0]) <= 1e-5
    assert all(distance(a, b) <= 1e-5 for a, b in zip(mine, theirs_, strict=True))
    reference = diffusers.GlmImageTransformer2DModel(num_layers=1, attention_head_dim=8, num_attention_heads=3)
    for a, b in zip(rotary, reference.rope(inputs["hidden_states"]), strict=True):
        torch.testing.assert_close(a, b)


# Hooks


def count(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


PIXART_PARTS = [
    "pos_embed", "pos_embed.proj", "adaln_single", "adaln_single.emb", "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.linear", "caption_projection", "caption_projection.linear_2", "transformer_blocks.1",
    "transformer_blocks.1.norm1", "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.1.attn2.to_q", "transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_out",
    "transformer_blocks.1.norm2", "transformer_blocks.1.ff", "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.ff.net.2", "norm_out", "proj_out",
]  # fmt: skip
GLM_PARTS = [
    "image_projector", "glyph_projector", "glyph_projector.net.2", "prior_token_embedding", "prior_projector",
    "time_condition_embed", "time_condition_embed.timestep_embedder", "time_condition_embed.condition_embedder",
    "transformer_blocks.1.norm1", "transformer_blocks.1.attn1.to_k", "transformer_blocks.1.ff.net.0", "norm_out",
    "norm_out.linear", "proj_out",
]  # fmt: skip


@pytest.mark.parametrize("name", PIXART_PARTS)
@pytest.mark.parametrize("staged", [False, True], ids=["plain", "staged"])
def test_hooks_on_parts_of_pixart_fire_once_per_step(name: str, staged: bool) -> None:
    model, inputs = pixart(), pixart_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        calls = count(model.get_submodule(name))
        if staged:  # as a pipeline does: halves of guidance, and all steps at once
            halves = [model.encode_context(inputs["encoder_hidden_states"][i : i + 1], MASK[i : i + 1]) for i in (0, 1)]
            inputs["encoder_hidden_states"] = type(halves[0]).concat(halves)
            steps = model.modulate(torch.tensor([3, 7, 700]), None)
            inputs["timestep"] = type(steps).concat([steps.select([1]), steps.select([2])])
            inputs["encoder_attention_mask"] = None
        for step in range(3):
            assert distance(model(**inputs).sample, expected) <= 1e-5
            assert len(calls) == step + 1


def test_hooks_and_micro_conditions() -> None:
    model = pixart(use_additional_conditions=True)
    conditions = {"resolution": torch.tensor([[512.0, 256.0]]), "aspect_ratio": torch.tensor([[2.0]])}
    inputs = pixart_inputs() | {"added_cond_kwargs": conditions}
    with torch.no_grad():
        expected = model(**inputs).sample
        calls = count(model.adaln_single.emb.resolution_embedder)
        steps = model.modulate(inputs["timestep"], conditions)
        assert distance(model(**inputs | {"timestep": steps}).sample, expected) <= 1e-5
    assert len(calls) == 2  # height and width


@pytest.mark.parametrize("name", GLM_PARTS)
@pytest.mark.parametrize("staged", [False, True], ids=["plain", "staged"])
def test_hooks_on_parts_of_glm_image_fire_once_per_step(name: str, staged: bool) -> None:
    model, inputs = glm(), glm_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        calls = count(model.get_submodule(name))
        if staged:
            given = (inputs.pop("encoder_hidden_states"), inputs.pop("prior_token_id"), inputs.pop("prior_token_drop"))
            halves = [
                model.encode_context(text[None], None, ids[None], drop[None], 8, 6)
                for text, ids, drop in zip(*given, strict=True)
            ]
            inputs["encoder_hidden_states"] = type(halves[0]).concat(halves)
            sizes = (inputs.pop("target_size")[:1], inputs.pop("crop_coords")[:1])
            steps = model.modulate(torch.tensor([3, 7, 700]), *sizes)
            inputs["timestep"] = type(steps).concat([steps.select([1]), steps.select([2])])
        for step in range(3):
            assert distance(model(**inputs).sample, expected) <= 1e-5
            assert len(calls) == step + 1


def test_contexts_and_modulations_from_before_and_after_a_hook_are_not_joined() -> None:
    model, inputs = pixart(), pixart_inputs()
    with torch.no_grad():
        before = model.encode_context(inputs["encoder_hidden_states"]), model.modulate(inputs["timestep"])
        count(model.caption_projection)
        count(model.adaln_single)
        after = model.encode_context(inputs["encoder_hidden_states"]), model.modulate(inputs["timestep"])
    for pair in zip(before, after, strict=True):
        with pytest.raises(InputError, match="cannot be joined"):
            type(pair[0]).concat(pair)
