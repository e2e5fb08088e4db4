"""Resolve model ids and folders to local folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..checks import printable, shown, text
from ..errors import CheckpointNotFoundError, HubError, InputError
from ..files import plain_path
from .layout import holds_weights, weight_patterns

#: Models that come with the package.
BUILTIN = {"builtin:scenes": "scenes/checkpoint"}
#: The keywords of ``resolve`` that are options of the download.
OPTIONS = ("revision", "cache_dir", "local_files_only", "token", "force_download")


def resolve(
    model: str | os.PathLike[str],
    *,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """Return the local folder of ``model``: an existing folder, a bundled model, or a hub repository.

    Args:
        model: a folder, ``builtin:NAME``, or ``owner/name`` on the Hugging Face hub.
        allow_patterns: the files to download from a hub repository; all by default.
        ignore_patterns: those of them that are not downloaded.
        revision, cache_dir, local_files_only, token, force_download: as in ``huggingface_hub.snapshot_download``.

    Raises:
        CheckpointNotFoundError: no such folder, bundled model or repository.
        HubError: it has to be downloaded, but the hub cannot be reached.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else model
    if not isinstance(name, str):
        raise InputError(f"a model must be a folder or an id, given as a string or a path, not {shown(model)}")
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise CheckpointNotFoundError(f"there is no bundled model {shown(name)}; bundled: {', '.join(BUILTIN)}")
        return package_file(BUILTIN[name])
    if os.path.isdir(name):  # unlike Path.is_dir, this takes names of any length
        return Path(name)
    if os.path.exists(name):
        raise InputError(f"{name} is a file; give the folder of the checkpoint that holds it")
    is_id = name.count("/") == 1 and name.isprintable() and len(name) <= 200
    if not is_id or name.startswith((".", "/", "~")) or "\\" in name:
        raise CheckpointNotFoundError(
            f"the folder {printable(name[:200]) or repr(name)} does not exist. Give an existing folder, a hub id such "
            f"as PixArt-alpha/PixArt-Sigma-XL-2-1024-MS, or {', '.join(BUILTIN)}."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    cache = None if cache_dir is None else plain_path(cache_dir, InputError)
    more: dict[str, Any] = {"force_download": True} if force_download else {}
    if ignore_patterns is not None:
        more["ignore_patterns"] = list(ignore_patterns)
    try:
        folder = snapshot_download(
            name,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            revision=revision,
            cache_dir=cache,
            local_files_only=local_files_only,
            token=token,
            **more,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"the hub has no {name}" + (f" at revision {revision}" if revision else "") + ", or it is private; "
            "check the id, or log in with `hf auth login`, or give a folder"
        ) from error
    except Exception as error:  # from the cache, the network, the server or the library
        raise HubError(
            f"{name} is neither a folder nor in the local cache, and the hub cannot be reached. Connect to the "
            f"network (and unset HF_HUB_OFFLINE), or give the folder of a downloaded copy. ({type(error).__name__})"
        ) from error
    return Path(folder)


def package_file(path: str) -> Path:
    """A file or folder that comes with the package."""
    return Path(str(resources.files("impasto"))) / path


def fetch(
    model: str | os.PathLike[str],
    folders: Sequence[str],
    *,
    variant: str | None,
    use_safetensors: bool | None,
    others: Sequence[str] = (),
    **options: Any,
) -> tuple[Path, list[str]]:
    """The local folder of ``model`` with components in it, of whose weights only one form is downloaded.

    Args:
        folders: of the components, relative to the repository.
        variant: of the weights; None: those without one.
        others: further files to download.
        options: for ``resolve``.

    Returns:
        the folder, and those of ``folders`` that should hold weights and hold none of this variant.
    """
    if use_safetensors not in (None, True, False):
        raise InputError(f"use_safetensors must be True, False or None, not {shown(use_safetensors)}")
    left = list(folders)
    deeper = [f"{folder}/*/*".lstrip("/") for folder in folders]  # "*" in a pattern matches "/" too
    for kind in {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]:
        asked = [f"{folder}/{file}".lstrip("/") for folder in left for file in weight_patterns(variant, kind)]
        root = resolve(model, allow_patterns=[*others, *asked], ignore_patterns=deeper, **options)
        left = [folder for folder in left if not holds_weights(root / folder, variant, kind)]
        if not left:
            break
    return root, left


def inside(root: Path, subfolder: str | None) -> Path:
    """A subfolder of a checkpoint.

    Raises:
        InputError: ``subfolder`` is not the name of a folder.
    """
    if subfolder is None:
        return root
    if "\0" in text("subfolder", subfolder, 255):
        raise InputError(f"subfolder must be the name of a folder, not {shown(subfolder)}")
    if os.path.isfile(root / subfolder):
        raise InputError(f"{printable(str(root / subfolder))} is a file; give the folder that holds it as subfolder")
    return root / subfolder
