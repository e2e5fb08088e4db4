"""Encode a source once: posteriors of its images and features of its captions, for ``data.cached.CachedSource``.

The samples are sorted by bucket and divided into chunks, each of which is a file. What a chunk holds depends on the
source alone, so several processes can share the work, and a killed one continues where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ...checks import shown, whole_number
from ...errors import ConfigurationError, InputError
from ...files import append_line, make_folder, write_file
from ..data.buckets import Buckets
from ..data.cached import EMPTY, SETTINGS, CacheSettings, read_index, read_settings, text_key
from ..data.captions import Captions
from ..data.faults import Faults
from ..data.images import ImageSource
from ..data.sample import Sample, Source, captions_of_sample, name_of
from ..data.views import Views
from ..running.randomness import reading_generator

T = TypeVar("T")

RANDOM_CROPS = "random crops cannot be cached; set crop of the source to centre, or to a number of fixed crops"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Encoders:
    """The frozen models.

    Attributes:
        posterior: samples with images of one size -> mean and deviation, each [B, C, h, w], float32.
        features: captions -> [M, D] of each, of its real tokens, float32; None: only latents are stored.
    """

    posterior: Callable[[list[Sample]], tuple[Tensor, Tensor]]
    features: Callable[[list[str]], list[Tensor]] | None


class Job:
    """The work on one source.

    Args:
        folder: of the cache.
        settings: of the cache, whose ``samples`` and views are those of the source.
        batch_size: images that are encoded at once.
        threads: that read images ahead.
        max_broken: how many samples may be broken: below 1 a share, else a number.

    Raises:
        ConfigurationError: the source has random crops, or there is a cache of other settings in the folder.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        encoders: Encoders,
        settings: CacheSettings,
        batch_size: int = 8,
        threads: int = 4,
        max_broken: float = 0.01,
    ):
        self.source, self.folder, self.encoders, self.settings = source, folder, encoders, settings
        self.batch_size = whole_number("the batch size", batch_size, error=ConfigurationError)
        self.threads = whole_number("threads", threads, error=ConfigurationError)
        self.faults = Faults(str(folder), max_broken, settings.samples)
        self.dtype = DTYPES[settings.dtype]
        self.buckets = Buckets(tuple((h, w) for h, w in settings.sizes), settings.max_upscale, settings.max_crop)
        sizes = np.array([source.size(i) for i in range(len(source))], np.int64).reshape(-1, 2)
        self._bins, _ = self.buckets.assign(sizes)
        self._sorted = np.lexsort((np.arange(len(sizes)), self._bins))
        self.chunks = -(-len(sizes) // settings.chunk)
        make_folder(folder)
        if (folder / SETTINGS).exists():
            different = read_settings(folder).differences(settings)
            if different:
                raise ConfigurationError(
                    f"{folder} is a cache with another {' and '.join(different)}; choose another folder, or delete it"
                )
        else:
            write_file(folder / SETTINGS, settings.text())

    def missing(self, shard: tuple[int, int] = (1, 1)) -> list[int]:
        """The chunks that are not there yet, of those of process i of N."""
        part, parts = shard
        done = self._done()
        return [n for n in range(part - 1, self.chunks, parts) if _file(n) not in done]

    def lacks_empty(self) -> bool:
        """Whether the features of the empty caption are not there yet."""
        return EMPTY not in self._done()

    def _done(self) -> set[str]:
        return {line["file"] for line in read_index(self.folder) if (self.folder / line["file"]).is_file()}

    def samples(self, chunks: Iterable[int]) -> int:
        """How many samples chunks have."""
        size = self.settings.chunk
        return sum(min(size, self.settings.samples - number * size) for number in chunks)

    def write_empty(self) -> str:
        """Write the features of the empty caption, if texts are stored, and return their line of the index."""
        features = self.encoders.features
        return self._write(EMPTY, {} if features is None else {"text": features([""])[0]}, [])

    def write_chunk(self, number: int) -> str:
        """Encode and write a chunk, and return its line of the index.

        Raises:
            InputError: too many samples are broken.
            OutputError: the disk is full, or the folder cannot be written.
        """
        chunk = self.settings.chunk
        indices = self._sorted[number * chunk : (number + 1) * chunk].tolist()
        tensors: dict[str, Tensor] = {}
        records: dict[int, dict[str, Any]] = {index: self._record(index) for index in indices}
        # One thread pool reads the next images while these are encoded.
        with ThreadPoolExecutor(self.threads, "read") as threads:
            read = threads.map(self._read, [index for index in indices if self._bins[index] >= 0])
            for _, group in groupby(_flat(read), key=lambda view: self._bins[view[0]]):
                for batch in _batches(group, self.batch_size):
                    self._encode(batch, records, tensors)
        captions = dict.fromkeys(c for record in records.values() for texts in record["captions"] for c in texts)
        if self.encoders.features is not None:
            for texts in _batches(captions, 8 * self.batch_size):
                for caption, features in zip(texts, self.encoders.features(texts)):
                    tensors[text_key(caption)] = features
        return self._write(_file(number), tensors, list(records.values()))

    def _record(self, index: int) -> dict[str, Any]:
        bucket = list(self.buckets.sizes[self._bins[index]]) if self._bins[index] >= 0 else None
        record = {"index": index, "size": list(self.source.size(index)), "bucket": bucket, "crops": []}
        captions = captions_of_sample(self.source, index) or Captions()
        name = name_of(self.source, index) or str(index)
        return record | {"name": name, "captions": [captions.short, captions.long]}

    def _read(self, index: int) -> tuple[int, list[Sample] | str]:
        """All views of a sample, or why it is broken."""
        target = self.buckets.sizes[self._bins[index]]
        try:
            if not isinstance(self.source, ImageSource):
                return index, [self.source.read(index, target, reading_generator(0, 0, index))]
            name, views = self.source.name(index), self.source.reading.views
            assert views.count is not None
            return index, [self.source.read_view(index, target, views.view(name, n), None) for n in range(views.count)]
        except InputError as error:
            return index, str(error)

    def _encode(
        self,
        batch: list[tuple[int, int, Sample | str]],
        records: dict[int, dict[str, Any]],
        tensors: dict[str, Tensor],
    ) -> None:
        for index, _, view in batch:
            if isinstance(view, str):
                records[index]["broken"] = view
                self.faults.add(records[index]["name"], view)
        good = [(index, number, view) for index, number, view in batch if not isinstance(view, str)]
        if not good:
            return
        means, deviations = self.encoders.posterior([sample for _, _, sample in good])
        for (index, number, sample), mean, deviation in zip(good, means, deviations):
            prefix = f"{index}.{number}."
            records[index]["crops"].append(list(sample.crop))
            tensors |= {f"{prefix}mean": mean, f"{prefix}std": deviation}
            if sample.loss_mask is not None:
                tensors[f"{prefix}mask"] = (sample.loss_mask * 255).round().byte()
            if sample.labels is not None:
                tensors[f"{prefix}labels"] = sample.labels
            tensors |= {f"{prefix}extra.{name}": value for name, value in sample.extra.items()}
            if not isinstance(self.source, ImageSource):
                records[index]["weight"] = sample.weight
                if captions_of_sample(self.source, index) is None:
                    records[index]["captions"] = [[sample.caption] if sample.caption else [], []]

    def _write(self, name: str, tensors: dict[str, Tensor], samples: list[dict[str, Any]]) -> str:
        stored = {key: _stored(value, self.dtype) for key, value in sorted(tensors.items())}
        content = safetensors.torch.save(stored)
        write_file(self.folder / name, content)
        checksum = hashlib.sha256(content).hexdigest()
        return json.dumps({"file": name, "sha256": checksum, "samples": samples}, ensure_ascii=True)


def settings_for(source: Source, buckets: Buckets, **values: Any) -> CacheSettings:
    """The settings of a cache of a source.

    Raises:
        ConfigurationError: its crops are random.
    """
    views = source.reading.views if isinstance(source, ImageSource) else Views()
    if views.count is None:
        raise ConfigurationError(RANDOM_CROPS)
    if values.get("dtype", "float32") not in DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(values['dtype'])}")
    return CacheSettings(
        samples=len(source),
        sizes=[list(size) for size in buckets.sizes],
        max_upscale=buckets.max_upscale,
        max_crop=buckets.max_crop,
        crop=views.crop,
        flip=views.flip,
        **values,
    )


