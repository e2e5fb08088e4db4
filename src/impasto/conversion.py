"""Checkpoints of the original programs <-> folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .checkpoints.layout import INDEX_NAME, superseded
from .checkpoints.original import files
from .checkpoints.original.convert import Component, component_of, to_original
from .checkpoints.stored import WEIGHTS_NAME, describe, iterate_tensors
from .checkpoints.weights import disk_errors, write_weights
from .checks import shown
from .errors import CheckpointError, InputError, OutputError
from .family import ALIASES
from .files import plain_path, write_file
from .folders import reading, saving
from .models.base import Model
from .models.dtypes import parse_dtype
from .registry import class_of

#: What the original format stores in addition, in a file next to the converted weights: for the way back.
EXTRAS_NAME = "original.safetensors"
_TARGETS = (".pth", ".pt", ".safetensors")
_SOURCES = ("transformer", "vae")
#: Options of ``start_from_dit``.
_OF_DIT = ("seed", "timestep", "null_class")


class Converted(NamedTuple):
    """What was converted."""

    class_name: str
    description: str  # of the source
    parameters: int
    weights: files.Weights | None  # which of two sets of weights
    notes: list[str]  # sentences about what was assumed or kept


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    weights: files.Weights | None = None,
    component: str | None = None,
    dtype: torch.dtype | str | None = "auto",
    overwrite: bool = False,
    **config: Any,
) -> Converted:
    """Convert a single file to a folder, or a folder to a single file, completely or not at all.

    Args:
        source: a file of the original PixArt code (alpha or sigma), ComfyUI, latent diffusion (an autoencoder), DiT (it
            becomes a start for training), or with our names; or a folder of a model, or of a pipeline.
        target: a folder; or, if the source is one, a ``.pth`` file as the original code reads it, or ``.safetensors``.
        weights: ``"raw"`` or ``"ema"``, of a training checkpoint with both.
        component: ``"transformer"`` or ``"vae"``, where the source has both.
        dtype: of the written weights; as stored by default.
        overwrite: replace the target if it is a file that exists, or the weights and the config in a folder.
        config: values that the file does not have, such as ``num_attention_heads`` or ``sample_size``; of a DiT also
            the options of ``start_from_dit``.

    Raises:
        CheckpointError: the source is damaged, holds something else, or has unknown or missing tensors.
        InputError: a value has to be given, or the source is a folder of another component.
        OutputError: the target exists, would replace the source, or cannot be written.
    """
    chosen = parse_dtype(dtype, None)
    if component not in (None, *_SOURCES):
        raise InputError(f"component must be 'transformer' or 'vae', not {component!r}")
    destination = plain_path(target)
    replaced = _replaced_by(destination)
    if isinstance(source, str | os.PathLike):
        _refuse_to_replace([source], replaced)
    if replaced and not overwrite:
        raise OutputError(f"{replaced[0]} exists already; give another target, or overwrite=True (--overwrite)")
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        if config or weights:
            raise InputError(f"{', '.join([*config, *(['weights'] if weights else [])])}: a folder says this itself")
        if destination.suffix not in _TARGETS:
            raise InputError(f"a folder is converted to a file named {' or '.join(_TARGETS)}, not {destination.name}")
        return _to_file(Path(source), destination, component, chosen)
    if destination.suffix in (*files.PICKLES, ".safetensors"):
        raise InputError(f"a file is converted to a folder; {destination.name} is named like a file")
    return _to_folder(source, destination, component, weights, chosen, config)


def _replaced_by(target: Path) -> list[Path]:
    """The files that a conversion to ``target`` replaces or removes."""
    if not os.path.isdir(target):
        return [target] if os.path.lexists(target) else []
    try:
        present = sorted(os.listdir(target))
    except OSError as error:
        raise OutputError(f"{target} cannot be read: {error.strerror}; choose another place") from error
    old = {Model.config_name, *_superseded(present, [f"{WEIGHTS_NAME}.safetensors"])}
    return [target / name for name in present if name in old]


def _refuse_to_replace(sources: Iterable[str | os.PathLike[str]], replaced: Iterable[Path]) -> None:
    """Raise OutputError if one of the files to be replaced is a source."""
    there = [source for source in sources if os.path.exists(source)]
    for path in replaced:
        if os.path.exists(path) and any(os.path.samefile(source, path) for source in there):
            raise OutputError(f"{path} is part of the source, and would be lost; give another target")


def _to_folder(
    source: Any,
    target: Path,
    role: str | None,
    weights: files.Weights | None,
    dtype: torch.dtype | None,
    given: Mapping[str, Any],
) -> Converted:
    file = files.read_single_file(source, weights)
    part = _part(file, role)
    cls = cast(type[Model], class_of(part.kind.class_name or "PixArtTransformer2DModel"))
    is_dit = part.kind is files.DIT
    cls.checked_arguments({}, **{key: x for key, x in given.items() if not (is_dit and key in _OF_DIT)})
    if is_dit:
        from .models.pixart.from_dit import TIMESTEP, start_from_dit

        config, tensors = start_from_dit(part.tensors, name=file.path.name, **given)
        found = Component("PixArtTransformer2DModel", tensors, config, {}, [])
        timestep = given.get("timestep", TIMESTEP)
        notes = [
            f"it computes what the DiT computes at timestep {timestep:g}, without a class and whatever the caption"
        ]
    else:
        stored = cls.arguments_next_to(file)
        found = component_of(file, str(part.kind.class_name), {**stored, **given})
        notes = [f"its config is that next to {file.path.name}"] if stored else list(found.assumed)
    model = cls.of_component(found, file.path)  # on the meta device: the tensors fit
    written = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in found.tensors.items()}
    with saving(target, _superseded) as staging:
        write_weights(written, staging)
        model._write_config(staging)
        if found.extras:
            _write_extras(found.extras, staging / EXTRAS_NAME)
            notes.append(f"{EXTRAS_NAME} keeps {', '.join(found.extras)} for the way back; nothing else reads it")
    if changed := model.changed_arguments():
        notes.append(f"diffusers has no {', '.join(changed)}, and would ignore it: use Impasto for this model")
    return Converted(found.class_name, part.kind.description, _count(written), file.weights, notes)


def _superseded(present: Sequence[str], written: Sequence[str]) -> list[str]:
    return [*superseded(present, written), *({EXTRAS_NAME} & set(present))]


def _part(file: files.SingleFile, role: str | None) -> files.Part:
    """The component to convert."""
    transformers = tuple(kind.class_name for kind in files.KINDS if kind.class_name != "AutoencoderKL")
    if role is not None:
        return file.part(*(("AutoencoderKL",) if role == "vae" else transformers))
    held = file.parts()
    if len({part.kind.class_name == "AutoencoderKL" for part in held}) == 2:
        raise InputError(
            f"{file.path} holds a transformer and an autoencoder; give component='transformer' or 'vae' (--component)"
        )
    return file.part("AutoencoderKL", *transformers)


def _write_extras(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with disk_errors():
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path)


def _to_file(source: Path, target: Path, role: str | None, dtype: torch.dtype | None) -> Converted:
    with reading(source) as root:
        if (root / INDEX_NAME).is_file():
            root = root / (role or "transformer")
        with reading(root) as folder:
            class_name = _class_in(folder)
            if role is not None and (role == "vae") != (class_name == "AutoencoderKL"):
                raise InputError(f"{folder} holds no {role} but {class_name}; leave component out (--component)")
            cls = cast(type[Model], class_of(class_name))
            _, stored = cls.skeleton(folder)
            weights = list(dict.fromkeys(each.file for each in stored.values()))
            extras_file = folder / EXTRAS_NAME
            _refuse_to_replace([*weights, extras_file], [target])
            tensors = {cls._rename_key(name): x for file in weights for name, x in iterate_tensors(file)}
            extras = dict(iterate_tensors(extras_file)) if extras_file.is_file() else {}
            if extras:
                describe([extras_file])  # checks it
            found = to_original(class_name, tensors, extras)
            written = {name: x.to(dtype) if dtype and x.is_floating_point() else x for name, x in found.items()}
            _write_single(written, target)
    notes = []
    if class_name == "PixArtTransformer2DModel" and "y_embedder.y_embedding" not in extras:
        notes.append(
            "y_embedder.y_embedding, the embedding of the empty caption, is not in the folder and was left out; the "
            "original code replaces it by a file of its own when it trains"
        )
    return Converted(class_name, f"a {class_name}", _count(written), None, notes)


def _class_in(folder: Path) -> str:
    name = Model._read_config(folder / "config.json").get("_class_name")
    known = sorted({kind.class_name for kind in files.KINDS if kind.class_name})
    found = ALIASES.get(name, name) if isinstance(name, str) else None
    if found is None or found not in known:
        raise CheckpointError(
            f"{folder}: its config says _class_name {shown(name)}; what can be converted is {', '.join(known)}"
        )
    return found


def _write_single(tensors: Mapping[str, Tensor], target: Path) -> None:
    from safetensors.torch import save_file

    alone = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        with disk_errors():
            if target.suffix == ".safetensors":
                save_file(alone, path, metadata={"format": "pt"})
            else:
                torch.save({"state_dict": alone}, path)

    write_file(target, write)


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
