"""Damaged text encoders, priors, tokenizers and processors: an error of ours that names the file and the fault."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from ..tiny import tiny_text_encoder, write_tokenizer
from .loading import accepted, copy_components, edit_nested, outcome_of
from .sandbox import Outcome, copy_of, edit_json, refused, run

NAN, INF = float("nan"), float("inf")
#: What the libraries say and what helps nobody here.
FOREIGN_ADVICE = (
    "tiktoken",
    "weights_only=False",
    "ignore_mismatched_sizes",
    "trust_remote_code",
    "pip install",
    "Please",
)


def refused_plainly(outcome: Outcome, error: str, *named: str) -> None:
    refused(outcome, error, *named)
    assert not [advice for advice in FOREIGN_ADVICE if advice in outcome.message], outcome.message
    assert "panicked" not in outcome.stderr


# --- configs ---

T5_VALUES = [
    *(("num_layers", value, "ConfigurationError") for value in (NAN, INF, "2", [2], None, True, 0, -1, 2.5, 10**9)),
    *(("num_layers", value, "WeightsMismatchError") for value in (1, 3, 1000)),
    *(("d_model", value, "ConfigurationError") for value in (NAN, "32", None, 0, -32, 10**12, {})),
    *(("d_model", value, "WeightsMismatchError") for value in (16, 65_536)),
    *(("d_ff", value, "ConfigurationError") for value in ("64", -1, 10**10)),
    *(("d_kv", value, "ConfigurationError") for value in (NAN, 0, [8])),
    ("d_kv", 16, "WeightsMismatchError"),
    *(("num_heads", value, "ConfigurationError") for value in ("4", 0, None)),
    ("num_heads", 2, "WeightsMismatchError"),
    *(("vocab_size", value, "ConfigurationError") for value in (NAN, -1, 10**11, "89")),
    ("vocab_size", 10**6, "WeightsMismatchError"),
    *(("relative_attention_num_buckets", value, "ConfigurationError") for value in (0, 1, "32", 10**9)),
    *(("relative_attention_max_distance", value, "ConfigurationError") for value in (0, 8, None, NAN)),
    *(("layer_norm_epsilon", value, "ConfigurationError") for value in (NAN, -1.0, 0, "1e-6", INF, 10)),
    *(("dropout_rate", value, "ConfigurationError") for value in (NAN, 2, -0.1, "0.1")),
    *(
        ("feed_forward_proj", value, "ConfigurationError")
        for value in (None, 3, "evil", "gated-gated-gelu", "gated-evil")
    ),
    ("feed_forward_proj", "relu", "WeightsMismatchError"),
    *(("eos_token_id", value, "ConfigurationError") for value in ("1", -1, ["a"], {})),
    *(("pad_token_id", value, "ConfigurationError") for value in (NAN, -1)),
    *(("dtype", value, "ConfigurationError") for value in ("load", 32, "int8", ["float32"])),
    ("tie_word_embeddings", "yes", "ConfigurationError"),
    *(("model_type", value, "CheckpointError") for value in ("bert", None, 3, "glm_image")),
]


@pytest.mark.parametrize(("key", "value", "error"), T5_VALUES, ids=[f"{k}={v!r}" for k, v, _ in T5_VALUES])
def test_values_of_a_text_encoders_config(
    pixart_folder: Path, tmp_path: Path, key: str, value: Any, error: str
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder")
    edit_json(folder / "text_encoder" / "config.json", **{key: value})
    names = (key, "config.json") if error != "WeightsMismatchError" or key == "num_layers" else ("text_encoder",)
    refused_plainly(outcome_of(folder, "text_encoder"), error, *names)


GLM_VALUES = [
    *(("text_config.num_hidden_layers", value, "ConfigurationError") for value in (10**9, "2", NAN, None)),
    ("text_config.num_hidden_layers", 3, "WeightsMismatchError"),
    *(("vision_config.depth", value, "ConfigurationError") for value in (10**9, -1, [1])),
    ("vision_config.depth", 2, "WeightsMismatchError"),
    *(("text_config.hidden_size", value, "ConfigurationError") for value in (NAN, 0)),
    ("text_config.num_attention_heads", 3, "ConfigurationError"),
    ("text_config.num_key_value_heads", 3, "ConfigurationError"),
    ("vision_config.num_heads", 3, "ConfigurationError"),
    *(("vision_config.patch_size", value, "ConfigurationError") for value in (0, [16, 16], 10**6)),
    ("vision_config.spatial_merge_size", 64, "ConfigurationError"),
    *(("vision_config.image_size", value, "ConfigurationError") for value in (10**9, "64")),
    *(("vq_config.num_embeddings", value, "ConfigurationError") for value in (10**12, NAN)),
    ("vq_config.num_embeddings", 10**6, "WeightsMismatchError"),
    *(("text_config.rms_norm_eps", value, "ConfigurationError") for value in (NAN, -1)),
    *(("text_config.hidden_act", value, "ConfigurationError") for value in ("evil", 3)),
    *(("text_config.rope_parameters.rope_type", value, "ConfigurationError") for value in ("yarn", 3)),
    *(("text_config.rope_parameters.rope_theta", value, "ConfigurationError") for value in (NAN, 0, "1")),
    *(
        ("text_config.rope_parameters.mrope_section", value, "ConfigurationError")
        for value in ([1], [9, 9, 9], "a", [-1, 1, 2])
    ),
    *(("text_config.rope_parameters", value, "ConfigurationError") for value in (3, [1])),
    *(("text_config", value, "ConfigurationError") for value in ("a", 3, [])),
    ("text_config.vision_vocab_size", 41, "WeightsMismatchError"),
    *(("image_token_id", value, "ConfigurationError") for value in (-1, "a", NAN)),
]


@pytest.mark.parametrize(("key", "value", "error"), GLM_VALUES, ids=[f"{k}={v!r}" for k, v, _ in GLM_VALUES])
def test_values_of_a_priors_config(glm_folder: Path, tmp_path: Path, key: str, value: Any, error: str) -> None:
    folder = copy_components(glm_folder, tmp_path, "vision_language_encoder")
    edit_nested(folder / "vision_language_encoder" / "config.json", key, value)
    named = key if error == "ConfigurationError" else "vision_language_encoder"
    refused_plainly(outcome_of(folder, "vision_language_encoder"), error, named)


GENERATION = [
    *(("temperature", value) for value in (0, -1, NAN, "1", 1e-30)),
    *(("top_k", value) for value in (-1, 2.5, "50", 10**12)),
    *(("top_p", value) for value in (0, 1.5, NAN, [1])),
    ("eos_token_id", "a"),
    ("do_sample", "yes"),
]


@pytest.mark.parametrize(("key", "value"), GENERATION, ids=[f"{k}={v!r}" for k, v in GENERATION])
def test_values_of_a_priors_sampling(glm_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy_components(glm_folder, tmp_path, "vision_language_encoder")
    edit_json(folder / "vision_language_encoder" / "generation_config.json", **{key: value})
    refused_plainly(outcome_of(folder, "vision_language_encoder"), "ConfigurationError", "generation_config.json", key)


@pytest.mark.parametrize("component", ["text_encoder", "vision_language_encoder"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"num_layers": ' + "9" * 5000 + "}", "[" * 10_000, "\udcff"]
)
def test_a_config_that_is_no_json_object(
    pixart_folder: Path, glm_folder: Path, tmp_path: Path, component: str, content: str
) -> None:
    folder = copy_components(pixart_folder if component == "text_encoder" else glm_folder, tmp_path, component)
    (folder / component / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused_plainly(outcome_of(folder, component), "CheckpointError", component, "config.json")


LEGAL = [
    ("text_encoder", "initializer_factor", 1),
    ("text_encoder", "layer_norm_epsilon", 1),
    ("vision_language_encoder", "text_config.initializer_range", 0),
    ("vision_language_encoder", "text_config.rms_norm_eps", 1),
    ("vision_language_encoder", "vision_config.initializer_range", 0),
    ("vision_language_encoder", "vision_config.layer_norm_eps", 1),
    ("vision_language_encoder", "vq_config.initializer_range", 1),
]


@pytest.mark.parametrize(("component", "key", "value"), LEGAL, ids=[f"{k}={v!r}" for _, k, v in LEGAL])
def test_values_that_json_may_write(
    pixart_folder: Path, glm_folder: Path, tmp_path: Path, component: str, key: str, value: Any
) -> None:
    folder = copy_components(pixart_folder if component == "text_encoder" else glm_folder, tmp_path, component)
    edit_nested(folder / component / "config.json", key, value)
    accepted(outcome_of(folder, component))


# --- weights ---

QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
TWIN = "encoder.embed_tokens.weight"
Tensors = dict[str, Tensor]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_(name: str, change: Callable[[Tensor], Tensor], source: str = QUERY) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[source]).contiguous()}


WEIGHTS = {
    "missing": (without(QUERY), QUERY),
    "missing embedding": (without("shared.weight"), "shared.weight"),
    "left over": (with_("encoder.evil.weight", Tensor.clone), "encoder.evil.weight"),
    "another layer": (with_(QUERY.replace("block.0", "block.2"), Tensor.clone), "num_layers"),
    "a layer far away": (with_(QUERY.replace("block.0", "block.999999999"), Tensor.clone), "block.999999999"),
    "transposed": (with_("shared.weight", Tensor.t, "shared.weight"), "shared.weight"),
    "scalar": (with_(QUERY, lambda tensor: tensor[0, 0]), QUERY),
    "int8": (with_(QUERY, lambda tensor: tensor.to(torch.int8)), "int8"),
    "int64": (with_(QUERY, lambda tensor: tensor.to(torch.int64)), "int64"),
    "bool": (with_(QUERY, lambda tensor: tensor > 0), "bool"),
    "complex": (with_(QUERY, lambda tensor: tensor.to(torch.complex64)), "complex64"),
    "float8": (with_(QUERY, lambda tensor: tensor.to(torch.float8_e4m3fn)), "float8"),
    "another twin": (with_(TWIN, lambda tensor: tensor[:3].clone(), "shared.weight"), TWIN),
}


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


@pytest.mark.parametrize(("change", "named"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_do_not_fit(
    pixart_folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], named: str
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder")
    rewrite(folder / "text_encoder" / "model.safetensors", change)
    refused_plainly(outcome_of(folder, "text_encoder"), "WeightsMismatchError", "text_encoder", named)


HARMLESS = {
    "decoder": with_("decoder.block.0.layer.0.SelfAttention.q.weight", Tensor.clone),
    "decoder of integers": with_("decoder.final_layer_norm.weight", lambda tensor: tensor.to(torch.int8)),
    "lm_head": with_("lm_head.weight", Tensor.clone),
    "twin": with_(TWIN, Tensor.clone, "shared.weight"),
    "twin alone": lambda tensors: without("shared.weight")({**tensors, TWIN: tensors["shared.weight"]}),
    "bfloat16": with_(QUERY, Tensor.bfloat16),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_weights_with_what_a_whole_t5_has(
    pixart_folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder")
    rewrite(folder / "text_encoder" / "model.safetensors", change)
    accepted(outcome_of(folder, "text_encoder"))


PRIOR = "model.language_model.layers.0.mlp.down_proj.weight"
PRIOR_WEIGHTS = {
    "missing": (without(PRIOR), PRIOR),
    "missing head": (without("lm_head.weight"), "lm_head.weight"),
    "another layer": (with_(PRIOR.replace("0", "2"), Tensor.clone, PRIOR), "num_hidden_layers"),
    "transposed": (with_(PRIOR, Tensor.t, PRIOR), PRIOR),
    "int8": (with_(PRIOR, lambda tensor: tensor.to(torch.int8), PRIOR), "int8"),
}


@pytest.mark.parametrize(("change", "named"), PRIOR_WEIGHTS.values(), ids=PRIOR_WEIGHTS)
def test_a_priors_weights_that_do_not_fit(
    glm_folder: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], named: str
) -> None:
    folder = copy_components(glm_folder, tmp_path, "vision_language_encoder")
    rewrite(folder / "vision_language_encoder" / "model.safetensors", change)
    refused_plainly(outcome_of(folder, "vision_language_encoder"), "WeightsMismatchError", named)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def long_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, empty, text, long_header, gone, a_folder], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("component", ["text_encoder", "vision_language_encoder"])
def test_weights_that_are_damaged(
    pixart_folder: Path, glm_folder: Path, tmp_path: Path, component: str, damage: Callable[[Path], None]
) -> None:
    folder = copy_components(pixart_folder if component == "text_encoder" else glm_folder, tmp_path, component)
    damage(folder / component / "model.safetensors")
    refused_plainly(outcome_of(folder, component), "CheckpointError", component)


def in_shards(folder: Path) -> list[Path]:
    """The weights of the text encoder anew, in several files."""
    (folder / "text_encoder" / "model.safetensors").unlink()
    tiny_text_encoder().save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    return sorted((folder / "text_encoder").glob("model-*.safetensors"))


def a_shard_gone(shards: list[Path]) -> None:
    shards[1].unlink()


def a_tensor_twice(shards: list[Path]) -> None:
    name = next(iter(safetensors.torch.load_file(shards[0])))
    rewrite(shards[1], with_(name, Tensor.clone, next(iter(safetensors.torch.load_file(shards[1])))))


def shards_exchanged(shards: list[Path]) -> None:
    first = shards[0].read_bytes()
    shutil.copy(shards[1], shards[0])
    shards[1].write_bytes(first)


def a_shard_cut(shards: list[Path]) -> None:
    cut(shards[1])


def an_index_without_a_map(shards: list[Path]) -> None:
    edit_json(shards[0].parent / "model.safetensors.index.json", weight_map=[])


@pytest.mark.parametrize(
    "damage",
    [a_shard_gone, a_tensor_twice, shards_exchanged, a_shard_cut, an_index_without_a_map],
    ids=lambda damage: damage.__name__,
)
def test_shards_that_are_damaged(pixart_folder: Path, tmp_path: Path, damage: Callable[[list[Path]], None]) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder")
    shards = in_shards(folder)
    assert len(shards) > 2
    accepted(outcome_of(folder, "text_encoder"))
    damage(shards)
    refused_plainly(outcome_of(folder, "text_encoder"), "CheckpointError", "text_encoder", ".safetensors")


# --- weights that bitsandbytes packed ---


def packed_folders(folder: Path) -> None:
    """The text encoder of a pipeline packed in three ways. In a process of its own: the library starts threads."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    plain = folder / "plain"
    tiny_text_encoder(d_model=64).save_pretrained(plain)
    ways: dict[str, dict[str, Any]] = {
        "4": {"load_in_4bit": True},
        "nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "nf4"},
        "8": {"load_in_8bit": True},
    }
    for name, options in ways.items():
        settings = BitsAndBytesConfig(**options)
        model: Any = T5EncoderModel.from_pretrained(plain, dtype=torch.float32, quantization_config=settings)
        model.save_pretrained(folder / name)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed")
    packed_folders(folder)
    return folder


