"""A model id or a folder -> a folder on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ..errors import CheckpointNotFoundError, HubError, InputError

#: Models that come with the package, by id.
BUILTIN = {"builtin:scenes": "scenes/checkpoint"}


def resolve(
    model: str | os.PathLike[str],
    *,
    allow_patterns: Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Return the local folder of ``model``: an existing folder, a bundled model, or a hub repository.

    Args:
        model: a folder, ``builtin:NAME``, or ``owner/name`` on the Hugging Face hub.
        allow_patterns: which files of a hub repository are wanted; all by default.
        revision, cache_dir, local_files_only, token: as in ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointNotFoundError: no such folder, bundled model or repository.
        HubError: it has to be downloaded, and the network or the hub does not answer.
    """
    name = os.fspath(model)
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise CheckpointNotFoundError(f"there is no bundled model {name!r}; bundled: {', '.join(BUILTIN)}")
        return Path(str(resources.files("impasto"))) / BUILTIN[name]
    if name and Path(name).is_dir():
        return Path(name)
    if name and Path(name).exists():
        raise InputError(f"{name} is a file; give the folder of the checkpoint that holds it")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\\" in name:
        raise CheckpointNotFoundError(
            f"the folder {name or repr(name)} does not exist. Give an existing folder, a hub id such as "
            f"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, or {', '.join(BUILTIN)}."
        )
    return _download(name, allow_patterns, revision, cache_dir, local_files_only, token)


def _download(
    repo_id: str,
    allow_patterns: Sequence[str] | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            repo_id,
            allow_patterns=list(allow_patterns) if allow_patterns is not None else None,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            token=token,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"the hub has no {repo_id}" + (f" at revision {revision}" if revision else "") + ", or it is private; "
            "check the id, or log in with `hf auth login`, or give a folder"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(
            f"{repo_id} is neither a folder nor in the local cache, and the hub cannot be reached. Connect to the "
            f"network (and unset HF_HUB_OFFLINE), or give the folder of a downloaded copy."
        ) from error
    return Path(folder)
