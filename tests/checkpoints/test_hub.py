"""A model's name -> its folder. No test has a network: the hub is offline, or replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from impasto.checkpoints import hub
from impasto.errors import CheckpointNotFoundError, HubError, InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtSigmaPipeline


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path)) == tmp_path


def test_a_folder_is_preferred_to_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name") == Path("owner/name")


def test_bundled_models_need_no_network() -> None:
    assert hub.resolve("builtin:scenes").parts[-3:] == ("impasto", "scenes", "checkpoint")


def test_unknown_bundled_model() -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no bundled model 'builtin:cats'; bundled: builtin:sc"):
        hub.resolve("builtin:cats")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(InputError, match=r"model.safetensors is a file; give the folder of the checkpoint"):
        hub.resolve(path)


@pytest.mark.parametrize("name", ["", "model", "./here", "/no/such", "~/model", "a/b/c", "C:\\models\\x", "../x"])
def test_names_that_are_neither_folder_nor_id(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"the folder .* does not exist. Give an existing folder, a hub"):
        hub.resolve(name)


@pytest.mark.parametrize("name", ["owner/na me", "owner/--name", "owner/name.git"])
def test_ids_that_the_hub_cannot_have(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=rf"the hub has no {name}.*check the id"):
        hub.resolve(name)


@pytest.mark.parametrize("local_files_only", [False, True])
def test_no_network(local_files_only: bool, tmp_path: Path) -> None:
    message = r"owner/name is neither a folder nor in the local cache.*Connect to the network .*or give the folder"
    with pytest.raises(HubError, match=message):
        hub.resolve("owner/name", cache_dir=tmp_path, local_files_only=local_files_only)
    with pytest.raises(ConnectionError, match=message):  # also a built-in
        PixArtTransformer2DModel.from_pretrained("owner/name", cache_dir=str(tmp_path), subfolder="transformer")


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v2", "cache_dir": str(tmp_path), "local_files_only": False, "token": "secret"}
    assert hub.resolve("owner/name", allow_patterns=["transformer/*"], **options) == tmp_path
    expected = {**options, "repo_id": "owner/name", "allow_patterns": ["transformer/*"], "cache_dir": tmp_path}
    assert asked == expected


@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError("slow"), LocalEntryNotFoundError("none")])
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match="owner/name is neither a folder nor in the local cache"):
        hub.resolve("owner/name")


# --- which files are downloaded ---

MODEL = [
    "config.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00002-of-00002.safetensors",
]
OTHERS = [
    "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "deeper/config.json",
    "deeper/diffusion_pytorch_model-00001-of-00002.safetensors",
]


class Repository:
    """A repository of empty files that is downloaded into a folder, with the hub's own filter of names."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names
        self.forced: list[bool] = []

    def download(self, repo_id: str, force_download: bool = False, **options: Any) -> str:
        filters = {key: options[key] for key in ("allow_patterns", "ignore_patterns") if key in options}
        self.forced.append(force_download)
        for name in huggingface_hub.utils.filter_repo_objects(self.names, **filters):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(self.folder)

    def downloaded(self) -> list[str]:
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("folder", ["", "transformer"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_form_of_the_weights_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, variant: str | None
) -> None:
    names = {name: f"{folder}/{name}".lstrip("/") for name in [*MODEL, *OTHERS]}
    repository = Repository(tmp_path, [*names.values(), "vae/config.json", "vae/notes.txt"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", repository.download)
    root, left = hub.fetch("owner/name", [folder], variant=variant, use_safetensors=None)
    assert (root, left) == (tmp_path, [])
    wanted = MODEL if variant is None else [*MODEL[:2], *OTHERS[:2]]
    assert sorted(repository.downloaded()) == sorted(names[name] for name in wanted)


def test_a_form_of_the_weights_that_there_is_not() -> None:
    with pytest.raises(InputError, match="use_safetensors must be True, False or None, not 'no'"):
        PixArtSigmaPipeline.from_pretrained("builtin:scenes", use_safetensors="no")  # type: ignore[arg-type]
