"""Small models of either library with the same weights, and comparable forms of what idioms return."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import huggingface_hub
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..tiny import tiny_text_encoder, tiny_tokenizer
from ..tiny_glm import SCHEDULER as GLM_SCHEDULER
from ..tiny_glm import TRANSFORMER as GLM_TRANSFORMER
from ..tiny_glm import VAE as GLM_VAE
from ..tiny_glm import prior_parts, text_parts

PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 8,
    "caption_channels": 32,
    "use_additional_conditions": False,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "scaling_factor": 0.7,
    "sample_size": 16,
}
TRANSFORMERS = {"PixArtTransformer2DModel": PIXART, "GlmImageTransformer2DModel": GLM_TRANSFORMER}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers for both libraries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(model: nn.Module) -> nn.Module:
    """Set each parameter to random values that depend on its name and shape alone."""
    for name, parameter in model.named_parameters():
        values = noise(*parameter.shape, seed=zlib.crc32(name.encode()))
        if parameter.ndim >= 2:
            values *= (0.5 if "scale_shift_table" in name else 1.0) / parameter[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        parameter.data.copy_(values)
    return model.eval()


class Copier:
    """Copies of a model. They take a third of the time of ``copy.deepcopy``: pickle walks over the modules in C."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[int, Tensor] = {}  # by identity
        content = io.BytesIO()
        pickler = pickle.Pickler(content)
        pickler.persistent_id = self._note  # type: ignore[method-assign]
        pickler.dump(model)
        self.content = content.getvalue()

    def _note(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)

    def copy(self) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self.content))
        copies: dict[int, Tensor] = {}
        unpickler.persistent_load = lambda i: copies.setdefault(i, copy.deepcopy(self.tensors[i]))  # type: ignore[method-assign]
        return unpickler.load()


class Make:
    """Builds the objects of an idiom, from the library that it runs with."""

    def __init__(self, lib: ModuleType, folder: Path) -> None:
        self.lib = lib
        self.folder = folder  # empty, and only of this run
        self.uploads: list[Any] = []

    def pixart(self, **changes: Any) -> Any:
        return self.model("PixArtTransformer2DModel", **{**PIXART, **changes})

    def glm_transformer(self, **changes: Any) -> Any:
        return self.model("GlmImageTransformer2DModel", **{**GLM_TRANSFORMER, **changes})

    def vae(self, **changes: Any) -> Any:
        return self.model("AutoencoderKL", **{**VAE, **changes})

    def model(self, name: str, **config: Any) -> Any:
        """A copy of the one that was built first, which takes less time than building."""
        key = f"{self.lib.__name__}.{name}({config})"
        if key not in _MODELS:
            _MODELS[key] = Copier(filled(getattr(self.lib, name)(**config)))
        return _MODELS[key].copy()

    def scheduler(self, name: str = "DPMSolverMultistepScheduler", **options: Any) -> Any:
        """A scheduler of this library, or of diffusers where only that has it."""
        return getattr(self.lib if hasattr(self.lib, name) else diffusers, name)(**options)

    def pixart_pipeline(self, name: str = "PixArtSigmaPipeline", **parts: Any) -> Any:
        made = {
            "tokenizer": tiny_tokenizer(),
            "text_encoder": lambda: _text_encoder().copy(),
            "vae": self.vae,
            "transformer": self.pixart,
            "scheduler": self.scheduler,
            **parts,
        }
        lazily = ("text_encoder", "vae", "transformer", "scheduler")
        built = {n: p() if n in lazily and n not in parts else p for n, p in made.items()}
        pipe = getattr(self.lib, name)(**built)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sigma(self, **parts: Any) -> Any:
        return self.pixart_pipeline("PixArtSigmaPipeline", **parts)

    def alpha(self, **parts: Any) -> Any:
        return self.pixart_pipeline("PixArtAlphaPipeline", **parts)

    def glm(self, prior: bool = False, **parts: Any) -> Any:
        made: dict[str, Any] = {
            "tokenizer": _glm_texts()["tokenizer"],
            "text_encoder": _glm_text_encoder().copy(),
            **(_prior() if prior else {"processor": None, "vision_language_encoder": None}),
            "vae": self.vae,
            "transformer": self.glm_transformer,
            "scheduler": self.scheduler,
            **parts,
        }
        if "vae" not in parts:
            made["vae"] = self.model("AutoencoderKL", **GLM_VAE)
        if "transformer" not in parts:
            made["transformer"] = self.glm_transformer()
        if "scheduler" not in parts:
            made["scheduler"] = self.lib.FlowMatchEulerDiscreteScheduler(**GLM_SCHEDULER)
        pipe = self.lib.GlmImagePipeline(**made)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def checkpoint(self, kind: str = "PixArtSigmaPipeline") -> str:
        """A folder to which diffusers saved a pipeline. Read it only."""
        return str(
            self.saved(kind, lambda make, name: make.glm(prior=True) if "Glm" in name else make.pixart_pipeline(name))
        )

    def saved(self, kind: str, build: Callable[[Make, str], Any]) -> Path:
        """The same for any class, which ``build`` makes."""
        if kind not in _SAVED:
            _FOLDERS.append(tempfile.TemporaryDirectory(prefix="impasto-drop-in-"))
            _SAVED[kind] = Path(_FOLDERS[-1].name)
            build(Make(diffusers, _SAVED[kind]), kind).save_pretrained(_SAVED[kind])
        return _SAVED[kind]

    def hub(self) -> Any:
        """While it lasts, an upload is noted in `uploads` instead of being sent."""

        def create(*args: Any, **kwargs: Any) -> Any:
            self.uploads.append(("create", kwargs.get("repo_id") or args[-1], kwargs.get("private")))
            return mock.Mock(repo_id=kwargs.get("repo_id") or args[-1])

        def upload(*args: Any, **kwargs: Any) -> Any:
            folder = Path(kwargs["folder_path"])
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            kept = [n for n in names if not n.endswith(".md")]
            self.uploads.append(("upload", kwargs["repo_id"], kwargs.get("create_pr"), kwargs["commit_message"], kept))
            return mock.Mock()

        stack = [mock.patch.object(huggingface_hub.HfApi, n, f) for n, f in _UPLOADS(create, upload)]
        import diffusers.configuration_utils
        import diffusers.models.modeling_utils
        import diffusers.pipelines.pipeline_utils
        import diffusers.utils.hub_utils

        for module in (
            diffusers.utils.hub_utils,
            diffusers.configuration_utils,
            diffusers.models.modeling_utils,
            diffusers.pipelines.pipeline_utils,
            huggingface_hub,
        ):
            for name, replacement in _UPLOADS(create, upload):
                if hasattr(module, name):
                    stack.append(mock.patch.object(module, name, replacement))
        return _Together(stack)


