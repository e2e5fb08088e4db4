"""The paths of ``/sdapi/v1``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ....checks import printable
from ....errors import InputError
from ....pipelines.image_files import GenerationSettings, settings_text
from ...image_settings import settings_of
from ...job import Job, RawImage
from .. import uploads
from ..context import Context
from ..images import base64_text, encode
from ..limits import release
from ..reading import read_json
from . import lists
from .calls import Call, Session, Sessions
from .fields import Files, image_fields, schema_of, text_fields
from .reading import WantedImages, read_wanted

logger = logging.getLogger("impasto.serve")


def a1111_router(context: Context) -> APIRouter:
    """The routes of ``/sdapi/v1`` over a service."""
    router, sessions = APIRouter(prefix="/sdapi/v1", tags=["sdapi"]), Sessions()
    of_text, of_images = text_fields(context), image_fields(context)

    @router.post("/txt2img", openapi_extra=schema_of(context, of_text))
    async def txt2img(request: Request) -> Response:
        """Generate images of a prompt."""
        return await _answer(context, sessions.of(request), request, "txt2img", of_text)

    @router.post("/img2img", openapi_extra=schema_of(context, of_images))
    async def img2img(request: Request) -> Response:
        """Edit images: all of them, or what a mask selects."""
        return await _answer(context, sessions.of(request), request, "img2img", of_images)

    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> Response:
        """How far the images of this key are."""
        return JSONResponse(await sessions.of(request).progress(not skip_current_image))

    @router.post("/interrupt")
    async def interrupt(request: Request) -> Response:
        """End the images of this key; their requests are answered with the last previews."""
        sessions.of(request).interrupt()
        return JSONResponse({})

    @router.post("/skip")
    async def skip(request: Request) -> Response:
        """End the first image of this key that is not done."""
        sessions.of(request).skip()
        return JSONResponse({})

    @router.get("/options")
    async def get_options(request: Request) -> Response:
        """The options of this key."""
        return JSONResponse(lists.options(context, sessions.of(request)))

    @router.post("/options", openapi_extra=_OPTIONS)
    async def set_options(request: Request) -> Response:
        """Set options of this key: sd_model_checkpoint, live_previews_enable, show_progress_every_n_steps."""
        sessions.of(request).set_options(context, await read_json(context, request))
        return JSONResponse({})

    @router.get("/sd-models")
    async def get_models() -> Response:
        """The models."""
        return JSONResponse(lists.sd_models(context))

    @router.get("/loras")
    async def get_loras() -> Response:
        """The adapters, which prompts name: <lora:NAME:0.8>."""
        return JSONResponse(lists.loras(context))

    @router.post("/png-info", openapi_extra=_PNG_INFO)
    async def png_info(request: Request) -> Response:
        """The settings in an image file."""
        return JSONResponse(await context.decode(_info_of, context, await read_json(context, request)))

    for path, content in lists.FIXED.items():
        router.get(f"/{path}", name=path)(_sender(content, f"What this server has of {path}."))
    for path in lists.WITHOUT_EFFECT:
        router.post(f"/{path}", name=path)(_sender({}, "Without effect: the server does it by itself."))
    return router


_OPTIONS = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object", "properties": {
        "sd_model_checkpoint": {"type": ["string", "null"]},
        "live_previews_enable": {"type": "boolean"},
        "show_progress_every_n_steps": {"type": "integer", "minimum": -1, "maximum": 10_000},
    }}}}}
}  # fmt: skip


_PNG_INFO = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {
        "type": "object", "properties": {"image": Files().schema()}, "required": ["image"],
    }}}}
}  # fmt: skip


def _sender(content: Any, about: str) -> Callable[[], Any]:
    async def send() -> Response:
        return JSONResponse(content)

    send.__doc__ = about
    return send


async def _answer(
    context: Context, session: Session, request: Request, name: str, fields: dict[str, Any]
) -> JSONResponse:
    wanted = await context.decode(read_wanted, context, session, fields, await read_json(context, request))
    release(request.scope)  # waiting for images must not keep others from sending
    if context.settings.log_prompts:
        logger.info("prompt: %s", printable(wanted.prompt))
    call = Call(name, wanted.jobs)
    session.calls.append(call)
    try:
        found = await call.run(request, context.service)
    finally:
        session.calls.remove(call)
    settings = [_settings(context, wanted, job, image) for job, image in found]
    images = []
    for (_, image), inside in zip(found, settings):
        if wanted.send_images:
            images.append(base64_text(await asyncio.to_thread(encode, image, settings=inside, http=context.settings)))
    info = _info(wanted, [job for job, _ in found], [one.to_text() for one in settings])
    return JSONResponse({"images": images, "parameters": wanted.fields, "info": json.dumps(info)})


def _settings(context: Context, wanted: WantedImages, job: Job, image: RawImage) -> GenerationSettings:
    """What is written into an image: the prompts as they were given, so that a client can use them again."""
    found = settings_of(job, context.service.models[job.model].scheduler)
    return replace(found, prompt=wanted.prompt, negative_prompt=wanted.negative_prompt)


def _info(wanted: WantedImages, jobs: list[Job], texts: list[str]) -> dict[str, Any]:
    """The ``info`` of an answer."""
    job = wanted.jobs[0]
    return {
        "prompt": wanted.prompt,
        "all_prompts": [wanted.prompt] * len(jobs),
        "negative_prompt": wanted.negative_prompt,
        "all_negative_prompts": [wanted.negative_prompt] * len(jobs),
        "seed": job.seed,
        "all_seeds": [one.seed for one in jobs],
        "subseed": 0,
        "all_subseeds": [0] * len(jobs),
        "subseed_strength": 0,
        "width": job.width,
        "height": job.height,
        "sampler_name": wanted.sampler,
        "cfg_scale": job.guidance_scale,
        "steps": job.steps,
        "batch_size": wanted.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None if job.given is None else job.given.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": "impasto",
    }


def _info_of(context: Context, body: dict[str, Any]) -> dict[str, Any]:
    """The settings in the image of a request of ``png-info``."""
    text = Files().read("image", body.get("image"))
    content = uploads.from_base64(text, "image")
    image = uploads.decode_upload(content, "image", context.settings.max_upload_pixels)
    found = settings_text(image) or ""
    items = {name: value for name, value in image.info.items() if isinstance(value, str)}
    try:
        settings = GenerationSettings.from_text(found)
    except InputError:
        return {"info": found, "items": items, "parameters": {}}
    entries = {
        "Prompt": settings.prompt,
        "Negative prompt": settings.negative_prompt,
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.guidance_scale,
        "Seed": settings.seed,
        "Size-1": settings.width,
        "Size-2": settings.height,
        "Model": settings.model,
        **settings.extra,
    }
    # A quoted value may have a lone surrogate ("\ud800"), which no answer can hold.
    texts = {name: str(value) for name, value in entries.items() if value is not None}
    parameters = {name: value.encode("utf-8", "replace").decode("utf-8") for name, value in texts.items()}
    return {"info": found, "items": items, "parameters": parameters}
