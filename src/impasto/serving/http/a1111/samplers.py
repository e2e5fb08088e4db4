"""The names of samplers as clients send them, and the nearest of ours."""

from __future__ import annotations

from typing import Any

from ....checks import nearest
from ...served import ServedModel
from ..errors import ApiError

#: The nearest of ours, by the names that clients know: multistep solvers are DPM-Solver++, first-order ones DDIM.
#: "Euler a" is what clients send when nobody has chosen, so it is the model's own sampler (None).
_NAMES: dict[str, str | None] = {
    "Euler a": None,
    "Euler": "ddim",
    "DDIM": "ddim",
    "DDIM CFG++": "ddim",
    "DDPM": "ddpm",
    "LCM": "lcm",
    "DPM++ 2M": "dpm++",
    "DPM++ SDE": "dpm++",
    "DPM++ 2M SDE": "dpm++",
    "DPM++ 2M SDE Heun": "dpm++",
    "DPM++ 2S a": "dpm++",
    "DPM++ 3M SDE": "dpm++",
    "DPM2": "dpm++",
    "DPM2 a": "dpm++",
    "DPM fast": "dpm++",
    "DPM adaptive": "dpm++",
    "DEIS": "dpm++",
    "Heun": "dpm++",
    "HeunPP2": "dpm++",
    "IPNDM": "dpm++",
    "IPNDM_V": "dpm++",
    "LMS": "dpm++",
    "PLMS": "dpm++",
    "Restart": "dpm++",
    "UniPC": "dpm++",
}
_OURS = {name: name for name in ("dpm++", "ddim", "ddpm", "lcm")}
_BY_NAME = {name.lower(): ours for name, ours in (_NAMES | _OURS).items()}
#: Old clients append the noise schedule, for which the model's is used.
_SCHEDULES = (" karras", " exponential", " polyexponential", " sgm uniform", " automatic")


def scheduler_of(name: str | None, model: ServedModel) -> str | None:
    """The nearest sampler of a model; None: its own.

    Raises:
        ApiError: 404, an unknown name.
    """
    if name is None:
        return None
    plain = name.strip().lower()
    for schedule in _SCHEDULES:
        plain = plain.removesuffix(schedule)
    if plain not in _BY_NAME:
        known = [*_NAMES, *_OURS]
        raise ApiError(f"Sampler not found: {name[:100]!r}{nearest(name, known)}", "sampler_name", status=404)
    found = _BY_NAME[plain]
    return found if found in model.schedulers else None


def samplers() -> list[dict[str, Any]]:
    """The names, each with the sampler that it means."""
    return [
        {"name": name, "aliases": [name.lower().replace(" ", "_")], "options": {"scheduler": ours or "the model's"}}
        for name, ours in _NAMES.items()
    ]
