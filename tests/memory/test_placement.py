"""Where weights live: components and blocks that are moved, device maps, components placed by other libraries."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import ConfigurationError, InputError, ResourceError
from impasto.memory import device_map
from impasto.memory.device_map import spread
from impasto.memory.moving import is_settled
from impasto.memory.placement import OneAtATime, PerComponent, Resident
from impasto.memory.streaming import Group, Slot, Stay, Visit, block_lists, methods_of
from impasto.nn.machine import require_device
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_transformer, tiny_vae, write_pipeline

MODULES = ("text_encoder", "transformer", "vae")
CPU, META = torch.device("cpu"), torch.device("meta")


def generate(pipe: Any, **options: Any) -> Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images: Tensor = pipe("a cat", num_inference_steps=2, latents=noise, output_type="pt", **options).images
    return images


def addresses(module: nn.Module) -> list[tuple[int, torch.dtype, torch.device]]:
    return [(t.data_ptr(), t.dtype, t.device) for t in (*module.parameters(), *module.buffers())]


def left_behind(module: nn.Module) -> list[str]:
    """Methods that instances have in the place of those of their classes, and hooks."""
    return [
        name
        for name, child in module.named_modules()
        if {"forward", "encode_text"} & set(vars(child)) or child._forward_hooks or child._forward_pre_hooks
    ]


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype stands for another device: what is there has it."""

    def copy(self: Group, slot: Slot) -> Tensor:
        tensor = slot.read()
        return tensor.double() if tensor.is_floating_point() else tensor.clone()

    monkeypatch.setattr(Group, "_copy", copy)


# --- one component at a time ---


@pytest.mark.usefixtures("in_float64")
def test_one_component_at_a_time() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    addresses_before, parameters = (addresses(a), addresses(b)), list(a.parameters())

    def there() -> list[bool]:
        return [module.weight.dtype == torch.float64 for module in (a, b)]

    placement = OneAtATime("cpu")
    with placement.using(a):
        assert there() == [True, False]
        weight = a.weight.data_ptr()
        with placement.using(a):  # the same component again costs nothing
            assert a.weight.data_ptr() == weight
        with placement.using(b):  # such as a preview
            assert there() == [False, True]
        assert there() == [True, False]
        assert all(x is y for x, y in zip(a.parameters(), parameters))
    assert there() == [False, False]
    assert (addresses(a), addresses(b)) == addresses_before


@pytest.mark.usefixtures("in_float64")
def test_a_component_returns_to_the_host_after_an_error_and_when_loops_end_in_any_order() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    addresses_before = addresses(a), addresses(b)
    placement = OneAtATime("cpu")
    with pytest.raises(KeyError), placement.using(a):
        raise KeyError
    assert addresses(a) == addresses_before[0]
    first, second = placement.using(a), placement.using(b)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert b.weight.dtype == torch.float64
    second.__exit__(None, None, None)
    assert (addresses(a), addresses(b)) == addresses_before


@pytest.mark.usefixtures("in_float64")
def test_changes_on_the_device_are_dropped_and_those_on_the_host_count() -> None:
    component = nn.BatchNorm1d(2)
    on_host = component.weight.data
    placement = OneAtATime("cpu")
    with placement.using(component), torch.no_grad():
        component.weight.mul_(5)
        assert component.running_mean is not None
        assert component.running_mean.dtype == torch.float64
    assert component.weight.tolist() == [1, 1]
    with torch.no_grad():
        on_host.mul_(3)
    with placement.using(component):
        assert component.weight.tolist() == [3, 3]


def test_components_that_are_moved_differently() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    placement = OneAtATime("cpu", Visit(blocks=2), {b: Visit(blocks=1)})
    assert placement.visit_of(a).blocks == 2
    assert placement.visit_of(b).blocks == 1
    gone = weakref.ref(b)
    del b
    gc.collect()
    assert gone() is None


# --- blocks ---


def record(blocks: nn.ModuleList, log: list[str]) -> None:
    """Write down, at each call of a block's class, which blocks are there."""
    cls = type(blocks[0])

    def there(self: nn.Module) -> str:
        flags = "".join("x" if next(b.parameters()).dtype == torch.float64 else "." for b in blocks)
        return f"{flags} {next(i for i, b in enumerate(blocks) if b is self)}"

    def watched(name: str) -> Any:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            log.append(f"{there(self)} {name}")
            return getattr(cls, name)(self, *args, **kwargs)

        return call

    Watched = type("Watched", (cls,), {name: watched(name) for name in methods_of(blocks[0])})
    for block in blocks:
        block.__class__ = Watched


