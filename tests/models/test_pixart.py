"""PixArtTransformer2DModel by itself; tests/parity compares it with the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from impasto.errors import ConfigurationError, InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.models.pixart.text import Modulation, PixArtContext, TextKeys
from impasto.nn.backends.absorbed import AbsorbedText
from impasto.nn.changes import is_plain

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
    "use_additional_conditions": False,
}
RAGGED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def tiny(**options: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**CONFIG, **options}).eval()


def arguments(batch: int = 2, size: int = 8, tokens: int = 5) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, size, size),
        "encoder_hidden_states": torch.randn(batch, tokens, 10),
        "timestep": torch.linspace(3, 998, batch).long(),
    }


def distance(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def predict(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).sample


# The three stages


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_stages_compose_to_forward(grad: bool) -> None:
    model, inputs = tiny(), arguments()
    with torch.set_grad_enabled(grad):
        expected = model(**inputs, encoder_attention_mask=RAGGED).sample
        context = model.encode_context(inputs["encoder_hidden_states"], RAGGED)
        modulation = model.modulate(inputs["timestep"])
        staged = model.denoise(inputs["hidden_states"], context, modulation)
        given = model(inputs["hidden_states"], context, modulation).sample
    assert (context.layers is None) == grad
    assert torch.equal(staged, expected)
    assert torch.equal(given, expected)


def test_discarded_tokens_are_left_out() -> None:
    model, inputs = tiny(), arguments()
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    with torch.no_grad():
        context = model.encode_context(inputs["encoder_hidden_states"], mask)
    assert context.layers is not None
    assert [[row.values.shape for row in layer] for layer in context.layers] == [[(4, 24), (1, 24)]] * 2


MASKS = {
    "ragged": RAGGED,
    "holes, one token": torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]]),
    "an empty row": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]),
    "soft bias": torch.tensor([[[0.0, 1.5, -10000.0, -2.0, 0.3]], [[-10000.0, -10000.0, 0.7, -10000.0, -10000.0]]]),
    "none": None,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("way", ["absorbed", "by row", "padded"])
def test_every_way_to_hold_the_text_agrees(
    way: str, bias: bool, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the blocks' own keys and values, as in training."""
    model, inputs = tiny(attention_bias=bias), arguments()
    expected = model(**inputs, encoder_attention_mask=mask).sample
    if way == "by row":
        monkeypatch.setattr("impasto.models.pixart.text.can_absorb", lambda *_: False)
    with torch.no_grad():
        if way == "padded":  # as on an accelerator
            monkeypatch.setattr(PixArtTransformer2DModel, "_keeps_rows", lambda *_: False)
        context = model.encode_context(inputs["encoder_hidden_states"], mask)
        assert context.layers is not None
        kind = {"absorbed": AbsorbedText, "by row": TextKeys, "padded": TextKeys}[way]
        assert all(isinstance(text if way == "padded" else text[0], kind) for text in context.layers)
        given = model(**{**inputs, "encoder_hidden_states": context}).sample
    assert distance(given, expected) <= 1e-6


def test_one_timestep_may_be_for_images_of_several_sizes() -> None:
    model, inputs = tiny(use_additional_conditions=True), arguments()
    sizes = torch.tensor([[64.0, 64.0], [32.0, 96.0]])
    inputs["added_cond_kwargs"] = {"resolution": sizes, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    expected = predict(model, **{**inputs, "timestep": torch.tensor([7, 7])})
    for timestep in (torch.tensor([7]), 7):
        assert distance(predict(model, **{**inputs, "timestep": timestep}), expected) <= 1e-6


def test_texts_held_in_different_ways_can_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), arguments(batch=3)
    text = inputs["encoder_hidden_states"]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(**inputs, encoder_attention_mask=mask).sample
        parts = [model.encode_context(text[:1], mask[:1])]
        monkeypatch.setattr(PixArtTransformer2DModel, "_keeps_rows", lambda *_: False)
        parts.append(model.encode_context(text[1:], mask[1:]))
        joined = PixArtContext.concat(parts)
        assert joined.rows == 3
        assert distance(model(**{**inputs, "encoder_hidden_states": joined}).sample, expected) <= 1e-6
    with pytest.raises(InputError, match="cannot be joined"):
        PixArtContext.concat([parts[0], model.encode_context(text)])


def test_forward_derivatives_without_gradients() -> None:
    """Products with packed weights have no derivative."""
    model, inputs = tiny(), arguments()
    x = inputs.pop("hidden_states")
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        _, slope = torch.func.jvp(lambda latents: model(latents, **inputs).sample, (x,), (tangent,))
    exact = copy.deepcopy(model).double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    up, down = (predict(exact, hidden_states=x.double() + step * tangent, **wide) for step in (1e-5, -1e-5))
    assert distance(slope, (up - down) / 2e-5) <= 1e-5


