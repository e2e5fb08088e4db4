"""Decoding layer by layer: the numbers of ``decode``, with others computing in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto import PixArtSigmaPipeline
from impasto.nn.precision import in_float32
from impasto.pipelines import base

from ..tiny import tiny_pipeline, tiny_vae

LATENTS = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def by_layer(pipe: Any, between: Callable[[], Any] = lambda: None) -> tuple[Tensor, int]:
    """Decoded images, and how often others could compute meanwhile."""
    work, count = pipe.decode_by_layer(LATENTS), 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, count
        between()
        count += 1


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_are_those_of_decode(dtype: torch.dtype, convolution: bool) -> None:
    vae = tiny_vae(use_post_quant_conv=convolution, force_upcast=True).to(dtype)
    pipe = tiny_pipeline(PixArtSigmaPipeline, vae=vae)
    seen = set()

    def other() -> None:
        """Neither the precision of the autoencoder nor its lack of gradients holds in between."""
        seen.add((torch.is_grad_enabled(), (torch.ones(2, 2).bfloat16() @ torch.ones(2, 2).bfloat16()).dtype))
        with in_float32():
            tiny_vae().decode(LATENTS)

    found, count = by_layer(pipe, other)
    expected = pipe.decode(LATENTS)
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    assert count > len(vae.decoder.layers())
    assert seen == {(True, torch.bfloat16)}


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_vae_slicing(),
        lambda pipe: pipe.enable_vae_tiling(),
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.vae.decoder.register_forward_hook(lambda *_: None),
        lambda pipe: setattr(pipe, "vae", torch.compile(pipe.vae, backend="eager")),
        lambda pipe: pipe.vae.decoder.compile(backend="eager"),
    ],
)
def test_it_is_one_piece_where_layers_cannot_be_called_one_by_one(change: Callable[[Any], Any]) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = pipe.decode(LATENTS)
    change(pipe)
    found, count = by_layer(pipe)
    assert count == 0
    torch.testing.assert_close(found, expected)


def test_layers_do_not_look_at_the_other_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took longer than the layers themselves of small images."""
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    work = pipe.decode_by_layer(LATENTS)
    next(work)
    monkeypatch.setattr(PixArtSigmaPipeline, "device", property(lambda self: pytest.fail("looked at the components")))
    for _ in work:
        pass


def test_autocast_is_off_where_an_offloaded_autoencoder_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def without(device: torch.device) -> AbstractContextManager[None]:
        seen.append(device)
        return nullcontext()

    monkeypatch.setattr(base, "without_autocast", without)
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.vae._onload_device = torch.device("meta")  # its weights are on the CPU
    with pipe.using_vae():
        assert seen == [torch.device("meta")]
