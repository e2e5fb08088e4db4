"""Adapters: LoRA, DoRA, LoKr and LoHa, as layers of peft around those of a module."""

from .fusing import fuse, fused_names, fused_size, unfuse
from .injection import add, collect
from .layers import (
    activate,
    active,
    configs_of,
    delete,
    enable,
    move,
    prepare_swapping,
    require_adapters,
    unload,
    weigh,
)
from .loading import Request, load_into, locate, open_adapter
from .saving import save

__all__ = [
    "Request",
    "activate",
    "active",
    "add",
    "collect",
    "configs_of",
    "delete",
    "enable",
    "fuse",
    "fused_names",
    "fused_size",
    "load_into",
    "locate",
    "move",
    "open_adapter",
    "prepare_swapping",
    "require_adapters",
    "save",
    "unfuse",
    "unload",
    "weigh",
]
