"""What clients send by mistake or on purpose: the right status and body, and a server that goes on."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serving.http.running import Running, running
from tests.serving.http.test_client import until

from impasto.serving.http import server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import StubService

KEY = "0123456789abcdefghij"
GENERATIONS, EDITS, TXT2IMG = "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(max_body=300_000, max_upload_pixels=1 << 20, receive_seconds=0.4, send_seconds=2.0) as found:
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    """A client; afterwards the server is unharmed."""
    with httpx.Client(base_url=served.url, timeout=10) as found:
        yield found
    assert httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a"}).status_code == 200
    assert not served.service.unfinished


def png(width: int = 64, height: int = 64, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of few bytes that says that it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def check(answer: httpx.Response, status: int, *said: str, param: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for words in said:
        assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def check_a1111(answer: httpx.Response, status: int, *said: str) -> None:
    """The same of an error under /sdapi, as its clients read it."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "detail", "body", "errors"}
    for words in said:
        assert words in body["detail"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "NaN"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
        (b'{"prompt": "\\ud800"}', "Unicode"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"[]," * 60_000 + b"[]]", "120,002 commas and opening brackets"),
        (b'{"prompt": "a", "n": 1' + b"0" * 6000 + b"}", ""),
        (b'{"prompt": "a", "seed": -1}', "seed"),
        (b'{"prompt": ["a"]}', "prompt"),
        (b'{"prompt": "a", "lora": "style"}', "lora"),
        (b'{"prompt": "a", "lora": [{"name": "../../etc/passwd"}]}', "style"),
        (b'{"prompt": "a", "model": "/etc/passwd"}', ""),
        (b'{"prompt": "a", "size": "1024x1025"}', "size"),
        (b'{"prompt": "a", "num_inference_steps": 100000}', "200"),
        (b'{"prompt": "' + b"a" * 20_001 + b'"}', "20,001"),
        (b'{"prompt": "a", "\\u001b[31m": 1}', "there is no field"),
    ],
)
def test_json_that_cannot_be_used(client: httpx.Client, content: bytes, said: str):
    answer = client.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    check(answer, 404 if b"/etc/passwd" in content and b"model" in content else 400, said)
    assert "\x1b" not in answer.text


