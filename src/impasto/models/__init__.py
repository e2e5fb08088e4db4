"""Models, under the import paths of diffusers too; see ``docs/architecture.md`` for the files."""

from __future__ import annotations

from typing import Any

from ..lazy import publish, resolve

_HOMES = {
    "AutoModel": ":AutoModel",
    "AutoencoderKL": "models.autoencoder.model:AutoencoderKL",
    "AutoencoderKLOutput": "models.autoencoder.model:AutoencoderKLOutput",
    "DecoderOutput": "models.autoencoder.model:DecoderOutput",
    "DiagonalGaussianDistribution": "nn.gaussian:DiagonalGaussianDistribution",
    "GlmImageKVCache": "models.glm_image.context:GlmImageKVCache",
    "GlmImageTransformer2DModel": "models.glm_image.model:GlmImageTransformer2DModel",
    "ModelMixin": "models.base:Model",
    "PixArtTransformer2DModel": "models.pixart.model:PixArtTransformer2DModel",
    "Transformer2DModel": "models.pixart.model:PixArtTransformer2DModel",
    "Transformer2DModelOutput": "nn.outputs:Transformer2DModelOutput",
}
_PROCESSORS = {name: f"models.compat.attention_processor:{name}" for name in ("AttnProcessor", "AttnProcessor2_0")}
_PROCESSORS["Attention"] = "models.compat.attention_processor:ProcessedAttention"
publish(__name__, _PROCESSORS, "attention_processor")
publish(
    __name__,
    _HOMES,
    "auto_model",
    "autoencoders",
    "autoencoders.autoencoder_kl",
    "autoencoders.vae",
    "modeling_outputs",
    "modeling_utils",
    "transformers",
    "transformers.pixart_transformer_2d",
    "transformers.transformer_2d",
    "transformers.transformer_glm_image",
)


def __getattr__(name: str) -> Any:
    return resolve(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