def load_packed(folder: str) -> None:
    from impasto.checkpoints.foreign.from_transformers import load_model

    load_model("T5EncoderModel", Path(folder), None, None, None)


NF4, FP4 = f"{QUERY}.quant_state.bitsandbytes__nf4", f"{QUERY}.quant_state.bitsandbytes__fp4"


def state_with(name: str, **changes: Any) -> Callable[[Tensors], Tensors]:
    def changed(tensors: Tensors) -> Tensors:
        content = {**json.loads(bytes(tensors[name].tolist())), **changes}
        data = json.dumps({key: value for key, value in content.items() if value is not ...}).encode()
        return {**tensors, name: torch.tensor(list(data), dtype=torch.uint8)}

    return changed


def cut_short(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name].flatten()[:-1].clone()}


SCALES = QUERY.replace("weight", "SCB")
PACKED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    **{f"blocks of {n}": ("4", state_with(FP4, blocksize=n), FP4) for n in (1, -1, 2**40, "64", 64.0, None, ...)},
    "larger blocks": ("4", state_with(FP4, blocksize=128), f"{QUERY}.absmax"),
    **{f"a shape of {n}": ("4", state_with(FP4, shape=n), FP4) for n in (None, [2048], [-32, -64], [32.0, 64], "a")},
    "a larger shape": ("4", state_with(FP4, shape=[64, 64]), QUERY),
    "a type of no name": ("4", state_with(FP4, quant_type="nf4"), FP4),
    "a dtype of no name": ("4", state_with(FP4, dtype="load"), FP4),
    "scales in the state": ("4", state_with(FP4, absmax=[1.0]), FP4),
    "no JSON": ("4", with_(FP4, lambda tensor: tensor + 1, FP4), FP4),
    "a long state": ("4", with_(FP4, lambda tensor: tensor.repeat(1000), FP4), FP4),
    "a state of floats": ("4", with_(FP4, Tensor.float, FP4), FP4),
    "no state": ("4", without(FP4), QUERY),
    "no scales": ("4", without(f"{QUERY}.absmax"), f"{QUERY}.absmax"),
    "fewer scales": ("4", cut_short(f"{QUERY}.absmax"), f"{QUERY}.absmax"),
    "fewer codes": ("4", cut_short(f"{QUERY}.quant_map"), f"{QUERY}.quant_map"),
    "fewer values": ("4", cut_short(QUERY), QUERY),
    "scales of another dtype": ("4", with_(f"{QUERY}.absmax", Tensor.byte, f"{QUERY}.absmax"), f"{QUERY}.absmax"),
    "scales of scales": ("4", with_(f"{QUERY}.nested_absmax", Tensor.clone, f"{QUERY}.absmax"), "nested_absmax"),
    **{f"nested blocks of {n}": ("nested", state_with(NF4, nested_blocksize=n), NF4) for n in (1, -1, 2**40, None)},
    "a nested offset": ("nested", state_with(NF4, nested_offset=NAN), NF4),
    "no nested scales": ("nested", without(f"{QUERY}.nested_absmax"), "nested_absmax"),
    "fewer nested scales": ("nested", cut_short(f"{QUERY}.nested_absmax"), "nested_absmax"),
    "fewer nested codes": ("nested", cut_short(f"{QUERY}.nested_quant_map"), "nested_quant_map"),
    "fewer scales of 8 bits": ("8", cut_short(SCALES), SCALES),
    "no scales of 8 bits": ("8", without(SCALES), SCALES),
}


