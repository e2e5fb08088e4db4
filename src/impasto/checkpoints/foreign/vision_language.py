"""Load any vision-language model of transformers. Its classes are those of transformers; nothing names other code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checks import shown
from ...errors import CheckpointError
from ..config import read_json
from .errors import held_back_stderr, translated

#: Settings by which a checkpoint asks for code of its own, or names code to download.
_CODE = ("auto_map", "custom_generate", "custom_pipelines", "kernel_config")
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_PLAIN_ATTENTION = ("eager", "sdpa", None)


def load_vision_language(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A model that generates text from images and text, in evaluation mode, and its processor.

    Raises:
        CheckpointError: it is no such model, it is damaged, it asks for code of its own, its weights are not in
            safetensors, or its processor needs torchvision.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not the folder of a model: it has no config.json")
    for path in sorted(folder.glob("*.json")):
        if path.name in ("config.json", "generation_config.json") or path.name.endswith("processor_config.json"):
            _refuse_code(path, read_json(path))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        _refuse_code(tokenizer, read_json(tokenizer))

    import transformers

    readers: Any = transformers.AutoProcessor
    models: Any = transformers.AutoModelForImageTextToText

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with translated("a vision-language model", folder), held_back_stderr():
        try:
            processor = readers.from_pretrained(folder, **options)
            if not callable(processor) or not hasattr(processor, "image_processor"):
                raise CheckpointError(f"{folder} has a {type(processor).__name__}, which does not prepare images")
            model = models.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
        except ImportError as error:
            if "torchvision" in str(error).lower():
                raise CheckpointError(
                    f"the processor of {folder} needs torchvision, which does not go with this package; choose a model "
                    f"whose processor works without it, such as a LLaVA"
                ) from error
            raise
    return model.to(device).eval(), processor


def _refuse_code(path: Path, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in _CODE and item:
                raise CheckpointError(f"{path}: {key} asks for code of the checkpoint's own, which is never run")
            if key in _ATTENTION and item not in _PLAIN_ATTENTION:
                raise CheckpointError(f"{path}: {key} is {shown(item)}; only eager and sdpa are allowed")
            _refuse_code(path, item)
    elif isinstance(value, list):
        for item in value:
            _refuse_code(path, item)
