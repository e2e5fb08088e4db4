"""Functions and configs that change a model from outside, under the import path that diffusers has for them."""

from __future__ import annotations

from dataclasses import dataclass

from .memory.group_offload import apply_group_offloading
from .transforms.layerwise_casting import apply_layerwise_casting

__all__ = ["FirstBlockCacheConfig", "TaylorSeerCacheConfig", "apply_group_offloading", "apply_layerwise_casting"]


@dataclass
class FirstBlockCacheConfig:
    """For ``model.enable_cache``: steps whose first block changes little reuse what the others computed.

    Args:
        threshold: the relative change below which they do.
    """

    threshold: float = 0.05


@dataclass
class TaylorSeerCacheConfig:
    """For ``model.enable_cache``: one step in several is computed, and the others are extrapolated.

    Args:
        cache_interval: one step in so many is computed.
        disable_cache_before_step: so many steps at the start are computed.
        disable_cache_after_step: only None.
        max_order: 1: linear extrapolation; 0: what was computed last.
    """

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1