@pytest.mark.parametrize(("way", "change", "named"), PACKED.values(), ids=PACKED)
def test_packed_weights_that_do_not_fit(
    packed: Path, tmp_path: Path, way: str, change: Callable[[Tensors], Tensors], named: str
) -> None:
    folder = copy_of(packed / way, tmp_path / "text_encoder")
    rewrite(folder / "model.safetensors", change)
    refused_plainly(run(load_packed, str(folder)), "CheckpointError", "model.safetensors", named)


def test_packed_weights_of_another_shape(packed: Path, tmp_path: Path) -> None:
    folder = copy_of(packed / "4", tmp_path / "text_encoder")
    rewrite(folder / "model.safetensors", state_with(FP4, shape=[64, 32]))
    refused_plainly(run(load_packed, str(folder)), "WeightsMismatchError", "text_encoder", QUERY)


# --- tokenizers ---

T5_TOKENIZER = {
    "no vocabulary": ("model.vocab", [], "model.vocab"),
    "vocabulary of numbers": ("model.vocab", [1, 2, 3, 4], "model.vocab[0]"),
    "a score of text": ("model.vocab.5.1", "a", "model.vocab[5]"),
    "a score of NaN": ("model.vocab.5.1", NAN, "model.vocab[5]"),
    "an infinite score": ("model.vocab.5.1", -INF, "model.vocab[5]"),
    "a piece of a number": ("model.vocab.5.0", 3, "model.vocab[5]"),
    "an empty piece": ("model.vocab.5.0", "", "model.vocab[5]"),
    "a piece twice": ("model.vocab.5.0", "<pad>", "model.vocab[5]"),
    "a long piece": ("model.vocab.5.0", "x" * 100_000, "model.vocab[5]"),
    "a lone surrogate": ("model.vocab.5.0", "\ud800", "tokenizer"),
    "an unknown piece far away": ("model.unk_id", 10**6, "model.unk_id"),
    "a negative unknown piece": ("model.unk_id", -1, "model.unk_id"),
    "no model": ("model", None, "model"),
    "a model of text": ("model", "BPE", "model"),
    "a model of another kind": ("model.type", "Evil", "model.type"),
    "BPE with a list": ("model.type", "BPE", "model.vocab"),
    "a charsmap that is none": ("normalizer.precompiled_charsmap", "AAAA", "tokenizer"),
    "a charsmap of nonsense": (
        "normalizer.precompiled_charsmap",
        base64.b64encode(b"\xff" * 4096).decode(),
        "tokenizer",
    ),
    "a charsmap that is no base64": ("normalizer.precompiled_charsmap", "???", "tokenizer"),
    "a normalizer of no kind": ("normalizer", {"type": "Evil"}, "tokenizer"),
    "a normalizer that grows": ("normalizer", {"type": "Prepend", "prepend": "x" * 100}, "normalizer.prepend"),
    "many normalizers": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 20},
        "normalizer.normalizers",
    ),
    "a pre-tokenizer of no kind": ("pre_tokenizer", {"type": "Evil"}, "tokenizer"),
    "a long expression": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a+)+" * 1000}, "behavior": "Isolated", "invert": False},
        "pre_tokenizer.pattern.Regex",
    ),
    "a broken expression": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False},
        "tokenizer",
    ),
    "rules that grow together": (
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "zzzz"}] * 4,
        },
        "normalizer",
    ),
    "a template that grows": (
        "post_processor",
        {
            "type": "Sequence",
            "processors": [
                {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 12,
                    "pair": [],
                    "special_tokens": {},
                }
            ]
            * 2,
        },
        "post_processor",
    ),
    "tables that grow": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": ""}] * 2},
        "normalizer",
    ),
    "pieces of no length": ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "pre_tokenizer.length"),
    "deep rules": ("decoder", json.loads('{"a":' * 40 + "1" + "}" * 40), "decoder"),
    "rules of infinity": ("post_processor", {"type": "TemplateProcessing", "x": INF}, "post_processor.x"),
    "added tokens of text": ("added_tokens", "abc", "added_tokens"),
    "an added token far away": ("added_tokens.0.id", 10**12, "added_tokens[0].id"),
    "an added token without a number": ("added_tokens.0.id", None, "added_tokens[0].id"),
    "an added token of no text": ("added_tokens.0.content", 5, "added_tokens[0]"),
    "a flag of text": ("added_tokens.0.special", "yes", "added_tokens[0].special"),
}


