"""Embeddings of prompts on disk: found again, never stale, damage survived, size kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto import compute_as_stored, compute_in_float32
from impasto.errors import InputError, OutputError
from impasto.pipelines import pixart
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.pipelines.prompt_cache import INDEX_NAME, fingerprint

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, write_pipeline

Texts = list[str]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Texts]:
    """The texts that a text encoder was given."""
    calls: list[Texts] = []
    encode = pixart.encode_texts

    def spy(tokenizer: Any, text_encoder: Any, texts: Texts, *args: Any) -> Any:
        calls.append(texts)
        return encode(tokenizer, text_encoder, texts, *args)

    monkeypatch.setattr(pixart, "encode_texts", spy)
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"))


def load(folder: Path, **options: Any) -> PixArtSigmaPipeline:
    pipe = PixArtSigmaPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def embed(pipe: PixArtSigmaPipeline, prompt: str | Texts, **options: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in pipe.encode_prompt(prompt, **options) if x is not None)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_a_repeated_prompt_is_not_encoded(tmp_path: Path, encoded: list[Texts]) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = embed(pipe, ["a cat", "a red cube"], negative_prompt="grey", num_images_per_prompt=2)
    pipe.enable_prompt_cache(tmp_path / "new" / "cache")
    encoded.clear()
    for _ in range(2):
        found = embed(pipe, ["a cat", "a red cube"], negative_prompt="grey", num_images_per_prompt=2)
        assert same(found, expected)
    assert encoded == [["a cat", "a red cube", "grey"]]
    embed(pipe, ["a red cube", "a dog"])
    assert encoded[1:] == [["a dog", ""]]
    assert len(entries(tmp_path / "new" / "cache")) == 5
    pipe.disable_prompt_cache()
    embed(pipe, "a cat")
    assert encoded[2:] == [["a cat", ""]]


def test_what_a_hook_computes_is_not_written(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = embed(pipe, "a cat")
    pipe.enable_prompt_cache(tmp_path)
    with pipe.text_encoder.register_forward_hook(lambda module, args, out: (out[0] * 2,)):
        assert not same(embed(pipe, "a cat"), expected)
    assert not entries(tmp_path)
    assert same(embed(pipe, "a cat"), expected)


def test_no_text_encoder_is_needed(folder: Path, tmp_path: Path) -> None:
    def draw(pipe: PixArtSigmaPipeline) -> Tensor:
        noise = torch.ones(1, 4, 8, 8)
        images: Tensor = pipe("A Cat", num_inference_steps=2, latents=noise, output_type="pt").images
        return images

    pipe = load(folder)
    pipe.enable_prompt_cache(tmp_path)
    expected = draw(pipe)
    pipe = load(folder, text_encoder=None, tokenizer=None)
    with pytest.raises(InputError, match="no text_encoder"):
        draw(pipe)
    pipe.enable_prompt_cache(tmp_path)
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(InputError, match="needs the"):
        pipe("a dog")
    stranger = tiny_pipeline(PixArtSigmaPipeline, text_encoder=None)  # of no checkpoint
    stranger.enable_prompt_cache(tmp_path)
    with pytest.raises(InputError, match="needs the text_encoder"):
        draw(stranger)


def test_a_checkpoint_that_has_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "model")
    pipe = load(folder)
    pipe.enable_prompt_cache(tmp_path / "cache")
    embed(pipe, "a cat")
    (folder / "text_encoder" / "model.safetensors").unlink()  # not needed any more
    pipe = load(folder, text_encoder=None)
    pipe.enable_prompt_cache(tmp_path / "cache")
    embed(pipe, "a cat")
    tiny_text_encoder(num_layers=3).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match="needs the text_encoder"):
        embed(pipe, "a cat")


def test_what_an_embedding_depends_on(tmp_path: Path, encoded: list[Texts]) -> None:
    """Length, weights, precision, vocabulary: each has entries of its own."""
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(tmp_path)
    embed(pipe, "a cat", max_sequence_length=20)
    embed(pipe, "a cat", max_sequence_length=30)
    assert len(encoded) == 2
    with torch.no_grad():
        pipe.text_encoder.encoder.block[1].layer[0].SelfAttention.v.weight.mul_(1.5)
    changed = embed(pipe, "a cat", max_sequence_length=20)
    assert len(encoded) == 3
    pipe.text_encoder = tiny_text_encoder()
    first = embed(pipe, "a cat", max_sequence_length=20)
    assert len(encoded) == 3
    assert not torch.equal(first[0], changed[0])
    pipe.to(torch.bfloat16)
    embed(pipe, "a cat", max_sequence_length=20)
    assert len(encoded) == 4


def test_results_of_another_precision_are_not_kept_for_this_one(tmp_path: Path) -> None:
    pipe, cached = (tiny_pipeline(PixArtSigmaPipeline) for _ in range(2))
    cached.enable_prompt_cache(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        embed(cached, "a cat")
    assert not entries(tmp_path)
    assert same(embed(cached, "a cat"), embed(pipe, "a cat"))
    compute_as_stored(cached.text_encoder)
    one = fingerprint(cached.text_encoder, cached.tokenizer)
    compute_in_float32(cached.text_encoder)
    assert one != fingerprint(cached.text_encoder, cached.tokenizer)


def test_a_wrapper_without_a_config_is_asked_every_time(tmp_path: Path, encoded: list[Texts]) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.dtype, self.device = inner, inner.dtype, inner.device

        def forward(self, *args: Any, **options: Any) -> Any:
            return self.inner(*args, **options)

    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = embed(pipe, "a cat")
    pipe.text_encoder = Wrapper(pipe.text_encoder).eval()
    pipe.enable_prompt_cache(tmp_path)
    encoded.clear()
    for _ in range(2):
        assert same(embed(pipe, "a cat"), expected)
    assert len(encoded) == 2
    assert not entries(tmp_path)


def test_fingerprints() -> None:
    tokenizer = tiny_tokenizer()
    plain = fingerprint(tiny_text_encoder(), tokenizer)
    assert plain == fingerprint(tiny_text_encoder(), tokenizer)
    assert plain == fingerprint(torch.compile(tiny_text_encoder(), backend="eager"), tokenizer)
    assert plain != fingerprint(tiny_text_encoder(seed=1), tokenizer)

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {**tokenizer.get_vocab(), "x": 999}

    assert plain != fingerprint(tiny_text_encoder(), Other())
    config = tiny_text_encoder()
    config.config.relative_attention_max_distance = 64
    assert plain != fingerprint(config, tokenizer)


def test_a_quantised_encoder_has_a_fingerprint_of_its_own() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    found = []
    for seed in (0, 1, 0):
        encoder = tiny_text_encoder(seed=seed)
        quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig())
        found.append(fingerprint(encoder, tiny_tokenizer()))
    assert found[0] == found[2] != found[1]
    assert found[0] != fingerprint(tiny_text_encoder(), tiny_tokenizer())


def test_gradients_are_recorded_as_without_a_cache(tmp_path: Path, encoded: list[Texts]) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(tmp_path)
    embed(pipe, "a cat")
    assert pipe.encode_prompt("a cat").prompt_embeds.requires_grad
    assert len(encoded) == 2
    pipe.text_encoder.requires_grad_(False)
    assert not pipe.encode_prompt("a cat").prompt_embeds.requires_grad
    assert len(encoded) == 2
    pipe.text_encoder.train()
    pipe.encode_prompt("a cat")
    assert len(encoded) == 3


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, None])
def test_damaged_entries_are_written_anew(
    damage: bytes | None, tmp_path: Path, encoded: list[Texts], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(tmp_path)
    expected = embed(pipe, "a cat", do_classifier_free_guidance=False)
    (path,) = entries(tmp_path)
    path.write_bytes(path.read_bytes()[:-10] if damage is None else damage)
    assert same(embed(pipe, "a cat", do_classifier_free_guidance=False), expected)
    assert "is damaged" in caplog.text
    assert len(encoded) == 2
    assert same(embed(pipe, "a cat", do_classifier_free_guidance=False), expected)
    assert len(encoded) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # no half-written file


def test_a_damaged_index_is_written_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / INDEX_NAME).write_text("[1")
    pipe = load(folder)
    pipe.enable_prompt_cache(tmp_path)
    embed(pipe, "a cat")
    assert "is damaged" in caplog.text
    (entry,) = json.loads((tmp_path / INDEX_NAME).read_text()).values()
    assert entry["encoder"].startswith(fingerprint(pipe.text_encoder, pipe.tokenizer))


def test_what_was_not_used_for_longest_is_removed(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_prompt_cache(tmp_path)
    options: dict[str, Any] = {"do_classifier_free_guidance": False}
    for age, prompt in enumerate(["a cat", "a dog", "a cube"]):
        before = set(entries(tmp_path))
        embed(pipe, prompt, **options)
        (new,) = set(entries(tmp_path)) - before
        os.utime(new, (1000 + age, 1000 + age))
    dog = sorted(entries(tmp_path), key=lambda path: path.stat().st_mtime)[1]
    embed(pipe, "a cat", **options)  # used again: now the youngest
    total = sum(path.stat().st_size for path in entries(tmp_path))
    pipe.enable_prompt_cache(tmp_path, max_bytes=f"{total}B")
    embed(pipe, "the sky", **options)
    assert not dog.exists()
    assert sum(path.stat().st_size for path in entries(tmp_path)) <= total
    assert len(entries(tmp_path)) == 3


def test_no_text_is_written(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder)
    pipe.enable_prompt_cache(tmp_path)
    embed(pipe, "a secret cactus")
    assert all(b"cactus" not in path.read_bytes() for path in tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    with pytest.raises(OutputError, match="cannot be created"):
        pipe.enable_prompt_cache(tmp_path / "file")
    pipe.enable_prompt_cache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    with caplog.at_level(logging.WARNING):
        embed(pipe, "a cat")  # encoded all the same
    assert "cannot be written" in caplog.text
