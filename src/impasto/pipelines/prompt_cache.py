"""The prompt cache: embeddings on disk, so that a repeated prompt needs no text encoder.

An entry is a safetensors file with the embeddings of the tokens, named by a hash of all that they depend on: the
text, the length to which it was truncated, tokenizer and text encoder. No text is stored. ``encoders.json`` says
which encoder a model was last used with, for pipelines that are loaded without one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoints.config import read_json
from ..checkpoints.stored import FLOATS, tensor_headers
from ..errors import CheckpointError, OutputError
from ..family import text_width
from ..files import make_folder, remove_abandoned, write_file
from ..nn.changes import adapters_in_force, is_intercepted, unwrapped
from ..nn.precision import precision_of
from .learned_tokens import concepts_of
from .prompts import EncodedTexts, samples_of

logger = logging.getLogger("impasto")

INDEX_NAME = "encoders.json"


class PromptCache:
    """Embeddings in a folder, which several pipelines and processes may share.

    Args:
        folder: created if it does not exist.
        max_bytes: of all entries; beyond it the least recently used are removed.
        source: the folder of the model, by which the encoder is identified if it is not loaded.

    Raises:
        OutputError: the folder cannot be created.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None, source: Path | None = None):
        self.folder, self.max_bytes = folder, max_bytes
        self._source = source
        make_folder(folder)
        remove_abandoned(folder, "*.tmp")

    def encode(
        self,
        texts: list[str],
        length: int,
        device: torch.device,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        encode: Callable[[list[str]], EncodedTexts],
    ) -> EncodedTexts:
        """The same as ``encode(texts)``, which is called only for texts that are not in the folder.

        Args:
            texts: cleaned already, if they are to be cleaned.
            length: tokens of a text, M.
            text_encoder: None if the pipeline has none: then only cached prompts work.

        Returns:
            embeds [B, M, C] and mask [B, M].
        """
        if text_encoder is not None and (
            text_encoder.training
            or not hasattr(unwrapped(text_encoder), "config")  # a wrapper, about which nothing is known
            or torch.is_autocast_enabled(device.type)  # its results are of another precision
            or any(map(is_intercepted, text_encoder.modules()))  # what they compute is not this encoder's
            or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in text_encoder.parameters()))
        ):
            return encode(texts)
        encoder = self._encoder(text_encoder, tokenizer)
        if encoder is None:
            return encode(texts)
        rows: dict[str, Tensor] = {}  # [tokens, C], without padding
        missing = []
        width = None if text_encoder is None else text_width(unwrapped(text_encoder).config)
        for text in dict.fromkeys(texts):
            found = self._read(self._path(encoder, text, length), length, width)
            if found is None:
                missing.append(text)
            else:
                rows[text] = found
        if len({row.shape[1] for row in rows.values()}) > 1:
            logger.warning("entries of %s have different widths; their prompts are encoded again", self.folder)
            missing = [*dict.fromkeys(texts)]
        if missing:
            encoded = encode(missing)
            for text, embeds, mask in zip(missing, *encoded, strict=True):
                rows[text] = embeds[: int(mask.sum())]
                self._write(self._path(encoder, text, length), rows[text])
            self._shrink()
        lengths = torch.tensor([len(rows[text]) for text in texts], device=device)
        padded = [F.pad(rows[text].to(device), (0, 0, 0, length - len(rows[text]))) for text in texts]
        return EncodedTexts(
            embeds=torch.stack(padded),  # [B, M, C]
            mask=(torch.arange(length, device=device) < lengths[:, None]).long(),  # [B, M]
        )

    def _encoder(self, text_encoder: nn.Module | None, tokenizer: Any) -> str | None:
        """The fingerprint of the encoder, or without one, of that which this model was last used with."""
        index = self._read_index()
        key = None if self._source is None else str(self._source.resolve())
        if text_encoder is not None:
            if tokenizer is None:
                return None
            found = f"{fingerprint(text_encoder, tokenizer)} {text_encoder.dtype}"
            entry = {"encoder": found, "files": _sizes(self._source)}
            if key is not None and index.get(key) != entry:
                self._save(self.folder / INDEX_NAME, json.dumps({**index, key: entry}, indent=1))
            return found
        last = index.get(key) if key is not None else None
        encoder, known = (last.get("encoder"), last.get("files")) if isinstance(last, dict) else (None, None)
        if not isinstance(encoder, str) or not isinstance(known, dict):
            return None
        now = _sizes(self._source)  # missing files, such as those never downloaded, do not count
        return encoder if all(known.get(name, size) == size for name, size in now.items()) else None

    # --- files ---

    def _path(self, encoder: str, text: str, length: int) -> Path:
        key = json.dumps([encoder, text, length], ensure_ascii=True)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, path: Path, length: int, width: int | None) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            header = tensor_headers(path)["embeds"]
            fits = len(header.shape) == 2 and 0 < header.shape[0] <= length and width in (None, header.shape[1])
            if not fits or header.dtype not in FLOATS:
                raise CheckpointError(f"a tensor of {header.dtype} {list(header.shape)}")
            with safe_open(path, framework="pt") as file:
                embeds: Tensor = file.get_tensor("embeds").clone()  # a removed file must not stay mapped
                stored = file.metadata() or {}
            if stored.get("checksum") != _checksum(path.stem, embeds):
                raise CheckpointError("its checksum differs")
            if not bool(embeds.isfinite().all()):
                raise CheckpointError("values that are not finite")
        except (SafetensorError, CheckpointError, OSError, KeyError, ValueError) as error:
            logger.warning("%s of the prompt cache is damaged (%s); its prompt is encoded again", path, error)
            return None
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(path)
        return embeds

    def _write(self, path: Path, embeds: Tensor) -> None:
        embeds = embeds.detach().cpu().contiguous().clone()
        if not bool(embeds.isfinite().all()):  # an error of the encoder, which must not be kept
            return
        with contextlib.suppress(OSError):
            if not path.is_file():  # such as a pipe in place of an entry
                path.unlink()
        self._save(path, save({"embeds": embeds}, {"checksum": _checksum(path.stem, embeds)}))

    def _shrink(self) -> None:
        """Remove the least recently used entries beyond ``max_bytes``."""
        if self.max_bytes is None:
            return
        entries = []
        for path in (*self.folder.glob("*.safetensors"), *self.folder.glob("*.tmp")):
            with contextlib.suppress(OSError):  # removed by another process
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                total -= size

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX_NAME
        if not path.exists():
            return {}
        try:
            return read_json(path)
        except CheckpointError as error:
            logger.warning("%s is damaged (%s) and is rewritten", path, error)
            return {}

    def _save(self, path: Path, content: bytes | str) -> None:
        try:
            write_file(path, content, durable=False)
        except OutputError as error:  # the prompt was encoded nevertheless
            logger.warning("the prompt cache cannot be written: %s", error)


