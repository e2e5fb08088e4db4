"""Small layers that the transformers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import shown
from ..errors import ConfigurationError
from .backends.onednn import Product, linear_gelu, multiplies, product
from .changes import is_plain, is_watched
from .machine import is_autocast
from .precision import checkpointed
from .tokens import Layout, addcmul_by_image, is_tracing


def modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: Layout | None = None) -> Tensor:
    """Adaptive layer normalization's affine part (DiT, 2212.09748): x (1 + scale) + shift.

    Args:
        x: [B, N, D], or [T, D] with a layout.
        shift, scale: [B or 1, 1, D].
    """
    return torch.addcmul(shift, x, 1 + scale) if layout is None else addcmul_by_image(layout, shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, change: Tensor, layout: Layout | None = None) -> Tensor:
    """x + gate · change; x and change as in ``modulate``, gate [B or 1, 1, D]."""
    return torch.addcmul(x, gate, change) if layout is None else addcmul_by_image(layout, x, gate, change)


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, layout: Layout | None = None) -> Tensor:
    """modulate(norm(x), shift, scale), as one operation where all tokens have one modulation: it is rounded once.

    On the CPU it is one operation for each image where they have their own, so an image is rounded alike in any batch.
    """
    plain = is_plain(norm, nn.LayerNorm) and not norm.elementwise_affine
    one = shift.shape[0] == 1
    if not plain or is_autocast(x.device) or not (one or _visits_images(x, layout)):
        return modulate(norm(x), shift, scale, layout)
    assert isinstance(norm, nn.LayerNorm)
    images = [x] if one else x if layout is None else layout.split(x)
    rows = zip(images, (1 + scale)[:, 0], shift[:, 0], strict=True)
    normed = [F.layer_norm(image, x.shape[-1:], weight, bias, norm.eps) for image, weight, bias in rows]
    if one:
        return normed[0]
    return torch.stack(normed) if layout is None else torch.cat(normed)


def _visits_images(x: Tensor, layout: Layout | None) -> bool:
    """Whether an operation for each image is cheap: not on a GPU, in a graph or in training."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or is_tracing():
        return False
    return layout is None or not layout.copies


