"""The PixArt pipelines and their sizes under the import path of diffusers."""

from __future__ import annotations

from ..lazy import publish
from .pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from .resolution import bins_for


def _bins(side: int) -> dict[str, list[float]]:
    """Aspect ratio (height / width) -> height and width."""
    return {str(ratio): [float(height), float(width)] for ratio, (height, width) in (bins_for(side) or {}).items()}


ASPECT_RATIO_256_BIN = _bins(256)
ASPECT_RATIO_512_BIN = _bins(512)
ASPECT_RATIO_1024_BIN = _bins(1024)
ASPECT_RATIO_2048_BIN = _bins(2048)

__all__ = [
    "ASPECT_RATIO_256_BIN",
    "ASPECT_RATIO_512_BIN",
    "ASPECT_RATIO_1024_BIN",
    "ASPECT_RATIO_2048_BIN",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
]
_HOMES = {name: f"pipelines.pixart_alpha:{name}" for name in __all__}
publish(__name__, _HOMES, "pipeline_pixart_alpha", "pipeline_pixart_sigma")
