"""Who may call the server: keys, and web pages of other origins."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ...errors import ConfigurationError
from .limits import answer_error
from .settings import HttpSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MIN_KEY = 16  # characters
#: Paths that need a key if there are any. The content of images is found by ids that are keys themselves.
_PROTECTED = re.compile(r"/(v1|sdapi|metrics|openapi\.json)(/|$)")
_CONTENT = re.compile(r"/v1/images/[^/]+/content")
_KEY = "impasto.key"


def key_of(scope: Scope) -> bytes:
    """What stands for the key of a request, however it was sent; empty if the server has no keys."""
    found: bytes = scope.get(_KEY, b"")
    return found


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file: one a line; empty lines, and those that begin with #, are none.

    Raises:
        ConfigurationError: the file cannot be read, has no key, or one that is too short or no plain ASCII.
    """
    try:
        if not path.is_file() or path.stat().st_size > 1 << 20:
            raise ConfigurationError(f"{path} is not a file of keys; give a file with one key a line")
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is not UTF-8"
        raise ConfigurationError(f"{path} cannot be read: {reason}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigurationError(f"{path} has no key; write one a line, such as {os.urandom(18).hex()}")
    for number, line in enumerate(lines, 1):
        if line in keys and not re.fullmatch(rf"[!-~]{{{MIN_KEY},1000}}", line):
            raise ConfigurationError(
                f"{path}, line {number}: a key has {MIN_KEY} or more ASCII characters and no spaces"
            )
    return keys


class Guard:
    """An ASGI application around another: refuses those who have no key, and web pages of foreign origins."""

    def __init__(self, app: ASGIApp, settings: HttpSettings):
        self.app, self.settings = app, settings
        self.keys = [_digest(key) for key in settings.keys]
        self.hosts = set[str]()  # of its own origin, if a proxy changes the header Host
        if settings.public_url is not None:
            self.hosts.add(urlsplit(settings.public_url).netloc.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        path: str = scope["path"]
        if not self._knows_host(headers.get(b"host", "")):
            message = "the server is not addressed by this name; see impasto serve --host"
            await answer_error(scope, send, message, 421)
        elif not self._knows_origin(headers):
            message = "web pages of this origin may not call the server; see --allow-origin"
            await answer_error(scope, send, message, 403)
        elif self.keys and _PROTECTED.match(path) and not (_CONTENT.fullmatch(path) or scope["method"] == "OPTIONS"):
            key = self._found_key(headers.get(b"authorization", ""))
            if key is not None:
                scope[_KEY] = key
                await self.app(scope, receive, send)
                return
            kind, how = "Bearer", "as Authorization: Bearer KEY"
            if path.startswith("/sdapi"):
                kind, how = 'Basic realm="impasto"', "as the password of HTTP basic authentication"
            message = f"a key is needed, and the request has none that is known; send it {how}"
            await answer_error(scope, send, message, 401, {"WWW-Authenticate": kind})
        else:
            await self.app(scope, receive, send)

    def _found_key(self, authorization: str) -> bytes | None:
        """The digest of the key that is there. All are compared, in a time that does not depend on them."""
        scheme, _, value = authorization.partition(" ")
        given = [value.strip()]
        if scheme.lower() == "basic":
            try:
                decoded = base64.b64decode(value, validate=True).decode("utf-8")
            except (binascii.Error, ValueError):
                return None
            given = [decoded, decoded.partition(":")[2]]
        elif scheme.lower() != "bearer":
            return None
        digests = [_digest(one) for one in given]
        equal = [key for one in digests for key in self.keys if hmac.compare_digest(one, key)]
        return equal[0] if equal else None

    def _knows_host(self, host: str) -> bool:
        hosts = self.settings.hosts
        return hosts is None or re.sub(r":\d*$", "", host).strip("[]").lower() in hosts

    def _knows_origin(self, headers: dict[bytes, str]) -> bool:
        origin = headers.get(b"origin")
        if origin is None or origin in self.settings.origins or "*" in self.settings.origins:
            return True
        try:
            return urlsplit(origin).netloc.lower() in {headers.get(b"host", "").lower(), *self.hosts}
        except ValueError:
            return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
