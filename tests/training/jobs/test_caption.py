"""Captions of a folder by a small random vision-language model, and by functions that stand for one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from impasto.checkpoints.foreign.vision_language import load_vision_language
from impasto.cli import app
from impasto.errors import CheckpointError, ConfigurationError, InputError
from impasto.training.data.captions import Captions
from impasto.training.data.folders import FolderSource
from impasto.training.jobs.caption import PARTIAL, Captioner, caption_folder

from ..data.folder_of_images import smooth_image, write_folder

SPECIAL = ["<pad>", "<unk>", "</s>", "<image>", "USER", ":", "ASSISTANT"]
WORDS = [*SPECIAL, *["a", "red", "cube", "on", "the", "floor", "Describe", "this", "image", "with"]]
CHAT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
    "{% endfor %}{% endfor %} ASSISTANT:"
)


def write_llava(folder: Path) -> Path:
    """A random LLaVA of a few thousand parameters."""
    import tokenizers
    import transformers as t

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<image>", "<pad>", "</s>"])
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = t.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=t.LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, bos_token_id=2),
        image_token_index=WORDS.index("<image>"),
    )
    with torch.random.fork_rng([]):
        model = t.LlavaForConditionalGeneration(config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@lru_cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_vision_language(folder, torch.float32, torch.device("cpu"))


def test_a_small_model_captions_a_folder(tmp_path: Path, llava: Path) -> None:
    folder = write_folder(tmp_path, [(20, 30), (16, 16), (50, 20)])
    command = ["caption", str(folder), "--model", str(llava), "--max-tokens", "6", "--batch-size", "2", "--overwrite"]
    with pytest.raises(SystemExit) as stop:
        app([*command, "--device", "cpu", "--dtype", "float32"])
    assert stop.value.code == 0
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == [f"a red cube {i}" for i in range(3)]
    captioner = Captioner(*loaded(llava), max_tokens=6)
    alone = [captioner([smooth_image(*size, seed)])[0] for seed, size in enumerate([(20, 30), (16, 16), (50, 20)])]
    assert [record["dense"] for record in records] == alone  # whatever the batch
    assert len(set(alone)) > 1
    assert all(set(text.split()) <= set(WORDS) for text in alone)
    assert not (folder / PARTIAL).exists()


def count(images: Sequence[Image.Image]) -> list[str]:
    return [f"an image of {image.width} x {image.height}" for image in images]


def test_captions_join_those_that_are_there(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8), (8, 12)], captions=False)
    (tmp_path / "1.txt").write_text("a person wrote this")
    assert caption_folder(tmp_path, count, settings={}) == {"captioned": 2, "kept": 0, "broken": 0}
    source = FolderSource(tmp_path)
    assert [source.captions(i) for i in range(2)] == [
        Captions((), ("an image of 8 x 8",)),
        Captions(("a person wrote this",), ("an image of 12 x 8",)),
    ]
    assert caption_folder(tmp_path, lambda images: 1 / 0, settings={})["kept"] == 2  # type: ignore[arg-type, return-value]


def test_images_that_were_added_later_are_captioned_too(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8)], captions=False)
    caption_folder(tmp_path, count, settings={})
    smooth_image(8, 12).save(tmp_path / "new.png")
    (tmp_path / "new.txt").write_text("a person wrote this")
    smooth_image(8, 12).save(tmp_path / "new_mask.png")
    counts = caption_folder(tmp_path, count, settings={}, mask_suffix="_mask")
    assert counts == {"captioned": 1, "kept": 1, "broken": 0}
    source = FolderSource(tmp_path)
    assert [source.name(i) for i in range(2)] == ["0.png", "new.png"]
    assert source.captions(1) == Captions(("a person wrote this",), ("an image of 12 x 8",))


def test_names_may_have_colons_and_be_written_in_several_ways(tmp_path: Path) -> None:
    write_folder(tmp_path / "sub", [(8, 8)], captions=False)
    smooth_image(8, 12).save(tmp_path / "12:30.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "sub\\0.png", "text": "written"}) + "\n")
    assert caption_folder(tmp_path, count, settings={}) == {"captioned": 2, "kept": 0, "broken": 0}
    source = FolderSource(tmp_path)
    assert {source.name(i): source.captions(i) for i in range(2)} == {
        "sub/0.png": Captions(("written",), ("an image of 8 x 8",)),
        "12:30.png": Captions((), ("an image of 12 x 8",)),
    }


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path: Path) -> None:
    smooth_image(8, 8).save(tmp_path / "ü.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).write_bytes((tmp_path / "ü.png").read_bytes())
    except OSError:
        pytest.skip("this disk takes valid UTF-8 alone")
    assert caption_folder(tmp_path, count, settings={})["captioned"] == 2
    assert sorted((tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()) == [
        r'{"file_name": "\udce9.png", "dense": "an image of 8 x 8"}',
        '{"file_name": "ü.png", "dense": "an image of 8 x 8"}',
    ]
    assert len(FolderSource(tmp_path)) == 2


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8)] * 5)
    before = (tmp_path / "metadata.jsonl").read_text()
    calls: list[int] = []

    def killed(images: Sequence[Image.Image]) -> list[str]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(images))
        return [f"caption {len(calls)}"] * len(images)

    with pytest.raises(KeyboardInterrupt):
        caption_folder(tmp_path, killed, settings={"model": "a"}, batch_size=2, overwrite=True)
    assert (tmp_path / "metadata.jsonl").read_text() == before
    with pytest.raises(ConfigurationError, match=r"unfinished job with other settings.*'model': 'a'"):
        caption_folder(tmp_path, count, settings={"model": "b"}, overwrite=True)
    with (tmp_path / PARTIAL).open("a") as file:
        file.write('{"file_name": "4.png", "den')  # what a full disk left of a line
    shown: list[int] = []
    caption_folder(tmp_path, count, settings={"model": "a"}, batch_size=2, overwrite=True, done=shown.append)
    records = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [record["dense"] for record in records] == ["caption 1"] * 2 + ["caption 2"] * 2 + ["an image of 8 x 8"]
    assert shown == [4, 1]


def test_broken_images_and_empty_captions_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, [(8, 8), (8, 12), (8, 16)], captions=False)
    (tmp_path / "0.png").write_bytes(b"nothing")

    def silent(images: Sequence[Image.Image]) -> list[str]:
        return ["" if image.width == 12 else "fine" for image in images]

    with caplog.at_level(logging.WARNING):
        assert caption_folder(tmp_path, silent, settings={}, max_broken=2) == {"captioned": 1, "kept": 0, "broken": 2}
    assert "1.png is left out: the model wrote nothing" in caplog.text
    assert [json.loads(line).get("dense") for line in (tmp_path / "metadata.jsonl").read_text().splitlines()] == [
        None,
        None,
        "fine",
    ]
    with pytest.raises(InputError, match=r"1 of 3 samples .* cannot be used.*0.png"):
        caption_folder(tmp_path, silent, settings={}, max_broken=0)


def test_models_that_are_refused(tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"it has no config.json"):
        load_vision_language(tmp_path, torch.float32, cpu)
    content = json.loads((llava / "config.json").read_text())
    for change, message in (
        ({"auto_map": {"AutoConfig": "code.Config"}}, "asks for code of the checkpoint's own, which is never run"),
        ({"text_config": {**content["text_config"], "_attn_implementation": "owner/kernels"}}, "only eager and sdpa"),
        ({"model_type": "t5"}, "which does not prepare images"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_vision_language(tmp_path, torch.float32, cpu)

    import transformers

    def needs_torchvision(*arguments: Any, **options: Any) -> None:
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs_torchvision)
    with pytest.raises(CheckpointError, match="needs torchvision, which does not go with this package"):
        load_vision_language(llava, torch.float32, cpu)
