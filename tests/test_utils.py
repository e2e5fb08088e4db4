"""impasto.utils: images from anywhere, grids, animations, noise, and logging."""

from __future__ import annotations

import http.server
import importlib
import io
import logging as plain_logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.utils
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor as their_noise
from PIL import Image

from impasto import utils
from impasto.errors import HubError, InputError
from impasto.utils import images, logging
from impasto.utils.torch_utils import is_compiled_module, randn_tensor


def picture(seed: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def same(ours: Image.Image, theirs: Image.Image) -> bool:
    return (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())


# --- load_image ---


@pytest.mark.parametrize("convert", [None, lambda image: image.convert("L")])
def test_images_are_loaded_as_there(tmp_path: Path, convert: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    picture().save(tmp_path / "upright.png")
    picture().save(tmp_path / "turned.jpg", exif=exif)
    picture().convert("P").save(tmp_path / "palette.png")
    for name in ("upright.png", "turned.jpg", "palette.png"):
        path = str(tmp_path / name)
        assert same(utils.load_image(path, convert), diffusers.utils.load_image(path, convert))
        with Image.open(path) as opened:
            assert same(utils.load_image(opened, convert), diffusers.utils.load_image(opened, convert))
    assert same(utils.load_image(tmp_path / "upright.png"), picture())


def test_images_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path / "missing.png", "ftp://example.com/x.png", 3):
        with pytest.raises(InputError):
            utils.load_image(path)


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        buffer = io.BytesIO()
        picture().save(buffer, "PNG")
        content = {"/image.png": buffer.getvalue(), "/large.png": bytes(5000), "/text": b"hello"}.get(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/image.png")
        else:
            self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of this machine, and a plain client: that of the hub may be offline."""
    library = next(name for name in ("httpx2", "httpx") if importlib.util.find_spec(name))
    with importlib.import_module(library).Client() as client:
        monkeypatch.setattr("huggingface_hub.get_session", lambda: client)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
        server.server_close()


def test_images_are_downloaded_within_limits(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("image.png", "moved"):
        assert same(utils.load_image(f"{site}/{path}"), picture())
    with pytest.raises(HubError, match="404"):
        utils.load_image(f"{site}/missing.png")
    with pytest.raises(InputError, match="none of PNG"):
        utils.load_image(f"{site}/text")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 4000)
    with pytest.raises(HubError, match="more than 4,000 bytes"):
        utils.load_image(f"{site}/large.png")
    monkeypatch.setattr(images, "_MOST_SECONDS", -1.0)
    with pytest.raises(HubError, match="seconds"):
        utils.load_image(f"{site}/image.png")


def test_an_address_without_a_server() -> None:
    with pytest.raises(HubError, match="cannot be downloaded"):
        utils.load_image("http://127.0.0.1:9/image.png")


# --- grids and other images ---


@pytest.mark.parametrize("resize", [None, 5])
def test_grids_are_those_of_the_reference(resize: int | None) -> None:
    several = [picture(i) for i in range(6)]
    ours, theirs = (lib.make_image_grid(several, rows=2, cols=3, resize=resize) for lib in (utils, diffusers.utils))
    assert same(ours, theirs)
    with pytest.raises(InputError, match="6 images for 2 x 2"):
        utils.make_image_grid(several, 2, 2)
    with pytest.raises(InputError, match="too large"):
        utils.make_image_grid([Image.new("1", (20_000, 20_000))], 1, 1)


def test_animations(tmp_path: Path) -> None:
    several = [picture(i) for i in range(3)]
    path = utils.export_to_gif(several, tmp_path / "x.gif", fps=20)
    assert path == str(tmp_path / "x.gif")
    with (
        Image.open(path) as found,
        Image.open(diffusers.utils.export_to_gif(several, str(tmp_path / "y.gif"), 20)) as expected,
    ):
        assert (found.n_frames, found.info["duration"], found.info["loop"]) == (3, 50, 0)  # type: ignore[attr-defined]
        assert found.info["duration"] == expected.info["duration"]
    temporary = Path(utils.export_to_gif(several))
    assert temporary.suffix == ".gif"
    temporary.unlink()
    with pytest.raises(InputError, match="no image"):
        utils.export_to_gif([])


def test_tensors_and_arrays_become_images() -> None:
    tensor = torch.rand(2, 3, 4, 5) * 2 - 1
    from diffusers.utils.pil_utils import numpy_to_pil, pt_to_pil

    assert all(map(same, utils.pt_to_pil(tensor), pt_to_pil(tensor)))
    array = np.random.default_rng(0).random((2, 4, 5, 3))
    assert all(map(same, utils.numpy_to_pil(array), numpy_to_pil(array)))
    assert {n: int(v) for n, v in utils.PIL_INTERPOLATION.items()} == {
        n: int(v) for n, v in diffusers.utils.PIL_INTERPOLATION.items()
    }


# --- tensors ---


def test_noise_is_that_of_the_reference() -> None:
    def seeded(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for given in (lambda: seeded(), lambda: [seeded(), seeded(1)], lambda: None):
        for options in ({}, {"device": "cpu"}, {"dtype": torch.bfloat16, "layout": torch.strided}):
            torch.manual_seed(3)
            ours = randn_tensor((2, 3, 4), generator=given(), **options)  # type: ignore[no-untyped-call]
            torch.manual_seed(3)
            theirs = their_noise((2, 3, 4), generator=given(), **options)  # type: ignore[no-untyped-call]
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    with pytest.raises(InputError, match="layout"):
        randn_tensor((2, 3), layout=torch.sparse_coo)


def test_compiled_modules() -> None:
    module = torch.nn.Linear(2, 2)
    assert not is_compiled_module(module)
    assert is_compiled_module(torch.compile(module))


def test_packages_that_are_installed() -> None:
    assert utils.is_torch_available()
    assert utils.is_transformers_available()
    assert utils.is_xformers_available() == diffusers.utils.is_xformers_available()
    with pytest.raises(AttributeError, match="is_torch_there"):
        utils.is_torch_there  # noqa: B018


# --- logging ---


@pytest.fixture
def logger() -> Iterator[plain_logging.Logger]:
    logger = plain_logging.getLogger("impasto")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield logger
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]


def test_verbosity(logger: plain_logging.Logger) -> None:
    assert logging.get_logger() is logger
    assert logging.get_logger("other") is plain_logging.getLogger("other")
    for name in ("debug", "info", "warning", "error"):
        getattr(logging, f"set_verbosity_{name}")()
        assert logging.get_verbosity() == getattr(plain_logging, name.upper()) == getattr(logging, name.upper())
    logging.set_verbosity(logging.INFO)
    assert plain_logging.getLogger("impasto").isEnabledFor(plain_logging.INFO)


def test_handlers(logger: plain_logging.Logger) -> None:
    stream = io.StringIO()
    handler = plain_logging.StreamHandler(stream)
    logging.add_handler(handler)
    logger.warning("one")
    logging.enable_explicit_format()
    logger.warning("two")
    logging.reset_format()
    logging.remove_handler(handler)
    logger.warning("three")
    first, second = stream.getvalue().splitlines()
    assert first == "one"
    assert second.startswith("[WARNING|test_utils.py:")
    logging.enable_default_handler()
    assert any(getattr(h, "stream", None) is not None and h is logging._default for h in logger.handlers)
    logging.disable_default_handler()
    assert logging._default not in logger.handlers
    logging.disable_propagation()
    assert not logger.propagate
    logging.enable_propagation()
    assert logger.propagate


def test_messages_are_shown_where_nothing_else_shows_them() -> None:
    import subprocess

    code = (
        "from impasto.utils import logging\nlogging.set_verbosity_info()\n"
        "logging.get_logger().info('hello')\nlogging.get_logger().debug('hidden')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "hello\n"


def test_progress_of_downloads() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    try:
        logging.disable_progress_bar()
        assert are_progress_bars_disabled()
        logging.enable_progress_bar()
        assert not are_progress_bars_disabled()
    finally:
        (logging.disable_progress_bar if before else logging.enable_progress_bar)()
