"""The only place where transformers loads anything: text encoders, GLM-Image's prior, tokenizers and its processor.

It loads explicit classes only, from data that was read and checked here: a config of known values, tensors of known
names and shapes, and a tokenizer's files in a temporary folder. So nothing in a checkpoint can choose code, other files
or kernels, and damage raises one of our errors.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...errors import (
    CheckpointError,
    CheckpointNotFoundError,
    MissingDependencyError,
    ResourceError,
    WeightsMismatchError,
)
from ..config import read_json
from ..stored import FLOATS, Stored, describe, find_weight_files, iterate_tensors, listing
from . import configs
from .configs import read_image_settings, read_model_config, read_values
from .errors import held_back_stderr, translated
from .quantized import check_bitsandbytes
from .tokenizer_files import read_tokenizer_files

logger = logging.getLogger("impasto")

_AGAIN = "Download or save it again."
#: Languages and signs of prompts: encoding it exercises the rules of a tokenizer.
_PROBE = "A red cube, 3 x 4 m: “é” ﬁ Ω ж 漢字 かな 한 ع हिन्दी 🙂\t~\n"


class _Kind(NamedTuple):
    """A model class of transformers."""

    config_class: str
    model_types: Sequence[str]
    table: configs.Table
    #: Config value that counts layers -> the pattern of their tensors' names.
    layers: Mapping[str, str]
    #: Names of tensors that the model ignores.
    ignored: tuple[str, ...] = ()
    #: Name -> the name that it shares its tensor with.
    tied: Mapping[str, str] = {}
    #: Whether tensors with other names are errors or only reported.
    strict: bool = True


_KINDS = {
    "T5EncoderModel": _Kind(
        "T5Config",
        ("t5", "mt5"),
        configs.T5,
        {"num_layers": r"encoder\.block\.(\d+)\."},
        ignored=("decoder.", "lm_head."),
        tied={"encoder.embed_tokens.weight": "shared.weight"},
    ),
    "GlmImageForConditionalGeneration": _Kind(
        "GlmImageConfig",
        ("glm_image",),
        configs.GLM_IMAGE,
        {
            "text_config.num_hidden_layers": r"model\.language_model\.layers\.(\d+)\.",
            "vision_config.depth": r"model\.visual\.blocks\.(\d+)\.",
        },
        strict=False,
    ),
}


def class_of_transformers(name: str) -> Any:
    """A class by its name.

    Raises:
        MissingDependencyError: the installed transformers has no such class.
    """
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise MissingDependencyError(
            f"transformers {transformers.__version__} has no {name}; update it: pip install -U transformers"
        )
    return found


# --- models ---


def load_model(
    name: str,
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
    quantization_config: Any = None,
) -> nn.Module:
    """Load a T5 encoder or GLM-Image's prior, in evaluation mode; ``dtype=None`` keeps the stored dtype.

    Args:
        quantization_config: one of transformers or diffusers: transformers quantizes the weights.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigurationError: a value of config.json has the wrong type or range.
        WeightsMismatchError: tensors are missing, misshapen or unexpected.
    """
    kind = _KINDS[name]
    values, files, stored = check_model(name, folder, variant, use_safetensors)
    with translated(name, folder):
        config = class_of_transformers(kind.config_class)(**values, architectures=[name])
    # Loading with a dtype, unlike a later cast to float16, keeps T5's sensitive weights in float32.
    options = {"dtype": "auto" if dtype is None else dtype, "generation_config": _generation(name, folder)}
    if quantization_config is not None:
        if "quantization_config" in values:
            raise CheckpointError(f"{folder} is quantized already; load it without quantization_config")
        options["quantization_config"] = _of_transformers(quantization_config)
    if "quantization_config" in values:
        source: Any = folder  # the quantization method reads the files itself, with its own names and dtypes
        options |= {"variant": variant, "use_safetensors": files[0].suffix == ".safetensors"}
    else:
        with translated(name, folder), torch.device("meta"):
            expected = class_of_transformers(name)(config).state_dict()
        _check_tensors(folder, name, kind, expected, stored)
        source, options["state_dict"] = None, _state(kind, files, expected)
    with translated(name, folder, quantized="quantization_config" in (values.keys() | options.keys())):
        loaded, report = class_of_transformers(name).from_pretrained(
            source,
            config=config,
            **options,
            attn_implementation="sdpa",
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = [*report["missing_keys"], *(report["unexpected_keys"] if kind.strict else ())]
    if missing:
        raise _mismatch(folder, name, f"missing or left over are {listing(map(str, missing))}")
    for key, layer in loaded.named_modules():
        packed = getattr(getattr(layer, "weight", None), "quant_state", None)
        if packed is not None and tuple(packed.shape) != (layer.out_features, layer.in_features):
            raise _mismatch(folder, name, f"misshapen are {listing([f'{key}.weight'])}")
    loaded.config.name_or_path = str(folder)
    return cast(nn.Module, loaded.eval())


def _of_transformers(config: Any) -> Any:
    """A quantization config as a class of transformers, which has those of diffusers under the same names."""
    name = type(config).__name__
    cls = class_of_transformers(name) if name.endswith("Config") else None
    if cls is None or isinstance(config, cls) or not hasattr(config, "to_dict"):
        return config
    given = {key: value for key, value in config.to_dict().items() if key != "quant_method" and not key.startswith("_")}
    return cls.from_dict(given)


def check_model(
    name: str, folder: Path, variant: str | None, use_safetensors: bool | None
) -> tuple[dict[str, Any], list[Path], Stored]:
    """Check a model's config, files and tensors: everything that ``load_model`` checks without transformers."""
    kind, path = _KINDS[name], folder / "config.json"
    if (adapter := folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{adapter} makes this an adapter, whose base model would be loaded from elsewhere. "
            f"Merge the adapter into its base model and save that, or remove the file."
        )
    values = read_model_config(path, kind.table, kind.model_types)
    files = _weight_files(folder, variant, use_safetensors)
    stored = {name: tensor for name, tensor in describe(files).items() if not name.startswith(kind.ignored)}
    _check_layers(path, values, kind, stored)
    if values.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        check_bitsandbytes(files, stored)
    return values, files, stored