def test_tensors_without_values_pass_through_with_a_mask() -> None:
    model, inputs = tiny(), arguments()
    inputs["encoder_attention_mask"] = torch.ones(inputs["encoder_hidden_states"].shape[:2], dtype=torch.long)
    expected = predict(model, **inputs).shape
    meta = {name: value.to("meta") for name, value in inputs.items()}
    assert predict(copy.deepcopy(model).to("meta"), **meta).shape == expected


def test_projections_that_someone_changed_or_watches_are_called() -> None:
    """A text is absorbed into plain layers only."""
    model, inputs = tiny(), arguments()
    plain = predict(model, **inputs)
    calls: list[int] = []
    hook = model.transformer_blocks[0].attn2.to_q.register_forward_hook(lambda *_: calls.append(1))
    assert distance(predict(model, **inputs), plain) <= 1e-6
    assert len(calls) == 1  # not once for each row
    hook.remove()

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    old = model.transformer_blocks[1].attn2.to_out[0]
    new = Doubled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.transformer_blocks[1].attn2.to_out[0] = new
    assert distance(predict(model, **inputs), model(**inputs).sample.detach()) <= 1e-6
    assert distance(predict(model, **inputs), plain) > 1e-3


def test_gradients_are_not_lost_in_a_context_that_was_made_without_them() -> None:
    model, inputs = tiny(), arguments()
    with torch.no_grad():
        context = model.encode_context(inputs["encoder_hidden_states"])
    with pytest.raises(InputError, match="made without gradients"):
        model(**{**inputs, "encoder_hidden_states": context})
    model.requires_grad_(False)
    given = model(**{**inputs, "encoder_hidden_states": context}).sample
    assert distance(given, predict(model, **inputs)) <= 1e-6


def test_layers_with_another_forward_or_a_quantised_weight_are_not_taken_apart() -> None:
    layer = nn.Linear(3, 4)
    assert is_plain(layer, nn.Linear)
    layer.forward = lambda x: x  # as offloading and patching libraries do
    assert not is_plain(layer, nn.Linear)

    class Packed(nn.Parameter):
        pass

    packed = nn.Linear(3, 4)
    packed.weight = Packed(packed.weight.data)
    assert not is_plain(packed, nn.Linear)


def test_contexts_of_other_kinds_are_refused_in_either_order() -> None:
    model, inputs = tiny(), arguments()
    with torch.no_grad():
        one = model.encode_context(inputs["encoder_hidden_states"])
    other = model.encode_context(inputs["encoder_hidden_states"])
    bare = tiny(caption_channels=None).encode_context(None)
    for pair in ([one, other], [other, one], [bare, other], [other, bare], [bare, one]):
        with pytest.raises(InputError, match="cannot be joined"):
            PixArtContext.concat(pair)


def test_in_bfloat16_an_absorbed_text_is_about_as_near_to_the_exact_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128), arguments()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**{k: v.double() for k, v in inputs.items()}).sample
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    model.bfloat16()
    absorbed = distance(predict(model, **inputs).double(), exact)
    monkeypatch.setattr("impasto.models.pixart.text.can_absorb", lambda *_: False)
    assert absorbed <= 1.2 * distance(predict(model, **inputs).double(), exact)


def test_an_absorbed_text_keeps_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128).double(), arguments()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    absorbed = predict(model, **inputs)
    monkeypatch.setattr("impasto.models.pixart.text.can_absorb", lambda *_: False)
    expected = predict(model, **inputs)
    assert not torch.equal(absorbed, expected)  # it was another way
    assert distance(absorbed, expected) <= 1e-13


def test_select_and_concat_are_rows_of_a_batch() -> None:
    model = tiny()
    inputs = arguments(batch=3)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = model(**inputs, encoder_attention_mask=mask).sample
        parts = [
            model.encode_context(inputs["encoder_hidden_states"][rows], mask[rows])
            for rows in (slice(0, 1), slice(1, 3))
        ]
        assert [part.rows for part in parts] == [1, 2]
        joined = PixArtContext.concat(parts)
        steps = [model.modulate(t[None]) for t in inputs["timestep"]]
        modulation = Modulation.concat(steps)
        assert distance(model(inputs["hidden_states"], joined, modulation).sample, expected) <= 1e-6
        for rows in ([2], [2, 0], slice(1, 3), torch.tensor([1])):
            some = model(inputs["hidden_states"][rows], joined.select(rows), modulation.select(rows)).sample
            assert distance(some, expected[rows]) <= 1e-6


def test_concat_of_projected_text_pads_with_discarded_tokens() -> None:
    model, inputs = tiny(), arguments()
    text = inputs["encoder_hidden_states"]
    joined = PixArtContext.concat([model.encode_context(text[:1, :2]), model.encode_context(text[1:])])
    assert joined.projected.text is not None
    assert joined.projected.text.shape == (2, 5, 24)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = model(**inputs, encoder_attention_mask=mask).sample
    given = model(**{**inputs, "encoder_hidden_states": joined}).sample
    assert distance(given, expected) <= 1e-6


