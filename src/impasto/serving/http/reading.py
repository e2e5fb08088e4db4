"""From a request of ``/v1`` to jobs: its fields, their meaning together, and their description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request
from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from ...checks import MAX_CHARACTERS, MAX_GUIDANCE, MAX_SIDE
from ...errors import InputError
from ..job import GivenImages, Job
from ..served import ServedModel
from . import uploads
from .context import Context
from .errors import ApiError
from .fields import (
    Adapters,
    Flag,
    Kind,
    Number,
    OneOf,
    Schema,
    Size,
    Text,
    Whole,
    parse_json,
    read_fields,
    unknown_field,
)
from .images import DEFAULT_QUALITY, MEDIA_TYPES
from .running import deadline, new_id, random_seed

MAX_SEED = 2**53 - 1  # what every reader of JSON has exactly
_FORM = "multipart/form-data"


@dataclass(frozen=True)
class ImageRequest:
    """What a client wants: a job for each image, and how to answer."""

    jobs: list[Job]
    kind: str  # png, jpeg or webp
    quality: int
    response_format: str
    stream: bool


@dataclass(frozen=True)
class Edit:
    """The images that a request gives."""

    images: list[Image.Image]
    mask: Image.Image | None
    strength: float | None
    padding: int | None


class Reader:
    """Reads requests of a server."""

    def __init__(self, context: Context):
        self.context = context
        service, settings = context.service, context.settings
        models = service.models.values()
        self.fields: dict[str, Kind] = {
            "prompt": Text(MAX_CHARACTERS, required=True),
            "model": Text(200),
            "n": Whole(1, settings.max_images),
            "size": Size(context.longest_side()),
            "response_format": OneOf(("b64_json", "url"))
            if context.storage
            else OneOf(("b64_json",), "; for url, start the server with --storage FOLDER"),
            "output_format": OneOf(tuple(MEDIA_TYPES)),
            "output_compression": Whole(0, 100),
            "stream": Flag(),
            "partial_images": Whole(0, 3),
            "negative_prompt": Text(MAX_CHARACTERS),
            "num_inference_steps": Whole(1, settings.max_steps),
            "guidance_scale": Number(-MAX_GUIDANCE, MAX_GUIDANCE),
            "seed": Whole(0, MAX_SEED),
            "use_resolution_binning": Flag(),
            "scheduler": OneOf(tuple(dict.fromkeys(name for model in models for name in model.schedulers))),
            "lora": Adapters(tuple(service.adapters)),
            # Accepted without effect:
            "quality": OneOf(("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
            "complexity": OneOf(("low", "medium", "high")),
            "style": OneOf(("vivid", "natural")),
            "background": OneOf(("auto", "opaque")),
            "moderation": OneOf(("auto", "low")),
            "safety_identifier": Text(1000),
            "user": Text(1000),
        }
        self.edit_fields = self.fields | {
            "strength": Number(0, 1, above=0),
            "padding_mask_crop": Whole(0, MAX_SIDE),
            "input_fidelity": OneOf(("high", "low")),
        }

    # --- reading ---

    async def generation(self, request: Request) -> ImageRequest:
        """Of ``/v1/images/generations``. Raises ApiError."""
        return self._request(read_fields(self.fields, await read_json(self.context, request)), None)

    async def edit(self, request: Request) -> ImageRequest:
        """Of ``/v1/images/edits``: a form, or JSON with images as base64 or data URIs. Raises ApiError."""
        if _media_type(request) == _FORM:
            texts, files = await self._form(request)
            given = read_fields(self.edit_fields, texts, texts=True)
        else:
            body = await read_json(self.context, request, f"{_FORM} or application/json")
            files = {name: _listed_files(name, body.pop(name, None)) for name in ("image", "mask")}
            given = read_fields(self.edit_fields, body)
        # All of it in one turn: a request that waits for a further one would keep what it has decoded.
        return await self.context.decode(lambda: self._request(given, self._decoded(files, given)))

    async def _form(self, request: Request) -> tuple[dict[str, str], dict[str, list[bytes]]]:
        """The texts and files of a form."""
        _, options = parse_options_header(request.headers["content-type"])  # as the form's parser reads it
        charset = options.get(b"charset", b"utf-8").lower()
        if charset not in (b"utf-8", b"utf8"):  # it would be any codec of Python, some of which take minutes
            raise ApiError("the charset of a form must be utf-8; leave it out", status=415)
        most = max(model.most_images for model in self.context.service.models.values())
        texts: dict[str, str] = {}
        files: dict[str, list[bytes]] = {"image": [], "mask": []}
        async with request.form(max_files=most + 2, max_fields=100, max_part_size=1 << 20) as form:
            _without_repeats(form)
            for name, value in form.multi_items():
                plain = name.removesuffix("[]")
                if isinstance(value, UploadFile):
                    if name in self.edit_fields:
                        raise ApiError(f"{name} must be a text, not a file", name, code="invalid_value")
                    if plain not in files:
                        raise unknown_field(name, [*files, *self.edit_fields])
                    files[plain].append(await value.read())
                elif plain in files:
                    files[plain] += _listed_files(plain, value)
                else:
                    texts[name] = value
        return texts, files

    def _decoded(self, files: dict[str, list[bytes]], given: dict[str, Any]) -> Edit:
        """The images of a request, if the model edits so many."""
        if not files["image"]:
            raise ApiError("image is missing: the image to edit", "image", code="missing_parameter")
        if len(files["mask"]) > 1:
            raise ApiError("there is more than one mask; give one, for the first image", "mask", code="invalid_value")
        model, most = self.context.model(given.get("model")), self.context.settings.max_upload_pixels
        try:
            uploads.check_given(model, len(files["image"]), masked=bool(files["mask"]))
        except InputError as error:
            raise ApiError(str(error), "image", code="invalid_value") from error
        found: dict[str, list[Image.Image]] = {}
        for name, contents in files.items():
            try:
                found[name] = [uploads.decode_upload(file, name, most) for file in contents]
            except InputError as error:
                raise ApiError(str(error), name, code="invalid_image") from error
        mask = _mask(found["mask"][0], found["image"][0]) if found["mask"] else None
        return Edit(found["image"], mask, given.pop("strength", None), given.pop("padding_mask_crop", None))

    # --- meaning ---

    def _request(self, given: dict[str, Any], edit: Edit | None) -> ImageRequest:
        """The jobs of checked fields."""
        if "prompt" not in given:
            raise ApiError("prompt is missing: what to show", "prompt", code="missing_parameter")
        n, stream = given.get("n", 1), given.get("stream", False)
        if stream and n > 1:
            raise ApiError("stream is for one image; leave n out, or stream", "n", code="invalid_value")
        model = self.context.model(given.get("model"))
        chosen, defaults = self.context.adapters(model, given.get("lora", []))
        scheduler = given.get("scheduler") or defaults.scheduler
        if scheduler is not None and scheduler not in model.schedulers:
            raise ApiError(
                f"{model.name} has the schedulers {', '.join(model.schedulers) or 'of its own alone'}",
                "scheduler",
                code="invalid_value",
            )
        edited, width, height = self._sizes(model, given.get("size"), edit)
        steps = given.get("num_inference_steps", defaults.steps)
        seed = given.get("seed", random_seed())
        jobs = [
            Job(
                id=new_id(),
                model=model.name,
                prompt=given["prompt"],
                negative_prompt=given.get("negative_prompt", ""),
                width=width,
                height=height,
                binning=given.get("use_resolution_binning", True),
                steps=min(steps, self.context.settings.max_steps),
                guidance_scale=given.get("guidance_scale", defaults.guidance_scale),
                seed=seed + i,
                scheduler=scheduler,
                adapters=chosen,
                given=edited,
                previews=given.get("partial_images", 0) if stream else 0,
                deadline=deadline(self.context.settings.deadline_seconds),
            )
            for i in range(n)
        ]
        quality = given.get("output_compression", DEFAULT_QUALITY)
        return ImageRequest(
            jobs, given.get("output_format", "png"), quality, given.get("response_format", "b64_json"), stream
        )

    def _sizes(
        self, model: ServedModel, size: tuple[int, int] | None, edit: Edit | None
    ) -> tuple[GivenImages | None, int, int]:
        """What is edited, and the width and height of the result."""
        try:
            if edit is None:
                width, height = size or (model.width, model.height)
                uploads.check_size(model, width, height)
                return None, width, height
            strength = edit.strength or (0.8 if edit.mask is None else 1.0)
            return uploads.given_images(model, edit.images, edit.mask, size, strength, edit.padding)
        except InputError as error:
            wrong_size = edit is None or "too large" in str(error)
            raise ApiError(str(error), "size" if wrong_size else "image", code="invalid_value") from error

    # --- description ---

    def generation_body(self) -> dict[str, Any]:
        """The OpenAPI description of the body of ``/v1/images/generations``."""
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": self._schema(False)}}}}

    def edit_body(self) -> dict[str, Any]:
        """The same of ``/v1/images/edits``."""
        form, data = self._schema(True, form=True), self._schema(True)
        most = max(model.most_images for model in self.context.service.models.values())
        file = {"type": "string", "format": "binary", "contentMediaType": "image/png"}
        text = {"type": "string", "format": "byte"}
        for schema, kind in ((form, file), (data, text)):
            image = kind if most == 1 else {"anyOf": [kind, {"type": "array", "items": kind, "maxItems": most}]}
            mask = kind if kind is file else {"anyOf": [kind, {"type": "null"}]}
            schema["properties"] |= {"image": image, "mask": mask}
            schema["required"].append("image")
        encoding = {"image": {"contentType": "image/png"}, "mask": {"contentType": "image/png"}}
        content = {_FORM: {"schema": form, "encoding": encoding}, "application/json": {"schema": data}}
        return {"requestBody": {"required": True, "content": content}}

    def _schema(self, edit: bool, form: bool = False) -> Schema:
        names = [*self.context.service.models, *self.context.service.aliases]
        properties = {}
        for name, kind in (self.edit_fields if edit else self.fields).items():
            schema = OneOf(tuple(names)).schema() if name == "model" else kind.schema()
            properties[name] = schema if form or name == "prompt" else {"anyOf": [schema, {"type": "null"}]}
        return {
            "type": "object",
            "properties": properties,
            "required": ["prompt"],
            "additionalProperties": False,
            # Streams have one image.
            "not": {
                "properties": {"stream": {"const": True}, "n": {"type": "integer", "minimum": 2}},
                "required": ["stream", "n"],
            },
        }


async def read_json(context: Context, request: Request, expected: str = "application/json") -> dict[str, Any]:
    """The object in the body of a request. Raises ApiError and InputError."""
    if _media_type(request) != "application/json":
        raise ApiError(f"the Content-Type must be {expected}", status=415)
    body = b"".join([piece async for piece in request.stream()])  # request.body() would keep it
    found = parse_json(body) if len(body) < 100_000 else await context.decode(parse_json, body)
    if not isinstance(found, dict):
        raise ApiError("the body must be a JSON object")
    return found


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _without_repeats(form: FormData) -> None:
    """Refuse a text that a form has twice."""
    seen = set()
    for name, value in form.multi_items():
        if isinstance(value, str) and name in seen:
            raise ApiError(f"{name[:100]} is given twice", name[:100], code="invalid_value")
        seen.add(name)


def _listed_files(name: str, value: Any) -> list[bytes]:
    """Images in JSON: one or a list of base64 texts or data URIs."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in listed):
        raise ApiError(f"{name} must be base64 or a data URI, or a list of these", name, code="invalid_value")
    try:
        return [uploads.from_base64(one, name) for one in listed]
    except InputError as error:
        raise ApiError(str(error), name, code="invalid_image") from error


def _mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """OpenAI's mask, or, if it has no transparency channel, one whose white is repainted."""
    by_transparency = uploads.transparent_mask(mask)
    found = uploads.white_mask(mask) if by_transparency is None else by_transparency
    try:
        uploads.check_mask(found, image)
    except InputError as error:
        raise ApiError(str(error), "mask", code="invalid_mask") from error
    return found
