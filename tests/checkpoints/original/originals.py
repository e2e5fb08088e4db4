"""Checkpoints of the original programs, with random weights, and what these programs compute, in float64.

Written from the programs' descriptions, and not from the tables in ``src``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, HEADS, TEXT = 24, 2, 10
State = dict[str, Tensor]


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}


def _linear(name: str, out: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def positions(side: int, scale: float) -> Tensor:
    """The original's table [1, side * side, WIDTH] of a model trained on ``side`` x ``side`` tokens."""
    omega = 10_000.0 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) / scale] * 2, indexing="ij")
    halves = [(p.flatten()[:, None] * omega).sin() if f else (p.flatten()[:, None] * omega).cos()
              for p in (columns, rows) for f in (True, False)]  # fmt: skip
    return torch.cat(halves, dim=1)[None].float()


def pixart(
    *,
    depth: int = 3,
    micro: bool = False,
    qk_norm: bool = False,
    conv: tuple[int, ...] = (),
    tokens: int | None = 300,
    side: int | None = 4,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> State:
    """A PixArt transformer as its original code stores it."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        **_linear("t_embedder.mlp.0", WIDTH, 256),
        **_linear("t_embedder.mlp.2", WIDTH, WIDTH),
        **_linear("t_block.1", 6 * WIDTH, WIDTH),
        **_linear("y_embedder.y_proj.fc1", WIDTH, TEXT),
        **_linear("y_embedder.y_proj.fc2", WIDTH, WIDTH),
        **_linear("final_layer.linear", 2 * 2 * 8, WIDTH),
        "final_layer.scale_shift_table": (2, WIDTH),
    }
    for embedder in ("csize_embedder", "ar_embedder") if micro else ():
        shapes |= _linear(f"{embedder}.mlp.0", WIDTH // 3, 256) | _linear(f"{embedder}.mlp.2", WIDTH // 3, WIDTH // 3)
    if tokens is not None:
        shapes["y_embedder.y_embedding"] = (tokens, TEXT)
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.scale_shift_table": (6, WIDTH),
            **_linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH),
            **_linear(f"{block}.attn.proj", WIDTH, WIDTH),
            **_linear(f"{block}.cross_attn.q_linear", WIDTH, WIDTH),
            **_linear(f"{block}.cross_attn.kv_linear", 2 * WIDTH, WIDTH),
            **_linear(f"{block}.cross_attn.proj", WIDTH, WIDTH),
            **_linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH),
            **_linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH),
        }
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            shapes |= {f"{block}.attn.{norm}.weight": (WIDTH,), f"{block}.attn.{norm}.bias": (WIDTH,)}
        if i in conv:
            shapes |= {f"{block}.attn.sr.weight": (WIDTH, 1, 2, 2), f"{block}.attn.sr.bias": (WIDTH,)}
            shapes |= {f"{block}.attn.norm.weight": (WIDTH,), f"{block}.attn.norm.bias": (WIDTH,)}
    state = random_state(shapes, seed, dtype)
    if side is not None:
        state["pos_embed"] = positions(side, scale).to(dtype)
    return state


class Original:
    """What the original code computes from a state dict."""

    def __init__(self, state: Mapping[str, Tensor], base: int, scale: float):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.base, self.scale = base, scale

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str = "") -> Tensor:
        if not name:
            return F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def embed(self, name: str, values: Tensor) -> Tensor:
        omega = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        angles = values.double()[:, None] * omega
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", features)))

    def places(self, rows: int, columns: int) -> Tensor:
        omega = 10_000.0 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
        y = torch.arange(rows, dtype=torch.float64) / (rows / self.base) / self.scale
        x = torch.arange(columns, dtype=torch.float64) / (columns / self.base) / self.scale
        grid = [torch.cat([(p[:, None] * omega).sin(), (p[:, None] * omega).cos()], dim=1) for p in (x, y)]
        return torch.cat([grid[0].repeat(rows, 1), grid[1].repeat_interleave(columns, dim=0)], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for query, key, value in zip(*(x.chunk(HEADS, dim=-1) for x in (q, k, v)), strict=True):
            heads.append(torch.softmax(query @ key.mT / (WIDTH // HEADS) ** 0.5, dim=-1) @ value)
        return torch.cat(heads, dim=-1)

    def self_attention(self, name: str, x: Tensor, rows: int, columns: int) -> Tensor:
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, dim=-1)
        if f"{name}.q_norm.weight" in self.state:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if f"{name}.sr.weight" in self.state:
            k, v = (self.compress(name, y, rows, columns) for y in (k, v))
        return self.linear(f"{name}.proj", self.attend(q, k, v))

    def compress(self, name: str, x: Tensor, rows: int, columns: int) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (rows, columns))
        weight, bias = self.state[f"{name}.sr.weight"], self.state[f"{name}.sr.bias"]
        mixed = F.conv2d(grid, weight, bias, stride=weight.shape[-1], groups=WIDTH)
        return self.norm(mixed.flatten(2).transpose(1, 2), f"{name}.norm")

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def patches(self, latents: Tensor) -> tuple[Tensor, int, int]:
        grid = F.conv2d(
            latents.double(), self.state["x_embedder.proj.weight"], self.state["x_embedder.proj.bias"], stride=2
        )
        rows, columns = grid.shape[-2:]
        return grid.flatten(2).transpose(1, 2) + self.places(rows, columns), rows, columns

    def image(self, x: Tensor, rows: int, columns: int) -> Tensor:
        out = x.unflatten(1, (rows, columns)).unflatten(-1, (2, 2, 8))
        return torch.einsum("nhwpqc->nchpwq", out).reshape(x.shape[0], 8, rows * 2, columns * 2)

    def pixart(self, latents: Tensor, text: Tensor, timestep: Tensor, sizes: Tensor | None = None) -> Tensor:
        x, rows, columns = self.patches(latents)
        t = self.embed("t_embedder", timestep)
        if sizes is not None:  # height, width and height / width of each
            c = [self.embed("csize_embedder", sizes[:, 0]), self.embed("csize_embedder", sizes[:, 1])]
            t = t + torch.cat([*c, self.embed("ar_embedder", sizes[:, 2])], dim=1)
        shared = self.linear("t_block.1", F.silu(t)).unflatten(1, (6, WIDTH))
        y = self.linear("y_embedder.y_proj.fc1", text.double())
        y = self.linear("y_embedder.y_proj.fc2", F.gelu(y, approximate="tanh"))
        for i in range(sum(name.endswith(".attn.qkv.weight") for name in self.state)):
            b = f"blocks.{i}"
            m = (self.state[f"{b}.scale_shift_table"] + shared).unbind(1)
            m = [each[:, None] for each in m]
            x = x + m[2] * self.self_attention(f"{b}.attn", self.norm(x) * (1 + m[1]) + m[0], rows, columns)
            k, v = self.linear(f"{b}.cross_attn.kv_linear", y).chunk(2, dim=-1)
            x = x + self.linear(f"{b}.cross_attn.proj", self.attend(self.linear(f"{b}.cross_attn.q_linear", x), k, v))
            x = x + m[5] * self.mlp(f"{b}.mlp", self.norm(x) * (1 + m[4]) + m[3])
        shift, scale = (self.state["final_layer.scale_shift_table"] + t[:, None]).chunk(2, dim=1)
        return self.image(self.linear("final_layer.linear", self.norm(x) * (1 + scale) + shift), rows, columns)

    def dit(self, latents: Tensor, timestep: Tensor, label: int | None) -> tuple[Tensor, list[Tensor]]:
        """The output, and that of each block."""
        x, rows, columns = self.patches(latents)
        c = self.embed("t_embedder", timestep)
        if label is not None:
            c = c + self.state["y_embedder.embedding_table.weight"][label]
        blocks = []
        for i in range(sum(name.endswith(".attn.qkv.weight") for name in self.state)):
            b = f"blocks.{i}"
            m = self.linear(f"{b}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
            x = x + m[2] * self.self_attention(f"{b}.attn", self.norm(x) * (1 + m[1]) + m[0], rows, columns)
            x = x + m[5] * self.mlp(f"{b}.mlp", self.norm(x) * (1 + m[4]) + m[3])
            blocks.append(x)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
        x = self.linear("final_layer.linear", self.norm(x) * (1 + scale) + shift)
        return self.image(x, rows, columns), blocks


def dit(*, depth: int = 2, classes: int = 1001, side: int = 4) -> State:
    """A class-conditional DiT."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        **_linear("t_embedder.mlp.0", WIDTH, 256),
        **_linear("t_embedder.mlp.2", WIDTH, WIDTH),
        "y_embedder.embedding_table.weight": (classes, WIDTH),
        **_linear("final_layer.linear", 2 * 2 * 8, WIDTH),
        **_linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH),
    }
    for i in range(depth):
        shapes |= {
            **_linear(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH),
            **_linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH),
            **_linear(f"blocks.{i}.mlp.fc1", 4 * WIDTH, WIDTH),
            **_linear(f"blocks.{i}.mlp.fc2", WIDTH, 4 * WIDTH),
            **_linear(f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH),
        }
    return {**{name: x / 2 for name, x in random_state(shapes, 7).items()}, "pos_embed": positions(side, 1.0)}