def test_contexts_without_text_join_their_masks() -> None:
    model, inputs = tiny(caption_channels=None), arguments() | {"encoder_hidden_states": None}
    mask = torch.rand(2, 16) > 0.5
    with torch.no_grad():
        expected = model(**inputs, encoder_attention_mask=mask).sample
        joined = PixArtContext.concat([model.encode_context(None, mask[i : i + 1]) for i in range(2)])
        assert torch.equal(model(**inputs | {"encoder_hidden_states": joined}).sample, expected)
        plain = PixArtContext.concat([model.encode_context(None), model.encode_context(None)])
        assert torch.equal(predict(model, **inputs | {"encoder_hidden_states": plain}), predict(model, **inputs))
        with pytest.raises(InputError, match="all of them have a mask, or none"):
            PixArtContext.concat([joined, model.encode_context(None)])


@pytest.mark.parametrize("mask", [RAGGED, torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0]]), None], ids=str)
def test_a_picture_does_not_depend_on_its_batch(mask: Tensor | None) -> None:
    model, inputs = tiny(), arguments()
    together = predict(model, **inputs, encoder_attention_mask=mask)
    for i in range(2):
        row = {name: value[i : i + 1] for name, value in inputs.items()}
        alone = predict(model, **row, encoder_attention_mask=None if mask is None else mask[i : i + 1])
        assert distance(alone, together[i : i + 1]) <= 1e-6


# Rows without any token


def without_text(model: PixArtTransformer2DModel, inputs: dict[str, Any], row: int) -> Tensor:
    """The prediction where cross-attention gives its output bias alone: its output's weight is zero."""
    bare = copy.deepcopy(model)
    for block in bare.transformer_blocks:
        block.attn2.to_out[0].weight.data.zero_()
    return predict(bare, **inputs)[row]


