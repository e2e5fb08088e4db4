"""Impasto: the PixArt and GLM-Image text-to-image diffusion transformers, run and trained.

    from impasto import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained("builtin:scenes")
    pipe("a red cube on top of a blue sphere").images[0].save("cube.png")

Names are resolved on first use, so ``import impasto`` and the ``--help`` of the command line load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    HubError,
    ImpastoError,
    InputError,
    MissingDependencyError,
    OutputError,
    ResourceError,
    WeightsMismatchError,
)

if TYPE_CHECKING:
    from .checkpoints.adapters.file import AdapterDefaults
    from .conversion import convert
    from .interop import to_diffusers
    from .memory.group_offload import apply_group_offloading
    from .memory.plan import Budget
    from .models.autoencoder.model import AutoencoderKL, AutoencoderKLOutput, DecoderOutput
    from .models.compat.surface import attention_backend
    from .models.glm_image.context import GlmImageKVCache
    from .models.glm_image.model import GlmImageTransformer2DModel
    from .models.pixart.kv_compression import compress_keys
    from .models.pixart.model import PixArtTransformer2DModel
    from .models.pixart.model import PixArtTransformer2DModel as Transformer2DModel
    from .nn.gaussian import DiagonalGaussianDistribution
    from .nn.outputs import Transformer2DModelOutput
    from .nn.precision import compute_as_stored, compute_in_float32
    from .pipelines.base import ImagePipelineOutput
    from .pipelines.compat.auto import (
        AutoModel,
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
    )
    from .pipelines.compat.configs import DiffusionPipeline
    from .pipelines.glm_image import GlmImagePipeline
    from .pipelines.parallel.parallelize import parallelize
    from .pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
    from .pipelines.pixart_edits import (
        PixArtAlphaImg2ImgPipeline,
        PixArtAlphaInpaintPipeline,
        PixArtSigmaImg2ImgPipeline,
        PixArtSigmaInpaintPipeline,
    )
    from .schedulers.base import SchedulerOutput
    from .schedulers.ddim import DDIMScheduler, DDIMSchedulerOutput
    from .schedulers.ddpm import DDPMScheduler, DDPMSchedulerOutput
    from .schedulers.dpm_solver import DPMSolverMultistepScheduler
    from .schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
    from .schedulers.lcm import LCMScheduler, LCMSchedulerOutput
    from .transforms.guidance_interval import guide_between
    from .transforms.layerwise_casting import apply_layerwise_casting
    from .transforms.quantize import dequantize, quantize
    from .transforms.step_cache import cache_steps

__version__ = "0.1.0"

__all__ = [
    "AdapterDefaults",
    "AutoModel",
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "AutoencoderKLOutput",
    "Budget",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigurationError",
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DDPMSchedulerOutput",
    "DPMSolverMultistepScheduler",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "DiffusionPipeline",
    "FlowMatchEulerDiscreteScheduler",
    "GlmImageKVCache",
    "GlmImagePipeline",
    "GlmImageTransformer2DModel",
    "HubError",
    "ImagePipelineOutput",
    "ImpastoError",
    "InputError",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "MissingDependencyError",
    "OutputError",
    "PixArtAlphaImg2ImgPipeline",
    "PixArtAlphaInpaintPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaImg2ImgPipeline",
    "PixArtSigmaInpaintPipeline",
    "PixArtSigmaPipeline",
    "PixArtTransformer2DModel",
    "ResourceError",
    "SchedulerOutput",
    "Transformer2DModel",
    "Transformer2DModelOutput",
    "WeightsMismatchError",
    "__version__",
    "apply_group_offloading",
    "apply_layerwise_casting",
    "attention_backend",
    "cache_steps",
    "compress_keys",
    "compute_as_stored",
    "compute_in_float32",
    "convert",
    "dequantize",
    "guide_between",
    "parallelize",
    "quantize",
    "to_diffusers",
]

#: Where each lazy name is defined. ``Transformer2DModel`` in old checkpoints is the PixArt transformer.
_HOMES = {
    "AdapterDefaults": ".checkpoints.adapters.file:AdapterDefaults",
    "AutoModel": ".pipelines.compat.auto:AutoModel",
    "AutoPipelineForImage2Image": ".pipelines.compat.auto:AutoPipelineForImage2Image",
    "AutoPipelineForInpainting": ".pipelines.compat.auto:AutoPipelineForInpainting",
    "AutoPipelineForText2Image": ".pipelines.compat.auto:AutoPipelineForText2Image",
    "AutoencoderKL": ".models.autoencoder.model:AutoencoderKL",
    "AutoencoderKLOutput": ".models.autoencoder.model:AutoencoderKLOutput",
    "Budget": ".memory.plan:Budget",
    "DDIMScheduler": ".schedulers.ddim:DDIMScheduler",
    "DDIMSchedulerOutput": ".schedulers.ddim:DDIMSchedulerOutput",
    "DDPMScheduler": ".schedulers.ddpm:DDPMScheduler",
    "DDPMSchedulerOutput": ".schedulers.ddpm:DDPMSchedulerOutput",
    "DPMSolverMultistepScheduler": ".schedulers.dpm_solver:DPMSolverMultistepScheduler",
    "DecoderOutput": ".models.autoencoder.model:DecoderOutput",
    "DiagonalGaussianDistribution": ".nn.gaussian:DiagonalGaussianDistribution",
    "DiffusionPipeline": ".pipelines.compat.configs:DiffusionPipeline",
    "FlowMatchEulerDiscreteScheduler": ".schedulers.flow_match_euler:FlowMatchEulerDiscreteScheduler",
    "GlmImageKVCache": ".models.glm_image.context:GlmImageKVCache",
    "GlmImagePipeline": ".pipelines.glm_image:GlmImagePipeline",
    "GlmImageTransformer2DModel": ".models.glm_image.model:GlmImageTransformer2DModel",
    "ImagePipelineOutput": ".pipelines.base:ImagePipelineOutput",
    "LCMScheduler": ".schedulers.lcm:LCMScheduler",
    "LCMSchedulerOutput": ".schedulers.lcm:LCMSchedulerOutput",
    "PixArtAlphaImg2ImgPipeline": ".pipelines.pixart_edits:PixArtAlphaImg2ImgPipeline",
    "PixArtAlphaInpaintPipeline": ".pipelines.pixart_edits:PixArtAlphaInpaintPipeline",
    "PixArtAlphaPipeline": ".pipelines.pixart:PixArtAlphaPipeline",
    "PixArtSigmaImg2ImgPipeline": ".pipelines.pixart_edits:PixArtSigmaImg2ImgPipeline",
    "PixArtSigmaInpaintPipeline": ".pipelines.pixart_edits:PixArtSigmaInpaintPipeline",
    "PixArtSigmaPipeline": ".pipelines.pixart:PixArtSigmaPipeline",
    "PixArtTransformer2DModel": ".models.pixart.model:PixArtTransformer2DModel",
    "SchedulerOutput": ".schedulers.base:SchedulerOutput",
    "Transformer2DModel": ".models.pixart.model:PixArtTransformer2DModel",
    "Transformer2DModelOutput": ".nn.outputs:Transformer2DModelOutput",
    "apply_group_offloading": ".memory.group_offload:apply_group_offloading",
    "apply_layerwise_casting": ".transforms.layerwise_casting:apply_layerwise_casting",
    "attention_backend": ".models.compat.surface:attention_backend",
    "cache_steps": ".transforms.step_cache:cache_steps",
    "compress_keys": ".models.pixart.kv_compression:compress_keys",
    "compute_as_stored": ".nn.precision:compute_as_stored",
    "compute_in_float32": ".nn.precision:compute_in_float32",
    "convert": ".conversion:convert",
    "dequantize": ".transforms.quantize:dequantize",
    "guide_between": ".transforms.guidance_interval:guide_between",
    "parallelize": ".pipelines.parallel.parallelize:parallelize",
    "quantize": ".transforms.quantize:quantize",
    "to_diffusers": ".interop:to_diffusers",
}


#: Modules that are attributes of the package without having been imported.
_MODULES = {
    "callbacks": ".callbacks",
    "image_processor": ".image_processor",
    "logging": ".utils.logging",
    "models": ".models",
    "pipelines": ".pipelines",
    "schedulers": ".schedulers",
    "utils": ".utils",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name], __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name].split(":")
    value = getattr(import_module(module, __name__), attribute)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