EXPRESSIONS = {
    "a repeated group": (r"([a-z ]+)+$#", True),
    "repeated twice or more": (r"(?:a+){2,}", True),
    "repeated often": (r"(a?){50}", True),
    "repeated by both": (r"(a+)?+", True),
    "with free spacing": (r"(?x)(a+) +", True),
    "with a comment": (r"(?#[)(a+)+", True),
    "with a control character": (r"\c[(a+)+", True),
    "a group that calls itself": (r"(?<n>a|b\g<n>)", True),
    "behind a class": (r"[[:alpha:])](a+)*", True),
    "GPT-4's": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+",
        False,
    ),
    "an optional group": (r"[\p{Lu}\p{M}]+(?i:'s|'t)?| ?[^(\s|[.,!?])]+", False),
    "parentheses": (r"\(a\)+|[()]+", False),
}


@pytest.mark.parametrize(("expression", "bad"), EXPRESSIONS.values(), ids=EXPRESSIONS)
@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
def test_an_expression_that_could_take_forever(
    pixart_folder: Path, tmp_path: Path, place: str, expression: str, bad: bool
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "tokenizer")
    rule: dict[str, Any] = {"type": "Split", "behavior": "Isolated", "invert": False}
    if place == "normalizer":
        rule = {"type": "Replace", "content": "a"}
    edit_nested(folder / "tokenizer" / "tokenizer.json", place, {**rule, "pattern": {"Regex": expression}})
    outcome = outcome_of(folder, "tokenizer")
    if bad:
        refused_plainly(outcome, "CheckpointError", "tokenizer.json", f"{place}.pattern.Regex")
    else:
        accepted(outcome)