@pytest.mark.parametrize("mask", ["keep", "bias"])
@pytest.mark.parametrize("rows", [[0], [0, 1]], ids=["one row", "every row"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_a_row_without_tokens_gets_the_output_bias_only(mask: str, rows: list[int], grad: bool) -> None:
    model, inputs = tiny(), arguments()
    keep = torch.ones(2, 5)
    keep[rows] = 0
    value = keep if mask == "keep" else ((1 - keep) * -10000.0)[:, None]
    with torch.set_grad_enabled(grad):
        output = model(**inputs, encoder_attention_mask=value).sample
    for row in rows:
        assert distance(output[row], without_text(model, inputs, row)) <= 1e-6
    if grad:
        output.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Fused projections


def test_fusing_changes_neither_outputs_nor_the_state_dict() -> None:
    model, inputs = tiny(), arguments()
    expected, state = predict(model, **inputs), {name: x.clone() for name, x in model.state_dict().items()}
    memory = sum(x.nbytes for x in model.state_dict().values())
    model.fuse_qkv_projections()
    assert distance(predict(model, **inputs), expected) <= 1e-5
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.state_dict().values()}
    assert sum(storages.values()) == memory
    model.unfuse_qkv_projections()
    assert torch.equal(predict(model, **inputs), expected)
    model.fuse_qkv_projections()
    model.set_default_attn_processor()
    assert torch.equal(predict(model, **inputs), expected)


def test_fused_weights_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients only the fused products are computed; with gradients, the layers' own."""
    model, inputs = tiny(), arguments()
    model.fuse_qkv_projections()
    calls = count_calls(model.transformer_blocks[0].attn1.to_k, monkeypatch)
    predict(model, **inputs)
    assert calls == []
    model(**inputs)
    assert len(calls) == 1


def count_calls(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        if self is layer:
            calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)  # the layer with another forward would not be a plain one
    return calls


def double(layer: nn.Linear) -> None:
    layer.weight.data.mul_(2.0)


def replace_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def assign_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": layer.weight * 2, "bias": layer.bias})


def load_by_assignment(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": layer.weight.detach() * 2, "bias": layer.bias}, assign=True)


def add_a_hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda _, __, output: 2 * output - layer.bias)


@pytest.mark.parametrize(
    "change", [double, replace_parameter, assign_data, load, load_by_assignment, add_a_hook], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("where", ["attn1", "attn2"])
def test_fused_projections_are_never_stale(change: Callable[[nn.Linear], None], where: str) -> None:
    plain, fused, inputs = tiny(), tiny(), arguments()
    fused.fuse_qkv_projections()
    before = predict(fused, **inputs)
    for model in (plain, fused):
        change(getattr(model.transformer_blocks[1], where).to_k)
    assert distance(predict(fused, **inputs), predict(plain, **inputs)) <= 1e-5
    assert distance(predict(fused, **inputs), before) > 1e-4


def test_an_adapter_put_in_after_fusing_is_honoured() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.base(x)

    plain, fused, inputs = tiny(), tiny(), arguments()
    fused.fuse_qkv_projections()
    for model in (plain, fused):
        model.transformer_blocks[0].attn1.to_v = Adapter(model.transformer_blocks[0].attn1.to_v)
    assert distance(predict(fused, **inputs), predict(plain, **inputs)) <= 1e-5
    fused.to(torch.float64).to(torch.float32)
    assert distance(predict(fused, **inputs), predict(plain, **inputs)) <= 1e-5
    with pytest.raises(ConfigurationError, match=r"cannot fuse a Adapter.*Merge or remove it first"):
        fused.fuse_qkv_projections()
    assert all(block.attn2._fused is None for block in fused.transformer_blocks)  # all or none


def test_fused_projections_survive_casts_loading_and_copies() -> None:
    model, inputs = tiny(), arguments()
    rounded = predict(tiny().bfloat16().float(), **inputs)
    model.fuse_qkv_projections()
    other = PixArtTransformer2DModel(**CONFIG)
    model.load_state_dict(other.state_dict())
    assert distance(predict(model, **inputs), predict(other.eval(), **inputs)) <= 1e-5
    model.load_state_dict(tiny().state_dict())
    model.to(torch.bfloat16).to(torch.float32)
    assert distance(predict(model, **inputs), rounded) <= 1e-5
    for block in model.transformer_blocks:  # and they are still fused
        assert block.attn1.to_q.weight.data_ptr() == block.attn1._fused.weight.data_ptr()
    twin = copy.deepcopy(model)
    twin.transformer_blocks[0].attn1.to_q.weight.data.zero_()
    assert distance(predict(model, **inputs), rounded) <= 1e-5
    assert distance(predict(twin, **inputs), rounded) > 1e-4


def test_a_step_of_training_is_seen_by_the_fused_weights() -> None:
    plain, fused, inputs = tiny(), tiny(), arguments()
    fused.fuse_qkv_projections()
    for model in (plain, fused):
        model(**inputs).sample.square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert distance(predict(fused, **inputs), predict(plain, **inputs)) <= 1e-5
    assert distance(predict(fused, **inputs), predict(tiny(), **inputs)) > 1e-4


def test_a_fused_model_is_saved_whole(tmp_path: Any) -> None:
    model, inputs = tiny(), arguments()
    expected = predict(model, **inputs)
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    assert torch.equal(predict(PixArtTransformer2DModel.from_pretrained(tmp_path), **inputs), expected)


# Gradient checkpointing, compilation


def test_checkpointing_gives_the_same_gradients() -> None:
    model, inputs = tiny(dropout=0.2).train(), arguments()

    def gradients() -> list[Tensor]:
        torch.manual_seed(7)  # of dropout
        model.zero_grad()
        model(**inputs, encoder_attention_mask=RAGGED).sample.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.enable_gradient_checkpointing()
    for ours, plain in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, plain)
    model.disable_gradient_checkpointing()
    assert all(torch.equal(ours, plain) for ours, plain in zip(gradients(), expected, strict=True))


def check_compiled(backend: str) -> None:
    model, inputs = tiny(), arguments() | {"encoder_attention_mask": RAGGED}
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert distance(predict(compiled, **inputs), predict(model, **inputs)) <= 1e-5
    with torch.no_grad():
        context = model.encode_context(inputs["encoder_hidden_states"], RAGGED)
        modulation = model.modulate(inputs["timestep"])
        staged = compiled(inputs["hidden_states"], context, modulation).sample
    assert distance(staged, predict(model, **inputs)) <= 1e-5
    model.fuse_qkv_projections()
    assert distance(predict(compiled, **inputs), predict(model, **inputs)) <= 1e-5


def test_compiles_into_one_graph() -> None:
    check_compiled("eager")


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    check_compiled("inductor")


# Images of several sizes in one forward


SIZES = [(8, 8), (4, 12), (12, 4), (8, 8), (16, 6)]
MIXED_MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]])


def mixed(**options: Any) -> tuple[PixArtTransformer2DModel, list[Tensor], dict[str, Any]]:
    """A model, latents of several sizes, and the rest of its arguments."""
    model = tiny(**options)
    torch.manual_seed(2)
    latents = [torch.randn(4, *size) for size in SIZES]
    text = torch.randn(5, 5, 10)
    return (
        model,
        latents,
        {
            "encoder_hidden_states": text,
            "timestep": torch.tensor([3, 998, 500, 3, 77]),
            "encoder_attention_mask": MIXED_MASK,
        },
    )


