"""Everything that may be in force on a transformer, each combined with each other, in both orders.

A change is made on a fresh model and another one after it, and the model still computes what it did. Then both are
undone, the first one first, and the model computes that bit by bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from impasto import GlmImageTransformer2DModel, PixArtSigmaPipeline, cache_steps, compute_in_float32, quantize
from impasto.errors import ConfigurationError
from impasto.nn.graphs import CapturedCalls, varies

from ..tiny import tiny_pipeline, tiny_transformer
from ..tiny_glm import TRANSFORMER, pipelines

Undo = Callable[[], Any]


class Subject:
    """A transformer, its inputs, and what is in force on it. All numbers are of 16 bits, in float32."""

    def __init__(self, family: str):
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"timestep": torch.tensor([500.0]), "return_dict": False}
        if family == "pixart":
            model: Any = tiny_transformer()
            arguments["encoder_hidden_states"] = torch.randn(2, 5, 32)
        else:
            model = GlmImageTransformer2DModel(**TRANSFORMER, sample_size=8).eval()
            arguments |= {"encoder_hidden_states": torch.randn(2, 5, 16), "prior_token_id": torch.randint(32, (2, 16))}
            arguments |= {"target_size": torch.tensor([[64, 64]]), "crop_coords": torch.zeros(1, 2)}
        self.model = model.bfloat16().float()
        self.arguments = {name: self._cast(value, torch.bfloat16) for name, value in arguments.items()}
        self.latents = torch.randn(2, 2, 4, 8, 8).bfloat16()  # of two steps
        self.blocks: nn.ModuleList = model.transformer_blocks
        self.call: Callable[..., Any] = model
        self.generations: list[Callable[[], AbstractContextManager[None]]] = []  # in which the steps are computed
        self.undo: list[Undo] = []
        self.checks: list[Callable[[], bool]] = []  # that what is in force has had an effect
        self.tolerance = 1e-5

    def predict(self, learn: bool) -> Tensor:
        """The predictions of two steps, and the gradient of one with respect to its latents."""
        dtype = self.model.proj_out.weight.dtype
        arguments = {name: self._cast(value, dtype) for name, value in self.arguments.items()}
        steps = self.latents.to(dtype)
        with torch.no_grad(), ExitStack() as stack:
            for generation in self.generations:
                stack.enter_context(generation())
            found = [self.call(x, **arguments)[0] for x in steps]
        if learn:
            x = steps[0].clone().requires_grad_()
            self.model(x, **arguments)[0].sum().backward()
            assert x.grad is not None
            found.append(x.grad)
        return torch.cat([x.flatten() for x in found]).float()

    @staticmethod
    def _cast(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# --- the changes; each returns how it is undone ---


def hooked(subject: Subject) -> Undo:
    calls: list[int] = []
    subject.checks.append(lambda: len(calls) >= 2)
    return subject.blocks[0].register_forward_hook(lambda *_: calls.append(1)).remove


def compiled(subject: Subject) -> Undo:
    """One block, since blocks are alike. With other shapes as variables if something is in force already."""
    block = subject.blocks[0]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    block.compile(backend=backend, fullgraph=True, dynamic=True if subject.undo else None)
    subject.checks.append(lambda: len(graphs) > 0)
    return lambda: vars(block).pop("_compiled_call_impl", None)


def captured(subject: Subject) -> Undo:
    captures: list[int] = []

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captures.append(1)
        return run

    def check() -> bool:
        return len(captures) == (0 if any(map(varies, subject.model.modules())) else 1)

    calls = CapturedCalls(lambda device: capture, device_type="cpu")
    subject.call = lambda x, **arguments: calls.begin(subject.model)(x, **arguments)
    subject.checks.append(check)
    return lambda: setattr(subject, "call", subject.model)


def sharded(subject: Subject) -> Undo:
    mesh = init_device_mesh("cpu", (1,))
    for module in (*subject.blocks, subject.model):
        fully_shard(module, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in subject.model.parameters())
    return lambda: None


def checkpointed(subject: Subject) -> Undo:
    subject.model.enable_gradient_checkpointing()
    return subject.model.disable_gradient_checkpointing


def cached(subject: Subject) -> Undo:
    cache = cache_steps(subject.model, threshold=0.0)
    subject.generations.append(cache.generation)
    subject.checks.append(lambda: cache.computed == 2)

    def undo() -> None:
        cache.remove()
        subject.generations.clear()

    return undo


def fused(subject: Subject) -> Undo:
    subject.model.fuse_qkv_projections()
    return subject.model.unfuse_qkv_projections


def quantized(subject: Subject) -> Undo:
    pytest.importorskip("torchao")
    subject.tolerance = 0.02
    return quantize(subject.model, "int8-weight-only").remove


def adapted(subject: Subject) -> Undo:
    places = [(block.attn1, name) for block in subject.blocks for name in ("to_q", "to_k", "to_v")]
    for attention, name in places:
        setattr(attention, name, Lora(getattr(attention, name)))
    return lambda: [setattr(attention, name, getattr(attention, name).base_layer) for attention, name in places]


class Lora(nn.Module):
    """The structure of peft's adapters: the second factor is initialized with zeros."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        options: Any = {"bias": False, "dtype": torch.float32}
        self.lora_A = nn.Linear(base_layer.in_features, 2, **options)
        self.lora_B = nn.Linear(2, base_layer.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(x.dtype)


def widened(subject: Subject) -> Undo:
    subject.model.bfloat16()
    subject.tolerance = 0.02
    handle = compute_in_float32(subject.model)

    def undo() -> None:
        handle.remove()
        subject.model.float()

    return undo


CHANGES: dict[str, Callable[[Subject], Undo]] = {
    "hooked": hooked,
    "compiled": compiled,
    "captured": captured,
    "sharded": sharded,
    "checkpointed": checkpointed,
    "cached": cached,
    "fused": fused,
    "quantized": quantized,
    "adapted": adapted,
    "widened": widened,
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()  # those of other tests count, too: there may be eight of a block
    yield
    torch.compiler.reset()


#: Pairs that are refused, and what the message says.
REFUSED = {
    ("quantized", "fused"): r"is quantized and cannot be fused; dequantize\(\) the model first",
    ("fused", "quantized"): r"is fused and cannot be quantized; call unfuse_qkv_projections\(\) on the model first",
    ("adapted", "fused"): "cannot fuse a Lora: a linear projection has an adapter",
    ("sharded", "fused"): "cannot fuse a Linear: a linear projection has .* quantized or sharded",
    ("sharded", "quantized"): "has hooks, or a weight that another library has quantized or sharded",
}
#: Pairs that cannot be, and why.
LEFT_OUT = {
    ("quantized", "sharded"): "torchao's int8 tensors cannot be split among processes",
}
PAIRS = [pair for pair in itertools.permutations(CHANGES, 2) if pair not in LEFT_OUT]


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("family", ["pixart", "glm_image"])
def test_each_with_each_other(family: str, first: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {first, second}
    if family == "glm_image" and "fused" in pair:
        pytest.skip("GLM-Image has no fuse_qkv_projections")
    learn = "quantized" not in pair and ("checkpointed" in pair or "compiled" not in pair)
    subject = Subject(family)
    plain = subject.predict(learn)
    subject.undo.append(CHANGES[first](subject))
    if (first, second) in REFUSED:
        with pytest.raises(ConfigurationError, match=REFUSED[first, second]):
            CHANGES[second](subject)
        return
    subject.undo.append(CHANGES[second](subject))
    found = subject.predict(learn)
    assert all(check() for check in subject.checks)
    assert (found - plain).norm() <= subject.tolerance * plain.norm()
    if "sharded" not in pair:
        for undo in subject.undo:
            undo()
        assert torch.equal(subject.predict(learn), plain)


@pytest.mark.parametrize("family", ["pixart", "glm_image"])
@torch.no_grad()
def test_a_pipeline_generates_with_a_sharded_transformer(family: str) -> None:
    """Its stages are called one by one, outside of ``forward``."""

    def generate(shard: bool) -> Tensor:
        torch.manual_seed(0)
        if family == "pixart":
            pipe: Any = tiny_pipeline(PixArtSigmaPipeline)
            call: dict[str, Any] = {}
        else:
            pipe = pipelines()[0]
            call = {"height": 64, "width": 96, "prior_token_ids": torch.zeros(1, 24, dtype=torch.long)}
        if shard:
            mesh = init_device_mesh("cpu", (1,))
            for module in (*pipe.transformer.transformer_blocks, pipe.transformer):
                fully_shard(module, mesh=mesh)
        generator = torch.Generator().manual_seed(0)
        result: Tensor = pipe('"a"', num_inference_steps=2, generator=generator, output_type="pt", **call).images
        return result

    torch.testing.assert_close(generate(True), generate(False), rtol=1e-4, atol=1e-5)
