"""Objects of diffusers: made of our tensors, and loaded next to ours. The only file that imports diffusers."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .checkpoints.config import read_json
from .checkpoints.foreign.errors import translated
from .checkpoints.stored import WEIGHTS_NAME, Stored, describe, find_weight_files, listing, with_variant
from .checks import printable, shown, whole_number
from .errors import CheckpointError, ConfigurationError, InputError, MissingDependencyError, WeightsMismatchError
from .models.base import Model
from .nn.changes import Change, refuse_adapters, refuse_conflicts, unwrapped
from .nn.precision import restore_class
from .optional import require
from .schedulers.base import Scheduler

#: Component -> its base class in diffusers, the pattern of its name, and the methods that a pipeline calls.
ROLES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "scheduler": ("SchedulerMixin", r"[A-Za-z0-9]{1,70}Scheduler", ("set_timesteps", "step", "from_config")),
    "vae": ("ModelMixin", r"(Asymmetric)?Autoencoder[A-Za-z0-9]{1,70}", ("encode", "decode", "from_pretrained")),
}
#: Values of a config that say how many modules there are.
_COUNTS = re.compile(r"(blocks?|layers|depths?)(?!.*(channels|dim|size))")
#: Numbers in tables that a model computes and no checkpoint holds.
_MOST_IN_TABLES = 2**24
_CONFIGS = {"scheduler": "scheduler_config.json", "vae": "config.json"}


# --- ours -> theirs ---


class _Given(Change):
    """What ``to_diffusers`` does, for the check of conflicts: with layers whose tensors need our code to run."""

    change = "given to diffusers"
    conflicts: ClassVar = ("quantized", "stored in a narrow dtype")


def to_diffusers(component: Any) -> Any:
    """The diffusers object of the same class, with the same tensors: no weight is copied.

    A change of a weight through one is seen through the other, so diffusers' pipelines, trainers and savers work on
    ours. ``from_pipe`` is the reverse for pipelines. A subclass of one of our classes becomes what that class would.
    What is not ours is returned unchanged.

    Args:
        component: a transformer, an autoencoder, a scheduler, or a whole pipeline.

    Raises:
        ConfigurationError: layers of a model are quantized or stored in a narrow dtype, or adapters wrap them.
        MissingDependencyError: diffusers is not installed.
    """
    component = unwrapped(component)
    if isinstance(component, Model):
        return _model(component)
    if isinstance(component, Scheduler):
        return _counterpart(component).from_config(_plain(component.config))
    components = getattr(component, "components", None)
    if not isinstance(components, Mapping) or not _bases(component):
        if isinstance(component, nn.Module) or components is not None:
            return _component(component)
        raise InputError(f"to_diffusers takes a model, a scheduler or a pipeline, not {shown(component)}")
    cls = _counterpart(component)
    theirs = cls(**{key: None if value is None else _component(value) for key, value in components.items()})
    theirs.set_progress_bar_config(**getattr(component, "_progress_bar_config", {}))
    return theirs


def _component(value: Any) -> Any:
    value = unwrapped(value)
    if isinstance(value, Model | Scheduler):
        return to_diffusers(value)
    if isinstance(value, nn.Module):
        restore_class(value)
    return value


def _bases(component: Any) -> list[type]:
    """The classes of ours that an object is of, the first one first; none if it is not ours."""
    return [cls for cls in type(component).__mro__ if cls.__module__.startswith(f"{__package__}.")]


def _counterpart(ours: Any) -> Any:
    name = getattr(ours, "saved_as", None) or _bases(ours)[0].__name__
    found = getattr(require("diffusers", "to_diffusers", "diffusers"), name, None)
    if found is None:
        raise MissingDependencyError(f"the installed diffusers has no {name}; update it: pip install -U diffusers")
    return found


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without private keys, such as which values are defaults."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _model(ours: Model) -> nn.Module:
    refuse_adapters(type(ours).__name__, ours, "given to diffusers")
    refuse_conflicts(ours, _Given)
    if changed := ours.changed_arguments():
        raise ConfigurationError(f"diffusers has no {listing(changed)}: its {type(ours).__name__} computes without it")
    cls = _counterpart(ours)
    known = inspect.signature(cls.__init__).parameters
    config = {name: value for name, value in _plain(ours.config).items() if name in known}
    try:
        from accelerate import init_empty_weights  # type: ignore[import-untyped]
    except ImportError:
        theirs: nn.Module = cls.from_config(config)
    else:
        with init_empty_weights(include_buffers=False):  # no checkpoint holds some of the buffers
            theirs = cls.from_config(config)
    tensors = ours.state_dict(keep_vars=True)
    expected = theirs.state_dict(keep_vars=True)
    different = sorted(tensors.keys() ^ expected.keys())
    if different or any(tensors[name].shape != expected[name].shape for name in expected):
        raise ConfigurationError(
            f"{type(ours).__name__} has other tensors than in diffusers, such as {listing(different, 2)}: its layers "
            f"are changed, for example quantized; undo that first"
        )
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = theirs.get_submodule(path)
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor
    for module in theirs.modules():
        for name in module._non_persistent_buffers_set:
            if (table := module._buffers.get(name)) is not None:
                module._buffers[name] = table.to(ours.device)
    for switch in ("tiling", "slicing"):
        if getattr(ours, f"use_{switch}", False):
            getattr(theirs, f"enable_{switch}")()
    return theirs.train(ours.training)


# --- theirs, loaded ---


def fits_role(component: str, library_and_class: Any) -> bool:
    """Whether an entry of ``model_index.json`` names a class of diffusers that may be one for this component."""
    library, name = library_and_class
    role = ROLES.get(component)
    return role is not None and library == "diffusers" and isinstance(name, str) and bool(re.fullmatch(role[1], name))


def class_of_diffusers(component: str, name: str) -> Any:
    """A class of diffusers for a component.

    Raises:
        CheckpointError: diffusers has no such class, or it is not one for this component.
        MissingDependencyError: diffusers is not installed.
    """
    base, _, methods = ROLES[component]
    diffusers = require("diffusers", f"the {component}, a {printable(name)} of diffusers,", "diffusers")
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, getattr(diffusers, base)):
        raise CheckpointError(
            f"diffusers {diffusers.__version__} has no {component} {shown(name)}; update it (pip install -U diffusers)"
            f", or pass a {component} of your own"
        )
    if not all(hasattr(found, method) for method in methods):
        raise CheckpointError(
            f"the {component} is a {shown(name)}, which cannot be used as one; pass another {component}"
        )
    return found


def load_component(
    component: str,
    name: str,
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
) -> Any:
    """Load a scheduler or an autoencoder of diffusers; ``dtype=None`` keeps the stored dtype.

    Raises:
        CheckpointError: the class does not fit, or files are missing or damaged.
        MissingDependencyError: diffusers is not installed.
        WeightsMismatchError: the weights do not fit the config.
    """
    cls = class_of_diffusers(component, name)
    path = folder / _CONFIGS[component]
    config = _plain(read_json(path))
    if component == "scheduler":
        steps = config.get("num_train_timesteps", 1000)
        whole_number(f"{path}: num_train_timesteps", steps, 1, 100_000, error=ConfigurationError)
        with translated(name, folder):
            return cls.from_config(config)
    if "quantization_config" in config:
        raise CheckpointError(f"{path}: a quantized {name} is not loaded; load it with diffusers and pass it")
    files = find_weight_files(folder, variant=variant, use_safetensors=use_safetensors)
    kind = files[0].suffix
    index = folder / with_variant(f"{WEIGHTS_NAME}{kind}.index.json", variant)
    # diffusers prefers the shards, which were then not checked.
    if files[0].name == with_variant(f"{WEIGHTS_NAME}{kind}", variant) and index.is_file():
        raise CheckpointError(
            f"{folder} holds its weights twice, in {files[0].name} and in shards, {index.name}; remove one of them"
        )
    stored = describe(files)
    _check_size(cls, path, config, stored)
    with translated(name, folder):
        model, report = cls.from_pretrained(
            folder,
            torch_dtype=getattr(torch, next(iter(stored.values())).dtype) if dtype is None else dtype,
            variant=variant,
            use_safetensors=kind == ".safetensors",
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise WeightsMismatchError(
            f"the weights in {folder} do not fit the config of {name}: {listing(map(str, wrong))} are missing, left "
            f"over or misshapen. Weights and config.json do not belong together."
        )
    return model.eval()


def _check_size(cls: Any, path: Path, config: Mapping[str, Any], stored: Stored) -> None:
    """Compare what a config asks for with what the files hold, before any of it takes memory.

    Raises:
        WeightsMismatchError: it asks for more modules than there are tensors, or for more numbers than are stored.
    """
    advice = "Weights and config.json do not belong together."
    known = {key: config[key] for key in inspect.signature(cls.__init__).parameters if key in config}
    for key, value in known.items():
        values = list(_leaves(value))
        counts = [leaf for leaf in values if type(leaf) is int] if _COUNTS.search(key) else []
        if max(len(values), sum(map(abs, counts))) > max(len(stored), 1):
            raise WeightsMismatchError(
                f"{path}: {key} asks for more layers than there are tensors in the weights, {len(stored)}. {advice}"
            )
    with translated(cls.__name__, path.parent), torch.device("meta"):
        model = cls.from_config(known)
    asked = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if asked > held + _MOST_IN_TABLES:
        raise WeightsMismatchError(
            f"{path} asks for a {cls.__name__} of {asked} numbers, and the weights hold {held}. {advice}"
        )


def _leaves(value: Any) -> Iterator[Any]:
    """The values in nested lists and objects; of numbers that are not whole, which make no layers, none."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif not isinstance(value, float):
        yield value