def _checksum(name: str, embeds: Tensor) -> str:
    """A hash of an entry's values, dtype and shape (its tokens and width), and of its name."""
    digest = hashlib.sha256(f"{name} {embeds.dtype} {list(embeds.shape)}".encode())
    digest.update(embeds.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- identifying encoders ---


def fingerprint(text_encoder: nn.Module, tokenizer: Any) -> str:
    """A hash of an encoder in its current state (names, shapes, dtypes and some values of its weights) and of the
    vocabulary of its tokenizer. Adapters, other weights and another precision change it."""
    digest = hashlib.sha256()
    inner: Any = unwrapped(text_encoder)
    settings: dict[str, Any] = inner.config.to_dict()  # every transformers model has one
    # Origin and version do not change the embeddings.
    kept = {name: value for name, value in settings.items() if name not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps([type(inner).__name__, kept], sort_keys=True, default=str).encode())
    digest.update(precision_of(inner).encode())
    if adapters := adapters_in_force(inner):
        digest.update(json.dumps(adapters).encode())
    for name, tensor in (*inner.named_parameters(), *inner.named_buffers()):
        for plain in _plain(tensor):
            digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
            if plain.numel() and not plain.is_meta:
                some = samples_of(plain).contiguous().cpu()
                digest.update(some.view(torch.uint8).numpy().tobytes())
    learned = [token for tokens in concepts_of(tokenizer).values() for token in tokens]
    if learned:  # a few rows of the table of embeddings, which some values of it do not show
        rows = inner.get_input_embeddings().weight.detach()[tokenizer.convert_tokens_to_ids(learned)]
        digest.update(rows.float().cpu().numpy().tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps(vocabulary).encode())
    return digest.hexdigest()


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor consists of; quantized ones have several."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _sizes(source: Path | None) -> dict[str, int]:
    """The sizes of those files of the text encoder and the tokenizer that exist."""
    if source is None:
        return {}
    folders = [source / "text_encoder", source / "tokenizer"]
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    return {str(path.relative_to(source)): path.stat().st_size for path in files}
