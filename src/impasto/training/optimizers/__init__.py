"""Optimizers by name, and which parameters each of them gets."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...optional import require
from .came import CAME
from .muon import Muon

if TYPE_CHECKING:
    from ..settings.config import OptimizerSettings

Group = dict[str, Any]


def make_optimizers(named: Mapping[str, Tensor], settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of named parameters, whose groups have a ``peak``: the highest rate of their parameters.

    ``muon`` gets the matrices inside blocks, and AdamW the rest. Vectors have no weight decay.

    Raises:
        ConfigurationError: a pattern of ``rates`` that no name matches.
    """
    for pattern in settings.rates:
        if not fnmatch.filter(named, pattern):
            raise ConfigurationError(
                f"optimizer.rates: {pattern!r} matches nothing that is trained, such as {next(iter(named), None)!r}"
            )
    hidden: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, parameter in named.items():
        (hidden if settings.name == "muon" and is_hidden_matrix(name, parameter) else rest)[name] = parameter
    matrices = _groups(hidden.items(), settings, settings.weight_decay)
    others = [
        *_groups(((n, p) for n, p in rest.items() if p.ndim >= 2), settings, settings.weight_decay),
        *_groups(((n, p) for n, p in rest.items() if p.ndim < 2), settings, 0.0),
    ]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, lr=settings.rate))
    if others:
        found.append(_make("adamw" if settings.name == "muon" else settings.name, others, settings))
    return found


#: Those that work on the shards of FSDP.
SHARDABLE = ("adamw", "adamw-8bit", "muon", "came")


def check_shardable(settings: OptimizerSettings) -> None:
    """Check that an optimizer works where parameters are sharded.

    Raises:
        ConfigurationError: it does not.
    """
    if settings.name not in SHARDABLE:
        raise ConfigurationError(
            f"optimizer.name {settings.name!r} does not work on parameters that FSDP shards; use one of "
            f"{', '.join(SHARDABLE)}, or parallel 'ddp'"
        )


def _groups(named: Iterable[tuple[str, Tensor]], settings: OptimizerSettings, weight_decay: float) -> list[Group]:
    """A group for each learning rate."""
    by_rate: dict[float, list[Tensor]] = {}
    for name, parameter in named:
        rate = next((r for pattern, r in settings.rates.items() if fnmatch.fnmatch(name, pattern)), settings.rate)
        by_rate.setdefault(rate, []).append(parameter)
    return [{"params": tensors, "weight_decay": weight_decay, "peak": rate} for rate, tensors in by_rate.items()]


def _make(name: str, groups: list[Group], settings: OptimizerSettings) -> torch.optim.Optimizer:
    first, second, *others = settings.betas
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.rate, betas=(first, second), eps=settings.eps, fused=True)
    if name == "adamw-8bit":
        kind = require("torchao.optim", "the optimizer adamw-8bit", "impasto[train]").AdamW8bit
        return kind(groups, lr=settings.rate, betas=settings.betas[:2], eps=settings.eps)  # type: ignore[no-any-return]
    if name == "came":
        return CAME(groups, lr=settings.rate, betas=(first, second, others[0] if others else 0.9999))
    assert name == "prodigy"
    kind = require("pytorch_optimizer", "the optimizer prodigy", "impasto[train]").Prodigy
    return kind(groups, lr=settings.rate, betas=settings.betas[:2], eps=settings.eps)  # type: ignore[no-any-return]


#: The names of lists of blocks: ours, T5's, those of transformers' vision and language models, the autoencoder's.
_BLOCKS = (".transformer_blocks.", ".block.", ".blocks.", ".layers.", ".resnets.", ".downsamplers.", ".upsamplers.")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it maps hidden states to hidden states, unlike embeddings, input and output layers."""
    inside = any(blocks in f".{name}" for blocks in _BLOCKS)
    return inside and parameter.ndim in (2, 4) and name.endswith(".weight") and "relative_attention_bias" not in name