@pytest.mark.parametrize("filler", ["{},", "[],", "0,", '"",', '{"a":0},', "1.5,"])
def test_a_tokenizer_json_that_would_fill_the_memory(pixart_folder: Path, tmp_path: Path, filler: str) -> None:
    folder = copy_components(pixart_folder, tmp_path, "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text('{"x": [' + filler * (60_000_000 // len(filler)) + "0]}")
    refused_plainly(outcome_of(folder, "tokenizer"), "CheckpointError", "tokenizer.json", "entries")
    path.write_bytes(b"{" + b" " * 64_000_000 + b"}")
    refused_plainly(outcome_of(folder, "tokenizer"), "CheckpointError", "tokenizer.json", "bytes")


def test_a_spiece_model_that_would_fill_the_memory(pixart_folder: Path, tmp_path: Path) -> None:
    folder = copy_components(pixart_folder, tmp_path)
    path = write_tokenizer(folder / "tokenizer") / "spiece.model"
    path.write_bytes(b"\n\x00" * 5_000_000)
    refused_plainly(outcome_of(folder, "tokenizer"), "CheckpointError", "spiece.model", "bytes")


@pytest.mark.parametrize(("keys", "value", "named"), T5_TOKENIZER.values(), ids=T5_TOKENIZER)
def test_a_tokenizer_json_that_is_damaged(
    pixart_folder: Path, tmp_path: Path, keys: str, value: Any, named: str
) -> None:
    folder = copy_components(pixart_folder, tmp_path, "tokenizer")
    edit_nested(folder / "tokenizer" / "tokenizer.json", keys, value)
    refused_plainly(outcome_of(folder, "tokenizer"), "ImpastoError", "tokenizer", named)


