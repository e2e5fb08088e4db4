"""``impasto convert``: checkpoints of the original programs <-> folders."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer

from ..errors import InputError
from .entry import say
from .options import DType


class Weights(enum.StrEnum):
    """The values of ``--weights``."""

    RAW = "raw"
    EMA = "ema"


class Role(enum.StrEnum):
    """The values of ``--component``."""

    TRANSFORMER = "transformer"
    VAE = "vae"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .pth, .pt, .ckpt or .safetensors file, or a folder.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A folder; for a folder, a .pth or .safetensors file.")],
    weights: Annotated[
        Weights | None,
        typer.Option(help="Of a training checkpoint; by default raw ones of PixArt, and ema ones of DiT."),
    ] = None,
    component: Annotated[Role | None, typer.Option(help="Which one, of a file or folder with both.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the written weights; auto: as stored.")] = DType.AUTO,
    sample_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Side of the latents in training, an eighth of the pixels; found if it can be."),
    ] = None,
    interpolation_scale: Annotated[
        float | None, typer.Option(metavar="X", help="Of positions; found if it can be.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(metavar="N", help="Attention heads; known for the published widths.")
    ] = None,
    kv_compression: Annotated[
        str | None,
        typer.Option(
            metavar="KIND[:FACTOR[:FIRST-LAST]]",
            help="Compression of keys without weights: ave, uniform or uniform_every, as in uniform:2:14-27.",
        ),
    ] = None,
    scaling_factor: Annotated[
        float | None, typer.Option(metavar="X", help="Of an autoencoder's latents: 0.18215 (alpha), 0.13025 (sigma).")
    ] = None,
    caption_channels: Annotated[
        int | None, typer.Option(metavar="N", help="Of the text encoder of a start from a DiT; 4096 by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the new layers of a start from a DiT.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Convert a checkpoint of the original PixArt code, ComfyUI, latent diffusion or DiT to a folder, or back."""
    given: dict[str, Any] = {
        "sample_size": sample_size,
        "interpolation_scale": interpolation_scale,
        "num_attention_heads": heads,
        "scaling_factor": scaling_factor,
        "caption_channels": caption_channels,
        "seed": seed,
        **_compression(kv_compression),
    }
    from ..conversion import convert as run

    converted = run(
        source,
        target,
        weights=None if weights is None else weights.value,
        component=None if component is None else component.value,
        dtype=dtype.value,
        overwrite=overwrite,
        **{name: value for name, value in given.items() if value is not None},
    )
    which = "" if converted.weights is None else f", its {converted.weights} weights"
    say(f"{source}: {converted.description}{which}")
    say(f"{target}: {converted.class_name}, {converted.parameters:,} parameters")
    for note in converted.notes:
        say(f"note: {note}")


def _compression(text: str | None) -> dict[str, Any]:
    """``uniform:2:14-27`` as arguments of the transformer."""
    if text is None:
        return {}
    kind, _, rest = text.partition(":")
    factor, _, layers = rest.partition(":")
    first, _, last = layers.partition("-")
    try:
        found: dict[str, Any] = {"kv_compression": kind, "kv_compression_factor": int(factor or 2)}
        if layers:
            found["kv_compression_layers"] = list(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise InputError(f"--kv-compression is KIND, KIND:FACTOR or KIND:FACTOR:FIRST-LAST, not {text!r}") from error
    return found
