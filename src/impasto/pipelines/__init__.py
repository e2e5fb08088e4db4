"""Pipelines, under the import paths of diffusers too."""

from __future__ import annotations

from typing import Any

from ..lazy import publish, resolve

_HOMES = {
    "AutoPipelineForImage2Image": ":AutoPipelineForImage2Image",
    "AutoPipelineForInpainting": ":AutoPipelineForInpainting",
    "AutoPipelineForText2Image": ":AutoPipelineForText2Image",
    "DiffusionPipeline": ":DiffusionPipeline",
    "GlmImagePipeline": "pipelines.glm_image:GlmImagePipeline",
    "ImagePipelineOutput": "pipelines.base:ImagePipelineOutput",
    "PixArtAlphaImg2ImgPipeline": "pipelines.pixart_edits:PixArtAlphaImg2ImgPipeline",
    "PixArtAlphaInpaintPipeline": "pipelines.pixart_edits:PixArtAlphaInpaintPipeline",
    "PixArtAlphaPipeline": "pipelines.pixart:PixArtAlphaPipeline",
    "PixArtSigmaImg2ImgPipeline": "pipelines.pixart_edits:PixArtSigmaImg2ImgPipeline",
    "PixArtSigmaInpaintPipeline": "pipelines.pixart_edits:PixArtSigmaInpaintPipeline",
    "PixArtSigmaPipeline": "pipelines.pixart:PixArtSigmaPipeline",
    "glm_image": "pipelines.glm_image:",
}
_PIXART = {
    **{name: _HOMES[name] for name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline")},
    **{f"ASPECT_RATIO_{side}_BIN": f"pipelines.compat.bins:ASPECT_RATIO_{side}_BIN" for side in (256, 512, 1024, 2048)},
    "retrieve_timesteps": "pipelines.compat.functions:retrieve_timesteps",
}
publish(__name__, _HOMES, "auto_pipeline", "pipeline_utils")
publish(__name__, _PIXART, *("pixart_alpha" + x for x in ("", ".pipeline_pixart_alpha", ".pipeline_pixart_sigma")))


def __getattr__(name: str) -> Any:
    return resolve(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