def _UPLOADS(create: Any, upload: Any) -> list[tuple[str, Any]]:
    return [("create_repo", create), ("upload_folder", upload)]


class _Together:
    def __init__(self, patches: list[Any]) -> None:
        self.patches = patches

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self.patches):
            patch.stop()


@lru_cache
def _text_encoder() -> Copier:
    return Copier(tiny_text_encoder())


@lru_cache
def _glm_texts() -> dict[str, Any]:
    return text_parts()


@lru_cache
def _glm_text_encoder() -> Copier:
    return Copier(_glm_texts()["text_encoder"])


@lru_cache
def _prior() -> dict[str, Any]:
    return prior_parts()


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed at exit
_SAVED: dict[str, Path] = {}
_MODELS: dict[str, Copier] = {}


def denoise(scheduler: Any, steps: int = 4, **options: Any) -> Tensor:
    """The result of sampling with a made-up model."""
    scheduler.set_timesteps(steps, **options)
    latents = noise(1, 2, 4, 4)
    generator = torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        prediction = 0.5 * latents + noise(1, 2, 4, 4, seed=i + 2)
        latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
    return latents


#: Keys of a config that say who wrote it.
PRIVATE = {"_diffusers_version", "_impasto_version"}


def comparable(value: Any) -> Any:
    """Plain data: arrays, numbers, texts, lists, dicts by sorted key; other objects by the name of their class."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.ndim == 0:
            return value.item()
        return value.double().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, Image.Image):
        return np.asarray(value).astype(float)
    if value is None or isinstance(value, (np.ndarray, bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        plain = {str(k): comparable(v) for k, v in value.items() if k not in PRIVATE}
        if "_use_default_values" in plain:  # in any order
            plain["_use_default_values"].sort()
        return dict(sorted(plain.items()))
    if isinstance(value, (list, tuple)):
        return [comparable(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(comparable(v) for v in value)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, nn.Module):
        return {f.name: comparable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Iterator):
        return "iterator"
    return type(value).__name__


def difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """What two comparable values differ in; None if they agree, arrays to 1e-4."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return f"{path}: keys {sorted(ours.keys() ^ theirs.keys())} in one only"
        pairs = [(k, ours[k], theirs[k]) for k in theirs]
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            return f"{path}: {len(ours)} values instead of {len(theirs)}: {ours!r:.200} instead of {theirs!r:.200}"
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(ours, theirs))]
    elif isinstance(theirs, np.ndarray) and isinstance(ours, np.ndarray):
        if ours.shape != theirs.shape:
            return f"{path}: shape {ours.shape} instead of {theirs.shape}"
        if theirs.dtype.kind != "f":
            return None if np.array_equal(ours, theirs) else f"{path}: {ours!r:.200} instead of {theirs!r:.200}"
        if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
            return f"{path}: other values are finite"
        finite = np.isfinite(theirs)
        apart = np.linalg.norm(ours[finite] - theirs[finite])
        return None if apart <= 1e-4 * max(np.linalg.norm(theirs[finite]), 1e-6) else f"{path}: {apart:.1e} apart"
    elif isinstance(theirs, float) and isinstance(ours, (int, float)) and not isinstance(ours, bool):
        same = ours == theirs or abs(ours - theirs) <= 1e-5 * abs(theirs) or (ours != ours and theirs != theirs)
        return None if same else f"{path}: {ours!r} instead of {theirs!r}"
    else:
        same = type(ours) is type(theirs) and ours == theirs
        return None if same else f"{path}: {ours!r:.200} instead of {theirs!r:.200}"
    return next((d for k, a, b in pairs if (d := difference(a, b, f"{path}.{k}"))), None)