def modulation_table(rows: int, width: int) -> nn.Parameter:
    """[rows, width] of deviation 1 / sqrt(width), as the original starts.

    Not on the meta device, where random normal numbers make torch import its compiler: for seconds, and for nothing.
    """
    if torch.get_default_device().type == "meta":
        return nn.Parameter(torch.empty(rows, width))
    return nn.Parameter(torch.randn(rows, width) / width**0.5)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """[B, height * width, p * p * C] -> [B, C, height * p, width * p]."""
    grid = torch.unflatten(torch.unflatten(tokens, 1, (height, width)), -1, (patch_size, patch_size, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C h p w q -> B C (h p) (w q)


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * p * p], the patches row by row."""
    grid = torch.unflatten(torch.unflatten(latents, 3, (-1, patch_size)), 2, (-1, patch_size))  # B C h p w q
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify_channels_first(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of ``patchify``: [B, height * width, C * p * p] -> [B, C, height * p, width * p]."""
    grid = torch.unflatten(torch.unflatten(tokens, 1, (height, width)), -1, (-1, patch_size, patch_size))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # B C h p w q -> B C (h p) (w q)


class PatchConvolution(nn.Conv2d):
    """A convolution whose kernel is as large as its stride, computed as a product of patches and kernels.

    On a CPU a row of a product does not depend on the other rows, and the last digits of a convolution depend on the
    batch: so the tokens of an image are bit-equal whatever other images are in its batch.
    """

    def forward(self, image: Tensor) -> Tensor:
        size = self.stride[0]
        rows, columns = image.shape[2] // size, image.shape[3] // size
        tokens = F.linear(patchify(image, size), self.weight.flatten(1), self.bias)  # [B, N, D]
        return torch.unflatten(tokens.transpose(1, 2), 2, (rows, columns))  # [B, D, rows, columns]


class TwoLayerMLP(nn.Module):
    """Linear, activation, linear: the embedder of timesteps, sizes and captions."""

    def __init__(self, in_features: int, hidden_size: int, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear_1(x)  # [..., hidden_size]
        out: Tensor = self.linear_2(self.activation(hidden))
        return out


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x) (Hendrycks and Gimpel 2016, 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


def _gated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A gated linear unit (2002.05202): half of the features gate the other half."""
    value, gate = x.chunk(2, dim=-1)
    return value * activation(gate)


#: name in configs -> (function, whether it gates and so needs twice the width)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "gelu": (F.gelu, False),
    "gelu-approximate": (gelu_tanh, False),
    "geglu": (partial(_gated, F.gelu), True),
    "geglu-approximate": (_quick_gelu, False),
    "swiglu": (partial(_gated, F.silu), True),
    "linear-silu": (F.silu, False),
}


class _Activated(nn.Module):
    """The projection into the hidden width and its activation; keys ``proj.*``."""

    def __init__(self, dim: int, hidden: int, activation_fn: str):
        super().__init__()
        if activation_fn not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigurationError(f"activation_fn {shown(activation_fn)} is unknown; use one of {known}")
        self.activation, gates = ACTIVATIONS[activation_fn]
        self.approximate = {"gelu": "none", "gelu-approximate": "tanh"}.get(activation_fn)
        self.proj = nn.Linear(dim, 2 * hidden if gates else hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.approximate is not None:
            return linear_gelu(self.proj, x, self.approximate)
        return self.activation(self.proj(x))


#: Bytes of a channel of the tokens that the feed-forward takes at a time on the CPU: their hidden states (19 MB in
#: XL/2) stay in its cache, and in memory that is used again (the allocator of Linux returns more than 32 MB at once).
_BYTES_AT_ONCE = 4096


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is stored for the backward pass: cheap results are computed again there.

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


class FeedForward(nn.Module):
    """Token-wise two-layer network, by default four times as wide inside and as wide outside as its input;
    keys ``net.0.proj.*`` and ``net.2.*``.
    """

    def __init__(
        self,
        dim: int,
        activation_fn: str = "gelu-approximate",
        dropout: float = 0.0,
        hidden: int | None = None,
        out: int | None = None,
    ):
        super().__init__()
        hidden, out = hidden or 4 * dim, out or dim
        self.net = nn.Sequential(_Activated(dim, hidden, activation_fn), nn.Dropout(dropout), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if x.device.type == "cpu" and eager and not is_watched(self.net):
            tokens = x.flatten(0, -2)
            net = self._products(tokens) or self.net
            pieces = [net(piece) for piece in tokens.split(_BYTES_AT_ONCE // tokens.element_size())]
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return joined.view(*x.shape[:-1], joined.shape[-1])
        activated = self.net[0]
        if not torch.is_grad_enabled() or is_watched(self.net) or not isinstance(activated, _Activated):
            out: Tensor = self.net(x)  # [B, N, D]
            return out
        hidden = activated.proj(x)  # [B, N, 4 * D]: all that is stored of the wide states
        return recomputed(lambda wide: self.net[1:](activated.activation(wide)), hidden)

    def _products(self, tokens: Tensor) -> Product | None:
        """``net`` as two products, where that can be and no one would miss a call of its layers."""
        if len(self.net) != 3 or not is_plain(self.net, nn.Sequential):
            return None
        activated, dropout, second = self.net
        if not is_plain(activated, _Activated):
            return None
        assert isinstance(activated, _Activated)
        if activated.approximate is None:
            return None
        if not is_plain(dropout, nn.Dropout):
            return None
        if not (multiplies(activated.proj, tokens) and multiplies(second, tokens)):
            return None
        rows = tokens.shape[0]
        widen, narrow = product(activated.proj, rows, activated.approximate), product(second, rows)
        return lambda piece: narrow(widen(piece))
