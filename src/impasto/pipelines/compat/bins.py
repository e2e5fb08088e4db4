"""The sizes of multi-aspect training, in the tables of diffusers: aspect ratio (height / width) -> height and width."""

from __future__ import annotations

from ..resolution import bins_for


def _bins(side: int) -> dict[str, list[float]]:
    return {str(ratio): [float(height), float(width)] for ratio, (height, width) in (bins_for(side) or {}).items()}


ASPECT_RATIO_256_BIN = _bins(256)
ASPECT_RATIO_512_BIN = _bins(512)
ASPECT_RATIO_1024_BIN = _bins(1024)
ASPECT_RATIO_2048_BIN = _bins(2048)
