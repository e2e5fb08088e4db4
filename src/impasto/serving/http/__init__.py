"""The server's HTTP interface. It needs the extra ``serve``; nothing else of the package imports it."""

from __future__ import annotations

from ...errors import MissingDependencyError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        f"the server needs {error.name}, which is not installed; pip install 'impasto[serve]'"
    ) from error