def run(
    job: Job, shard: tuple[int, int] = (1, 1), done: Callable[[int], None] = lambda samples: None
) -> dict[str, int]:
    """Write what is missing of process i of N, and count chunks (skipped, written) and broken samples.

    Args:
        shard: (i, N), from (1, 1) to (N, N).
        done: called with the number of samples after each chunk.
    """
    part, parts = shard
    if not 1 <= part <= parts:
        raise ConfigurationError(f"the shard {part}/{parts} does not exist; of {parts}, there are 1 to {parts}")
    index = job.folder / f"index-{part}-of-{parts}.jsonl"
    missing = job.missing(shard)
    counts = {"skipped": len(range(part - 1, job.chunks, parts)) - len(missing), "written": 0, "broken": 0}
    if job.lacks_empty():
        append_line(index, job.write_empty())
    for number in missing:
        append_line(index, job.write_chunk(number))
        counts["written"] += 1
        done(job.samples([number]))
    counts["broken"] = len(job.faults)
    return counts


def _file(number: int) -> str:
    return f"chunk-{number:06d}.safetensors"


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()


def _flat(read: Iterable[tuple[int, list[Sample] | str]]) -> Iterator[tuple[int, int, Sample | str]]:
    """(index, number of the view, view) of each view; a broken sample is one."""
    for index, views in read:
        if isinstance(views, str):
            yield index, 0, views
        else:
            yield from ((index, number, view) for number, view in enumerate(views))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
