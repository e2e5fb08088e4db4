"""The server's HTTP interface. It needs the extra ``serve``; nothing else of the package imports it."""

from __future__ import annotations

from ...optional import require

for _library in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
    require(_library, "the server", "impasto[serve]")
