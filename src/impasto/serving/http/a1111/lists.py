"""Lists that clients ask for before they generate, and those that are empty here."""

from __future__ import annotations

from typing import Any

from ..context import Context
from .calls import Session
from .samplers import samplers

#: Paths whose answer is the same on every server like this one.
FIXED: dict[str, Any] = {
    "samplers": samplers(),
    "schedulers": [
        {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0, "need_inner_model": False}
    ],
    "upscalers": [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1.0}],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "artists": [],
    "artist-categories": [],
    "extensions": [],
    "script-info": [],
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {"api": True, "nowebui": True, "listen": False, "share": False, "ckpt": None, "lowvram": False},
    "memory": {
        "ram": {"error": "the server plans its memory itself"},
        "cuda": {"error": "the server plans its memory itself"},
    },
}
#: Paths that ask to look again for files, or to load and unload a model, which the server does by itself.
WITHOUT_EFFECT = (
    "refresh-checkpoints",
    "refresh-vae",
    "refresh-loras",
    "refresh-embeddings",
    "reload-checkpoint",
    "unload-checkpoint",
)


def sd_models(context: Context) -> list[dict[str, Any]]:
    """The models. Their files are the server's business: all names are the served name."""
    names = dict.fromkeys(("title", "model_name", "filename"))
    empty = dict.fromkeys(("hash", "sha256", "config"))
    return [dict.fromkeys(names, model) | empty for model in context.service.models]


def loras(context: Context) -> list[dict[str, Any]]:
    """The adapters, as prompts name them."""
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in context.service.adapters]


def options(context: Context, session: Session) -> dict[str, Any]:
    """The options that mean something here, and those that clients expect to find."""
    return {
        "sd_model_checkpoint": context.model(session.model).name,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "live_previews_enable": session.shows_previews,
        "show_progress_every_n_steps": session.preview_every,
    }