def _weight_files(folder: Path, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """The weight files; transformers uses another name for pickles than for safetensors."""
    if use_safetensors is not False:
        try:
            return find_weight_files(folder, variant=variant, use_safetensors=True, stem="model")
        except CheckpointNotFoundError:
            if use_safetensors or not any(folder.glob("pytorch_model*")):
                raise
    return find_weight_files(folder, variant=variant, use_safetensors=False, stem="pytorch_model")


def _generation(name: str, folder: Path) -> Any:
    path = folder / "generation_config.json"
    if name == "T5EncoderModel" or not path.is_file():
        return None
    values = read_values(path, configs.GENERATION)
    with translated("generation settings", path):
        return class_of_transformers("GenerationConfig")(**values)


def _check_layers(path: Path, values: Mapping[str, Any], kind: _Kind, stored: Stored) -> None:
    """Require as many layers as the weights have, before anything is built."""
    for key, pattern in kind.layers.items():
        numbers = {int(match[1]) for name in stored if (match := re.match(pattern, name)) and len(match[1]) < 6}
        *outer, inner = key.split(".")
        section = values.get(outer[0], {}) if outer else values
        found, asked = max(numbers, default=-1) + 1, section.get(inner)
        if asked is not None and asked != found:
            raise WeightsMismatchError(
                f"{path}: {key} is {asked}, but the weights have {found} layers. "
                f"Weights and config.json do not belong together."
            )


def _check_tensors(folder: Path, name: str, kind: _Kind, expected: Mapping[str, Tensor], stored: Stored) -> None:
    """Check names, shapes and dtypes before any tensor is read."""
    wrong = [key for key, tensor in stored.items() if key in expected and tensor.shape != tuple(expected[key].shape)]
    if wrong:
        sizes = f"{list(stored[wrong[0]].shape)}, not {list(expected[wrong[0]].shape)}"
        raise _mismatch(folder, name, f"misshapen are {listing(wrong)} (the first is {sizes})")
    held = stored.keys() | {kind.tied[key] for key in kind.tied.keys() & stored.keys()}
    missing = [key for key in expected if key not in held and key not in kind.tied]
    left = [key for key in stored if key not in expected]
    if left and not kind.strict:
        logger.warning("%s: the %s has no place for %d tensors: %s", folder, name, len(left), listing(left))
        left = []
    faults = [f"{what} are {listing(names)}" for what, names in (("missing", missing), ("left over", left)) if names]
    if faults:
        raise _mismatch(folder, name, " and ".join(faults))
    for key, tensor in stored.items():
        if key in expected and tensor.dtype not in FLOATS:
            raise WeightsMismatchError(
                f"{tensor.file}: {listing([key])} is stored as {tensor.dtype}, but must be one of {', '.join(FLOATS)}; "
                f"config.json has no quantization_config that says otherwise."
            )


def _mismatch(folder: Path, name: str, what: str) -> WeightsMismatchError:
    return WeightsMismatchError(
        f"the weights in {folder} do not fit the config of {name}: {what}. "
        f"Weights and config.json do not belong together."
    )


def _state(kind: _Kind, files: Sequence[Path], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, memory-mapped; shared ones under their main name."""
    state = {key: tensor for file in files for key, tensor in iterate_tensors(file) if key in expected}
    for twin, own in kind.tied.items():
        if twin in state:
            state.setdefault(own, state.pop(twin))
    return state


# --- tokenizers and the processor ---


def load_reader(name: str, folder: Path) -> Any:
    """Load a tokenizer or processor by its class name in ``model_index.json``."""
    return load_processor(folder) if name == "GlmImageProcessor" else load_tokenizer(name.removesuffix("Fast"), folder)


def load_tokenizer(name: str, folder: Path) -> Any:
    """Load T5's or ByT5's tokenizer; ``PreTrainedTokenizerFast`` is the one that ``tokenizer.json`` describes.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigurationError: a setting has the wrong type or range.
    """
    vocabularies = {
        "T5Tokenizer": ("tokenizer.json", "spiece.model"),
        "ByT5Tokenizer": (),
        "PreTrainedTokenizerFast": ("tokenizer.json",),
    }[name]
    contents = read_tokenizer_files(folder, *vocabularies)
    if vocabularies and not contents.keys() & set(vocabularies):  # transformers would build it without a vocabulary
        raise CheckpointNotFoundError(f"{folder} holds no tokenizer: expected {' or '.join(vocabularies)}. {_AGAIN}")
    with _folder_of_ours(contents) as ours, translated(name, folder), held_back_stderr():
        tokenizer = class_of_transformers(name).from_pretrained(ours, trust_remote_code=False, local_files_only=True)
        tokenizer(_PROBE)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(folder)
    if getattr(tokenizer, "vocab_file", None):
        tokenizer.vocab_file = tokenizer.init_kwargs["vocab_file"] = str(folder / "spiece.model")
    return tokenizer


@contextmanager
def _folder_of_ours(contents: Mapping[str, bytes]) -> Iterator[str]:
    """A temporary folder with only these files."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="impasto-"))
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content)
        except OSError as error:
            raise ResourceError(
                f"temporary files cannot be written ({error.strerror or error}), and loading a tokenizer needs some; "
                f"free some space, or set TMPDIR to another folder"
            ) from error
        yield folder


def load_processor(folder: Path) -> Any:
    """Build GLM-Image's processor from its tokenizer and image settings.

    Its chat template is only kept for saving and never executed: the text of a prompt is built in
    ``models.glm_image.prior``.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigurationError: a setting has the wrong type or range.
    """
    images = _image_settings(folder)
    tokenizer = load_tokenizer("PreTrainedTokenizerFast", folder)
    required = ("image_token", "grid_bos_token", "grid_eos_token", "bos_token")
    lacking = [name for name in required if not getattr(tokenizer, name, None)]
    if lacking:
        raise CheckpointError(f"{folder}/tokenizer_config.json does not name the {', '.join(lacking)}. {_AGAIN}")
    path, template = folder / "chat_template.jinja", None
    if path.is_file():
        with translated("a chat template", path), path.open(encoding="utf-8") as file:
            template = file.read(100_000)
    with translated("GlmImageProcessor", folder):
        prepare = class_of_transformers("GlmImageImageProcessorPil")(**images)
        return class_of_transformers("GlmImageProcessor")(prepare, tokenizer, chat_template=template)


def check_vocabulary(reader: str, tokenizer: Any, model_name: str, model: Any) -> None:
    """Check that a tokenizer, or a processor with one, fits the model that reads its token ids.

    Raises:
        CheckpointError: it does not; the message names both components.
    """
    rows = model.config.get_text_config().vocab_size
    highest = max(getattr(tokenizer, "tokenizer", tokenizer).get_vocab().values())
    if highest >= rows:
        raise CheckpointError(
            f"the {reader} has token ids up to {highest}, but the vocabulary of the {model_name} has {rows} "
            f"(vocab_size). They do not belong together; take both from one checkpoint."
        )
    images, vision = getattr(tokenizer, "image_processor", None), getattr(model.config, "vision_config", None)
    for key, owner, other, other_key in (
        ("image_token_id", tokenizer, model.config, "image_token_id"),
        ("patch_size", images, vision, "patch_size"),
        ("merge_size", images, vision, "spatial_merge_size"),
    ):
        ours, theirs = getattr(owner, key, None), getattr(other, other_key, None)
        if ours != theirs:
            raise CheckpointError(
                f"the {reader} has the {key} {ours}, but the {model_name} {theirs}. "
                f"They do not belong together; take both from one checkpoint."
            )


def _image_settings(folder: Path) -> dict[str, Any]:
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = folder / file
        if path.is_file():
            content = read_json(path)
            nested = content.get("image_processor", content) if file == "processor_config.json" else content
            if isinstance(nested, Mapping) and nested.keys() & configs.IMAGES.keys():
                return read_image_settings(f"{path}: ", nested)
    raise CheckpointNotFoundError(
        f"{folder} does not say how images are prepared: expected processor_config.json with an image_processor, or "
        f"preprocessor_config.json. {_AGAIN}"
    )
