"""What transformers loads through our one place is what it would have loaded itself; tests/hostile has the damaged."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentencepiece
import tokenizers
import torch
from transformers import ByT5Tokenizer, GlmImageForConditionalGeneration, GlmImageProcessor, T5EncoderModel, T5Tokenizer

import impasto
from impasto.checkpoints.foreign.charsmap import MOST_GROWTH, fault_of_charsmap
from impasto.checkpoints.foreign.configs import GLM_IMAGE, read_model_config
from impasto.checkpoints.foreign.errors import held_back_stderr, translated
from impasto.checkpoints.foreign.from_transformers import load_model, load_processor, load_tokenizer
from impasto.errors import CheckpointError, ConfigurationError, MissingDependencyError, ResourceError

from ...tiny import WORDS, tiny_text_encoder, write_tokenizer
from ...tiny_glm import prior_parts

TEXTS = ["a red cube on top of a blue sphere", "", "zebra <extra_id_3> </s> é ﬁ 漢字", "  x  y\n\tz", "<pad> <more>"]
WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"


# --- models ---


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    tiny_text_encoder().save_pretrained(folder)
    return folder


def load_t5(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    return load_model("T5EncoderModel", folder, dtype, variant, None)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_text_encoder_is_what_transformers_loads(t5: Path, dtype: torch.dtype | None) -> None:
    ours = load_t5(t5, dtype)
    theirs = T5EncoderModel.from_pretrained(t5, dtype="auto" if dtype is None else dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
    assert not ours.training
    assert ours.dtype == theirs.dtype
    assert ours.encoder.embed_tokens.weight is ours.shared.weight
    assert ours.config.to_dict() == theirs.config.to_dict()
    ids = torch.tensor([[3, 4, 5, 1]])
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=0, atol=0)


def test_float16_keeps_what_would_overflow(t5: Path) -> None:
    found = {tensor.dtype for name, tensor in load_t5(t5, torch.float16).state_dict().items() if ".wo." in name}
    assert found == {torch.float32}


def test_weights_stay_in_the_mapped_file(t5: Path) -> None:
    """As stored, they are no second copy: the memory of every tensor is in a mapping of the file."""
    model = load_t5(t5)
    file = str((t5 / "model.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert all(any(low <= tensor.data_ptr() < high for low, high in spans) for tensor in model.state_dict().values())


def test_other_names_of_files(tmp_path: Path) -> None:
    encoder = tiny_text_encoder()
    encoder.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="30KB")
    encoder.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    encoder.save_pretrained(tmp_path / "pickle")
    torch.save(encoder.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    for folder, variant in (("variant", "fp16"), ("shards", None), ("pickle", None)):
        found = load_t5(tmp_path / folder, variant=variant).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_text_encoder_is_found_under_the_name_of_its_twin(t5: Path, tmp_path: Path) -> None:
    shutil.copytree(t5, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    model = load_t5(tmp_path)
    assert torch.equal(model.shared.weight, tensors["encoder.embed_tokens.weight"])
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_prior_is_what_transformers_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prior_parts()["vision_language_encoder"].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**settings, "do_sample": True, "temperature": 0.9, "top_p": 0.75})
    )
    ours: Any = load_model("GlmImageForConditionalGeneration", tmp_path, None, None, None)
    theirs = GlmImageForConditionalGeneration.from_pretrained(tmp_path)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert (ours.generation_config.temperature, ours.generation_config.top_p) == (0.9, 0.75)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id
    for name, tensor in [*theirs.named_buffers(), *theirs.state_dict().items()]:
        assert torch.equal(dict([*ours.named_buffers(), *ours.state_dict().items()])[name], tensor)
    assert not caplog.text

    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file({**tensors, "model.more": torch.ones(2)}, tmp_path / "model.safetensors")
    load_model("GlmImageForConditionalGeneration", tmp_path, None, None, None)
    assert "no place for 1 tensors: model.more" in caplog.text


def test_a_prior_without_a_token_of_padding(tmp_path: Path) -> None:
    """transformers refuses null there."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "glm_image", "text_config": {"pad_token_id": None}}))
    assert read_model_config(path, GLM_IMAGE, ["glm_image"]) == {"text_config": {}, "dtype": None}