@pytest.mark.usefixtures("in_float64")
def test_blocks_are_moved_for_each_of_their_methods() -> None:
    transformer = tiny_transformer(num_layers=3)
    addresses_before = addresses(transformer)
    text = torch.randn(1, 30, 32).double()
    latents = torch.randn(1, 4, 8, 8).double()
    reference = tiny_transformer(num_layers=3).double()
    log: list[str] = []
    record(transformer.transformer_blocks, log)
    with torch.no_grad():
        expected = reference(latents, text, torch.tensor([5]), return_dict=False)[0]
        with OneAtATime("cpu", Visit(blocks=1)).using(transformer):
            context = transformer.encode_context(text)
            modulation = transformer.modulate(torch.tensor([5]))
            found = transformer.denoise(latents, context, modulation)
            assert transformer.proj_out.weight.dtype == torch.float64  # what is in no block stays
    assert log[-3:] == ["x.. 0 forward", ".x. 1 forward", "..x 2 forward"]
    assert len(log) > 3  # those that make what is read of the text, before any forward
    assert {line.rpartition(" ")[0] for line in log} == {"x.. 0", ".x. 1", "..x 2"}
    torch.testing.assert_close(found, expected)
    assert addresses(transformer) == addresses_before
    assert left_behind(transformer) == []


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("inference", [False, True])
def test_groups_are_fetched_ahead_of_their_use(inference: bool) -> None:
    encoder = tiny_text_encoder(num_layers=5)
    stay = Stay(encoder, CPU, Visit(blocks=2, ahead=True))
    there: list[list[int]] = []
    for block in encoder.encoder.block:
        block.register_forward_hook(
            lambda *_: there.append([i for i, group in enumerate(stay._groups) if group._copies is not None])
        )
    ids = torch.arange(1, 6)[None]
    with torch.inference_mode(inference), torch.no_grad():
        expected = tiny_text_encoder(num_layers=5).double()(ids)[0]
        stay.begin()
        try:
            found = encoder(ids)[0]
        finally:
            stay.end()
    assert there == [[0, 1], [0, 1], [1, 2], [1, 2], [0, 2]]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(group._copies is None for group in stay._groups)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not any(p.is_inference() for p in encoder.parameters())


def test_which_blocks_are_streamed() -> None:
    assert [name for name, _ in block_lists(tiny_text_encoder())] == ["encoder.block"]
    assert [name for name, _ in block_lists(tiny_transformer())] == ["transformer_blocks"]
    assert block_lists(tiny_vae()) == []  # its tiles read the layers inside blocks, and it is small
    assert {"forward", "encode_text"} <= set(methods_of(tiny_transformer().transformer_blocks[0]))
    assert methods_of(tiny_text_encoder().encoder.block[0]) == ["forward"]


def test_too_little_memory_leaves_everything_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_transformer()
    addresses_before = addresses(transformer)
    placement = OneAtATime("cpu")

    def fail(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("impasto.memory.streaming.Group._copy", fail)
    with pytest.raises(torch.OutOfMemoryError), placement.using(transformer):
        pass
    monkeypatch.undo()
    assert addresses(transformer) == addresses_before
    with placement.using(transformer):
        assert addresses(transformer) == addresses_before  # the CPU is where they are


@pytest.mark.usefixtures("in_float64")
def test_too_little_memory_for_another_component_leaves_the_first_one_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    addresses_before = addresses(a), addresses(b)
    placement = OneAtATime("cpu")
    lacking: list[nn.Module] = [b]
    copy: Any = Group._copy

    def fail(self: Group, slot: Slot) -> Tensor:
        if slot.owner in lacking:
            raise torch.OutOfMemoryError("no memory")
        there: Tensor = copy(self, slot)
        return there

    monkeypatch.setattr(Group, "_copy", fail)
    with placement.keeping(a):
        with pytest.raises(torch.OutOfMemoryError), placement.using(b):
            pass
        assert a.weight.dtype == torch.float64
        with placement.using(a):
            assert a.weight.dtype == torch.float64
        assert addresses(b) == addresses_before[1]
        lacking.clear()
        with pytest.raises(torch.OutOfMemoryError), placement.using(b):
            lacking.append(a)  # no memory to return to the first one either
        lacking.clear()
        with placement.using(a):  # until now
            assert a.weight.dtype == torch.float64
    assert (addresses(a), addresses(b)) == addresses_before


def test_compiled_components() -> None:
    whole = torch.compile(tiny_transformer(), backend="eager")
    with pytest.raises(ConfigurationError, match="enable_model_cpu_offload"):
        Stay(whole, CPU, Visit(blocks=1))
    blocks = tiny_transformer()
    for block in blocks.transformer_blocks:
        block.compile(backend="eager")
    expected = generate(tiny_pipeline(PixArtSigmaPipeline))
    pipe = tiny_pipeline(PixArtSigmaPipeline, transformer=blocks)
    pipe.enable_sequential_cpu_offload()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)


