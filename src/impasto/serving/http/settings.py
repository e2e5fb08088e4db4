"""What the server allows, and what it adds to images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

MIB = 1 << 20

#: Adds provenance to the content of an image file; the second argument is its media type.
Signer: TypeAlias = Callable[[bytes, str], bytes]


@dataclass(frozen=True)
class HttpSettings:
    """Every bound of the interface, with values for one machine.

    Attributes:
        keys: one of them must come with a request; none: no key is needed.
        origins: web origins whose pages may call the server, in addition to its own.
        hosts: the names by which it may be addressed; None: any. A server without keys names its own, so that no web
            page can reach it through a name of its own that points here.
        max_body: bytes of a request.
        max_buffered: bytes of all requests that are being received or read.
        max_unread: bytes of all answers that clients have not read yet; beyond it, the one that has been unread for
            longest is given up.
        max_upload_pixels: of an image that is given.
        max_images, max_steps: of a request.
        receive_seconds: the longest pause between two pieces of a request.
        body_seconds: the longest time in which a request arrives.
        send_seconds: how long a client may leave a piece of the answer unread.
        deadline_seconds: how long a request may take.
        storage: the folder of stored images; None: nothing is stored.
        storage_bytes: the oldest images are removed beyond it.
        public_url: the address for links to images; None: that of the request.
        settings_in_images: whether each image holds its prompt and settings.
        signer: adds provenance to images.
        log_prompts: whether the log shows them.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    max_body: int = 64 * MIB
    max_buffered: int = 512 * MIB
    max_unread: int = 512 * MIB
    max_upload_pixels: int = 4096**2
    max_images: int = 10
    max_steps: int = 200
    receive_seconds: float = 20.0
    body_seconds: float = 120.0
    send_seconds: float = 60.0
    deadline_seconds: float = 900.0
    storage: Path | None = None
    storage_bytes: int = 10_000 * MIB
    public_url: str | None = None
    settings_in_images: bool = True
    signer: Signer | None = None
    log_prompts: bool = False
