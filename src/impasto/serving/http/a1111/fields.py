"""The fields of ``txt2img`` and ``img2img``. Others are ignored, as their clients send dozens that mean nothing here.

Some fields ask for what is absent: they are accepted with the values that switch it off, and refused with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....checks import MAX_CHARACTERS, MAX_GUIDANCE, MAX_SIDE, shown
from ....errors import InputError
from ..context import Context
from ..errors import ApiError
from ..fields import Flag, Kind, Number, Schema, Text, Whole, read_fields
from ..reading import MAX_SEED


@dataclass(frozen=True)
class Switch(Flag):
    """True or false, or 1 or 0."""

    def schema(self) -> Schema:
        return {"enum": [True, False, 1, 0]}

    def read(self, name: str, value: Any) -> bool:
        return super().read(name, bool(value) if value in (0, 1) and isinstance(value, int) else value)


@dataclass(frozen=True)
class Files(Kind):
    """Images as base64 or data URIs: one, or a list."""

    most: int | None = None

    def schema(self) -> Schema:
        text = {"type": "string", "format": "byte", "minLength": 1}
        return text if self.most is None else {"type": "array", "items": text, "minItems": 1, "maxItems": self.most}

    def read(self, name: str, value: Any) -> Any:
        if self.most is None:
            if not isinstance(value, str):
                raise InputError(f"{name} must be base64 or a data URI, not {shown(value)}")
            return value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise InputError(f"{name} must be a list of images as base64 or data URIs, not {shown(value)}")
        if not 1 <= len(value) <= self.most:
            raise InputError(f"{name} has {len(value)} images; give 1 to {self.most}")
        return value


@dataclass(frozen=True)
class Settings(Kind):
    """An object of settings by name. Only those that are used are kept: the answer repeats them."""

    names: tuple[str, ...]

    def schema(self) -> Schema:
        return {"type": "object"}

    def read(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InputError(f"{name} must be an object, not {shown(value)}")
        return {each: value[each] for each in self.names if each in value}


#: What switches off what is absent.
_OFF: dict[str, str] = {
    "enable_hr": "no second pass at a higher resolution; ask for the size itself",
    "restore_faces": "no restoration of faces",
    "tiling": "no seamless tiling",
    "subseed_strength": "no variation seeds",
    "refiner_checkpoint": "no refiner",
    "script_name": "no scripts",
}
#: How texts switch it off, in any case.
_OFF_TEXTS = ("", "none", "false", "0")


def text_fields(context: Context) -> dict[str, Kind]:
    """Of ``txt2img``."""
    settings, side = context.settings, context.longest_side()
    return {
        "prompt": Text(MAX_CHARACTERS),
        "negative_prompt": Text(MAX_CHARACTERS),
        "steps": Whole(1, settings.max_steps),
        "cfg_scale": Number(-MAX_GUIDANCE, MAX_GUIDANCE),
        "width": Whole(1, side),
        "height": Whole(1, side),
        "seed": Whole(-1, MAX_SEED),
        "batch_size": Whole(1, settings.max_images),
        "n_iter": Whole(1, settings.max_images),
        "sampler_name": Text(100),
        "sampler_index": Text(100),
        "override_settings": Settings(("sd_model_checkpoint",)),
        "send_images": Switch(),
    }


def image_fields(context: Context) -> dict[str, Kind]:
    """Of ``img2img``."""
    return text_fields(context) | {
        "init_images": Files(context.settings.max_images),
        "mask": Files(),
        "denoising_strength": Number(0, 1),
        "resize_mode": Whole(0, 3),
        "mask_blur": Number(0, 256),
        "mask_blur_x": Number(0, 256),
        "mask_blur_y": Number(0, 256),
        "inpainting_mask_invert": Switch(),
        "inpaint_full_res": Switch(),
        "inpaint_full_res_padding": Whole(0, MAX_SIDE),
    }


def read_known(fields: Mapping[str, Kind], body: Mapping[str, Any]) -> dict[str, Any]:
    """The known fields of a request, checked. Numbers and flags may be texts, as in A1111; a mask may be empty.

    Raises:
        ApiError: a value that cannot be used, or that asks for what is absent.
    """
    for name, meaning in _OFF.items():
        value = body.get(name)
        if (value.strip().lower() if isinstance(value, str) else value) not in (None, False, 0, *_OFF_TEXTS):
            message = f"{name} is {shown(value)}, and this server has {meaning}; leave it out"
            raise ApiError(message, name, code="not_supported")
    scripts = body.get("alwayson_scripts")
    if scripts is not None and scripts != [] and not isinstance(scripts, dict):
        raise ApiError(f"alwayson_scripts must be an object, not {shown(scripts)}", "alwayson_scripts")
    for name, script in scripts.items() if isinstance(scripts, dict) else ():
        arguments = script.get("args", []) if isinstance(script, dict) else script
        if not _is_off(arguments):
            message = f"alwayson_scripts has {shown(name)}, and this server has no scripts; leave it out"
            raise ApiError(message, "alwayson_scripts", code="not_supported")
    known = {name: value for name, value in body.items() if name in fields and (name, value) != ("mask", "")}
    return read_fields(fields, known, texts=True)


def _is_off(arguments: Any) -> bool:
    """Whether the arguments of a script switch it off: none, false first, or units that are not enabled."""
    if isinstance(arguments, dict):
        return arguments.get("enabled", True) is False
    if not isinstance(arguments, list):
        return not arguments
    first = arguments[0] if arguments else False
    return first in (False, None) or all(isinstance(one, dict) and _is_off(one) for one in arguments)


def schema_of(context: Context, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """The OpenAPI description of a body with these fields."""
    null = {"type": "null"}
    properties: dict[str, Schema] = {name: {"anyOf": [kind.schema(), null]} for name, kind in fields.items()}
    properties |= {name: {"enum": [None, False, 0, "", "None"]} for name in _OFF}
    properties["alwayson_scripts"] = {"anyOf": [{"type": ["object", "array"], "maxProperties": 0, "maxItems": 0}, null]}
    schema: Schema = {"type": "object", "properties": properties}
    if "batch_size" in fields:
        most = context.settings.max_images
        schema["anyOf"] = [  # the product is bounded
            {
                "properties": {
                    "batch_size": {"maximum": i},
                    **({"init_images": {"maxItems": i}} if "init_images" in fields else {}),
                    "n_iter": {"maximum": most // i},
                }
            }
            for i in range(1, most + 1)
        ]
    if "init_images" in fields:
        properties["init_images"] = fields["init_images"].schema()
        properties["mask"] = {"anyOf": [*properties["mask"]["anyOf"], {"const": ""}]}
        schema["required"] = ["init_images"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