# --- offload of a pipeline ---


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("enable_model_cpu_offload", {}),
        ("enable_sequential_cpu_offload", {}),
        ("enable_group_offload", {"onload_device": "cpu", "num_blocks_per_group": 2, "use_stream": True}),
        ("enable_group_offload", {"exclude_modules": "text_encoder"}),
    ],
)
def test_offloads_generate_the_same_and_leave_nothing(method: str, options: dict[str, Any]) -> None:
    expected = generate(tiny_pipeline(PixArtSigmaPipeline))
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    addresses_before = {name: addresses(getattr(pipe, name)) for name in MODULES}
    assert getattr(pipe, method)(**options) is None
    assert isinstance(pipe.placement, OneAtATime)
    assert pipe.device == (torch.accelerator.current_accelerator(check_available=True) or CPU)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    assert {name: addresses(getattr(pipe, name)) for name in MODULES} == addresses_before
    assert all(left_behind(getattr(pipe, name)) == [] for name in MODULES)
    assert PixArtAlphaPipeline.from_pipe(pipe).placement is pipe.placement
    assert isinstance(pipe.to("cpu").placement, Resident)


def test_offloading_what_is_on_a_device_already() -> None:
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        pipe = tiny_pipeline(PixArtSigmaPipeline).to("meta")
        with pytest.raises(InputError, match=r"text_encoder is already on meta.*instead of pipe\.to\('meta'\)"):
            getattr(pipe, method)()
        assert isinstance(pipe.placement, Resident)


def test_arguments_of_group_offload() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    with pytest.raises(InputError, match="offload_device"):
        pipe.enable_group_offload("cpu", "meta")
    with pytest.raises(InputError, match="num_blocks_per_group"):
        pipe.enable_group_offload("cpu", num_blocks_per_group=0)
    with pytest.raises(InputError, match="unet"):
        pipe.enable_group_offload("cpu", exclude_modules=["unet"])


def test_dtypes_in_which_nothing_computes(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="bfloat16"):
        tiny_pipeline(PixArtSigmaPipeline).to(torch.float8_e4m3fn)
    with pytest.raises(ResourceError, match="float8"):
        PixArtSigmaPipeline.from_pretrained(write_pipeline(tmp_path), torch_dtype=torch.float8_e4m3fn)
    with pytest.raises(ResourceError, match="mps has no float64"):
        tiny_pipeline(PixArtSigmaPipeline).to("mps", torch.float64)


@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_components_without_references_are_freed(offload: str | None, tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    if offload is not None:
        getattr(pipe, offload)()
    pipe.enable_prompt_cache(tmp_path)
    generate(pipe)
    parts = {name: weakref.ref(getattr(pipe, name)) for name in MODULES}
    weights = {name: weakref.ref(next(getattr(pipe, name).parameters())) for name in MODULES}
    del pipe.text_encoder, pipe.transformer, pipe.vae
    gc.collect()
    for name in MODULES:
        assert parts[name]() is None, name
        assert weights[name]() is None, name


# --- components placed by other libraries ---


@pytest.mark.usefixtures("in_float64")
def test_a_component_with_its_own_device_map_is_not_moved() -> None:
    encoder = tiny_text_encoder()
    encoder.hf_device_map = {"": "cpu"}
    addresses_before = addresses(encoder)
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder)
    pipe.to(torch.bfloat16)
    assert (pipe.text_encoder.dtype, pipe.transformer.dtype) == (torch.float32, torch.bfloat16)
    embeds = pipe.encode_prompt("a cat").prompt_embeds
    assert torch.equal(embeds, tiny_pipeline(PixArtSigmaPipeline).encode_prompt("a cat").prompt_embeds)
    pipe.to("meta")
    assert pipe.device == META  # that of the others
    assert addresses(encoder) == addresses_before
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder)
    pipe.placement = OneAtATime("cpu")
    with pipe.using("text_encoder"):
        assert addresses(encoder) == addresses_before


def test_a_text_encoder_of_torchao_stays_as_it_is() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    encoder = tiny_text_encoder()
    quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig())
    assert is_settled(encoder)
    assert not is_settled(tiny_text_encoder())
    expected = tiny_pipeline(PixArtSigmaPipeline).encode_prompt("a cat").prompt_embeds
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder).to(torch.bfloat16).to("cpu")
    pipe.enable_sequential_cpu_offload()
    weight = encoder.encoder.block[0].layer[0].SelfAttention.q.weight
    assert type(weight) not in (Tensor, nn.Parameter)
    found = pipe.encode_prompt("a cat").prompt_embeds
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


# --- device maps ---


