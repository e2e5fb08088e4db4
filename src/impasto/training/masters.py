"""Float32 master weights, which the optimizer updates, of models that compute in a faster dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..nn.machine import fast_dtype


class Masters:
    """The master weights of what has ``requires_grad``; other parameters are left as they are.

    Layers with buffers, such as batch normalization, stay in float32. A parameter that computes in float32 is its own
    master, without a copy.

    Args:
        dtype: in which trained parameters compute.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.working.values():
            parameter.data = parameter.data.float()
        self.named = {name: parameter.detach() for name, parameter in self.working.items()}
        for module in model.modules():
            if not list(module.buffers(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)

    def take_gradients(self) -> None:
        """Add the gradients of the model to those of the masters; unused parameters have a gradient of zero."""
        for name, parameter in self.working.items():
            master, gradient = self.named[name], parameter.grad
            parameter.grad = None
            if master.grad is None:
                master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
            elif gradient is not None:
                master.grad += gradient

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters' values into the model."""
        cast = [(p, self.named[name]) for name, p in self.working.items() if p.dtype != torch.float32]
        if cast:
            torch._foreach_copy_([p for p, _ in cast], [master for _, master in cast])

    @contextlib.contextmanager
    def replaced_by(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block, the model holds these float32 tensors themselves as its parameters."""
        kept = {name: parameter.data for name, parameter in self.working.items()}
        try:
            for name, parameter in self.working.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self.working.items():
                parameter.data = kept[name]


def working_dtype(precision: str, device: torch.device) -> torch.dtype:
    """In which trained models compute: ``auto`` or the name of a dtype."""
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    fast = fast_dtype(device)
    return torch.float32 if fast == torch.float16 else fast  # gradients underflow in float16
