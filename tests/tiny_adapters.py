"""Adapter files as other programs write them, from known matrices; written from their conventions, not from our code.

Each has the changes of weights that the matrices make, so that a test can add these to a model and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK

BLOCK = "transformer_blocks.{}."
#: Our linear layers of a PixArt block -> the original layer, and which of its projections.
BLOCK_LAYERS = {
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn1.to_out.0": ("attn.proj", 0, 1),
    "attn2.to_q": ("cross_attn.q_linear", 0, 1),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
    "attn2.to_out.0": ("cross_attn.proj", 0, 1),
    "ff.net.0.proj": ("mlp.fc1", 0, 1),
    "ff.net.2": ("mlp.fc2", 0, 1),
}
OTHER_LAYERS = {
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.linear": "t_block.1",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
}
T5_LAYERS = ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo")


class Written(NamedTuple):
    """The tensors of a file, and the changes of weights by component and layer."""

    tensors: dict[str, Tensor]
    deltas: dict[str, dict[str, Tensor]]
    header: dict[str, str] | None = None
    config: dict[str, Any] | None = None  # adapter_config.json


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Writer:
    """Makes random factors for layers of a model, and remembers the changes that they make."""

    def __init__(self, models: dict[str, nn.Module]):
        self.models, self.seed = models, 0
        self.tensors: dict[str, Tensor] = {}
        self.deltas: dict[str, dict[str, Tensor]] = {name: {} for name in models}

    def random(self, *shape: int, std: float = 0.1) -> Tensor:
        self.seed += 1
        return std * noise(*shape, seed=self.seed)

    def weight(self, component: str, layer: str) -> Tensor:
        return self.models[component].get_parameter(f"{layer}.weight").detach()

    def lora(self, component: str, layers: list[str], scale: float) -> tuple[Tensor, Tensor]:
        """Down and up of layers of one input that a file has as one, like the fused qkv."""
        weights = [self.weight(component, layer) for layer in layers]
        out, rest = sum(len(w) for w in weights), weights[0].shape[1:]
        down, up = self.random(RANK, *rest), self.random(out, RANK, *(1 for _ in rest[1:]))
        delta = scale * (up.flatten(1) @ down.flatten(1))
        for layer, part, weight in zip(layers, delta.split([len(w) for w in weights]), weights):
            self.deltas[component][layer] = part.reshape(weight.shape)
        return down, up

    def done(self, **more: Any) -> Written:
        return Written(self.tensors, {c: d for c, d in self.deltas.items() if d}, **more)


def ours(blocks: int = 2, others: bool = True) -> list[str]:
    layers = [BLOCK.format(n) + name for n in range(blocks) for name in BLOCK_LAYERS]
    return [*layers, *OTHER_LAYERS] if others else layers


def originals(blocks: int = 2) -> dict[str, list[str]]:
    """Original layers -> ours."""
    found: dict[str, list[str]] = {}
    for n in range(blocks):
        for name, (original, _, _) in BLOCK_LAYERS.items():
            found.setdefault(f"blocks.{n}.{original}", []).append(BLOCK.format(n) + name)
    return {**found, **{original: [name] for name, original in OTHER_LAYERS.items()}}


def flat(name: str) -> str:
    return name.replace(".", "_")


Maker = Callable[[dict[str, nn.Module]], Written]


def peft(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    for layer in ours():
        down, up = w.lora("transformer", [layer], SCALE)
        w.tensors |= {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
    return w.done(config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA})


def diffusers(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    layers = [("transformer", layer) for layer in ours(others=False)] + [("text_encoder", t) for t in T5_LAYERS]
    for component, layer in layers:
        down, up = w.lora(component, [layer], SCALE)
        w.tensors |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
    settings = {f"{c}.{k}": v for c in models for k, v in (("r", RANK), ("lora_alpha", ALPHA))}
    import json

    return w.done(header={"lora_adapter_metadata": json.dumps(settings)})


def scripts(models: dict[str, nn.Module]) -> Written:
    """The original training scripts: a convolution and embedders too, no alpha, which is 8 then."""
    w = Writer(models)
    for layer in ours():
        down, up = w.lora("transformer", [layer], 8 / RANK)
        prefix = f"unet.base_model.model.{layer}"
        w.tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    return w.done()


def onetrainer_diffusers(models: dict[str, nn.Module]) -> Written:
    """Alpha is folded into the matrices."""
    w = Writer(models)
    for layer in ours():
        down, up = w.lora("transformer", [layer], 1.0)
        w.tensors |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    return w.done()


def onetrainer_legacy(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    layers = [("transformer", layer) for layer in ours()] + [("text_encoder", layer) for layer in T5_LAYERS]
    for component, layer in layers:
        down, up = w.lora(component, [layer], SCALE)
        key = f"{'lora_transformer_' if component == 'transformer' else 'lora_te_'}{flat(layer)}"
        w.tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return w.done()


def _original(models: dict[str, nn.Module], prefix: str, text: str, ends: tuple[str, str], flattened: bool) -> Written:
    w = Writer(models)
    groups = [("transformer", prefix, name, layers) for name, layers in originals().items()]
    groups += [("text_encoder", text, layer, [layer]) for layer in T5_LAYERS if text]
    for component, start, name, layers in groups:
        down, up = w.lora(component, layers, SCALE)
        key = start + (flat(name) if flattened else name)
        w.tensors |= {f"{key}.{ends[0]}": down, f"{key}.{ends[1]}": up, f"{key}.alpha": torch.tensor(ALPHA)}
    return w.done()


PAIRS = {"new": ("lora_A.weight", "lora_B.weight"), "old": ("lora_down.weight", "lora_up.weight")}


def onetrainer_kohya(models: dict[str, nn.Module]) -> Written:
    return _original(models, "lora_unet_", "lora_te1_", PAIRS["old"], flattened=True)


def onetrainer_original(models: dict[str, nn.Module]) -> Written:
    return _original(models, "", "", PAIRS["new"], flattened=False)


def onetrainer_comfy(models: dict[str, nn.Module]) -> Written:
    return _original(models, "diffusion_model.", "text_encoders.t5xxl.transformer.", PAIRS["new"], flattened=False)


def _dora(models: dict[str, nn.Module], by_row: bool, original: bool, key: str = "dora_scale") -> Written:
    w = Writer(models)
    groups = originals() if original else {layer: [layer] for layer in ours()}
    for name, layers in groups.items():
        if name in ("pos_embed.proj", "x_embedder.proj"):
            continue
        weight = torch.cat([w.weight("transformer", layer) for layer in layers])
        down, up = w.lora("transformer", layers, SCALE)
        changed = weight + SCALE * up @ down
        norm = changed.norm(dim=1 if by_row else 0, keepdim=True)
        wanted = norm * (1 + w.random(*norm.shape))
        delta = changed / norm * wanted - weight
        for layer, part in zip(layers, delta.split([len(w.weight("transformer", one)) for one in layers])):
            w.deltas["transformer"][layer] = part
        prefix = f"{'diffusion_model' if original else 'transformer'}.{name}"
        w.tensors |= {
            f"{prefix}.lora_A.weight": down,
            f"{prefix}.lora_B.weight": up,
            f"{prefix}.alpha": torch.tensor(ALPHA),
            f"{prefix}.{key}": wanted.flatten() if key == "lora_magnitude_vector" else wanted,
        }
    return w.done()


def dora_rows(models: dict[str, nn.Module]) -> Written:
    return _dora(models, by_row=True, original=False)


def dora_rows_fused(models: dict[str, nn.Module]) -> Written:
    return _dora(models, by_row=True, original=True)


def dora_columns(models: dict[str, nn.Module]) -> Written:
    return _dora(models, by_row=False, original=False)


def dora_columns_fused(models: dict[str, nn.Module]) -> Written:
    return _dora(models, by_row=False, original=True)


def dora_peft(models: dict[str, nn.Module]) -> Written:
    return _dora(models, by_row=True, original=False, key="lora_magnitude_vector")


def lycoris_lokr(models: dict[str, nn.Module]) -> Written:
    """SimpleTuner: w1 whole, w2 whole or of low rank; with whole matrices the alpha says nothing."""
    w = Writer(models)
    for i, layer in enumerate(ours(others=False)):
        out, inputs = w.weight("transformer", layer).shape
        key = f"lycoris_{flat(layer)}"
        w1 = w.random(4, 4, std=0.4)
        w.tensors |= {f"{key}.lokr_w1": w1, f"{key}.alpha": torch.tensor(ALPHA if i % 2 else 1e3)}
        if i % 2:
            a, b = w.random(out // 4, RANK), w.random(RANK, inputs // 4)
            w.tensors |= {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
            delta = SCALE * torch.kron(w1, a @ b)
        else:
            w2 = w.random(out // 4, inputs // 4)
            w.tensors[f"{key}.lokr_w2"] = w2
            delta = torch.kron(w1, w2)
        w.deltas["transformer"][layer] = delta
    return w.done()


def lokr_fused(models: dict[str, nn.Module]) -> Written:
    """Kronecker products of the original code's fused layers: those of qkv can be divided, those of kv cannot."""
    w = Writer(models)
    for name, layers in originals().items():
        if not name.endswith(("attn.qkv", "kv_linear")):
            continue
        sizes = [len(w.weight("transformer", layer)) for layer in layers]
        inputs = w.weight("transformer", layers[0]).shape[1]
        first = 3
        w1, w2 = w.random(first, 4), w.random(sum(sizes) // first, inputs // 4)
        w.tensors |= {f"lora_unet_{flat(name)}.lokr_w1": w1, f"lora_unet_{flat(name)}.lokr_w2": w2}
        for layer, part in zip(layers, torch.kron(w1, w2).split(sizes)):
            w.deltas["transformer"][layer] = part
    return w.done()


def loha(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    for name, layers in originals().items():
        if name == "x_embedder.proj":
            continue
        sizes = [len(w.weight("transformer", layer)) for layer in layers]
        inputs = w.weight("transformer", layers[0]).shape[1]
        a1, b1, a2, b2 = (w.random(*s, std=0.4) for s in ((sum(sizes), RANK), (RANK, inputs)) * 2)
        key = f"lora_unet_{flat(name)}"
        w.tensors |= {f"{key}.hada_w1_a": a1, f"{key}.hada_w1_b": b1, f"{key}.hada_w2_a": a2, f"{key}.hada_w2_b": b2}
        w.tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        for layer, part in zip(layers, (SCALE * (a1 @ b1) * (a2 @ b2)).split(sizes)):
            w.deltas["transformer"][layer] = part
    return w.done()


def whole_differences(models: dict[str, nn.Module]) -> Written:
    """LyCORIS "full": the change itself, next to ordinary LoRA."""
    w = Writer(models)
    for i, layer in enumerate(ours()):
        key = f"lycoris_{flat(layer)}"
        if i % 2:
            down, up = w.lora("transformer", [layer], 1.0)
            w.tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        else:
            delta = w.random(*w.weight("transformer", layer).shape)
            w.tensors[f"{key}.diff"] = w.deltas["transformer"][layer] = delta
    return w.done()


def rs_lora(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    for layer in ours():
        down, up = w.lora("transformer", [layer], ALPHA / RANK**0.5)
        w.tensors |= {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
    return w.done(config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": True})


def alpha_pattern(models: dict[str, nn.Module]) -> Written:
    w = Writer(models)
    for layer in ours():
        scale = (5.0 if layer.endswith("attn1.to_q") else ALPHA) / RANK
        down, up = w.lora("transformer", [layer], scale)
        w.tensors |= {f"base_model.model.{layer}.lora_A.weight": down, f"base_model.model.{layer}.lora_B.weight": up}
    return w.done(config={"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {"attn1.to_q": 5.0}})


DIALECTS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        peft,
        rs_lora,
        alpha_pattern,
        diffusers,
        scripts,
        onetrainer_diffusers,
        onetrainer_legacy,
        onetrainer_kohya,
        onetrainer_original,
        onetrainer_comfy,
        dora_rows,
        dora_rows_fused,
        dora_columns,
        dora_columns_fused,
        dora_peft,
        lycoris_lokr,
        lokr_fused,
        loha,
        whole_differences,
    )
}