def autoencoder(levels: int = 2, width: int = 8, layers: int = 1, latents: int = 4) -> State:
    """Latent diffusion's autoencoder of equal widths on every level but the first, which has half as many channels."""
    widths = [width // 2] + [width] * (levels - 1)
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, inner: int, size: int = 3) -> None:
        shapes.update({f"{name}.weight": (out, inner, size, size), f"{name}.bias": (out,)})

    def block(name: str, inner: int, out: int) -> None:
        for norm, channels in (("norm1", inner), ("norm2", out)):
            shapes.update({f"{name}.{norm}.weight": (channels,), f"{name}.{norm}.bias": (channels,)})
        conv(f"{name}.conv1", out, inner)
        conv(f"{name}.conv2", out, out)
        if inner != out:
            conv(f"{name}.nin_shortcut", out, inner, 1)

    def middle(side: str) -> None:
        block(f"{side}.mid.block_1", width, width)
        block(f"{side}.mid.block_2", width, width)
        shapes.update({f"{side}.mid.attn_1.norm.weight": (width,), f"{side}.mid.attn_1.norm.bias": (width,)})
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", width, width, 1)

    conv("encoder.conv_in", widths[0], 3)
    inner = widths[0]
    for level, out in enumerate(widths):
        for number in range(layers):
            block(f"encoder.down.{level}.block.{number}", inner if number == 0 else out, out)
        inner = out
        if level < levels - 1:
            conv(f"encoder.down.{level}.downsample.conv", out, out)
    middle("encoder")
    conv("decoder.conv_in", width, latents)
    middle("decoder")
    for level in reversed(range(levels)):  # the decoder counts from the image as well
        out = widths[level]
        for number in range(layers + 1):
            block(f"decoder.up.{level}.block.{number}", inner if number == 0 else out, out)
        inner = out
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", out, out)
    for side, channels, last in (("encoder", width, 2 * latents), ("decoder", widths[0], 3)):
        shapes.update({f"{side}.norm_out.weight": (channels,), f"{side}.norm_out.bias": (channels,)})
        conv(f"{side}.conv_out", last, channels)
    conv("quant_conv", 2 * latents, 2 * latents, 1)
    conv("post_quant_conv", latents, latents, 1)
    return random_state(shapes, 9)


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items()
    )
