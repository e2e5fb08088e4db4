"""Former names of ``changes.is_plain``."""

from __future__ import annotations

from torch import nn

from .changes import is_plain


def is_watched(module: nn.Module) -> bool:
    return not is_plain(module, type(module))


def is_idle_dropout(module: nn.Module) -> bool:
    return is_plain(module, nn.Dropout)


def is_plain_linear(layer: nn.Module) -> bool:
    return is_plain(layer, nn.Linear)
