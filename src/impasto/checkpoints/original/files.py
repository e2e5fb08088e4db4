"""Single files with the weights of one or several components: what they hold, by the names of their tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from ...checks import shown
from ...errors import CheckpointError, CheckpointNotFoundError, InputError
from ..adapters.parsing import has_adapter
from ..stored import checked_tensors, iterate_tensors, listing, load_pickle, tensor_headers

#: Which weights of a training checkpoint: those that were trained, or their average.
Weights = Literal["raw", "ema"]
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
#: Where training programs store the trained weights and their average, and which of them they generate with.
_CONTAINERS: tuple[tuple[str, str, Weights], ...] = (("state_dict", "state_dict_ema", "raw"), ("model", "ema", "ema"))
#: Of other components or of training, in files of an autoencoder.
_OF_TRAINING = ("loss.", "model_ema.")
_HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/(.+?)(?:\?.*)?")


class Kind(NamedTuple):
    """A kind of component, in the names of a program."""

    name: str
    #: Our class; None: there is none.
    class_name: str | None
    description: str
    #: Names that only this kind has all of.
    marks: tuple[str, ...]


ORIGINAL = Kind(
    "pixart-original",
    "PixArtTransformer2DModel",
    "a PixArt transformer in the format of the original code",
    ("t_block.1.weight", "blocks.0.cross_attn.q_linear.weight", "x_embedder.proj.weight"),
)
DIT = Kind(
    "dit",
    None,
    "a class-conditional DiT",
    ("blocks.0.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight", "x_embedder.proj.weight"),
)
PIXART = Kind(
    "pixart",
    "PixArtTransformer2DModel",
    "a PixArt transformer",
    ("adaln_single.linear.weight", "transformer_blocks.0.attn1.to_q.weight", "pos_embed.proj.weight"),
)
GLM_IMAGE = Kind(
    "glm-image",
    "GlmImageTransformer2DModel",
    "a GLM-Image transformer",
    ("prior_token_embedding.weight", "image_projector.proj.weight"),
)
LDM_AUTOENCODER = Kind(
    "ldm-autoencoder",
    "AutoencoderKL",
    "an autoencoder in the format of latent diffusion",
    ("decoder.mid.block_1.norm1.weight", "encoder.conv_in.weight"),
)
AUTOENCODER = Kind(
    "autoencoder",
    "AutoencoderKL",
    "an autoencoder",
    ("decoder.mid_block.resnets.0.norm1.weight", "encoder.conv_in.weight"),
)
KINDS = (ORIGINAL, DIT, PIXART, GLM_IMAGE, LDM_AUTOENCODER, AUTOENCODER)


class Part(NamedTuple):
    """A component in a file, by names without their prefix."""

    kind: Kind
    prefix: str
    tensors: dict[str, Tensor]


class SingleFile(NamedTuple):
    """A file, or a state dict, with the weights of components."""

    path: Path
    tensors: Mapping[str, Tensor]
    #: Which of the file's sets of weights these are; None: it has one.
    weights: Weights | None

    def parts(self) -> list[Part]:
        """The components that are recognized, in the order of ``KINDS``."""
        return [Part(kind, prefix, self._below(prefix)) for kind, prefix in recognize(self.tensors)]

    def part(self, *class_names: str | None) -> Part:
        """The one component of one of these classes.

        Raises:
            CheckpointError: the file has none, or several; the message says what it has.
        """
        if any(name.startswith("controlnet.") for name in self.tensors):
            raise CheckpointError(f"{self.path} holds a ControlNet, which these pipelines have no component for")
        parts = self.parts()
        fitting = [part for part in parts if part.kind.class_name in class_names]
        if len(fitting) == 1:
            return fitting[0]
        held = "; ".join(f"{part.kind.description} ({part.prefix or 'no prefix'})" for part in parts)
        wanted = " or ".join(dict.fromkeys(name or "DiT" for name in class_names))
        if fitting:
            raise CheckpointError(f"{self.path} holds several components for a {wanted}: {held}")
        hint = " Convert it with `impasto convert`." if any(part.kind is DIT for part in parts) else ""
        if not parts and has_adapter(self.tensors):
            raise CheckpointError(
                f"{self.path} is an adapter, not a model: load it into a pipeline, by load_lora_weights() or "
                f"`impasto generate --lora`"
            )
        if not parts:
            hint = f" Its tensors are named like {listing(self.tensors, 3) or 'nothing'}."
        raise CheckpointError(f"{self.path} holds no {wanted}, but {held or 'nothing that is known here'}.{hint}")

    def _below(self, prefix: str) -> dict[str, Tensor]:
        found = {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}
        return {name: x for name, x in found.items() if not name.startswith(_OF_TRAINING)}


def recognize(names: Iterable[str]) -> list[tuple[Kind, str]]:
    """The kinds of components that have their marks among the names, each with its prefix."""
    known = set(names)
    found = []
    for kind in KINDS:
        first = kind.marks[0]
        prefixes = {name[: -len(first)] for name in known if name.endswith(first)}
        for prefix in sorted(prefixes):
            ends = prefix == "" or prefix.endswith(".")
            if ends and not prefix.startswith("model_ema.") and all(prefix + mark in known for mark in kind.marks):
                found.append((kind, prefix))
    return found


def read_single_file(source: Any, weights: Weights | None = None, **hub_options: Any) -> SingleFile:
    """Read a file of weights without running code; tensors stay memory-mapped.

    Args:
        source: a ``.safetensors`` file, a pickle of tensors (``.pth``, ``.pt``, ``.ckpt``, ``.bin``), the address of
            one on the hub, or a state dict.
        weights: of a training checkpoint, those that were trained or their average; by default those that the
            program that wrote it generates with: PixArt's the former, DiT's the latter.
        hub_options: ``revision``, ``cache_dir``, ``local_files_only``, ``token``, ``force_download``.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is damaged, or holds anything but tensors.
        InputError: not a file of weights, or it has no weights of this kind.
    """
    if weights not in (None, *get_args(Weights)):
        raise InputError(f"weights must be 'raw' or 'ema', not {shown(weights)}")
    if isinstance(source, SingleFile):
        return source
    if isinstance(source, Mapping):
        return _chosen(Path("the state dict"), dict(source), weights)
    path = _local(source, hub_options)
    if path.suffix == ".safetensors":
        if weights == "ema":
            raise InputError(f"{path} holds one set of weights; leave weights out")
        tensor_headers(path)
        return SingleFile(path, dict(iterate_tensors(path)), None)
    if path.suffix not in PICKLES:
        raise InputError(f"{path} is no file of weights; these are named .safetensors or {', '.join(PICKLES)}")
    return _chosen(path, load_pickle(path, "Ask for a safetensors file instead"), weights)


def _local(source: Any, hub_options: Mapping[str, Any]) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a file of weights is given by its path or by a state dict, not {shown(source)}")
    match = _HUB.fullmatch(os.fspath(source))
    if match:
        from .. import hub

        options = {"revision": match[2], **{k: v for k, v in hub_options.items() if v is not None}}
        path = hub.resolve(match[1], allow_patterns=[match[3]], **options) / match[3]
    else:
        path = Path(source)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; from_pretrained loads it")
    if os.path.isfile(path):
        return path
    raise CheckpointNotFoundError(f"there is no file {shown(os.fspath(source), 200)}; give the path of the weights")


def _chosen(path: Path, content: Any, weights: Weights | None) -> SingleFile:
    if isinstance(content, dict):
        for raw, ema, usual in _CONTAINERS:
            sets: dict[Weights, Any] = {"raw": content.get(raw), "ema": content.get(ema)}
            held = {name: tensors for name, tensors in sets.items() if isinstance(tensors, dict)}
            if not held:
                continue
            choice = weights or (usual if usual in held else next(iter(held)))
            if choice not in held:
                raise InputError(f"{path} has no {choice} weights, only {' and '.join(held)}")
            return SingleFile(path, checked_tensors(path, held[choice]), choice if len(held) == 2 else None)
    if weights == "ema":
        raise InputError(f"{path} holds one set of weights; leave weights out")
    return SingleFile(path, checked_tensors(path, content), None)
