"""``impasto serve``: its options, and how it begins and ends, mostly without a model."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import ones

from impasto.cli.serve import allowed_hosts, announcement, pairs, run
from impasto.errors import ConfigurationError, InputError
from impasto.serving.http.app import create_app
from impasto.serving.http.keys import read_keys
from impasto.serving.http.server import bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.served import bounded
from impasto.serving.stub import SCENES, StubService

from .tiny import tiny_transformer, write_pipeline


def test_pairs():
    assert pairs("--model", ["a=x/y", "builtin:scenes", "some/folder"]) == {
        "a": "x/y", "scenes": "builtin:scenes", "folder": "some/folder",
    }  # fmt: skip
    assert pairs("--model", ["models/sigma-0.5", "models/sigma-0.6.safetensors", "sigma.v1.pth"]) == {
        "sigma-0.5": "models/sigma-0.5", "sigma-0.6": "models/sigma-0.6.safetensors", "sigma.v1": "sigma.v1.pth",
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
        keyed = announcement({"scenes": "x"}, bound, HttpSettings(keys=("k" * 20,)), Path("my keys.txt"))[2]
        port = bound.getsockname()[1]
    assert address.endswith(f"serves scenes at http://127.0.0.1:{port}/v1")
    assert page == f"page: http://127.0.0.1:{port}/"
    assert curl.startswith(f"curl -s http://127.0.0.1:{port}/v1/images/generations -H 'Content-Type")
    assert """-H "Authorization: Bearer $(grep -m1 '^[^#]' 'my keys.txt')\"""" in keyed
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


def children_of(pid: int) -> list[int]:
    """The descendants of a process (Linux)."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
    return [each for child in found for each in (child, *children_of(child))]


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.cluster)])
def test_the_command_with_its_options(end: signal.Signals, tmp_path: Path):
    """A server and its engine, in processes of their own: what is printed works, and so does each option."""
    key, model, style = "0123456789abcdefghij", write_pipeline(tmp_path / "model"), tmp_path / "style.safetensors"
    out, width = tiny_transformer().proj_out.weight.shape
    factors = {"A": ones(1, width), "B": ones(out, 1)}
    save_file({f"transformer.proj_out.lora_{name}.weight": factor for name, factor in factors.items()}, style)
    (tmp_path / "keys").write_text(f"# ours\n\n{key}\n")
    options = ["--model", f"tiny={model}", "--alias", "dall-e-3=tiny", "--lora", f"style={style}", "--port", "0"]
    options += ["--api-key-file", "keys", "--memory-budget", "4GB", "--storage", "kept", "--no-settings"]
    options += ["--queue", "3", "--max-steps", "60", "--max-side", "128"]
    command = [sys.executable, "-m", "impasto", "serve", *options]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        address, page, curl = (server.stdout.readline() for _ in range(3))
        assert "serves tiny at" in address
        engines = children_of(server.pid)
        subprocess.run(["bash", "-c", curl], cwd=tmp_path, check=True, timeout=60)
        assert Image.open(tmp_path / "image.png").format == "PNG"
        with httpx.Client(base_url=page.split()[1], headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            assert httpx.get(client.base_url.join("v1/models")).status_code == 401
            wanted = {"prompt": "a cube", "model": "dall-e-3", "size": "64x64", "num_inference_steps": 2, "seed": 1}

            def ask(**changes: object) -> httpx.Response:
                return client.post("v1/images/generations", json=wanted | changes)

            with_style = {"lora": [{"name": "style", "weight": 1.0}]}
            plain, styled = (ask(**more).json()["data"][0]["b64_json"] for more in ({}, with_style))
            assert plain != styled
            assert not Image.open(io.BytesIO(base64.b64decode(plain))).info  # --no-settings
            kept = httpx.get(ask(response_format="url").json()["data"][0]["url"]).content
            assert Image.open(io.BytesIO(kept)).size == (64, 64)
            assert len([*(tmp_path / "kept").rglob("*.png")]) == 4  # all so far
            for changes in ({"num_inference_steps": 61}, {"size": "192x192"}, {"lora": [{"name": "other"}]}):
                assert ask(**changes).status_code == 400, changes
            assert "accepts at most 3 images" in ask(n=4).json()["error"]["message"]  # --queue
            with client.stream(
                "POST", "v1/images/generations", json=wanted | {"stream": True, "num_inference_steps": 60}
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.send_signal(end)
                if end == signal.SIGTERM:
                    assert "event: image_generation.completed" in [*lines]
        assert server.wait(60) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
        left = time.monotonic() + 20
        while any(Path(f"/proc/{each}").exists() for each in engines):
            assert time.monotonic() < left, "an engine outlives its server"
            time.sleep(0.05)
    finally:
        server.kill()
        server.wait()
