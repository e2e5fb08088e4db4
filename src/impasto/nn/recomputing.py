"""In training, cheap results are computed again in the backward pass rather than stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .tokens import is_tracing


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *, random: bool = False) -> Tensor:
    """function(x), of which only x is stored for the backward pass.

    Without gradients, in graphs, and where others decide what is stored (gradient checkpointing, ``save_on_cpu``), it
    is a plain call.

    Args:
        function: called again in the backward pass.
        random: whether it uses random numbers, which are then the same again.
    """
    decided = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if not torch.is_grad_enabled() or decided or is_tracing():
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=random)
    return result