class Machine:
    """Two accelerators of 100 and 80 bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(device_map, "SHARE", 1.0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: ((100, 80)[device.index], 200))


def test_components_are_spread_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)

    def places(how: str, max_memory: Any = None, **sizes: int) -> list[str]:
        found = spread(sizes, how, max_memory)
        assert list(found) == list(sizes)
        return [str(device) for device in found.values()]

    assert places("auto", a=40, b=50, c=30) == ["cuda:0", "cuda:0", "cuda:1"]
    assert places("balanced", a=40, b=50, c=30) == ["cuda:1", "cuda:0", "cuda:0"]
    assert places("balanced", a=120, b=50) == ["cpu", "cuda:0"]
    assert places("auto", {1: "45B", "cpu": "1GB"}, a=40, b=50) == ["cuda:1", "cpu"]
    assert places("auto", {"cuda:0": 50}, a=40, b=50) == ["cpu", "cuda:0"]


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        Machine(patched)
        assert require_device("cuda:1") == torch.device("cuda:1")
        with pytest.raises(ResourceError, match="cuda:2 is not available; this machine has cpu, cuda:0, cuda:1"):
            require_device("cuda:2")
    with pytest.raises(InputError, match="gpu"):
        require_device("gpu")
    if not torch.accelerator.is_available():
        for device in ("cuda", 0):
            with pytest.raises(ResourceError, match="this machine has cpu"):
                require_device(device)
        pipe = tiny_pipeline(PixArtSigmaPipeline)
        for move in (pipe.to, pipe.enable_group_offload, lambda device: pipe.enable_model_cpu_offload(device=device)):
            with pytest.raises(ResourceError, match="cuda is not available; this machine has cpu"):
                move("cuda")
        assert pipe.device == CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"transformer": "cpu"}])
def test_device_maps_on_a_machine_without_accelerator(
    folder: Path, device_map: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    pipe = PixArtSigmaPipeline.from_pretrained(folder, device_map=device_map, transformer=None)
    assert isinstance(pipe.placement, PerComponent)
    assert pipe.hf_device_map == {"text_encoder": CPU, "vae": CPU}
    pipe.transformer = tiny_transformer()
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(pipe), generate(tiny_pipeline(PixArtSigmaPipeline)), rtol=1e-5, atol=1e-5)


def test_each_component_computes_on_its_device(folder: Path) -> None:
    pipe = PixArtSigmaPipeline.from_pretrained(folder, device_map={"vae": "meta", "text_encoder": "cpu"})
    assert pipe.hf_device_map == {"text_encoder": CPU, "vae": META, "transformer": CPU}
    assert pipe.device == CPU
    with pipe.using("vae"):
        assert pipe.device == META
        with pipe.using("transformer"):
            assert pipe.device == CPU
    assert pipe.decode(torch.zeros(1, 4, 8, 8)).device == META
    with pytest.raises(InputError, match="reset_device_map"):
        pipe.enable_model_cpu_offload()
    other = PixArtSigmaPipeline.from_pretrained(folder, device_map={"vae": "cpu"})
    other.reset_device_map()
    assert other.hf_device_map is None
    assert isinstance(other.placement, Resident)


def test_device_maps_that_cannot_be(folder: Path) -> None:
    with pytest.raises(InputError, match="unet"):
        PixArtSigmaPipeline.from_pretrained(folder, device_map={"unet": "cpu"})
    with pytest.raises(InputError, match="one of them"):
        PixArtSigmaPipeline.from_pretrained(folder, device_map="auto", memory_budget="8GB")
    with pytest.raises(InputError, match="no device 'everywhere'"):
        PixArtSigmaPipeline.from_pretrained(folder, device_map="everywhere")


# --- a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_stream_to_a_gpu(ahead: bool) -> None:
    expected = generate(tiny_pipeline(PixArtSigmaPipeline, transformer=tiny_transformer(num_layers=6)))
    pipe = tiny_pipeline(PixArtSigmaPipeline, transformer=tiny_transformer(num_layers=6))
    pipe.enable_group_offload("cuda", num_blocks_per_group=2, use_stream=ahead)
    assert next(pipe.transformer.parameters()).is_pinned() == ahead
    assert (generate(pipe).cpu() - expected).abs().max() < 1e-3
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [False, True])
def test_streamed_blocks_take_the_memory_of_their_groups(ahead: bool) -> None:
    stack = nn.Module()
    stack.blocks = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(16))  # 16 MiB each
    x = torch.randn(4096, 2048, device="cuda")
    expected = x
    for block in stack.blocks:
        expected = expected @ block.weight.detach().cuda().T
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), OneAtATime("cuda", Visit(blocks=1, ahead=ahead)).using(stack):
        found = x
        for _ in range(2):
            found = x
            for block in stack.blocks:
                found = block(found)
    peak = torch.cuda.max_memory_allocated()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    blocks = 2 if ahead else 1
    assert peak - before < (blocks * 16 + 3 * 32 + 1) * 2**20