def one_by_one(model: nn.Module, latents: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    return [
        model(image[None], **{name: value[i : i + 1] for name, value in inputs.items()}).sample[0]
        for i, image in enumerate(latents)
    ]


@pytest.mark.parametrize("way", ["absorbed", "by row", "padded", "projected"])
@pytest.mark.parametrize("upcast", [False, True], ids=["as it is", "upcast"])
@pytest.mark.parametrize("few", [0, 128], ids=["by views", "by tensors"])
def test_images_of_several_sizes_share_a_forward(
    few: int, way: str, upcast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("impasto.nn.tokens._FEW_TOKENS", few)
    model, latents, inputs = mixed(upcast_attention=upcast)
    with torch.set_grad_enabled(way == "projected"):
        expected = one_by_one(model, latents, inputs)
        if way == "by row":
            monkeypatch.setattr("impasto.models.pixart.text.can_absorb", lambda *_: False)
        if way == "padded":
            monkeypatch.setattr(PixArtTransformer2DModel, "_keeps_rows", lambda *_: False)
        together = model(latents, **inputs).sample
    assert [output.shape for output in together] == [(8, *size) for size in SIZES]
    assert max(map(distance, together, expected)) <= 1e-6


def test_a_layout_first_seen_in_inference_mode_serves_training() -> None:
    model, latents, inputs = mixed()
    latents = [image[:, :2, :2] if i == 1 else image for i, image in enumerate(latents)]  # a layout of no other test
    with torch.inference_mode():
        model([image.clone() for image in latents], **inputs)
    sum(output.sum() for output in model(latents, **inputs).sample).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_linear_layers_see_all_tokens_of_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latents, inputs = mixed()
    shapes: list[tuple[int, ...]] = []
    model.transformer_blocks[1].attn1.to_q.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    predict(model, hidden_states=latents, **inputs)
    assert shapes == [(16 + 12 + 12 + 16 + 24, 24)]


@pytest.mark.parametrize("few", [0, 128], ids=["by views", "by tensors"])
def test_the_gradients_of_a_mixed_batch_are_those_of_its_images(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("impasto.nn.tokens._FEW_TOKENS", few)
    model, latents, inputs = mixed()

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        sum(output.square().sum() for output in outputs).backward()
        grads = [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "to_k.bias" not in n]
        assert len(grads) == len([*model.parameters()]) - 4  # the gradient of the keys' bias is 0, but for rounding
        return grads

    expected = gradients(one_by_one(model, latents, inputs))
    for _ in range(2):
        assert max(map(distance, gradients(model(latents, **inputs).sample), expected)) <= 1e-5
        model.enable_gradient_checkpointing()


def test_one_modulation_serves_a_mixed_batch_and_micro_conditions_differ() -> None:
    model, latents, inputs = mixed(use_additional_conditions=True)
    sizes = torch.tensor(SIZES, dtype=torch.float32)
    conditions = {"resolution": sizes * 8, "aspect_ratio": sizes[:, :1] / sizes[:, 1:]}
    for timestep in (inputs["timestep"], inputs["timestep"][:1]):
        each = timestep.expand(5)
        with torch.no_grad():
            expected = [
                model(
                    image[None],
                    inputs["encoder_hidden_states"][i : i + 1],
                    each[i : i + 1],
                    {name: value[i : i + 1] for name, value in conditions.items()},
                    encoder_attention_mask=MIXED_MASK[i : i + 1],
                ).sample[0]
                for i, image in enumerate(latents)
            ]
            together = model(latents, **{**inputs, "timestep": each}, added_cond_kwargs=conditions).sample
        assert max(map(distance, together, expected)) <= 1e-6
    model, latents, inputs = mixed()
    inputs["timestep"] = torch.tensor([3])
    expected = one_by_one(model, latents, {**inputs, "timestep": torch.tensor([3] * 5)})
    assert max(map(distance, predict(model, hidden_states=latents, **inputs), expected)) <= 1e-6


def test_without_text_a_mixed_batch_attends_to_its_own_images() -> None:
    model, latents, inputs = mixed(caption_channels=None)
    rest = {"timestep": inputs["timestep"]}
    with torch.no_grad():
        expected = one_by_one(model, latents, rest)
        assert max(map(distance, model(latents, **rest).sample, expected)) <= 1e-6
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert max(map(distance, compiled(latents, **rest).sample, expected)) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its blocks"])
def test_one_graph_serves_every_layout(whole: bool) -> None:
    model, latents, inputs = mixed()
    expected = one_by_one(model, latents, inputs)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    called: Any = model
    if whole:
        called = torch.compile(model, **options)
    else:
        for block in model.transformer_blocks:
            block.compile(**options)
    counts = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 0, 4, 3, 2], [2, 4, 3]):
        some = [latents[i] for i in order]
        rest = {name: value[order] for name, value in inputs.items()}
        with torch.no_grad():
            together = called(some, **rest).sample
        assert max(map(distance, together, [expected[i] for i in order])) <= 1e-5
        counts.append(len(graphs))
    if not whole:  # the first layout and the next one, in which numbers are seen to change, may each make a graph
        assert counts[1:] == [counts[1]] * 3


def test_attentions_that_are_watched_see_the_text_as_it_was_given() -> None:
    """Of which a processor may split off the last tokens, as image prompts are."""
    model, inputs = tiny(), arguments()
    mask = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 0, 1]])
    expected = predict(model, **inputs, encoder_attention_mask=mask)
    shapes: list[tuple[int, ...]] = []
    to_k = model.transformer_blocks[0].attn2.to_k
    to_k.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    assert distance(predict(model, **inputs, encoder_attention_mask=mask), expected) <= 1e-6
    assert shapes == [(2, 5, 24)]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: shapes.append((id(module),)))
    with handle:  # hooks on all modules, too
        predict(model, **inputs, encoder_attention_mask=mask)
    assert (id(model.transformer_blocks[1].attn2.to_v),) in shapes


