"""Image processors under their documented import path."""

from __future__ import annotations

from .pipelines.images import ImageProcessor as VaeImageProcessor
from .pipelines.images import PixArtImageProcessor

__all__ = ["PixArtImageProcessor", "VaeImageProcessor"]
