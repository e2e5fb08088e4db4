"""The application: interfaces, page, health and metrics over a service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.routing import Route

from ..service import Service
from . import errors
from .a1111.routes import a1111_router
from .context import Context
from .document import describe
from .errors import ApiError
from .images import MEDIA_TYPES
from .keys import Guard
from .limits import Limits
from .metrics import Metrics
from .openai import openai_router
from .settings import HttpSettings
from .storage import Storage

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger("impasto.serve")

PAGE = Path(__file__).parent.parent / "page"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon", ".webmanifest": "application/manifest+json",
}  # fmt: skip
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(service: Service, settings: HttpSettings | None = None) -> FastAPI:
    """The server's application.

    Args:
        service: with at least one model.
        settings: bounds, keys, storage.

    Raises:
        OutputError: the folder of stored images cannot be created.
    """
    settings = settings or HttpSettings()
    storage = None if settings.storage is None else Storage(settings.storage, settings.storage_bytes)
    context = Context(service, settings, storage)
    app = FastAPI(title="Impasto", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    errors.install(app)
    metrics = Metrics(service)
    routers = [openai_router(context), a1111_router(context), _health_router(service, metrics)]
    if storage is not None:
        routers.append(_content_router(storage))
    for router in routers:
        app.include_router(router)
        app.include_router(_heads(router))
    app.router.routes += _page_routes()
    app.openapi = lambda: describe(app, context)  # type: ignore[method-assign]
    # The last one is the outermost.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Guard, settings=settings)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "HEAD", "POST"], allow_headers=["*"]
        )
    app.add_middleware(metrics.layer)
    return app


def _heads(router: APIRouter) -> APIRouter:
    """HEAD for each path that a router has for GET, as monitors and link checkers ask; uvicorn leaves out the body."""
    heads = APIRouter()
    for route in router.routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            heads.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    return heads


def _health_router(service: Service, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/health")
    async def health() -> Response:
        """Whether the process runs."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """Whether images are generated: 503 while the default model is loaded, for which requests wait, and when the
        server ends."""
        if not service.ready:
            raise ApiError("not ready", status=503, headers=errors.RETRY)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics")
    async def show_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _no_image() -> ApiError:
    return ApiError("there is no such image, or no more", "id", status=404, code="image_not_found")


class StoredImage(FileResponse):
    """An image that may be removed, to make room for others, before it is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (FileNotFoundError, RuntimeError) as error:  # starlette raises RuntimeError if there is no file
            if Path(self.path).is_file():
                raise
            raise _no_image() from error


def _content_router(storage: Storage) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["images"])

    @router.get("/images/{id}/content")
    async def get_content(id: str) -> Response:
        """A stored image. Its id is a secret: no further key is needed."""
        found = storage.find(id)
        if found is None or not found[0].is_file():
            raise _no_image()
        headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
        headers["Cache-Control"] = "private, max-age=31536000, immutable"
        return StoredImage(found[0], media_type=MEDIA_TYPES[found[1]], headers=headers)

    return router


def _page_routes() -> list[Route]:
    """A route for each file of the page. No path of a client is ever looked up in a folder."""
    routes: list[Route] = []
    for path in sorted(PAGE.rglob("*")) if PAGE.is_dir() else ():
        kind = _PAGE_TYPES.get(path.suffix)
        if kind is None or not path.is_file():
            continue
        name = path.relative_to(PAGE).as_posix()
        for address in {f"/{name}", "/"} if name == "index.html" else {f"/{name}"}:
            routes.append(Route(address, _sender(path, kind), methods=["GET"], include_in_schema=False))
    return routes


def _sender(path: Path, kind: str) -> Any:
    async def send(request: StarletteRequest) -> Response:
        return FileResponse(path, media_type=kind, headers=_PAGE_HEADERS)

    return send
