"""Stored images, and what is written into them."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from PIL import Image
from tests.serving.http.running import running
from tests.serving.http.test_openai import call, image_of

from impasto.errors import ConfigurationError
from impasto.serving.http import app
from impasto.serving.http.settings import HttpSettings
from impasto.serving.http.storage import Storage

PATH = "/v1/images/generations"


def test_links_to_stored_images(tmp_path: Path):
    settings = HttpSettings(storage=tmp_path / "images", keys=("0123456789abcdefghij",))
    headers = {"Authorization": "Bearer 0123456789abcdefghij"}
    with running(settings=settings) as served, httpx.Client(base_url=served.url) as client:
        body = {"prompt": "a", "n": 2, "response_format": "url", "output_format": "webp"}
        answer = client.post(PATH, json=body, headers=headers).json()
        for item in answer["data"]:
            assert item["url"] == f"{served.url}/v1/images/{item['id']}/content"
            found = client.get(item["url"])  # without a key: its id is one
            assert found.headers["content-type"] == "image/webp"
            assert "sandbox" in found.headers["content-security-policy"]
            assert Image.open(io.BytesIO(found.content)).size == (64, 64)
        for id in ("img-" + "0" * 32, "..%2f..%2fetc%2fpasswd", "nothing"):
            assert client.get(f"/v1/images/{id}/content").status_code in (401, 404)
    with running(settings=settings) as served:  # they outlive the server
        assert httpx.get(f"{served.url}/v1/images/{answer['data'][0]['id']}/content").status_code == 200


def test_an_image_that_is_removed_before_it_is_sent_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    id = "img-" + "a" * 32
    monkeypatch.setattr(Storage, "find", lambda *_: (tmp_path / f"{id}.png", "png"))
    found = tmp_path / f"{id}.png"
    found.write_bytes(b"x")
    sent = app.StoredImage.__call__

    async def evicted(self, *arguments):  # type: ignore[no-untyped-def]
        found.unlink()
        await sent(self, *arguments)

    monkeypatch.setattr(app.StoredImage, "__call__", evicted)
    answer = call("GET", f"/v1/images/{id}/content", settings=HttpSettings(storage=tmp_path))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "image_not_found"


def test_saving_lists_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may have a hundred thousand images."""
    storage = Storage(tmp_path, 1000)
    monkeypatch.setattr(Path, "glob", None)
    storage.save("img-" + "a" * 32, "png", b"x")
    assert storage.find("img-" + "a" * 32) is not None


def test_servers_with_one_folder_find_each_other_s_images(tmp_path: Path):
    one, other = Storage(tmp_path, 1000), Storage(tmp_path, 1000)
    one.save("img-" + "a" * 32, "webp", b"x")
    assert other.find("img-" + "a" * 32) == (tmp_path / f"img-{'a' * 32}.webp", "webp")
    (tmp_path / "notes.png").write_bytes(b"x")
    for id in ("img-" + "b" * 32, "notes", "../notes", ""):
        assert other.find(id) is None


def test_the_oldest_images_are_removed(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    storage = Storage(tmp_path, 250)
    ids = [f"img-{i:032x}" for i in range(4)]
    for id in ids:
        storage.save(id, "png", bytes(100))
    assert [storage.find(id) is not None for id in ids] == [False, False, True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{id}.png" for id in ids[2:]), "mine.txt"]
    assert Storage(tmp_path, 250).find(ids[3]) == (tmp_path / f"{ids[3]}.png", "png")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_image_even_if_it_cannot_be_stored(tmp_path: Path, stream: bool):
    with running(storage=tmp_path / "images") as served, httpx.Client(base_url=served.url) as client:
        shutil.rmtree(tmp_path / "images")
        answer = client.post(PATH, json={"prompt": "a", "stream": stream})
        assert answer.status_code == 200
        assert '"b64_json": "iVBOR' in answer.text.replace('":"', '": "')
        assert client.post(PATH, json={"prompt": "a", "response_format": "url"}).status_code == 500


@pytest.mark.parametrize("kept", [True, False])
def test_settings_in_images(kept: bool):
    answer = call("POST", PATH, settings=HttpSettings(settings_in_images=kept), json={"prompt": "a secret"})
    assert ("parameters" in image_of(answer.json()["data"][0]).info) is kept


_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = Test
O = Test
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = emailProtection
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, chain.pem, and its key, leaf.key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("credentials")
    (folder / "config").write_text(_CONFIG)
    new = "openssl ecparam -name prime256v1 -genkey -noout"
    script = f"""set -e
    {new} -out root.key; {new} | openssl pkcs8 -topk8 -nocrypt -out leaf.key
    openssl req -x509 -new -key root.key -days 3650 -config config -extensions root -out root.pem
    openssl req -new -key leaf.key -subj "/CN=Signer/O=Test" -out leaf.csr
    openssl x509 -req -in leaf.csr -CA root.pem -CAkey root.key -CAcreateserial -days 3650 -extfile config \
        -extensions leaf -out leaf.pem
    cat leaf.pem root.pem > chain.pem"""
    subprocess.run(["sh", "-c", script], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_content_credentials(credentials: Path, kind: str):
    c2pa = pytest.importorskip("c2pa")
    from impasto.serving.http.provenance import make_signer

    signer = make_signer(credentials / "chain.pem", credentials / "leaf.key", "impasto 1.0")
    settings = HttpSettings(signer=signer)
    answer = call("POST", PATH, settings=settings, json={"prompt": "a", "output_format": kind}).json()
    image = image_of(answer["data"][0])
    assert "parameters" in image.info or "exif" in image.info  # its settings are still there
    file = io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))
    with c2pa.Reader(f"image/{kind}", file) as reader:
        found = json.loads(reader.json())
    assert found["validation_state"] in ("Valid", "Trusted")
    manifest = found["manifests"][found["active_manifest"]]
    assert manifest["claim_generator_info"][0]["name"] == "impasto"
    assert "trainedAlgorithmicMedia" in json.dumps(manifest["assertions"])


def test_credentials_that_cannot_sign(credentials: Path):
    pytest.importorskip("c2pa")
    from impasto.serving.http.provenance import make_signer

    with pytest.raises(ConfigurationError, match="cannot sign"):
        make_signer(credentials / "chain.pem", credentials / "chain.pem", "impasto 1.0")
    with pytest.raises(ConfigurationError, match="No such file"):
        make_signer(credentials / "nothing.pem", credentials / "leaf.key", "impasto 1.0")
