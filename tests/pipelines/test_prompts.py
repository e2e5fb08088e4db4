from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from impasto import PixArtSigmaPipeline
from impasto.errors import InputError
from impasto.pipelines.cleaning import clean_caption
from impasto.pipelines.prompts import _tokenize, encode_texts, prepare

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, write_tokenizer

# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A RED Cube", "a red cube"),
        ("a cat http://example.com/cat", "a cat"),
        ("a <b>red</b> cube &amp; a ball", "a red cube a ball"),
        ("free shipping: cat 10x20", "cat"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("red-hot", "red-hot"),
        ("“a cat”", "a cat"),
        ("", ""),
    ],
)
def test_clean_caption(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


def test_clean_caption_survives_markup_that_the_parser_rejects() -> None:
    assert clean_caption("a cat <![foo bar") == "a cat <! foo bar"


def test_a_prompt_that_is_not_cleaned() -> None:
    assert prepare("  A Cat, http://x.com \n", clean=False) == "a cat, http://x.com"


# --- embeddings ---------------------------------------------------------------------------------------------------

TEXTS = ["a red cube on top of a blue sphere", "", "hello world", "a red cube", "a big zebra !", "hello world", ""]


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def encode(encoder: Any, texts: list[str], length: int = 24) -> tuple[Tensor, Tensor]:
    return encode_texts(tiny_tokenizer(), encoder, texts, length, "cpu")


def padded_reference(encoder: T5EncoderModel, texts: list[str], length: int = 24) -> tuple[Tensor, Tensor]:
    inputs = tiny_tokenizer()(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0], inputs.attention_mask


class Counting(T5EncoderModel):
    """Counts the tokens that it is run on. A hook would be one that may compute anything."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        self.calls.shapes.append(tuple(input_ids.shape))
        return super().forward(input_ids, **options)


class Calls:
    def __init__(self, encoder: T5EncoderModel):
        self.shapes: list[tuple[int, ...]] = []
        encoder.__class__, encoder.__dict__["calls"] = Counting, self


@pytest.mark.parametrize("length", [24, 5, 1])
def test_real_tokens_are_encoded_as_with_padding_and_mask(no_grad: None, length: int) -> None:
    encoder = tiny_text_encoder()
    embeds, mask = encode(encoder, TEXTS, length)
    expected, expected_mask = padded_reference(encoder, TEXTS, length)
    assert embeds.shape == expected.shape
    assert mask.dtype == torch.int64
    assert torch.equal(mask, expected_mask)
    kept = mask.bool()
    torch.testing.assert_close(embeds[kept], expected[kept], rtol=1e-5, atol=1e-5)
    assert embeds[~kept].abs().sum() == 0


def test_the_encoder_sees_each_text_once_and_no_padding(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    calls = Calls(encoder)
    texts = ["a red cube", "the small cat", "", "a red cube", "hello", "a blue sphere"]
    lengths = [len(ids) for ids in tiny_tokenizer()(texts).input_ids]
    assert lengths == [4, 4, 1, 4, 2, 4]
    encode(encoder, texts)
    assert sorted(calls.shapes) == [(1, 1), (1, 2), (3, 4)]


def test_a_text_does_not_depend_on_its_batch(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    together, _ = encode(encoder, TEXTS)
    for row, text in zip(together, TEXTS):
        alone, _ = encode(encoder, [text])
        torch.testing.assert_close(row, alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_encoder(no_grad: None, dtype: torch.dtype) -> None:
    encoder = tiny_text_encoder()
    reference, _ = encode(encoder, TEXTS)
    embeds, _ = encode(encoder.to(dtype), TEXTS)
    assert embeds.dtype == dtype
    assert (embeds.float() - reference).norm() / reference.norm() < 0.05


def test_a_float16_checkpoint_whose_wo_stays_float32(no_grad: None, tmp_path: Path) -> None:
    tiny_text_encoder().save_pretrained(tmp_path)
    encoder = T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert encode(encoder, TEXTS)[0].dtype == torch.float16


def test_gradients_flow_when_they_are_recorded() -> None:
    encoder = tiny_text_encoder()
    embeds, _ = encode(encoder, ["a red cube", ""])
    embeds[1].sum().backward()
    assert encoder.shared.weight.grad is not None
    assert encoder.shared.weight.grad.abs().sum() > 0


def test_truncated_text_is_quoted(no_grad: None, caplog: pytest.LogCaptureFixture) -> None:
    long = "a red cube on top of a blue sphere and a cat"
    embeds, mask = encode(tiny_text_encoder(), [long, "a cat", long], 8)
    assert embeds.shape[:2] == mask.shape == (3, 8)
    (record,) = caplog.records  # the same text twice: one warning
    assert record.name == "impasto"
    assert "'blue sphere and a cat'" in record.getMessage()
    assert "max_sequence_length" in record.getMessage()
    assert tiny_tokenizer()(long).input_ids[7] == tiny_tokenizer()("blue").input_ids[0]


def test_a_text_that_just_fits_is_not_warned_about(no_grad: None, caplog: pytest.LogCaptureFixture) -> None:
    encode(tiny_text_encoder(), ["a red cube"], 4)
    assert not caplog.records


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        ("a cat", 8, "list of one or more texts"),
        ([], 8, "list of one or more texts"),
        ([None], 8, "list of one or more texts"),
        (["a cat"], 0, "max_sequence_length must be a whole number from 1"),
    ],
)
def test_what_cannot_be_encoded(texts: Any, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(tiny_text_encoder(), texts, length)


def test_saved_tokenizers_work_too(no_grad: None, tmp_path: Path) -> None:
    encoder = tiny_text_encoder()
    expected, _ = encode(encoder, TEXTS)
    from_spiece = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "spiece"))
    from_spiece.save_pretrained(tmp_path / "json")
    from_json = AutoTokenizer.from_pretrained(tmp_path / "json")
    for tokenizer in (from_spiece, from_json):
        assert torch.equal(encode_texts(tokenizer, encoder, TEXTS, 24, "cpu").embeds, expected)


# --- the empty text -----------------------------------------------------------------------------------------------


def test_the_empty_text_is_encoded_once(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    calls = Calls(encoder)
    first, _ = encode(encoder, [""])
    second, _ = encode(encoder, ["", ""], 7)
    assert calls.shapes == [(1, 1)]
    assert torch.equal(first[0, :7], second[1])


def test_the_kept_embedding_cannot_be_changed_by_callers(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    for _ in range(2):
        embeds, _ = encode(encoder, [""], 1)
        assert embeds.abs().sum() > 0
        embeds.zero_()


def test_inference_mode_and_others_share_it() -> None:
    encoder = tiny_text_encoder()
    with torch.inference_mode():
        expected, _ = encode(encoder, [""])
    with torch.no_grad():
        embeds, _ = encode(encoder, [""])
    assert not embeds.is_inference()
    weight = torch.ones_like(embeds, requires_grad=True)
    (embeds * weight).sum().backward()
    assert torch.equal(weight.grad, expected)


def test_an_encoder_made_in_inference_mode() -> None:
    with torch.inference_mode():
        encoder = tiny_text_encoder()
        calls = Calls(encoder)
        encode(encoder, [""])
        encode(encoder, [""])
    assert calls.shapes == [(1, 1)]


def test_moving_the_weights_away_and_back_keeps_it(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    calls = Calls(encoder)
    encode(encoder, [""])
    for parameter in encoder.parameters():  # what Module.to does on its way to a device and back
        parameter.data = parameter.data.clone()
    encode(encoder, [""])
    assert calls.shapes == [(1, 1)]


def scale_in_place(encoder: T5EncoderModel) -> None:
    encoder.encoder.block[0].layer[0].SelfAttention.v.weight.mul_(2)


def optimizer_step(encoder: T5EncoderModel) -> None:
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(encoder.parameters(), lr=0.1).step()


def load(encoder: T5EncoderModel, assign: bool = False) -> None:
    encoder.load_state_dict(tiny_text_encoder(seed=1).state_dict(), assign=assign)


def load_and_assign(encoder: T5EncoderModel) -> None:
    load(encoder, assign=True)


def moving_average(encoder: T5EncoderModel) -> None:
    for parameter in encoder.parameters():
        parameter.data.lerp_(torch.ones_like(parameter), 0.5)


def exchanged_data(encoder: T5EncoderModel) -> None:
    for parameter in encoder.parameters():
        parameter.data = parameter.data + 0.5


def other_dtype(encoder: T5EncoderModel) -> None:
    encoder.to(torch.bfloat16)


def merged_by_hand(encoder: T5EncoderModel) -> None:
    weight = encoder.encoder.block[0].layer[0].SelfAttention.v.weight
    weight.data += torch.ones_like(weight)


def block_removed(encoder: T5EncoderModel) -> None:
    encoder.encoder.block = encoder.encoder.block[:-1]


class Halved(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options) * 0.5


def layer_replaced(encoder: T5EncoderModel) -> None:
    layers = encoder.encoder.block[0].layer
    layers[1] = Halved(layers[1])


def hook(encoder: T5EncoderModel) -> None:
    encoder.register_forward_hook(lambda module, args, out: (out[0] * 2,))


def inner_hook(encoder: T5EncoderModel) -> None:
    encoder.encoder.final_layer_norm.register_forward_hook(lambda module, args, out: out * 2)


def assigned_forward(encoder: T5EncoderModel) -> None:
    forward = encoder.forward
    encoder.forward = lambda *args, **options: (forward(*args, **options)[0] * 2,)


@pytest.mark.parametrize(
    "change",
    [
        scale_in_place,
        optimizer_step,
        load,
        load_and_assign,
        moving_average,
        exchanged_data,
        other_dtype,
        merged_by_hand,
        block_removed,
        layer_replaced,
        hook,
        inner_hook,
        assigned_forward,
    ],
)
def test_changed_weights_and_code_are_used(no_grad: None, change: Any) -> None:
    encoder = tiny_text_encoder()
    before, _ = encode(encoder, [""], 1)
    change(encoder)
    after, _ = encode(encoder, [""], 1)
    assert torch.equal(after, encoder(torch.tensor([[1]]))[0])
    assert not torch.equal(after, before)


def test_what_a_hook_has_changed_is_not_kept(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    plain = encoder(torch.tensor([[1]]))[0]
    with encoder.register_forward_hook(lambda module, args, out: (out[0] * 2,)):
        assert torch.equal(encode(encoder, [""], 1)[0], 2 * plain)
    assert torch.equal(encode(encoder, [""], 1)[0], plain)


def test_another_method_of_the_class_is_used(no_grad: None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, forward = tiny_text_encoder(), T5EncoderModel.forward
    before, _ = encode(encoder, [""], 1)
    monkeypatch.setattr(T5EncoderModel, "forward", lambda *args, **options: (forward(*args, **options)[0] * 2,))
    assert torch.equal(encode(encoder, [""], 1)[0], 2 * before)


def test_dropout_is_not_frozen(no_grad: None) -> None:
    encoder = tiny_text_encoder().train()
    assert not torch.equal(encode(encoder, [""])[0], encode(encoder, [""])[0])


def test_lower_precision_of_autocast_is_not_kept(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = encode(encoder, [""], 1)
    exact, _ = encode(encoder, [""], 1)
    assert not torch.equal(rough, exact)
    assert torch.equal(exact, encoder(torch.tensor([[1]]))[0])


def test_a_freed_encoder_is_freed(no_grad: None) -> None:
    encoder = tiny_text_encoder()
    encode(encoder, ["", "a cat"])
    gone = weakref.ref(encoder)
    weight_gone = weakref.ref(encoder.shared.weight)
    del encoder
    gc.collect()
    assert gone() is None
    assert weight_gone() is None


def test_two_encoders_do_not_share_it(no_grad: None) -> None:
    first, second = tiny_text_encoder(seed=0), tiny_text_encoder(seed=1)
    assert not torch.equal(encode(first, [""])[0], encode(second, [""])[0])
    assert torch.equal(encode(first, [""])[0], encode(tiny_text_encoder(seed=0), [""])[0])


def test_threads_share_a_tokenizer() -> None:
    """A fast tokenizer keeps the truncation of its last call, whichever thread made it."""
    tokenizer, texts = tiny_tokenizer(), ["a red cube " * 30]

    def right(length: int) -> bool:
        return all(len(_tokenize(tokenizer, texts, length)[0]) == length for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(10, 18)))


def test_an_encoder_whose_config_has_another_name_for_its_width(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPTextConfig(vocab_size=len(pipe.tokenizer) + 5, max_position_embeddings=400, **size)
    with_clip = PixArtSigmaPipeline(**{**pipe.components, "text_encoder": transformers.CLIPTextModel(clip).eval()})
    with_clip.enable_prompt_cache(tmp_path)
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent"}
    assert with_clip("a cat", **options).images.shape == (1, 4, 8, 8)
    wide = transformers.CLIPTextConfig(vocab_size=300, **{**size, "hidden_size": 48})
    with_clip.text_encoder = transformers.CLIPTextModel(wide)
    with pytest.raises(InputError, match="48 channels"):
        with_clip("a cat", **options)
