"""Errors as clients read them: one form and one status for each kind of mistake, on every path."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match

from ...checks import is_out_of_memory, printable
from ...errors import InputError
from ..job import Failed
from ..service import RefusedError
from .storage import hide_ids

logger = logging.getLogger("impasto.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_FAILED = {"input": 400, "resources": 400, "cancelled": 503, "deadline": 504, "shutdown": 503, "engine": 500}


class ApiError(HTTPException):
    """A request that gets no result.

    Args:
        status: the HTTP status.
        param: the field that is wrong.
        code: a name for programs.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, printable(message)[:2000], dict(headers or {}))
        self.param, self.code = param, code


def of_failure(failed: Failed) -> ApiError:
    """The error of a job that ended without an image."""
    headers = NO_RETRY if failed.reason in ("engine", "deadline") else None
    return ApiError(failed.message, status=_FAILED[failed.reason], code=f"generation_{failed.reason}", headers=headers)


def of_fault(error: Exception) -> ApiError:
    """What clients see of a fault of the server."""
    if is_out_of_memory(error):
        return ApiError("the server lacks memory for this request; try again later", status=503, headers=RETRY)
    return ApiError("the server failed; its log has the reason", status=500)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None, *, path: str = ""
) -> dict[str, Any]:
    """The body of every error, as the clients of a path read it."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if path.startswith("/sdapi/"):
        return {"error": kind, "detail": message, "body": "", "errors": message}
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Answer every error in this form."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(InputError, _input)
    app.add_exception_handler(Exception, _unexpected)


def _answer(
    request: Request,
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = error_body(message, status, param, code, path=request.url.path)
    return JSONResponse(body, status, dict(headers or {}))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404 and not isinstance(error, ApiError):
        message = f"there is no {printable(request.url.path)[:200]} here; /openapi.json lists the paths"
    elif error.status_code == 405:
        message = f"{request.method} is not for {printable(request.url.path)[:200]}; see the header Allow"
        return _answer(request, message, 405, headers={"Allow": ", ".join(_methods(request))})
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return _answer(request, message, error.status_code, param, code, error.headers)


def _methods(request: Request) -> list[str]:
    """What the path takes. Several routes may have it, each for one method."""
    scope = dict(request.scope)
    found = []
    for method in ("GET", "HEAD", "POST"):
        scope["method"] = method
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            found.append(method)
    return found


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0] if error.errors() else {"loc": (), "msg": "it cannot be read"}
    param = ".".join(str(name) for name in first["loc"][1:]) or None
    return _answer(request, printable(f"{param or 'the body'}: {first['msg']}")[:2000], 400, param)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    code = {429: "queue_full", 503: "unavailable"}.get(error.status, "too_large")
    return _answer(request, str(error), error.status, None, code, headers)


async def _input(request: Request, error: Exception) -> JSONResponse:
    return _answer(request, printable(str(error))[:2000], 400)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    fault = of_fault(error)
    if fault.status_code == 503:
        logger.error("out of memory at %s", printable(hide_ids(request.url.path))[:200])
    return _answer(request, str(fault.detail), fault.status_code, headers=fault.headers)


RETRY = {"Retry-After": "10"}
#: For OpenAI's client, which repeats requests that are answered with 500 or 504: these would end so again.
NO_RETRY = {"x-should-retry": "false"}
