"""``/v1``: images as OpenAI's clients ask for them, with what this server adds."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...checks import printable
from ...errors import OutputError
from ..image_settings import settings_of
from ..job import Event, Failed, Finished, Job, Preview, Progress
from ..served import ServedModel
from ..service import Generation
from .context import Context
from .errors import ApiError, error_body, of_failure, of_fault
from .images import base64_text, encode
from .limits import release
from .reading import ImageRequest, Reader
from .running import UNFINISHED, events_of, generate
from .storage import hide_ids

logger = logging.getLogger("impasto.serve")


def openai_router(context: Context) -> APIRouter:
    """The routes of ``/v1`` over a service."""
    router, reader = APIRouter(prefix="/v1", tags=["images"]), Reader(context)

    @router.post("/images/generations", openapi_extra=reader.generation_body())
    async def create_image(request: Request) -> Response:
        """Generate images of a prompt."""
        return await _answer(context, request, await reader.generation(request), "image_generation")

    @router.post("/images/edits", openapi_extra=reader.edit_body())
    async def edit_image(request: Request) -> Response:
        """Edit an image: all of it, or what a mask selects. GLM-Image takes several as references."""
        return await _answer(context, request, await reader.edit(request), "image_edit")

    @router.get("/models")
    async def list_models() -> Response:
        """The models that are served, with what they take, and the adapters."""
        models = [_describe(context, model) for model in context.service.models.values()]
        adapters = [_describe_adapter(context, name) for name in context.service.adapters]
        return JSONResponse({"object": "list", "data": models, "adapters": adapters})

    @router.get("/models/{model}")
    async def get_model(model: str) -> Response:
        """One of them, by its name or another name of it."""
        return JSONResponse(_describe(context, context.model(model)))

    return router


def _describe(context: Context, model: ServedModel) -> dict[str, Any]:
    """A model as clients see it."""
    names = [alias for alias, name in context.service.aliases.items() if name == model.name]
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "impasto",
        "aliases": names,
        "family": model.family,
        "width": model.width,
        "height": model.height,
        "multiple": model.multiple,
        "most_pixels": model.most_pixels,
        "most_side": context.longest_side(model),
        "steps": model.steps,
        "most_steps": context.settings.max_steps,
        "guidance_scale": model.guidance_scale,
        "scheduler": model.scheduler,
        "schedulers": list(model.schedulers),
        "edits": model.edits,
        "masks": model.masks,
        "most_images": model.most_images,
    }


def _describe_adapter(context: Context, name: str) -> dict[str, Any]:
    """An adapter as clients see it: how to generate with it, where it says so."""
    defaults = context.defaults_of(name)
    return {
        "id": name,
        "object": "adapter",
        "steps": defaults.steps,
        "guidance_scale": defaults.guidance_scale,
        "scheduler": defaults.scheduler,
    }


async def _answer(context: Context, request: Request, wanted: ImageRequest, event: str) -> Response:
    release(request.scope)  # waiting for images must not keep others from sending
    if context.settings.log_prompts:
        logger.info("prompt: %s", printable(wanted.jobs[0].prompt))
    if wanted.stream:
        (generation,) = context.service.submit(wanted.jobs)
        return StreamingResponse(
            _stream(context, request, wanted, generation, event),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    finished = await generate(request, context.service, wanted.jobs)
    data = []
    for job, result in zip(wanted.jobs, finished):
        data.append(await _item(context, request, wanted, job, result))
    first = finished[0].image
    return JSONResponse(
        {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": wanted.kind,
            "quality": "high",
            "size": f"{first.width}x{first.height}",
            "data": data,
            "usage": _usage(context, wanted.jobs),
        }
    )


async def _item(context: Context, request: Request, wanted: ImageRequest, job: Job, result: Finished) -> dict[str, Any]:
    """One image of an answer."""
    content = await _encoded(context, wanted, job, result)
    item: dict[str, Any] = {"id": job.id, "seed": job.seed, "revised_prompt": None}
    await _store(context, wanted, job, content)
    if wanted.response_format == "url":
        base = context.settings.public_url or str(request.base_url)
        return item | {"url": f"{base.rstrip('/')}/v1/images/{job.id}/content", "b64_json": None}
    return item | {"b64_json": base64_text(content), "url": None}


async def _encoded(context: Context, wanted: ImageRequest, job: Job, result: Finished) -> bytes:
    settings = settings_of(job, context.service.models[job.model].scheduler)
    return await asyncio.to_thread(encode, result.image, wanted.kind, wanted.quality, settings, context.settings)


async def _store(context: Context, wanted: ImageRequest, job: Job, content: bytes) -> None:
    """Keep an image, if images are kept. One that is in the answer itself is not lost if that fails."""
    if context.storage is None:
        return
    try:
        await asyncio.to_thread(context.storage.save, job.id, wanted.kind, content)
    except OutputError as error:
        if wanted.response_format == "url" and not wanted.stream:
            raise
        logger.error("an image is not stored: %s", printable(hide_ids(str(error))))


async def _stream(
    context: Context, request: Request, wanted: ImageRequest, generation: Generation, event: str
) -> AsyncIterator[bytes]:
    """Server-sent events. Steps are comments, which clients ignore unless they know of them."""
    job = generation.job
    common = {"created_at": int(time.time()), "quality": "high", "background": "opaque", "output_format": wanted.kind}
    request.scope[UNFINISHED] = True
    try:
        async with aclosing(events_of(generation)) as events:
            async for found in events:
                yield await _written(context, wanted, job, found, event, common)
    except Exception as error:  # the status is sent, so that this is the only way to say it
        logger.exception("a stream failed")
        yield _sse_error(of_fault(error))
    request.scope[UNFINISHED] = False


async def _written(
    context: Context, wanted: ImageRequest, job: Job, found: Event, event: str, common: dict[str, Any]
) -> bytes:
    """An event of a job as a server-sent event."""
    if isinstance(found, Progress):
        step = {"step": found.step, "steps": found.steps, "seconds_left": found.seconds_left}
        return f": progress {json.dumps(step)}\n\n".encode()
    if isinstance(found, Failed):
        return _sse_error(of_failure(found))
    size = f"{found.image.width}x{found.image.height}"
    if isinstance(found, Preview):
        content = await asyncio.to_thread(encode, found.image, wanted.kind, wanted.quality)
        partial = {"b64_json": base64_text(content), "size": size, "partial_image_index": found.number}
        return _sse(f"{event}.partial_image", common | partial)
    content = await _encoded(context, wanted, job, found)
    await _store(context, wanted, job, content)
    completed = {"b64_json": base64_text(content), "size": size, "usage": _usage(context, [job])}
    return _sse(f"{event}.completed", common | completed | {"id": job.id, "seed": job.seed})


def _sse_error(error: ApiError) -> bytes:
    return _sse("error", error_body(str(error.detail), error.status_code, error.param, error.code))


def _sse(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps({'type': event} | data)}\n\n".encode()


def _usage(context: Context, jobs: list[Job]) -> dict[str, Any]:
    """Tokens: of images what the transformer computes on; of texts, an estimate by words."""
    text = sum(len(job.prompt.split()) + len(job.negative_prompt.split()) for job in jobs)
    given = [image for job in jobs if job.given is not None for image in job.given.images]

    model = context.service.models[jobs[0].model]
    images = sum(model.tokens(image.width, image.height) for image in given)
    output = sum(model.tokens(job.width, job.height, job.binning) for job in jobs)
    return {
        "input_tokens": text + images,
        "input_tokens_details": {"text_tokens": text, "image_tokens": images},
        "output_tokens": output,
        "total_tokens": text + images + output,
    }


__all__ = ["ApiError", "openai_router"]