def test_weights_that_torchao_quantized(t5: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    tiny_text_encoder(d_model=64).save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    small: Any = T5EncoderModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=settings)
    small.save_pretrained(tmp_path / "int8")
    found = load_t5(tmp_path / "int8")
    ids = torch.tensor([[3, 4, 5, 1]])
    torch.testing.assert_close(found(ids)[0], small(ids)[0])
    assert type(found.encoder.block[0].layer[0].SelfAttention.q.weight).__name__ == "Int8Tensor"
    path = tmp_path / "int8" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 3}))
    with pytest.raises(CheckpointError, match="num_layers is 3"):
        load_t5(tmp_path / "int8")


def test_weights_that_torchao_quantized_for_a_cpu(t5: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    tiny_text_encoder(d_model=64).save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    small: Any = T5EncoderModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, quantization_config=settings)
    small.save_pretrained(tmp_path / "int4")
    ids = torch.tensor([[3, 4, 5, 1]])
    torch.testing.assert_close(load_t5(tmp_path / "int4")(ids)[0], small(ids)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
    ids=["fp4", "nested nf4", "fp4 in bfloat16", "int8"],
)
def test_weights_that_bitsandbytes_packed(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_text_encoder(d_model=64).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(**options)
    small: Any = T5EncoderModel.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=settings)
    small.save_pretrained(tmp_path / "packed")
    ids = torch.tensor([[3, 4, 5, 1]])
    torch.testing.assert_close(load_t5(tmp_path / "packed")(ids)[0], small(ids)[0])


# --- tokenizers ---


def published(folder: Path) -> None:
    """As T5's own are: sentinels in every file."""
    write_tokenizer(folder)
    count = len(T5Tokenizer.from_pretrained(folder))
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    tokens = {
        **dict(enumerate(["<pad>", "</s>", "<unk>"])),
        **{count + 99 - i: name for i, name in enumerate(sentinels)},
    }
    path = folder / "tokenizer_config.json"
    more = {
        "extra_ids": 100,
        "additional_special_tokens": sentinels,
        "added_tokens_decoder": {str(i): {"content": name, **flags, "special": True} for i, name in tokens.items()},
        "legacy": True,
        "sp_model_kwargs": {},
        "clean_up_tokenization_spaces": True,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    special = {"additional_special_tokens": sentinels, "eos_token": {"content": "</s>", **flags}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({name: count + 99 - i for i, name in enumerate(sentinels)}))


def early(folder: Path) -> None:
    """As they were before the settings listed every token."""
    published(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings))


def saved_again(folder: Path) -> None:
    published(folder.with_name("published"))
    T5Tokenizer.from_pretrained(folder.with_name("published")).save_pretrained(folder)


def bundled(folder: Path) -> None:
    shutil.copytree(Path(impasto.__file__).parent / "scenes" / "checkpoint" / "tokenizer", folder)


def after_a_call(folder: Path) -> None:
    """A tokenizer.json with the truncation and the padding of the call before it was saved."""
    write_tokenizer(folder.with_name("before"))
    tokenizer = T5Tokenizer.from_pretrained(folder.with_name("before"))
    tokenizer(["a"], max_length=3, padding="max_length", truncation=True)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("make", [write_tokenizer, published, early, saved_again, bundled, after_a_call])
def test_a_tokenizer_is_what_transformers_loads(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    folder = tmp_path / "tokenizer"
    make(folder)
    ours, theirs = load_tokenizer("T5Tokenizer", folder), T5Tokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.model_max_length == theirs.model_max_length
    assert ours.special_tokens_map == theirs.special_tokens_map
    options = {"padding": True, "truncation": True, "max_length": 12}
    assert ours(TEXTS, **options)["input_ids"] == theirs(TEXTS, **options)["input_ids"]
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours.name_or_path == str(folder)
    ours.save_pretrained(tmp_path / "again")
    again = load_tokenizer("T5Tokenizer", tmp_path / "again")
    assert again(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]


def test_a_machine_without_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match=r"temporary files cannot be written.*TMPDIR"):
        load_tokenizer("T5Tokenizer", tmp_path)


def test_byt5_is_what_transformers_loads(tmp_path: Path) -> None:
    ByT5Tokenizer(extra_ids=10).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer("ByT5Tokenizer", tmp_path), ByT5Tokenizer.from_pretrained(tmp_path)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()


def test_a_processor_is_what_transformers_loads(tmp_path: Path) -> None:
    prior_parts()["processor"].save_pretrained(tmp_path)
    ours, theirs = load_processor(tmp_path), GlmImageProcessor.from_pretrained(tmp_path)
    assert ours.tokenizer.backend_tokenizer.to_str() == theirs.tokenizer.backend_tokenizer.to_str()
    assert ours.image_processor.to_dict() == theirs.image_processor.to_dict()
    assert ours.chat_template == theirs.chat_template
    names = ("image_token", "grid_bos_token", "grid_eos_token", "bos_token", "image_token_id")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in names)
    ours.save_pretrained(tmp_path / "again")
    assert load_processor(tmp_path / "again").image_processor.to_dict() == theirs.image_processor.to_dict()


