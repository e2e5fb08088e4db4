"""Uploading, against a stand-in of the hub's client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from impasto.callbacks import PipelineCallback
from impasto.errors import HubError, InputError
from impasto.image_processor import VaeImageProcessor
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.ddim import DDIMScheduler

from ..tiny import tiny_pipeline, tiny_transformer


class Hub:
    """What was asked of the hub: each call of the client, with the names of the files in an uploaded folder."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.folders: list[Path] = []
        self.error: Exception | None = None

    def client(self, token: Any = None) -> Any:
        def create_repo(repo_id: str, **options: Any) -> Any:
            self.calls.append(("create", {"repo_id": repo_id, "token": token, **options}))
            if self.error is not None:
                raise self.error
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def upload_folder(folder_path: str, allow_patterns: Any = None, **options: Any) -> str:
            root = Path(folder_path)
            self.folders.append(root)
            files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
            files = list(filter_repo_objects(files, allow_patterns=allow_patterns))
            self.calls.append(("upload", {"files": files, **options}))
            return "https://hub/commit/1"

        return SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found.client)
    return found


def test_a_model_is_saved_and_uploaded(hub: Hub) -> None:
    assert tiny_transformer().push_to_hub("me/model", "better", True, "secret", True, variant="fp16") == (
        "https://hub/commit/1"
    )
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo_id": "me/model", "token": "secret", "private": True, "exist_ok": True}
    assert uploaded == {
        "files": ["config.json", "diffusion_pytorch_model.fp16.safetensors"],
        "repo_id": "me/model",
        "path_in_repo": None,
        "commit_message": "better",
        "create_pr": True,
    }


def test_a_scheduler_goes_into_a_subfolder(hub: Hub) -> None:
    DDIMScheduler().push_to_hub("scheduler", subfolder="scheduler")
    uploaded = hub.calls[1][1]
    assert uploaded["files"] == ["scheduler_config.json"]
    assert (uploaded["repo_id"], uploaded["path_in_repo"]) == ("me/scheduler", "scheduler")
    assert uploaded["commit_message"] == "Upload scheduler"


def test_save_with_push_uploads_what_was_saved_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "secret.txt").write_text("not for everyone")
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=None, tokenizer=None, vae=None)
    pipe.save_pretrained(folder, push_to_hub=True, commit_message="first", private=True)
    (_, created), (_, uploaded) = hub.calls
    assert created["repo_id"] == "my-model"
    assert created["private"] is True
    assert uploaded["commit_message"] == "first"
    assert "secret.txt" not in uploaded["files"]
    assert {"model_index.json", "transformer/config.json"} <= set(uploaded["files"])
    assert (folder / "model_index.json").is_file()
    assert hub.folders == [folder.resolve()]  # nothing is written a second time
    hub.calls.clear()
    DDIMScheduler().save_pretrained(folder / "scheduler", push_to_hub=True, repo_id="me/other")
    assert hub.calls[0][1]["repo_id"] == "me/other"


def test_save_with_push_uploads_the_same_shards(hub: Hub, tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "model", max_shard_size=20_000, push_to_hub=True)
    saved = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert len(saved) > 3
    assert hub.calls[1][1]["files"] == saved
    pipe = tiny_pipeline(PixArtSigmaPipeline, transformer=model, text_encoder=None, tokenizer=None, vae=None)
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size=20_000, push_to_hub=True, variant="fp16")
    uploaded = [name for name in hub.calls[3][1]["files"] if name.startswith("transformer/")]
    assert uploaded == sorted(f"transformer/{path.name}" for path in (tmp_path / "pipe" / "transformer").iterdir())
    assert len(uploaded) == len(saved)


@pytest.mark.parametrize("made", [VaeImageProcessor, PipelineCallback])
def test_what_has_no_weights_uploads_its_config_alone(hub: Hub, tmp_path: Path, made: Any) -> None:
    assert not hasattr(made, "push_to_hub")
    made().save_config(tmp_path / "thing", push_to_hub=True, repo_id="me/thing")
    assert hub.calls[1][1]["files"] == [made.config_name]
    assert hub.calls[1][1]["commit_message"] == f"Upload {made.__name__}"


def test_unknown_options_are_refused_before_anything_is_written(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no argument 'repo'.*repo_id, commit_message"):
        tiny_pipeline(PixArtSigmaPipeline).save_pretrained(tmp_path / "x", push_to_hub=True, repo="a/b")
    assert not (tmp_path / "x").exists()
    assert hub.calls == []


def test_pickles_are_not_uploaded(hub: Hub) -> None:
    with pytest.raises(InputError, match="pickle"):
        tiny_transformer().push_to_hub("me/model", safe_serialization=False)
    assert hub.calls == []


def test_a_failed_upload_says_what_to_do(hub: Hub) -> None:
    hub.error = ConnectionError("refused")
    with pytest.raises(HubError, match=r"me/model was not uploaded \(ConnectionError\).*hf auth login"):
        tiny_transformer().push_to_hub("me/model")
