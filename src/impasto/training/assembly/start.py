"""The start of a training stage: the weights of the previous stage under another configuration.

A stage of PixArt-α or -Σ (2310.00426, section 2.2; 2403.04692, section 3.3) goes on from the last one with a higher
resolution, longer texts, another autoencoder, micro-conditions or compressed keys and values. Weights that both have
are kept. Weights that only the new configuration has start so that they change the output as little as they can.
Anything else that does not fit is an error.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...checkpoints import hub
from ...checkpoints.config import naming
from ...checkpoints.stored import FLOATS, Stored, describe, find_weight_files, iterate_tensors, listing
from ...checkpoints.weights import fill
from ...errors import CheckpointError, WeightsMismatchError
from ...folders import reading
from ...models.base import Model

logger = logging.getLogger("impasto")

M = TypeVar("M", bound=Model)
Shape = tuple[int, ...]


def start_stage(
    cls: type[M],
    source: str | os.PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    subfolder: str | None = None,
    seed: int = 0,
) -> M:
    """A model with the weights of ``source`` under its config with some values changed, in float32.

    Positions: if ``sample_size`` changes and ``interpolation_scale`` is not given, it changes in proportion, so that
    positions cover the range of the previous stage (position interpolation).

    New weights:

    - micro-conditions: the output of their embedders is zero, and so they have no effect yet;
    - q/k normalization: scale 1, shift 0;
    - compressed keys and values: the layer normalization of the mean, as in the original code;
    - a learned variance: halfway between its bounds, with the prediction kept;
    - other latent channels: a new patch embedding (DiT, 2212.09748, section 3.2) and a zero output layer.

    Args:
        cls: the class of the model.
        source: the folder of the previous stage, or of a pipeline with ``subfolder``.
        changes: arguments of the constructor that replace those of the config.
        seed: of new weights that start at random.

    Raises:
        CheckpointError: the folder is missing or damaged, or its weights do not fit for another reason than those
            above; the message names the tensors.
        ConfigurationError: a value that cannot be used, by name.
    """
    root, _ = hub.fetch(source, [subfolder or ""], variant=None, use_safetensors=None)
    with reading(hub.inside(root, subfolder)) as folder:
        stored = describe(find_weight_files(folder))
        names = {cls._rename_key(name) for name in stored}
        config = changed_config(cls, folder, names, changes or {})
        with naming(folder / cls.config_name), torch.device("meta"):
            cls._check_lists(cls.checked_arguments(config), names, folder)
            model = cls.from_config(config)
        return _fill(model, folder, stored, seed)


def changed_config(cls: type[Model], folder: Path, names: set[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a stored model with some values changed."""
    cls.checked_arguments({}, **changes)
    config = cls._fit_config(cls.load_config(folder), names)
    before, after = config.get("sample_size"), changes.get("sample_size")
    moved = {**config, **changes}
    if before and after and before != after and "interpolation_scale" not in changes:
        scale = config.get("interpolation_scale") or max(before // 64, 1)
        moved["interpolation_scale"] = scale * after / before
    return moved


# --- new weights ---


def _zeros(shape: Shape, random: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def _ones(shape: Shape, random: torch.Generator) -> Tensor:
    return torch.ones(shape)


def _normal(shape: Shape, random: torch.Generator) -> Tensor:
    return 0.02 * torch.randn(shape, generator=random)


def _mean(shape: Shape, random: torch.Generator) -> Tensor:
    """A convolution of each channel over R x R tokens that averages them."""
    return torch.full(shape, 1.0 / (shape[-2] * shape[-1]))


def _patches(shape: Shape, random: torch.Generator) -> Tensor:
    """Xavier's uniform distribution on the convolution seen as a linear layer."""
    weight = torch.empty(shape[0], shape[1] * shape[2] * shape[3])
    return nn.init.xavier_uniform_(weight, generator=random).view(shape)


Start = Callable[[Shape, torch.Generator], Tensor]
#: Tensors that a source may lack -> how they start.
MISSING: Mapping[str, Start] = {
    r"adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.linear_1\.weight": _normal,
    r"adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.linear_1\.bias": _zeros,
    r"adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.linear_2\.(weight|bias)": _zeros,
    r"transformer_blocks\.\d+\.attn1\.(q_norm|k_norm|kv_compression\.norm)\.weight": _ones,
    r"transformer_blocks\.\d+\.attn1\.(q_norm|k_norm|kv_compression\.(norm|conv))\.bias": _zeros,
    r"transformer_blocks\.\d+\.attn1\.kv_compression\.conv\.weight": _mean,
}


def _start(name: str, shape: Shape, random: torch.Generator) -> Tensor | None:
    """The start of a tensor that the source lacks; None: the source has to have it."""
    found = next((start for pattern, start in MISSING.items() if re.fullmatch(pattern, name)), None)
    return None if found is None else found(shape, random)


def _refit(model: Any, name: str, old: Tensor, shape: Shape, random: torch.Generator) -> Tensor | None:
    """The start of a tensor that has another shape in the source; None: it does not fit.

    The patch embedding is [D, C, p, p]; the output layer [p * p * C, D], with the channel as the fastest index.
    """
    config = model.config
    if name == "pos_embed.proj.weight" and old.ndim == 4 and old.shape[:1] + old.shape[2:] == shape[:1] + shape[2:]:
        return _patches(shape, random)
    if not name.startswith("proj_out."):
        return None
    area = config["patch_size"] ** 2
    if old.ndim != len(shape) or old.shape[1:] != shape[1:] or len(old) % area:
        return None
    channels, before, after = config["in_channels"], len(old) // area, shape[0] // area
    if sorted((before, after)) != [channels, 2 * channels]:
        return torch.zeros(shape)  # other latents
    grid = old.new_zeros(area, after, *shape[1:])
    grid[:, :channels] = old.view(area, before, *shape[1:])[:, :channels]
    return grid.reshape(shape)


def _fill(model: M, folder: Path, stored: Stored, seed: int) -> M:
    """Give a model on the meta device its weights: the stored ones, and new ones."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    random = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    new: list[str] = []
    unfit: dict[str, str] = {}
    for name, tensor in _read(model, stored):
        shape = shapes.get(name)
        if tuple(tensor.shape) == shape:
            values[name] = tensor.float().clone()
            continue
        value = None if shape is None else _refit(model, name, tensor.float(), shape, random)
        if value is None:
            wanted = "is unknown to it" if shape is None else f"would have to be {list(shape)}"
            unfit[name] = f"{name} {list(tensor.shape)} {wanted}"
        else:
            values[name] = value
            new.append(name)
    for name in [name for name in shapes if name not in values and name not in unfit]:
        value = _start(name, shapes[name], random)
        if value is None:
            unfit[name] = f"{name} is missing"
        else:
            values[name] = value
            new.append(name)
    if unfit:
        raise WeightsMismatchError(
            f"the weights in {folder} cannot start this configuration of {type(model).__name__}; {len(unfit)} tensors "
            f"do not fit: {listing(unfit.values())}. Keep the config values that determine them."
        )
    if "pos_embed.proj.weight" in new:  # other latents, to which neither input nor output layer applies
        for name in ("pos_embed.proj.bias", "proj_out.weight", "proj_out.bias"):
            values[name] = torch.zeros(shapes[name])
            new.append(name)
    fill(model, values.items())
    if new:
        logger.info("%s: %d tensors are new: %s", folder, len({*new}), listing(dict.fromkeys(new)))
    model.eval()
    return model


def _read(model: Model, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors by their names in the model."""
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        for name, tensor in iterate_tensors(file):
            if stored[name].dtype not in FLOATS:
                raise CheckpointError(f"{file}: {name} is stored as {stored[name].dtype}; train from float weights")
            yield model._rename_key(name), tensor
