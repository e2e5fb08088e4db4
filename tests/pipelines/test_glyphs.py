"""The quoted texts of a prompt and their embeddings, against those of the diffusers pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import GlmImagePipeline as Reference
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from impasto.pipelines.glyphs import encode_glyphs, quoted_texts

PROMPTS = {
    "none": "a red cube",
    "one": 'a sign that says "open"',
    "two": "a sign that says \"open\" and 'now'",
    "all kinds": "“first” 「third」 and 'none', then \"second\" “again”",
    "empty quotes": 'a sign ""',
    "unpaired": "it's a cube",
}


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return ByT5Tokenizer(), T5EncoderModel(config).eval()


def test_texts_follow_each_other_by_kind_of_quote() -> None:
    assert quoted_texts(PROMPTS["all kinds"]) == ["none", "first", "again", "second", "third"]
    assert quoted_texts(PROMPTS["unpaired"]) == []
    for prompt in PROMPTS.values():
        assert [quoted_texts(prompt)] == Reference.get_glyph_texts(None, prompt)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_alone_is_encoded_as_by_the_reference(parts: tuple[Any, Any], prompt: str) -> None:
    class Stub:
        tokenizer, text_encoder = parts
        get_glyph_texts = Reference.get_glyph_texts

    with torch.no_grad():
        expected = Reference._get_glyph_embeds(Stub(), [prompt], 2048, torch.device("cpu"))
    embeds, mask = encode_glyphs(*parts, [prompt], 2048, "cpu")
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)
    assert mask.tolist() == [[1] * expected.shape[1]]


def test_in_a_batch_as_alone_and_padded_behind(parts: tuple[Any, Any]) -> None:
    embeds, mask = encode_glyphs(*parts, list(PROMPTS.values()), 2048, "cpu")
    assert embeds.shape[0] == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS.values()):
        alone, _ = encode_glyphs(*parts, [prompt], 2048, "cpu")
        length = alone.shape[1]
        torch.testing.assert_close(embeds[row, :length], alone[0], rtol=1e-5, atol=1e-5)
        assert mask[row].tolist() == [1] * length + [0] * (embeds.shape[1] - length)
        assert not embeds[row, length:].any()


def test_equal_texts_are_encoded_once_and_long_ones_cut(parts: tuple[Any, Any]) -> None:
    tokenizer, encoder = parts
    rows: list[int] = []
    handle = encoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    encode_glyphs(tokenizer, encoder, ["a cube"] * 3 + ['"a"'], 2048, "cpu")
    handle.remove()
    assert rows == [2]
    embeds, _ = encode_glyphs(tokenizer, encoder, ['"abcdefgh"'], 4, "cpu")
    assert embeds.shape[1] == 4
