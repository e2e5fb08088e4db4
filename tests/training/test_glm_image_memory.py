"""A LoRA of GLM-Image, of the released size, is trained on a GPU of 16 GB: counted on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from impasto import GlmImageTransformer2DModel, quantize
from impasto.training.assembly.adapters import adapter_config
from impasto.training.settings import recipe_files as recipes
from impasto.transforms.adapters.injection import add

GB = 10**9
LAYERS = 30
#: In bfloat16: the autoencoder, the encoder of glyphs, and the prior's vision tower and codebook.
OTHERS = 2 * (0.4e9 + 0.3e9 + 1.2e9)


class Memory(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: Any = weakref.WeakSet()

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.alive:
            self.alive.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out


def stored(module: nn.Module) -> Iterator[Tensor]:
    """The tensors in memory: of a quantized weight, those that it consists of."""
    for tensor in (*module.parameters(), *module.buffers()):
        parts = getattr(tensor, "__tensor_flatten__", None)
        yield from [tensor] if parts is None else [getattr(tensor, name) for name in parts()[0]]


def as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
    """Attention that keeps no scores; on the meta device torch takes the formula."""
    assert mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=options.get("scale"))[0]


def peak_of_a_step(base: str, layers: int, pixels: int) -> tuple[int, int]:
    """The most bytes during a step of one image with checkpointing, and the number of trained parameters."""
    settings = recipes.read("glm-image-lora").adapter
    assert settings is not None
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = GlmImageTransformer2DModel(num_attention_heads=32, attention_head_dim=128, num_layers=layers)
    torch.set_default_dtype(default)
    model.requires_grad_(False)
    quantize(model, base, keep_originals=False)
    add(model, adapter_config(settings, settings.rank, settings.targets), "default")
    model.enable_gradient_checkpointing()
    latents, tokens = pixels // 8, (pixels // 16) ** 2

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    with Memory() as memory:
        for tensor in stored(model):
            memory.hold(tensor)
        output = model.train()(
            empty(1, 16, latents, latents),
            empty(1, 16, 1472),
            empty(1, tokens, dtype=torch.long),
            empty(1, tokens, dtype=torch.bool),
            empty(1, dtype=torch.float32),
            empty(1, 2),
            empty(1, 2),
        ).sample
        output.sum().backward()
    return memory.peak, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("base", "most"), [("nf4", 12 * GB), ("int8-weight-only", 14.5 * GB)])
def test_it_fits_16_gb(base: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are alike: those of two and of four give what each adds. Some of 16 GB is not ours."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", as_on_a_gpu)
    (two, _), (four, trained) = (peak_of_a_step(base, layers, pixels=1024) for layers in (2, 4))
    each = (four - two) / 2
    weights = 6.9e9 / LAYERS * (0.5 if base == "nf4" else 1)
    assert each > 0.9 * weights
    adapters = trained / 4 * LAYERS * 4 * 4  # float32 weights, gradients and two moments
    peak = two + (LAYERS - 2) * each + adapters + OTHERS
    print(f"\n{base}: {peak / GB:.1f} GB, of which {(two + (LAYERS - 2) * each) / GB:.1f} are the transformer's")
    assert peak <= most