SETTINGS: list[tuple[str, Any]] = [
    *(("extra_ids", value) for value in (10**9, -1, "5", NAN, None, [1])),
    *(("model_max_length", value) for value in (-1, 0, "many", NAN, INF, [1])),
    *(("padding_side", value) for value in ("middle", 3)),
    ("truncation_side", "evil"),
    *(("pad_token", value) for value in (3, [1], {"content": 3}, {"content": "a", "lstrip": "no"}, "x" * 10_000)),
    ("evil_token", {}),
    *(("extra_special_tokens", value) for value in ("a", 3, [3], {"__class__": "a"}, {"encode": "a"})),
    *(("additional_special_tokens", value) for value in (True, [{"content": None}])),
    *(("added_tokens_decoder", value) for value in (3, {"a": "b"}, {"-1": "b"}, {"9" * 20: "b"}, {"5": 3})),
    ("split_special_tokens", "yes"),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=[f"{k}={str(v)[:30]}" for k, v in SETTINGS])
@pytest.mark.parametrize("place", ["tokenizer", "processor"])
def test_settings_of_a_tokenizer(
    pixart_folder: Path, glm_folder: Path, tmp_path: Path, place: str, key: str, value: Any
) -> None:
    folder = copy_components(pixart_folder if place == "tokenizer" else glm_folder, tmp_path, place)
    edit_json(folder / place / "tokenizer_config.json", **{key: value})
    refused_plainly(outcome_of(folder, place), "ImpastoError", "tokenizer_config.json", key)


@pytest.mark.parametrize("key", ["extra_ids", "model_max_length", "pad_token"])
def test_settings_of_byt5(glm_folder: Path, tmp_path: Path, key: str) -> None:
    folder = copy_components(glm_folder, tmp_path, "tokenizer")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", **{key: [10**9]})
    refused_plainly(outcome_of(folder, "tokenizer"), "ImpastoError", "tokenizer_config.json", key)


@pytest.mark.parametrize("content", ['{"a": "b"}', '{"a": -1}', '{"a": 1e300}', "[]", "{"])
def test_added_tokens_that_are_damaged(glm_folder: Path, tmp_path: Path, content: str) -> None:
    folder = copy_components(glm_folder, tmp_path, "tokenizer")
    (folder / "tokenizer" / "added_tokens.json").write_text(content)
    refused_plainly(outcome_of(folder, "tokenizer"), "ImpastoError", "added_tokens.json")


@pytest.mark.parametrize("content", ['{"pad_token": 3}', '{"pad_token": {"content": [1]}}', "[]", "{"])
def test_special_tokens_that_are_damaged(pixart_folder: Path, tmp_path: Path, content: str) -> None:
    folder = copy_components(pixart_folder, tmp_path, "tokenizer")
    (folder / "tokenizer" / "special_tokens_map.json").write_text(content)
    refused_plainly(outcome_of(folder, "tokenizer"), "ImpastoError", "special_tokens_map.json")