# --- the table of replacements ---


def charsmap(rule: str) -> bytes:
    model = io.BytesIO()
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS.split(), k=10)) for _ in range(300)]),
        model_writer=model,
        vocab_size=128,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        num_threads=1,
        minloglevel=2,
    )
    from sentencepiece import sentencepiece_model_pb2

    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model.getvalue())
    return bytes(parsed.normalizer_spec.precompiled_charsmap)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"])
def test_every_table_of_sentencepiece_is_accepted(rule: str) -> None:
    assert fault_of_charsmap(charsmap(rule)) is None


def test_a_table_that_is_accepted_harms_nobody() -> None:
    """Damaged at random: what passes turns every character into another text, without a panic, and a short one."""
    good = charsmap("nmt_nfkc")
    characters = "".join(chr(code) for code in range(1, 0x3000))
    rng = random.Random(0)
    passed = 0
    for _ in range(60):
        table = bytearray(good)
        for _ in range(rng.choice([1, 2, 5])):
            table[rng.randrange(4, len(table))] = rng.randrange(256)
        if fault_of_charsmap(bytes(table)) is None:
            passed += 1
            text = tokenizers.normalizers.Precompiled(bytes(table)).normalize_str(characters)
            assert len(text) < MOST_GROWTH * len(characters)
    assert 5 < passed < 60


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (b"\x01", "trie has 1 bytes"),
        (b"\xff" * 64, "trie has 4294967295 bytes"),
        (b"\x00" * 64, "trie has 0 bytes"),
        (b"\x06\x00\x00\x00" + b"\x00" * 64, "trie has 6 bytes"),
        (b"\x04\x00\x00\x00" + b"\xff" * 64, "leads out of it"),
    ],
)
def test_a_table_that_leads_nowhere(table: bytes, fault: str) -> None:
    assert fault in (fault_of_charsmap(table) or "")


# --- errors ---


def test_a_panic_is_an_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    table = (1024).to_bytes(4, "little") + b"\xff\xff\xff\x7f" * 256 + b"abc"  # offsets far behind its end
    with pytest.raises(CheckpointError, match="x cannot be loaded as a table"), translated("a table", Path("x")):  # noqa: SIM117
        with held_back_stderr():
            tokenizers.normalizers.Precompiled(table).normalize_str("abc")
    assert capfd.readouterr().err == ""


def test_warnings_are_printed_where_nothing_is_raised(capfd: pytest.CaptureFixture[str]) -> None:
    with held_back_stderr():
        os.write(2, b"from below\n")
        print("from Python", file=sys.__stderr__)
    assert capfd.readouterr().err == "from below\nfrom Python\n"


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError("first\nsecond"), CheckpointError, "cannot be loaded as T5: first. Download"),
        (KeyError("a"), CheckpointError, "cannot be loaded as T5: a. Download"),
        (OSError("Please install tiktoken"), CheckpointError, "cannot be loaded as T5: OSError. Download"),
        (
            RuntimeError("set `ignore_mismatched_sizes`"),
            CheckpointError,
            "cannot be loaded as T5: RuntimeError. Download",
        ),
        (RuntimeError("\x1b[2J"), CheckpointError, r"\x1b[2J"),
        (RuntimeError(""), CheckpointError, "RuntimeError"),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), RuntimeError, "not enough memory"),
        (MemoryError("x"), MemoryError, "x"),
        (KeyboardInterrupt("x"), KeyboardInterrupt, "x"),
        (SystemExit("x"), SystemExit, "x"),
        (ConfigurationError("x"), ConfigurationError, "x"),
        (ModuleNotFoundError("no", name="x"), CheckpointError, "folder cannot be loaded as T5. Download"),
        (ModuleNotFoundError("no", name="bitsandbytes"), MissingDependencyError, "folder is quantized"),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, BaseException) else "",
)
def test_what_the_libraries_raise(error: BaseException, expected: type[BaseException], message: str) -> None:
    quantized = expected is MissingDependencyError
    with pytest.raises(expected) as caught, translated("T5", Path("folder"), quantized=quantized):
        raise error
    assert type(caught.value) is expected
    assert message in str(caught.value)