def test_gradients_of_each_image_by_vmap() -> None:
    model, inputs = tiny(), arguments()
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 1]])
    weights = dict(model.named_parameters())

    def loss(weights: Any, latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        given = {"encoder_hidden_states": text[None], "timestep": timestep[None], "encoder_attention_mask": mask[None]}
        return torch.func.functional_call(model, weights, (latents[None],), given).sample.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))
    found = each(weights, *(inputs[n] for n in ("hidden_states", "encoder_hidden_states", "timestep")), mask)
    model(**inputs, encoder_attention_mask=mask).sample.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].sum(dim=0), parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled blocks"])
@torch.no_grad()
def test_a_mixed_batch_on_a_gpu(compiled: bool, dtype: torch.dtype) -> None:
    model, latents, inputs = mixed(attention_head_dim=16, cross_attention_dim=32)
    expected = one_by_one(model, latents, inputs)
    model.to("cuda", dtype)
    moved = {name: x.cuda() if name != "encoder_hidden_states" else x.to("cuda", dtype) for name, x in inputs.items()}
    if compiled:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=True)
    for _ in range(2):
        together = model([image.to("cuda", dtype) for image in latents], **moved).sample
        assert max(distance(a.float().cpu(), b) for a, b in zip(together, expected, strict=True)) <= (
            1e-3 if dtype == torch.float32 else 3e-2
        )


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_compiled_blocks_may_run_eagerly(stance: str) -> None:
    model, _, inputs = mixed()
    latents = [torch.randn(4, *size) for size in [(16, 16), (8, 24), (16, 12), (12, 16), (24, 8)]]
    expected = one_by_one(model, latents, inputs)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    predict(model, **arguments())
    with torch.compiler.set_stance(stance):
        together = predict(model, hidden_states=latents, **inputs)
    assert max(map(distance, together, expected)) <= 1e-6


def test_under_autocast_the_tokens_of_a_mixed_batch_keep_their_digits() -> None:
    model, latents, inputs = mixed()
    dtypes: list[torch.dtype] = []
    model.transformer_blocks[1].register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        predict(model, hidden_states=latents, **inputs)
        predict(model, **arguments())
    assert dtypes == [torch.float32] * 2


def test_contexts_from_before_and_after_a_hook_can_be_joined() -> None:
    model, inputs = tiny(), arguments()
    text = inputs["encoder_hidden_states"]
    with torch.no_grad():
        expected = model(**inputs).sample
        before = model.encode_context(text[:1])
        model.transformer_blocks[0].attn2.register_forward_hook(lambda *_: None)
        joined = PixArtContext.concat([before, model.encode_context(text[1:])])
        assert distance(model(**inputs | {"encoder_hidden_states": joined}).sample, expected) <= 1e-6


@pytest.mark.long
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_number_of_images(strict: bool, masked: bool) -> None:
    model, batch = tiny(), torch.export.Dim("batch", min=2, max=64)
    mask = {"encoder_attention_mask": RAGGED} if masked else {}
    with torch.no_grad():
        inputs: dict[str, Any] = {**arguments(), **mask}
        shapes = {name: {0: batch} for name in inputs}
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()
        three = {**arguments(batch=3), **({"encoder_attention_mask": MIXED_MASK[:3]} if masked else {})}
        assert distance(exported(**three).sample, model(**three).sample) <= 1e-5