def test_other_paths_methods_and_types(client: httpx.Client):
    check(client.get("/v1/nothing"), 404, "/v1/nothing")
    check(client.get("/v1/images/../../etc/passwd"), 404)
    check(client.get("/..%2f..%2fetc/passwd"), 404)
    answer = client.get(GENERATIONS)
    check(answer, 405)
    assert answer.headers["allow"] == "POST"
    check(client.post(GENERATIONS, content="prompt=a"), 415)
    check(client.post(GENERATIONS, data={"prompt": "a"}), 415, "application/json")
    check(client.post(EDITS, content=b"x", headers={"Content-Type": "text/plain"}), 415, "multipart/form-data")


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        ([], {"prompt": "a"}, "image"),
        ([("image", ("x.png", b"no image"))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", b""))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", png()[:60]))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", png(200, 200)[:-30]))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", bomb(100_000)))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", bomb(2000)))], {"prompt": "a"}, "image"),
        ([("image", ("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))], {"prompt": "a"}, "image"),
        ([("image", ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"))], {"prompt": "a"}, "image"),
        ([("image[]", ("1.png", png())), ("image[]", ("2.png", png()))], {"prompt": "a"}, "image"),
        ([("image", ("x.png", png()))], {}, "prompt"),
        ([("image", ("x.png", png()))], {"prompt": "a", "n": "two"}, "n"),
        ([("image", ("x.png", png()))], {"prompt": "a", "strength": "nan"}, "strength"),
        ([("image", ("x.png", png()))], {"prompt": "a", "strength": "0"}, "strength"),
        ([("image", ("x.png", png()))], {"prompt": "a", "strenght": "0.5"}, "strenght"),
        ([("image", ("x.png", png())), ("mask", ("m.png", png(32, 64, "L")))], {"prompt": "a"}, "mask"),
        ([("image", ("x.png", png())), ("mask", ("m.png", png(mode="L")))], {"prompt": "a"}, "mask"),
        ([("image", ("x.png", png())), ("mask", ("m.png", b"no"))], {"prompt": "a"}, "mask"),
        ([("image", ("x.png", png())), ("mask", ("1", png())), ("mask", ("2", png()))], {"prompt": "a"}, "mask"),
        ([("image", ("x.png", png())), ("prompt", ("p.txt", b"a"))], {}, "prompt"),
        ([("image", (None, "http://127.0.0.1/x.png"))], {"prompt": "a"}, "image"),
        ([("image", (None, "file:///etc/passwd"))], {"prompt": "a"}, "image"),
        ([("image", (None, "/etc/passwd"))], {"prompt": "a"}, "image"),
    ],
)
def test_forms_that_cannot_be_used(client: httpx.Client, files: Any, data: dict[str, str], param: str):
    if not files:
        files = [("x", (None, ""))]
        check(client.post(EDITS, files=files, data=data), 400, "there is no field")
        return
    check(client.post(EDITS, files=files, data=data), 400, param=param)


@pytest.mark.parametrize(
    ("files", "data", "said"),
    [
        ([("file", ("x.png", png()))], {"prompt": "a"}, "there is no field 'file'"),
        ([("imag", ("x.png", png()))], {"prompt": "a"}, "did you mean 'image'?"),
        ([("image", ("x.png", png())), ("prompt", ("p.txt", b"a"))], {}, "prompt must be a text, not a file"),
        ([("image", ("x.png", png()))], {"prompt": "a", "lora[][name]": "style"}, "did you mean lora as a JSON text"),
        ([("image", ("x.png", png()))], {"prompt": "a", "strength": "2"}, "a finite number above 0 and of 1 or less"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(client: httpx.Client, files: Any, data: dict[str, str], said: str):
    check(client.post(EDITS, files=files, data=data), 400, said)


@pytest.mark.parametrize("value", ["/etc/passwd", "http://127.0.0.1:1/x.png", "data:image/png,abc", 5, ["x", 5], {}])
def test_json_edits_open_no_path_or_address(client: httpx.Client, value: Any):
    check(client.post(EDITS, json={"prompt": "a", "image": value}), 400, param="image")


def test_hostile_file_names_are_not_used(client: httpx.Client):
    for name in ("../../../etc/passwd", "a\x00b.png", "x" * 5000, "\r\nX-Injected: 1", "😀.png"):
        answer = client.post(EDITS, files={"image": (name, png())}, data={"prompt": "a"})
        assert answer.status_code in (200, 400)
        assert "x-injected" not in answer.headers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na',
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        b"--y\r\n\r\n--y--",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 200 + b"--x--\r\n",
        (b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n1\r\n' * 20) + b"--x--\r\n",
        b"--x\r\n" + b"X-Header: 1\r\n" * 5000 + b"\r\n--x--\r\n",
    ],
)
def test_truncated_and_malformed_forms(client: httpx.Client, body: bytes):
    check(client.post(EDITS, content=body, headers={"Content-Type": "multipart/form-data; boundary=x"}), 400)
    check(client.post(EDITS, content=body, headers={"Content-Type": "multipart/form-data"}), 400)


@pytest.mark.parametrize("charset", ["punycode", '"undefined"', "utf-7", "utf-8; charset=unicode_escape"])
def test_forms_are_utf_8(client: httpx.Client, charset: str):
    """Other codecs take minutes, or have no text as a result."""
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n-aaa\r\n--x--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    check(client.post(EDITS, content=body, headers=headers), 415, "charset")
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=UTF-8"}
    check(client.post(EDITS, content=body, headers=headers), 400, param="image")


def test_too_large_bodies(client: httpx.Client, served: Running):
    large = json.dumps({"prompt": "a", "user": "x" * 400_000})
    headers = {"Content-Type": "application/json"}
    check(client.post(GENERATIONS, content=large, headers=headers), 413, "300,000")
    pieces = (large[i : i + 4096].encode() for i in range(0, len(large), 4096))
    check(client.post(GENERATIONS, content=pieces, headers=headers), 413)
    check(client.post(EDITS, files={"image": ("x.png", bytes(400_000))}, data={"prompt": "a"}), 413)
    answer = exchange(served, b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 415")) or b" 413 " in answer[:20]


def test_too_much_at_once():
    with running(max_buffered=1000) as served:
        answer = httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a" * 2000})
        check(answer, 503, "too much at once")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/sdapi/v1/txt2img", "/sdapi/v1/img2img"])
def test_requests_that_wait_do_not_keep_others_from_sending(path: str):
    image = base64.b64encode(png()).decode()
    body: dict[str, Any] = {"prompt": "a" * 700}
    if path == EDITS:
        body["image"] = image
    elif path == "/sdapi/v1/img2img":
        body["init_images"] = [image]
    quick = body | {"num_inference_steps" if "v1/images" in path else "steps": 1}
    service = StubService(seconds=0.02)
    with running(service, max_buffered=1300) as served:
        waiting = threading.Thread(target=httpx.post, args=(f"{served.url}{path}",), kwargs={"json": body})
        waiting.start()
        until(lambda: service.unfinished)
        assert httpx.post(f"{served.url}{path}", json=quick).status_code == 200
        waiting.join(20)


def exchange(served: Running, sent: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to raw bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        try:
            for piece in [sent] if not pause else [sent[i : i + 1] for i in range(len(sent))]:
                connection.sendall(piece)
                time.sleep(pause)
            found = b""
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionError:
            return b""
        return found


def test_header_bombs(client: httpx.Client, served: Running):
    many = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 100) for i in range(1000))
    for headers in (many, b"X: " + b"a" * 100_000 + b"\r\n", b"X: " + b"a" * 100_000):
        answer = exchange(served, b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n")
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431")  # it may be reset before it is read
    answer = exchange(served, b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the headers are too large"


def test_headers_that_are_too_large_together(client: httpx.Client):
    many = {f"X-{i}": "a" * 1000 for i in range(33)}  # each is small enough for the parser
    check(client.get("/health", headers=many), 431, "the headers are too large")
    check_a1111(client.get("/sdapi/v1/options", headers=many), 431, "the headers are too large")


def test_what_is_not_http(client: httpx.Client, served: Running):
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        answer = exchange(served, sent)
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_slow_clients_are_disconnected(client: httpx.Client, served: Running):
    assert exchange(served, b"") == b""  # nothing is sent
    assert exchange(served, b"GET /health HT") == b""
    assert exchange(served, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: 1\r\n" * 20, pause=0.02) == b""
    start = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = exchange(served, start + b'Content-Length: 100\r\n\r\n{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request arrives too slowly"


@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [
        (GENERATIONS, "application/json", b'{"prompt": "a'),
        (EDITS, "multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'),
        ("/sdapi/v1/txt2img", "application/json", b'{"prompt": "a'),
    ],
)
def test_clients_that_leave_while_they_send(path: str, kind: str, part: bytes, caplog: pytest.LogCaptureFixture):
    """They are counted as such, not as faults of the server."""
    with running() as served:
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode() + part)
        counted = f'impasto_http_requests_total{{method="POST",path="{path}",status="499"}} 1.0'
        until(lambda: counted in httpx.get(f"{served.url}/metrics").text)
        assert 'status="500"' not in httpx.get(f"{served.url}/metrics").text
        assert httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a"}).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_that_never_ends_is_cut_off():
    with running(receive_seconds=0.5, body_seconds=0.3) as served:
        start = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = exchange(served, start + b"Content-Length: 1000\r\n\r\n" + b" " * 40, pause=0.01)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_slow_readers_are_disconnected(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "impasto.serve")
    with running(send_seconds=0.4) as served, socket.socket() as connection:
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        body = json.dumps({"prompt": "a", "n": 10, "size": "512x512", "num_inference_steps": 1})
        request = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        end = time.monotonic() + 10
        while not served.service.submitted or served.server.server_state.connections:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert "does not read its answer" in caplog.text


def test_answers_that_nobody_reads_are_bounded_together(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "impasto.serve")
    with running(send_seconds=8.0, receive_seconds=0.4, max_unread=1000) as served, socket.socket() as connection:
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", served.port))
        body = json.dumps({"prompt": "a", "n": 10, "size": "512x512", "num_inference_steps": 1})
        request = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: "connection of one of them is closed" in caplog.text)
    assert "does not read its answer" not in caplog.text


class Slow:
    """A transport whose client reads some bytes between two looks."""

    aborted = False

    def __init__(self, *sizes: int):
        self.sizes = [*sizes]

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0)

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(("read", "aborted"), [(100_000, False), (20_000, True)])
def test_a_large_answer_is_read_within_minutes(read: int, aborted: bool, monkeypatch: pytest.MonkeyPatch):
    """60 MB in 600 s are 100,000 bytes a second; in all, 1024 bytes a second would take a day."""
    now = [0.0]
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    settings = HttpSettings(send_seconds=4.0, receive_seconds=4.0)
    one: Any = object.__new__(type("Protocol", (server.BoundedProtocol,), {"settings": settings}))
    one.loop = SimpleNamespace(call_later=lambda *_: None)
    one.cycle, one.connections = SimpleNamespace(response_complete=False), set()
    one.transport = Slow(*(60_000_000 - i * read for i in range(8)))
    one._idle_since = one._read_at = one._unread_since = 0.0
    one._unread = one._first_unread = 0
    while one.transport.sizes and not one.transport.aborted:
        one._check()
        now[0] += one._tick
    assert one.transport.aborted == aborted


def test_keys():
    with running(keys=("another-key-0123456", KEY)) as served, httpx.Client(base_url=served.url) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": KEY},
            {"Authorization": "Bearer"},
            {"Authorization": b"Bearer \xff\xfe"},
            {"Authorization": "Basic !!!"},
        ):
            for path in (GENERATIONS, "/v1/anything"):
                answer = client.post(path, json={"prompt": "a"}, headers=headers)
                check(answer, 401, "a key is needed")
                assert answer.headers["www-authenticate"] == "Bearer"
            answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a"}, headers=headers)
            check_a1111(answer, 401, "a key is needed", "the password of HTTP basic authentication")
            assert answer.headers["www-authenticate"].startswith("Basic")
        check(client.get("/metrics"), 401)
        check(client.get("/openapi.json"), 401)  # it names models and adapters
        assert client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).is_success
        assert client.get("/health").status_code == 200
        assert client.post(GENERATIONS, json={"prompt": "a"}, headers={"Authorization": f"Bearer {KEY}"}).is_success
        assert client.post(GENERATIONS, json={"prompt": "a"}, auth=("anyone", KEY)).is_success
        assert not served.service.unfinished


def test_web_pages_of_other_origins():
    with running(hosts=("127.0.0.1", "localhost")) as served:
        url = f"{served.url}{GENERATIONS}"
        check(httpx.post(url, json={"prompt": "a"}, headers={"Origin": "http://evil.example"}), 403)
        check(httpx.post(url, json={"prompt": "a"}, headers={"Origin": "null"}), 403)
        check(httpx.post(url, json={"prompt": "a"}, headers={"Host": "evil.example"}), 421)
        check_a1111(httpx.post(f"{served.url}{TXT2IMG}", json={}, headers={"Origin": "http://evil.example"}), 403)
        check_a1111(httpx.post(f"{served.url}{TXT2IMG}", json={}, headers={"Host": "evil.example"}), 421)
        assert httpx.post(url, json={"prompt": "a"}, headers={"Origin": served.url}).is_success
        answer = httpx.options(url, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
        assert "access-control-allow-origin" not in answer.headers
    with running(public_url="https://images.example/some/path/") as served:  # a proxy sends another Host
        url = f"{served.url}{GENERATIONS}"
        assert httpx.post(url, json={"prompt": "a"}, headers={"Origin": "https://images.example"}).is_success
        check(httpx.post(url, json={"prompt": "a"}, headers={"Origin": "https://evil.example"}), 403)
    with running(origins=("https://app.example",)) as served:
        url = f"{served.url}{GENERATIONS}"
        headers = {"Origin": "https://app.example"}
        answer = httpx.options(url, headers=headers | {"Access-Control-Request-Method": "POST"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        answer = httpx.post(url, json={"prompt": "a"}, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_logs_have_no_prompts(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with running() as served:
        httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a secret", "n": 0})
        httpx.post(f"{served.url}{GENERATIONS}?q=secret", json={"prompt": "a secret"})
        httpx.get(f"{served.url}/%1b%0aforged")
        httpx.get(f"{served.url}/v1/images/img-{'5ec2e7' * 5}00/content")
    assert f"POST {GENERATIONS} 200" in caplog.text
    assert "secret" not in caplog.text
    assert "GET /v1/images/img-.../content 404" in caplog.text
    assert "5ec2e7" not in caplog.text
    assert "\x1b" not in caplog.text
    caplog.clear()
    with running(log_prompts=True) as served:
        httpx.post(f"{served.url}{GENERATIONS}", json={"prompt": "a secret"})
    assert "a secret" in caplog.text


class Broken(StubService):
    """Fails as a fault of the server does."""

    def submit(self, jobs):  # type: ignore[no-untyped-def]
        raise {"memory": MemoryError(), "fault": KeyError("x")}[jobs[0].prompt]


def test_faults_of_the_server_say_nothing_of_its_inside():
    with running(Broken()) as served:
        url = f"{served.url}{GENERATIONS}"
        check(httpx.post(url, json={"prompt": "fault"}), 500, "the server failed")
        check(httpx.post(url, json={"prompt": "memory"}), 503, "lacks memory")
