"""Saving to the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checks import printable
from ..errors import HubError, ImpastoError, InputError
from ..folders import reading

_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")


class Uploads:
    """What can be saved into a folder, and so be uploaded."""

    save_pretrained: Any

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Save it into a temporary folder, upload that, and return the address of the commit.

        Args:
            repo_id: ``owner/name``, or a name among your own repositories; created if it does not exist.
            private: of a new repository; None: as the owner's settings say.
            token: of the hub; None: that of ``hf auth login``.
            create_pr: open a pull request rather than committing to the main branch.
            safe_serialization: only True: pickles are never written.
            variant: inserted into the names of the weight files, such as ``"fp16"``.
            subfolder: the folder in the repository.

        Raises:
            HubError: the upload failed; the message says why.
        """
        given: dict[str, Any] = {} if variant is None else {"variant": variant}
        if not safe_serialization:
            given["safe_serialization"] = safe_serialization  # refused, with the reason
        with tempfile.TemporaryDirectory(prefix="impasto-") as folder:
            self.save_pretrained(folder, **given)
            message = commit_message or _message(self)
            return _upload(folder, None, repo_id, message, private, token, create_pr, subfolder)


def push_saved(saved: object, folder: str | os.PathLike[str], files: Iterable[str], options: Mapping[str, Any]) -> None:
    """``push_to_hub=True`` of saving: upload the files that were written, and no others of their folder.

    Args:
        files: relative to the folder.
        options: of ``push_to_hub``; the repository has the folder's name unless they have another.
    """
    named = {"repo_id": Path(folder).name, **options}
    message = named.pop("commit_message", None) or _message(saved)
    with reading(folder) as unchanging:
        _upload(os.fspath(unchanging), files, commit_message=message, **named)


def files_in(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _message(uploaded: object) -> str:
    """The message of a commit, as diffusers chooses it."""
    name = type(uploaded).__name__
    return f"Upload {next((kind.lower() for kind in ('Model', 'Scheduler') if kind in name), name)}"


def check_upload_options(options: Mapping[str, Any]) -> None:
    """Refuse keywords of ``save_pretrained`` that ``push_to_hub`` does not have.

    Raises:
        InputError: the message lists those that it has.
    """
    wrong = next((name for name in options if name not in _OPTIONS), None)
    if wrong is not None:
        raise InputError(f"save_pretrained has no argument {wrong!r}; those of push_to_hub are {', '.join(_OPTIONS)}")


def check_writable(safe_serialization: bool, use_flashpack: bool = False) -> None:
    """Refuse formats that are not written.

    Raises:
        InputError: anything but safetensors.
    """
    if not safe_serialization or use_flashpack:
        wanted = "use_flashpack=True" if use_flashpack else "safe_serialization=False"
        raise InputError(
            f"{wanted} would write {'another format' if use_flashpack else 'a pickle'}; only safetensors are written"
        )


def _upload(
    folder: str,
    files: Iterable[str] | None,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Upload these files of a folder (None: all) to a repository, which is created if needed.

    Returns:
        the address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=None if files is None else [glob.escape(file) for file in files],
        )
    except ImpastoError:
        raise
    except Exception as error:  # from the network, the server or the library
        raise HubError(
            f"{printable(str(repo_id)[:200])} was not uploaded ({type(error).__name__}): check the name, log in with "
            f"`hf auth login` or give token=, and unset HF_HUB_OFFLINE"
        ) from error
    return str(commit)