def with_pieces(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(data)
        change(model)
        return bytes(model.SerializeToString())

    return changed


SENTENCEPIECE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:500],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "noise": lambda data: bytes(range(256)) * 16,
    "tiktoken": lambda data: b"IQ== 0\nIg== 1\n",
    "json": lambda data: b'{"model": {}}',
    "BPE": with_pieces(lambda model: setattr(model.trainer_spec, "model_type", 2)),
    "no pieces": with_pieces(lambda model: model.ClearField("pieces")),
    "a score of NaN": with_pieces(lambda model: setattr(model.pieces[9], "score", NAN)),
    "an infinite score": with_pieces(lambda model: setattr(model.pieces[9], "score", -INF)),
    "a piece twice": with_pieces(lambda model: setattr(model.pieces[9], "piece", model.pieces[8].piece)),
    "an empty piece": with_pieces(lambda model: setattr(model.pieces[9], "piece", "")),
    "a charsmap of nonsense": with_pieces(
        lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"\xff" * 4096)
    ),
    "a short charsmap": with_pieces(lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"\x01")),
}


@pytest.mark.parametrize("change", SENTENCEPIECE.values(), ids=SENTENCEPIECE)
def test_a_spiece_model_that_is_damaged(pixart_folder: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    folder = copy_components(pixart_folder, tmp_path)
    path = write_tokenizer(folder / "tokenizer") / "spiece.model"
    path.write_bytes(change(path.read_bytes()))
    refused_plainly(outcome_of(folder, "tokenizer"), "CheckpointError", "tokenizer")


def test_the_tokenizer_of_published_checkpoints(pixart_folder: Path, tmp_path: Path) -> None:
    folder = copy_components(pixart_folder, tmp_path)
    write_tokenizer(folder / "tokenizer")
    accepted(outcome_of(folder, "tokenizer"))


@pytest.mark.parametrize("form", ["spiece.model", "tokenizer.json"])
def test_a_tokenizer_with_more_ids_than_the_text_encoder(pixart_folder: Path, tmp_path: Path, form: str) -> None:
    folder = copy_components(pixart_folder, tmp_path, "text_encoder", "tokenizer")
    if form == "spiece.model":
        shutil.rmtree(folder / "tokenizer")
        write_tokenizer(folder / "tokenizer")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", extra_ids=100, additional_special_tokens=...)
    edit_json(folder / "tokenizer" / "tokenizer_config.json", extra_special_tokens=[f"<more{i}>" for i in range(9)])
    refused_plainly(
        outcome_of(folder, "text_encoder", "tokenizer"), "CheckpointError", "tokenizer", "text_encoder", "89"
    )


# --- GLM-Image's processor ---

PROCESSOR_TOKENIZER = {
    "numbers twice": ("model.vocab.a", 3, "model.vocab"),
    "a number far away": ("model.vocab.a", 10**10, "model.vocab"),
    "a negative number": ("model.vocab.a", -5, "model.vocab"),
    "a number of text": ("model.vocab.a", "5", "model.vocab"),
    "a number of NaN": ("model.vocab.a", NAN, "model.vocab"),
    "a vocabulary of text": ("model.vocab", "abc", "model.vocab"),
    "no vocabulary": ("model.vocab", {}, "model.vocab"),
    "no unknown token": ("model.unk_token", ..., "processor"),
    "another kind": ("model.type", "Unigram", "model.vocab"),
    "merges of nothing": ("model.type", "BPE", "model.merges"),
    "an empty token": ("model.vocab.", 500, "model.vocab"),
}


@pytest.mark.parametrize(("keys", "value", "named"), PROCESSOR_TOKENIZER.values(), ids=PROCESSOR_TOKENIZER)
def test_a_processors_tokenizer_json_that_is_damaged(
    glm_folder: Path, tmp_path: Path, keys: str, value: Any, named: str
) -> None:
    folder = copy_components(glm_folder, tmp_path, "processor")
    edit_nested(folder / "processor" / "tokenizer.json", keys, value)
    refused_plainly(outcome_of(folder, "processor"), "ImpastoError", "processor", named)


IMAGES = [
    *(("patch_size", value) for value in (0, -1, NAN, "16", None, 10**9)),
    *(("merge_size", value) for value in (0, "1", 64)),
    *(("temporal_patch_size", value) for value in (10**9, 64)),
    *(("min_pixels", value) for value in (2**28, 2**24, 0)),
    *(("max_pixels", value) for value in (2**28, 1, NAN)),
    *(("size", value) for value in ({"shortest_edge": 9, "longest_edge": 8}, {"longest_edge": 2**24 + 1})),
    *(("size", value) for value in ({"shortest_edge": 9}, {"longest_edge": 9})),
    *(("image_mean", value) for value in ("a", [1], [NAN, 0, 0], 3)),
    *(("image_std", value) for value in ([0, 0, 0], [1, 1, 1, 1], [-1, 1, 1])),
    *(("rescale_factor", value) for value in (0, NAN, "a", 1e300)),
    *(("resample", value) for value in (77, "bicubic")),
    *(("size", value) for value in (3, {"shortest_edge": -1}, {"longest_edge": 10**15})),
    *(("do_resize", value) for value in (3, "yes")),
]


@pytest.mark.parametrize(("key", "value"), IMAGES, ids=[f"{k}={v!r}" for k, v in IMAGES])
def test_how_a_processor_prepares_images(glm_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy_components(glm_folder, tmp_path, "processor")
    edit_nested(folder / "processor" / "processor_config.json", f"image_processor.{key}", value)
    refused_plainly(outcome_of(folder, "processor"), "ConfigurationError", "processor_config.json", key)


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_a_processor_without_a_file(glm_folder: Path, tmp_path: Path, file: str) -> None:
    folder = copy_components(glm_folder, tmp_path, "processor")
    (folder / "processor" / file).unlink()
    refused_plainly(outcome_of(folder, "processor"), "CheckpointNotFoundError", "processor", file)


@pytest.mark.parametrize("value", [..., "", None], ids=["removed", "empty", "null"])
@pytest.mark.parametrize("token", ["image_token", "grid_bos_token", "grid_eos_token", "bos_token"])
def test_a_processor_without_a_token(glm_folder: Path, tmp_path: Path, token: str, value: Any) -> None:
    folder = copy_components(glm_folder, tmp_path, "processor")
    edit_json(folder / "processor" / "tokenizer_config.json", **{token: value})
    refused_plainly(outcome_of(folder, "processor"), "CheckpointError", "tokenizer_config.json", token)


MISFITS = {
    "more ids": ("processor/tokenizer_config.json", "extra_special_tokens", ["<more>"], "vocab_size"),
    "another image token": ("vision_language_encoder/config.json", "image_token_id", 35, "image_token_id"),
    "another merge size": ("processor/processor_config.json", "image_processor.merge_size", 2, "merge_size"),
    "another patch size": ("processor/processor_config.json", "image_processor.patch_size", 14, "patch_size"),
}


@pytest.mark.parametrize(("file", "keys", "value", "named"), MISFITS.values(), ids=MISFITS)
def test_a_processor_that_does_not_fit_the_prior(
    glm_folder: Path, tmp_path: Path, file: str, keys: str, value: Any, named: str
) -> None:
    folder = copy_components(glm_folder, tmp_path, "processor", "vision_language_encoder")
    edit_nested(folder / file, keys, value)
    outcome = outcome_of(folder, "processor", "vision_language_encoder")
    refused_plainly(outcome, "CheckpointError", "processor", "vision_language_encoder", named)


def ask(folder: str, change: str, prompt: str, with_image: bool) -> list[int]:
    """Call a pipeline whose sizes are NumPy's, with a component changed after it was loaded."""
    import numpy as np
    from PIL import Image

    from impasto import GlmImagePipeline

    pipe = GlmImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if change == "merge_size":
        pipe.processor.image_processor.merge_size = 3
    if change == "panic":

        def panics(*args: Any, **options: Any) -> Any:
            raise type("PanicException", (BaseException,), {})("called unwrap")

        pipe.processor._get_target_shape = panics
    image = Image.new("RGB", (64, 64)) if with_image else None
    size: Any = {"height": np.int64(64), "width": np.int32(64)}
    return list(pipe(prompt, image, **size, num_inference_steps=1, output_type="np").images.shape)


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_sizes_of_numpy(glm_folder: Path, with_image: bool) -> None:
    outcome = run(ask, str(glm_folder), "", "a cube", with_image)
    accepted(outcome)
    assert outcome.value == [1, 64, 64, 3]


@pytest.mark.parametrize("token", ["<image>", "<end>"])
@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
def test_a_prompt_with_the_token_of_an_image(glm_folder: Path, token: str, with_image: bool) -> None:
    refused(run(ask, str(glm_folder), "", f"a {token} cube", with_image), "InputError", "prompt", token)


@pytest.mark.parametrize(
    ("change", "named"), [("merge_size", "vision_language_encoder"), ("panic", "processor")], ids=["merge", "panic"]
)
def test_a_component_that_fails_at_the_call(glm_folder: Path, change: str, named: str) -> None:
    refused(run(ask, str(glm_folder), change, "a cube", True), "CheckpointError", f"{named} cannot be used as")


def test_the_good_ones_load(pixart_folder: Path, glm_folder: Path) -> None:
    accepted(outcome_of(pixart_folder, "tokenizer", "text_encoder"))
    accepted(outcome_of(glm_folder, "tokenizer", "text_encoder", "processor", "vision_language_encoder"))
