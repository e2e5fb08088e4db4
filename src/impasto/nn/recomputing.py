"""In training, cheap results are computed again in the backward pass rather than stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .precision import checkpointed
from .tokens import is_tracing


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is stored for the backward pass.

    Without gradients, in graphs, and where others decide what is stored (gradient checkpointing, ``save_on_cpu``), it
    is a plain call.

    Args:
        function: called again in the backward pass, with the same random numbers.
    """
    if not torch.is_grad_enabled() or is_tracing() or _others_decide():
        return function(x)
    result: Tensor = checkpointed(function, x)
    return result


def _others_decide() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
