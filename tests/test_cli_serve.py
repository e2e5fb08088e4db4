"""``impasto serve``: its options, and how it begins and ends. The service has no model."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from impasto.cli.serve import allowed_hosts, announcement, pairs, run
from impasto.errors import ConfigurationError, InputError
from impasto.serving.http.app import create_app
from impasto.serving.http.keys import read_keys
from impasto.serving.http.server import bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.served import bounded
from impasto.serving.stub import SCENES, StubService


def test_pairs():
    assert pairs("--model", ["a=x/y", "builtin:scenes", "some/folder"]) == {
        "a": "x/y", "scenes": "builtin:scenes", "folder": "some/folder",
    }  # fmt: skip
    for given in (["a="], ["=x"], ["a=1", "a=2"], ["<b>=x"], ["\x1b=x"]):
        with pytest.raises(InputError, match="--model"):
            pairs("--model", given)


def test_a_public_address_needs_keys():
    with bind("127.0.0.1", 0) as bound:
        assert allowed_hosts("127.0.0.1", bound, has_keys=True, allow_anyone=False) is None
        assert "localhost" in (allowed_hosts("127.0.0.1", bound, has_keys=False, allow_anyone=False) or ())
    with bind("0.0.0.0", 0) as bound:
        assert allowed_hosts("0.0.0.0", bound, has_keys=True, allow_anyone=False) is None
        assert allowed_hosts("0.0.0.0", bound, has_keys=False, allow_anyone=True) is None
        with pytest.raises(ConfigurationError, match="--api-key-file"):
            allowed_hosts("0.0.0.0", bound, has_keys=False, allow_anyone=False)


def test_an_address_in_use():
    with bind("127.0.0.1", 0) as bound, pytest.raises(ConfigurationError, match="choose another"):
        bind("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(ConfigurationError, match="not an address"):
        bind("no.such.host.invalid", 0)


def test_key_files(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text("# ours\n0123456789abcdefghij\n\n  abcdefghij0123456789  \n")
    assert read_keys(path) == ("0123456789abcdefghij", "abcdefghij0123456789")
    for content, message in (("", "has no key"), ("short", "line 1"), ("# a\na key with some spaces", "line 2")):
        path.write_text(content)
        with pytest.raises(ConfigurationError, match=message):
            read_keys(path)
    for missing in (tmp_path, tmp_path / "nothing", Path("/dev/null")):
        with pytest.raises(ConfigurationError, match="not a file"):
            read_keys(missing)


def test_sizes_are_bounded():
    large = replace(SCENES, width=64, height=64, most_pixels=4096**2)
    assert (bounded(large, None).most_side, bounded(large, None).most_pixels) == (256, 256**2)
    assert bounded(large, 1000).most_side == 1000
    small = bounded(large, 32)
    assert (small.width, small.height, small.most_side) == (32, 32, 32)
    assert bounded(replace(large, most_pixels=100), 1000).most_pixels == 100


def test_what_is_printed_is_a_command():
    with bind("127.0.0.1", 0) as bound:
        address, page, curl = announcement({"scenes": "x"}, bound, HttpSettings(), None)
        keyed = announcement({"scenes": "x"}, bound, HttpSettings(keys=("k" * 20,)), Path("keys.txt"))[2]
        port = bound.getsockname()[1]
    assert address.endswith(f"serves scenes at http://127.0.0.1:{port}/v1")
    assert page == f"page: http://127.0.0.1:{port}/"
    assert curl.startswith(f"curl -s http://127.0.0.1:{port}/v1/images/generations -H 'Content-Type")
    assert '"Authorization: Bearer $(grep' in keyed
    assert "k" * 20 not in keyed


class Fleet(StubService):
    """Takes a while for each step, and can be started and closed."""

    closed = False

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True


def test_sigterm_ends_the_server_when_accepted_images_are_done():
    fleet, settings, found = Fleet(seconds=0.05), HttpSettings(), list[object]()
    bound = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    server = make_server(create_app(fleet, settings), fleet, settings)

    def ask() -> None:
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                body = {"prompt": "a", "stream": True, "num_inference_steps": 30}
                with client.stream("POST", "/v1/images/generations", json=body) as answer:
                    lines = answer.iter_lines()
                    found.append(next(lines))
                    os.kill(os.getpid(), signal.SIGTERM)
                    while fleet.ready:
                        time.sleep(0.005)
                    with httpx.Client(timeout=60) as other:
                        found.append(other.post(f"{url}/v1/images/generations", json={"prompt": "b"}).status_code)
                    found.append("event: image_generation.completed" in list(lines))
        finally:
            server.end()

    thread = threading.Thread(target=ask)
    thread.start()
    asyncio.run(run(fleet, server, bound, []))  # signals arrive in the main thread
    thread.join(30)
    assert found[1:] == [503, True]
    assert str(found[0]).startswith(": progress")
    assert fleet.closed
