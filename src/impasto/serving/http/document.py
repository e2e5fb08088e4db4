"""The OpenAPI document: what the routes say of themselves, and what is true of all of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .context import Context
from .fields import Schema
from .images import MEDIA_TYPES
from .storage import ID_PATTERN

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_MEANINGS = {
    400: "A field is unknown or has a value that cannot be used.",
    401: "A key is needed.",
    403: "Web pages of this origin may not call the server.",
    404: "There is no such model or image.",
    408: "The request arrives too slowly.",
    413: "The request is too large.",
    415: "The body has a type that is not read.",
    421: "The server is not addressed by this name.",
    429: "The queue is full; try again after Retry-After seconds.",
    500: "The server failed.",
    503: "The server is starting, ends, or lacks memory; try again later.",
    504: "The image was not done in time.",
}
_POST = (400, 404, 408, 413, 415, 429, 500, 503, 504)
_OF_PATH = {"/v1/models/{model}": (404,), "/v1/images/{id}/content": (404,), "/ready": (503,)}
_WHOLE: Schema = {"type": "integer", "minimum": 0}
_USAGE: Schema = {
    "type": "object",
    "properties": {
        "input_tokens": _WHOLE,
        "input_tokens_details": {
            "type": "object",
            "properties": {"text_tokens": _WHOLE, "image_tokens": _WHOLE},
            "required": ["text_tokens", "image_tokens"],
        },
        "output_tokens": _WHOLE,
        "total_tokens": _WHOLE,
    },
    "required": ["input_tokens", "input_tokens_details", "output_tokens", "total_tokens"],
}


def describe(app: FastAPI, context: Context) -> dict[str, Any]:
    """The document of an application; it is made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version="1", description="Images of prompts, by PixArt and GLM-Image.", routes=app.routes
        )
        document["components"] = {"schemas": {"Error": _ERROR, **_answers(context)}}
        keys = bool(context.settings.keys)
        if keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(path, method, operation, context)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(path: str, method: str, operation: dict[str, Any], context: Context) -> None:
    """Add to an operation what it may answer."""
    responses = operation["responses"]
    responses.pop("422", None)
    protected = bool(context.settings.keys) and path.startswith(("/v1", "/sdapi", "/metrics")) and "content" not in path
    statuses = {403, *(_POST if method == "post" else ()), *_OF_PATH.get(path, ())}
    statuses |= {400} if any(one["in"] == "query" for one in operation.get("parameters", [])) else set()
    statuses |= ({401} if protected else set()) | (set() if context.settings.hosts is None else {421})
    error = _reference("Error") if not path.startswith("/sdapi") else {"type": "object"}
    for status in sorted(statuses):
        content = {"application/json": {"schema": error}}
        responses[str(status)] = {"description": _MEANINGS[status], "content": content}
    if protected:
        operation["security"] = [{"key": []}]
    known = _contents().get(path)
    if known is not None:
        responses["200"] = {"description": "Done.", "content": known}
    for parameter in operation.get("parameters", []):
        if path == "/v1/images/{id}/content":
            parameter["schema"] = {"type": "string", "pattern": ID_PATTERN}
        elif path == "/v1/models/{model}":
            parameter["schema"] = {"type": "string", "minLength": 1}


def _contents() -> dict[str, dict[str, Any]]:
    """What routes answer with 200, by media type."""
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    images = {
        "application/json": {"schema": _reference("Images")},
        "text/event-stream": {"schema": event},
    }
    status = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
    return {
        "/v1/images/generations": images,
        "/v1/images/edits": images,
        "/v1/models": {"application/json": {"schema": _reference("Models")}},
        "/v1/models/{model}": {"application/json": {"schema": _reference("Model")}},
        "/v1/images/{id}/content": {
            kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()
        },
        "/health": {"application/json": {"schema": status}},
        "/ready": {"application/json": {"schema": status}},
        "/metrics": {"text/plain": {"schema": {"type": "string"}}},
    }


def _answers(context: Context) -> dict[str, Schema]:
    """The schemas of answers by name."""
    text: Schema = {"type": "string"}
    optional: Schema = {"type": ["string", "null"]}
    image = _object(
        {"id": text, "seed": {"type": "integer"}, "b64_json": optional, "url": optional, "revised_prompt": optional}
    )
    images = _object(
        {
            "created": _WHOLE,
            "background": {"const": "opaque"},
            "output_format": {"enum": list(MEDIA_TYPES)},
            "quality": text,
            "size": text,
            "data": {"type": "array", "items": image, "minItems": 1, "maxItems": context.settings.max_images},
            "usage": _USAGE,
        }
    )
    numbers = (
        "created",
        "width",
        "height",
        "multiple",
        "most_pixels",
        "most_side",
        "steps",
        "most_steps",
        "most_images",
    )
    model = _object(
        dict.fromkeys(("id", "object", "owned_by", "family", "scheduler"), text)
        | dict.fromkeys(numbers, _WHOLE)
        | {name: {"type": "array", "items": text} for name in ("aliases", "schedulers")}
        | {"guidance_scale": {"type": "number"}, "edits": {"type": "boolean"}, "masks": {"type": "boolean"}}
    )
    adapter = _object(
        {
            "id": text,
            "object": {"const": "adapter"},
            "steps": {"type": ["integer", "null"]},
            "guidance_scale": {"type": ["number", "null"]},
            "scheduler": optional,
        }
    )
    models = _object(
        {
            "object": {"const": "list"},
            "data": {"type": "array", "items": _reference("Model")},
            "adapters": {"type": "array", "items": adapter},
        }
    )
    return {"Images": images, "Model": model, "Models": models}


def _object(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
