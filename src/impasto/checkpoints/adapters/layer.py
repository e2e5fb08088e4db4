"""What an adapter does to the weight of one layer.

Shapes: a weight W of a linear layer is [out, in]; of a convolution [out, in, k, k]. r is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["lora", "lokr", "loha", "full"]
#: The tensors of each kind: those that are always there, and those that may be.
TENSORS: Mapping[Kind, tuple[frozenset[str], frozenset[str]]] = {
    "lora": (frozenset({"A", "B"}), frozenset({"mid", "magnitude"})),
    "lokr": (frozenset(), frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2", "magnitude"})),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}), frozenset({"t1", "t2", "magnitude"})),
    "full": (frozenset({"diff"}), frozenset({"magnitude"})),
}


class AdapterLayer(NamedTuple):
    """An adapter of one layer.

    - ``lora`` (2106.09685): ``A`` [r, in], ``B`` [out, r]; of a convolution A [r, in, k, k] and B [out, r, 1, 1], or
      with ``mid`` [r, r, k, k] A [r, in, 1, 1].
    - ``lokr`` (2212.10650): ``w1`` ⊗ ``w2``, each whole or a product such as ``w1_a`` [a, r] ``w1_b`` [r, c].
    - ``loha`` (2108.06098): (``w1_a w1_b``) ∘ (``w2_a w2_b``), [out, r] and [r, in] each.
    - ``full``: ``diff``, of the shape of the weight.

    With ``magnitude`` (DoRA, 2402.09353), [out, 1] or [1, in], each row or column of the changed weight has this norm.
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    scale: float  # alpha / r

    @property
    def rank(self) -> int | None:
        """r; None if no tensor has it."""
        t = self.tensors
        if self.kind == "lora":
            return t["A"].shape[0]
        low = next((t[name] for name in ("w1_b", "w2_b") if name in t), None)
        return None if low is None else low.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Output features, and inputs times the size of the kernel, as the tensors have them.

        Raises:
            ValueError: the tensors do not fit each other.
        """
        with torch.device("meta"):
            empty = {name: torch.empty(tensor.shape) for name, tensor in self.tensors.items() if name != "magnitude"}
            try:
                product = _product(self.kind, empty)
            except (RuntimeError, IndexError, KeyError) as error:
                raise ValueError("its tensors do not fit each other") from error
        return product.shape[0], math.prod(product.shape[1:])

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to a weight, in float32 and in its shape."""
        product = _product(self.kind, {name: tensor.float() for name, tensor in self.tensors.items()})
        delta: Tensor = product.reshape(weight.shape) * self.scale
        magnitude = self.tensors.get("magnitude")
        if magnitude is None:
            return delta
        changed = weight.float() + delta
        by_row = self.magnitude_is_by_row
        rest = tuple(i for i in range(changed.ndim) if i != (0 if by_row else 1))
        norm = torch.linalg.vector_norm(changed, dim=rest, keepdim=True)
        renormed: Tensor = changed * (magnitude.float().reshape(norm.shape) / norm)
        return renormed - weight.float()

    @property
    def magnitude_is_by_row(self) -> bool:
        """Whether DoRA's norms are those of the rows, one for each output, as in peft and in the paper's code."""
        return self.tensors["magnitude"].shape[0] != 1 or self.shape[0] == 1

    def rows(self, sizes: Sequence[int]) -> list[AdapterLayer] | None:
        """The adapter of several layers of one input that this one holds as one; None if it cannot be divided."""
        t, count = self.tensors, len(sizes)
        if "magnitude" in t and not self.magnitude_is_by_row:
            return None
        if self.kind == "lora":
            divided = {"B", "magnitude"}
        elif self.kind == "full":
            divided = {"diff", "magnitude"}
        elif self.kind == "loha" and "t1" not in t:
            divided = {"w1_a", "w2_a", "magnitude"}
        elif self.kind == "lokr" and "w1" in t and t["w1"].shape[0] % count == 0 and len(set(sizes)) == 1:
            blocks = t["w1"].chunk(count)  # the rows of w1 ⊗ w2 are blocks of those of w2
            return [self._replace(tensors={**t, "w1": block}) for block in blocks]
        else:
            return None
        split = {name: tensor.split([*sizes]) for name, tensor in t.items() if name in divided}
        return [self._replace(tensors={**t, **{name: parts[i] for name, parts in split.items()}}) for i in range(count)]


def dense(delta: Tensor) -> AdapterLayer:
    """Any change of a weight as a ``lora`` of full rank, with A the identity."""
    out, *rest = delta.shape
    identity = torch.eye(math.prod(rest), dtype=delta.dtype, device=delta.device)
    a, b = identity.reshape(-1, *rest), delta.reshape(out, -1, *(1 for _ in rest[1:]))
    return AdapterLayer("lora", {"A": a, "B": b}, 1.0)


def _product(kind: Kind, t: Mapping[str, Tensor]) -> Tensor:
    """The change before scaling: [out, ...]."""
    if kind == "full":
        return t["diff"]
    if kind == "lora":
        if "mid" in t:
            return torch.einsum("ijkl,jr,pi->prkl", t["mid"], t["A"].flatten(1), t["B"].flatten(1))
        return t["B"].flatten(1) @ t["A"].flatten(1)
    if kind == "loha":
        first, second = (_factor(t, n) for n in ("1", "2"))
        return first * second
    first, second = _factor(t, "1"), _factor(t, "2")
    if second.ndim == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second.contiguous())


def _factor(t: Mapping[str, Tensor], number: str) -> Tensor:
    """One of the two matrices of LoKr or LoHa."""
    if f"w{number}" in t:
        return t[f"w{number}"]
    a, b = t[f"w{number}_a"], t[f"w{number}_b"]
    if f"t{number}" in t:  # Tucker's form of a convolution
        return torch.einsum("ijkl,ip,jr->prkl", t[f"t{number}"], a, b)
    return a @ b
