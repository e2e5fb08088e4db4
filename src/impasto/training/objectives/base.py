"""What is trained, and by which loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor, nn

from ...checkpoints.adapters.file import AdapterDefaults
from ...errors import InputError
from ...transforms.quantized_linear import QuantizedLinear
from ..data.sample import Batch
from ..running.randomness import Randomness


class Loss(NamedTuple):
    each: Tensor  # [B], of each sample, float32
    parts: Mapping[str, Tensor] = {}  # [B], or single numbers, detached, for the log; NaN: this sample has none


class AnyBatch(Protocol):
    """What the training loop knows of a batch: this process's share of the global batch of a step."""

    @property
    def first(self) -> int: ...  # the place of its first sample in the global batch
    @property
    def count(self) -> int: ...  # the size of the global batch
    @property
    def step(self) -> int: ...
    def __len__(self) -> int: ...
    def split(self, size: int | None) -> Sequence[Self]: ...


class Data(Protocol):
    """Batches as a function of the step."""

    def batch(self, step: int, rank: int, world: int) -> AnyBatch:
        """The share of process ``rank`` of ``world`` of the global batch of a step."""
        ...


class Objective(nn.Module):
    """Models and the loss by which they are trained. What is trained has ``requires_grad``.

    ``forward`` is the only entry. Its result depends on the parameters, the batch and ``random`` alone.
    """

    #: Why parameters cannot be sharded over processes; "" where they can.
    unshardable: str = ""
    #: How to generate with an adapter that was trained on it, if in another way than with the model.
    adapter_defaults: ClassVar[AdapterDefaults | None] = None

    def __init__(self) -> None:
        super().__init__()
        self._frozen: list[nn.Module] = []

    def freeze(self, module: nn.Module) -> None:
        """Neither train a module nor save it with the state of a run; it stays in evaluation mode."""
        module.requires_grad_(False).eval()
        self._frozen.append(module)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def prompts(self, texts: Sequence[str]) -> dict[str, Any]:
        """How a pipeline of the models is given these prompts, as arguments."""
        return {"prompt": list(texts)}

    @property
    def sampling(self) -> Mapping[str, Any]:
        """How a pipeline of the models generates, as arguments, if in another way than its family does."""
        return {}

    def state_buffers(self) -> dict[str, Tensor]:
        """The buffers that are part of a run: persistent ones, but for those of frozen modules and quantized layers."""
        frozen = {id(inner) for module in self._frozen for inner in module.modules()}
        found = {}
        for prefix, module in self.named_modules():
            if id(module) not in frozen and not isinstance(module, QuantizedLinear):
                for name, buffer in module.named_buffers(prefix, recurse=False):
                    if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                        found[name] = buffer
        return found

    def forward(self, batch: Any, random: Randomness) -> Loss:
        """The losses of a batch."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The repeated blocks: units of compilation, checkpointing and sharding."""
        return ()

    def flops(self, batch: Any) -> float:
        """Operations of a step on a batch, forward and backward, for the log; 0 if they are not counted."""
        return 0.0

    def after_step(self, step: int) -> None:
        """Called after the optimizers' step, with the number of steps done."""

    def validation(self, batch: Any, random: Randomness) -> Mapping[str, Tensor]:
        """Single numbers that measure the models on a batch of held-out samples; by default their mean loss."""
        return {"validation": self(batch, random).each.mean()}

    def export(self, folder: Path) -> None:
        """Save the result: a folder of a model or of a pipeline, or the file of an adapter."""
        raise NotImplementedError(f"{type(self).__name__} exports nothing")


@dataclass
class Tensors:
    """A batch of a program's own tensors, for objectives that are not trained on samples of images."""

    values: Any  # a named tuple
    count: int
    step: int
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def split(self, size: int | None) -> list[Tensors]:
        if size is not None and size < self.count:
            raise InputError(f"these batches of {self.count} cannot be divided; leave micro_batch unset")
        return [self]


class ByStep:
    """Data made by a function from a step to a ``Batch`` or a named tuple of tensors, for one process.

    Args:
        size: of a batch; that of the first tensor, unless given.
    """

    def __init__(self, function: Callable[[int], Any], size: int | None = None):
        self.function, self.size = function, size

    def batch(self, step: int, rank: int = 0, world: int = 1) -> AnyBatch:
        if world != 1:
            raise InputError("this data is made for one process; start one")
        values = self.function(step)
        if isinstance(values, Batch):
            return values
        return Tensors(values, len(values[0]) if self.size is None else self.size, step)


def linear_weights(module: nn.Module) -> dict[str, int]:
    """The numbers of weights of linear layers, quantized or not, by name: each multiplies a token once."""
    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
    return {name: layer.in_features * layer.out_features for name, layer in layers}