def test_hooks_on_attentions_fire_and_see_halves_and_text() -> None:
    """And the batch is [B, N, D], whatever sizes it holds."""
    model, inputs = tiny(), arguments() | {"encoder_attention_mask": RAGGED}
    expected = predict(model, **inputs)
    seen: list[list[Any]] = []

    def look(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
        values = [*args, *kwargs.values()]
        seen.append([None if value is None else tuple(value.shape) for value in values])

    with torch.no_grad():
        before = model.encode_context(inputs["encoder_hidden_states"], RAGGED)
    handles = [
        getattr(model.transformer_blocks[0], n).register_forward_hook(look, with_kwargs=True)
        for n in ("attn1", "attn2")
    ]
    assert distance(predict(model, **inputs), expected) <= 1e-6
    assert seen == [[(2, 16, 24), None, None], [(2, 16, 24), (2, 5, 24), (2, 1, 5)]]
    seen.clear()
    again = predict(model, **inputs | {"encoder_hidden_states": before, "encoder_attention_mask": None})
    assert distance(again, expected) <= 1e-6
    assert seen == [[(2, 16, 24), None, None], [(2, 16, 24), (2, 5, 24), (2, 1, 5)]]
    seen.clear()
    _, latents, rest = mixed()
    together = predict(model, hidden_states=latents, **rest)
    assert len(seen) == 10
    assert all(one[0][0] == 1 for one in seen)
    for handle in handles:
        handle.remove()
    assert max(map(distance, together, one_by_one(model, latents, rest))) <= 1e-6


def test_an_attention_with_another_forward_is_called() -> None:
    model, inputs = tiny(), arguments()

    def nothing(hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Tensor:
        return torch.zeros_like(hidden_states)

    for block in model.transformer_blocks:
        block.attn2.forward = nothing
    bare = tiny()
    for block in bare.transformer_blocks:
        for parameter in block.attn2.to_out.parameters():
            parameter.data.zero_()
    assert distance(predict(model, **inputs), predict(bare, **inputs)) <= 1e-6


def test_bad_mixed_batches() -> None:
    model, latents, inputs = mixed()
    with pytest.raises(InputError, match=r"hidden_states has shape \[1, 4, 7, 8\]"):
        predict(model, hidden_states=[*latents[:4], torch.randn(4, 7, 8)], **inputs)
    with pytest.raises(InputError, match="holds 5 texts for 4 images"):
        predict(model, hidden_states=latents[:4], **inputs | {"timestep": inputs["timestep"][:4]})
    with pytest.raises(InputError, match="attention_mask masks the tokens of images of one size"):
        predict(model, hidden_states=latents, **inputs, attention_mask=torch.ones(5, 16))


# Bad input

BAD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "channels of latents": ({}, {"hidden_states": torch.zeros(2, 3, 8, 8)}, r"\[2, 3, 8, 8\]; expected \[batch, 4"),
    "three dimensions": ({}, {"hidden_states": torch.zeros(4, 8, 8)}, r"expected \[batch, 4, height, width\]"),
    "odd height": ({}, {"hidden_states": torch.zeros(2, 4, 7, 8)}, "with sides that 2 divides"),
    "odd width": ({}, {"hidden_states": torch.zeros(2, 4, 8, 9)}, "with sides that 2 divides"),
    "nothing": ({}, {"hidden_states": torch.zeros(2, 4, 0, 8)}, "with sides that 2 divides"),
    "no text": ({}, {"encoder_hidden_states": None}, "this model projects captions; give text embeddings"),
    "channels of text": (
        {},
        {"encoder_hidden_states": torch.zeros(2, 5, 11)},
        r"encoder_hidden_states has shape \[2, 5, 11\]; expected \[batch, tokens, 10\]",
    ),
    "text of another batch": ({}, {"encoder_hidden_states": torch.zeros(3, 5, 10)}, "holds 3 texts for 2 images"),
    "flat text": ({}, {"encoder_hidden_states": torch.zeros(5, 10)}, r"expected \[batch, tokens, 10\]"),
    "mask of another length": (
        {},
        {"encoder_attention_mask": torch.ones(2, 4)},
        r"encoder_attention_mask has shape \[2, 4\]; expected \[2, 5\] \(1 keeps\) or \[2, 1, 5\] \(a bias\)",
    ),
    "mask of another batch": ({}, {"encoder_attention_mask": torch.ones(1, 5)}, r"expected \[2, 5\]"),
    "mask of four dimensions": ({}, {"encoder_attention_mask": torch.ones(2, 1, 1, 5)}, r"expected \[2, 5\]"),
    "image mask": (
        {},
        {"attention_mask": torch.ones(2, 5)},
        r"attention_mask has shape \[2, 5\]; it masks image tokens: expected \[2, 16\]",
    ),
    "mask without text": (
        {"caption_channels": None},
        {"encoder_hidden_states": None, "encoder_attention_mask": torch.ones(2, 5)},
        r"encoder_attention_mask masks the image tokens: expected \[2, 16\]",
    ),
    "no timestep": ({}, {"timestep": None}, "timestep is None; give one number for the batch or one for each"),
    "timesteps": ({}, {"timestep": torch.tensor([1, 2, 3])}, "timestep has 3 values for 2 images; give 1 or 2"),
    "no micro-conditions": ({"use_additional_conditions": True}, {}, "takes micro-conditions: give added_cond_kwargs"),
    "micro-conditions of None": (
        {"use_additional_conditions": True},
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "takes micro-conditions: give added_cond_kwargs",
    ),
    "half of the micro-conditions": (
        {"use_additional_conditions": True},
        {"added_cond_kwargs": {"resolution": torch.ones(2, 2)}},
        "takes micro-conditions: give added_cond_kwargs",
    ),
    "micro-conditions of another shape": (
        {"use_additional_conditions": True},
        {"added_cond_kwargs": {"resolution": torch.ones(2), "aspect_ratio": torch.ones(2, 1)}},
        r"resolution has shape \[2\] and aspect_ratio \[2, 1\]; expected \[2, 2\] and \[2, 1\]",
    ),
    "attention arguments": ({}, {"cross_attention_kwargs": {"gligen": 1}}, "gligen.*takes none of them"),
}


@pytest.mark.parametrize(("options", "change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_say_what_was_expected(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    model = tiny(**options)
    with pytest.raises(InputError, match=message):
        predict(model, **{**arguments(), **change})


def test_prepared_inputs_of_another_batch_are_refused() -> None:
    model, inputs = tiny(), arguments()
    with torch.no_grad():
        context = model.encode_context(torch.randn(3, 5, 10))
        with pytest.raises(InputError, match="holds 3 texts for 2 images"):
            model(inputs["hidden_states"], context, inputs["timestep"])
        modulation = model.modulate(torch.tensor([1, 2, 3]))
        with pytest.raises(InputError, match="timestep holds 3 rows for 2 images; give 1 or 2"):
            model(inputs["hidden_states"], inputs["encoder_hidden_states"], modulation)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "norm_type": ({"norm_type": "layer_norm"}, "norm_type 'layer_norm' is not PixArt's; use 'ada_norm_single'"),
    "attention_type": ({"attention_type": "gated"}, "attention_type 'gated' is not PixArt's; use 'default'"),
    "num_vector_embeds": ({"num_vector_embeds": 5}, "num_vector_embeds=5 asks for discrete latents"),
    "num_embeds_ada_norm": ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm cannot be None"),
    "activation_fn": ({"activation_fn": "mish"}, "activation_fn 'mish' is unknown; use one of gelu"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
    "num_layers": ({"num_layers": 0}, "num_layers must be a whole number from 1 to 65536, not 0"),
    "in_channels": ({"in_channels": None}, "in_channels must be a whole number from 1 to 65536, not None"),
    "patch_size": ({"patch_size": -2}, "patch_size must be a whole number from 1 to 64, not -2"),
    "sample_size": ({"sample_size": 1}, "sample_size 1 is smaller than patch_size 2"),
    "out_channels": ({"out_channels": -8}, "out_channels must be a whole number from 1 to 65536, not -8"),
    "caption_channels": ({"caption_channels": 0}, "caption_channels must be a whole number from 1 to 65536, not 0"),
    "interpolation_scale": (
        {"interpolation_scale": 0},
        "interpolation_scale must be a finite number of 1e-06 or more .*, not 0",
    ),
    "width": ({"num_attention_heads": 1, "attention_head_dim": 6}, "is 6; 2-D positions need a multiple of 4"),
    "thirds": (
        {"attention_head_dim": 8, "cross_attention_dim": 16, "use_additional_conditions": True},
        "splits the width 16 in three; it must be a multiple of 3",
    ),
    "contradiction": (
        {"cross_attention_dim": 20},
        "projected to the width 24, so cross_attention_dim cannot be 20; make them equal",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_refused_constructor_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny(**options)


# Config


def test_deprecated_arguments_are_stored_and_written_only_where_given(tmp_path: Any) -> None:
    model = tiny()
    assert not {"use_linear_projection", "num_vector_embeds"} & set(model.config)
    assert tiny(use_linear_projection=False).config.use_linear_projection is False
    model.save_config(tmp_path / "default")
    written = model.load_config(tmp_path / "default")
    assert not {"use_linear_projection", "num_vector_embeds"} & set(written)
    assert set(written) - {"_class_name", "_diffusers_version"} == set(model.config) - {"_use_default_values"}
    tiny(use_linear_projection=True).save_config(tmp_path / "given")
    assert model.load_config(tmp_path / "given")["use_linear_projection"] is True


def test_the_weights_decide_on_micro_conditions(tmp_path: Any) -> None:
    """Configs that lack the key, at sample_size 128: α has the embedders, Σ has not."""
    for embeds in (True, False):
        folder = tmp_path / str(embeds)
        tiny(sample_size=128, use_additional_conditions=embeds).save_pretrained(folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace(f'"use_additional_conditions": {str(embeds).lower()},', ""))
        assert "use_additional_conditions" not in (folder / "config.json").read_text()
        assert PixArtTransformer2DModel.from_pretrained(folder).use_additional_conditions is embeds
