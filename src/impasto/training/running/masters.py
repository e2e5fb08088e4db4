"""Float32 master weights, which the optimizer updates, of models that compute in a faster dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...errors import ConfigurationError
from ...nn.machine import fast_dtype
from ..distributed.shards import local


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
        """Within the block, the model holds these float32 values as its parameters: the tensors themselves, or copies
        in the memory of shards, which FSDP does not let go of.
        """
        if any(isinstance(parameter, DTensor) for parameter in self.working.values()):
            kept = {name: master.clone() for name, master in self.named.items()}
            put = self._write
        else:
            kept = {name: parameter.data for name, parameter in self.working.items()}
            put = self._assign
        try:
            put(values)
            yield
        finally:
            put(kept)

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.working.items():
            parameter.data = values[name]

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, master in self.named.items():
            local(master).copy_(local(values[name]))


def working_dtype(precision: str, device: torch.device) -> torch.dtype:
    """In which trained models compute: ``auto`` or the name of a dtype.

    Raises:
        ConfigurationError: float16 on a CPU, where its gradients underflow and its products are slow.
    """
    fast = fast_dtype(device)
    if precision == "auto":
        return torch.float32 if fast == torch.float16 else fast
    if precision == "float16" and device.type == "cpu":
        raise ConfigurationError("precision float16 needs a GPU; use bfloat16, float32 or auto on a CPU")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
