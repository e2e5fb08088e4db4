"""Dense captions of a folder of images by a vision-language model, written into its ``metadata.jsonl``.

Finished captions are appended to ``captions.partial.jsonl``. When all are there, they are merged into
``metadata.jsonl`` in one write, with the captions that were there before; so a killed job goes on, and leaves no half
file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...checkpoints.foreign.errors import translated
from ...checks import MAX_CHARACTERS, shown, whole_number
from ...errors import ConfigurationError, InputError
from ...files import append_line, write_file
from ...pipelines.image_files import open_image
from ..data.faults import Faults
from ..data.listing import METADATA, Entry, list_folder, read_records, unlisted, with_text

PARTIAL = "captions.partial.jsonl"
PROMPT = (
    "Describe this image in one paragraph for someone who cannot see it: the subjects, their colors, materials and "
    "positions, the background, the lighting, and the style. Do not guess what cannot be seen."
)
_MOST_PIXELS = 1 << 21  # of what the model is shown: more would only be slower


@dataclass(frozen=True)
class Captioner:
    """A vision-language model that captions images.

    Attributes:
        model, processor: of transformers.
        prompt: what the model is asked.
        max_tokens: of a caption.
    """

    model: Any
    processor: Any
    prompt: str = PROMPT
    max_tokens: int = 300

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption of each image, without random choices."""
        with translated("a captioner", Path(str(self.model.config.name_or_path or "the model")), done="used"):
            self.processor.tokenizer.padding_side = "left"
            inputs = self.processor(
                text=[self._text()] * len(images),
                images=[[image] for image in images],
                padding=True,
                return_tensors="pt",
            ).to(self.model.device)
            inputs = {name: _cast(value, self.model.dtype) for name, value in inputs.items()}
            tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
            new = tokens if self.model.config.is_encoder_decoder else tokens[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [" ".join(text.split())[:MAX_CHARACTERS] for text in texts]

    def _text(self) -> str:
        """The prompt in the form of the model's chats, if it has one."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return f"{getattr(self.processor, 'image_token', '')}{self.prompt}"


def caption_folder(
    folder: Path,
    caption: Callable[[Sequence[Image.Image]], Sequence[str]],
    *,
    settings: dict[str, Any],
    field: str = "dense",
    overwrite: bool = False,
    mask_suffix: str | None = None,
    batch_size: int = 4,
    max_broken: float = 0.01,
    done: Callable[[int], None] = lambda images: None,
) -> dict[str, int]:
    """Caption the images of a folder that have no caption in ``field`` yet.

    Args:
        caption: images -> a caption of each.
        settings: what captions depend on; a job goes on only with the same.
        overwrite: caption all images, and replace what ``field`` has.
        done: called with the number of images after each batch.

    Returns:
        The numbers of images that were ``captioned``, ``kept`` as they had captions, and ``broken``.

    Raises:
        InputError: no images, metadata that cannot be read, or too many broken images.
        ConfigurationError: an unfinished job of other settings.
        OutputError: the folder cannot be written, or the disk is full.
    """
    whole_number("the batch size", batch_size, error=ConfigurationError)
    records = records_of(folder, mask_suffix)
    names = [name for name, record in records.items() if overwrite or not record.get(field)]
    partial = folder / PARTIAL
    finished = _read_partial(partial, {**settings, "field": field})
    faults = Faults(str(folder), max_broken, len(records))
    waiting = [name for name in names if name not in finished]
    done(len(names) - len(waiting))
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        images: dict[str, Image.Image] = {}
        for name in batch:
            try:
                images[name] = _reduced(open_image(folder / name))
            except InputError as error:
                faults.add(name, str(error))
        for name, text in zip(images, caption(list(images.values())) if images else ()):
            if not text.strip():
                faults.add(name, "the model wrote nothing")
                continue
            append_line(partial, json.dumps({"file_name": name, field: text}))
            finished[name] = text
        done(len(batch))
    for name in names:
        if name in finished:
            records[name][field] = finished[name]
    write_file(folder / METADATA, "".join(f"{_line(record)}\n" for record in records.values()))
    partial.unlink(missing_ok=True)
    captioned = sum(name in finished for name in names)
    return {"captioned": captioned, "kept": len(records) - len(names), "broken": len(faults)}


def records_of(folder: Path, mask_suffix: str | None = None) -> dict[str, dict[str, Any]]:
    """The records of a folder's ``metadata.jsonl``, and new ones of other images, with the captions found elsewhere.

    Returns:
        them by the names of ``list_folder``.
    """
    entries = list_folder(folder, mask_suffix=mask_suffix)
    new = [with_text(folder, name) for name in unlisted(folder, entries, mask_suffix)]
    if (folder / METADATA).is_file():
        listed = zip(entries, read_records(folder / METADATA), strict=True)
        records = {entry.name: record for entry, record in listed}  # whose names may be written in other ways
    else:
        records = {entry.name: _record(entry) for entry in entries}
    return records | {entry.name: _record(entry) for entry in new}


def _line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, readable unless a file's name is not valid UTF-8, which only escapes can express."""
    line = json.dumps(record, ensure_ascii=False)
    return json.dumps(record) if any("\ud800" <= character <= "\udfff" for character in line) else line


def _record(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"file_name": entry.name}
    if entry.captions.short:
        found["texts"] = list(entry.captions.short)
    if entry.captions.long:
        found["sharegpt4v"] = list(entry.captions.long)
    return found


def _read_partial(path: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The finished captions of a job that was killed; a first line with the settings is written to a new file."""
    if not path.is_file():
        append_line(path, json.dumps({"settings": settings}))
        return {}
    finished: dict[str, str] = {}
    lines = path.read_bytes().split(b"\n")[:-1]  # a last one that was not written to its end does not count
    if not lines:
        append_line(path, json.dumps({"settings": settings}))
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            if number == 0:
                if record["settings"] != settings:
                    raise ConfigurationError(
                        f"{path} is an unfinished job with other settings: {shown(record['settings'], 300)}; finish it "
                        f"with these, or delete it"
                    )
            else:
                finished[str(record["file_name"])] = str(record[settings["field"]])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise InputError(f"{path}, line {number + 1}, is damaged; remove it, or delete the file") from error
    return finished


def _reduced(image: Image.Image) -> Image.Image:
    scale = (_MOST_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
