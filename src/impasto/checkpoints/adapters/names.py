"""The names of layers in adapter files <-> ours.

The original code joins the projections of one input, so one of its layers may be several of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..original.names import PIXART

#: The original PixArt code's names of layers -> ours; N is the number of a block.
ORIGINAL: Mapping[str, tuple[str, ...]] = {
    theirs.replace("{}", "N"): tuple(name.replace("{}", "N") for name in ours) for theirs, ours in PIXART.rows
}


class Dialect(NamedTuple):
    """How the names of a file begin, and what follows."""

    prefix: str
    component: str | None  # of the pipeline; None: whichever has layers of these names
    written_by: str
    alpha: float | None = None  # where the file has none; None: the rank


#: The longest prefix that fits a name counts.
DIALECTS = (
    Dialect("base_model.model.", None, "peft"),
    Dialect("unet.base_model.model.", "transformer", "the original PixArt scripts", alpha=8.0),
    Dialect("transformer.base_model.model.", "transformer", "peft"),
    Dialect("transformer.", "transformer", "diffusers, Impasto or OneTrainer"),
    Dialect("text_encoder.", "text_encoder", "diffusers or Impasto"),
    Dialect("lora_transformer_", "transformer", "OneTrainer (legacy)"),
    Dialect("lora_te_", "text_encoder", "OneTrainer (legacy)"),
    Dialect("lora_unet_", "transformer", "OneTrainer (kohya)"),
    Dialect("lora_te1_", "text_encoder", "OneTrainer (kohya)"),
    Dialect("diffusion_model.", "transformer", "ComfyUI or OneTrainer (comfy)"),
    Dialect("text_encoders.t5xxl.transformer.", "text_encoder", "OneTrainer (comfy)"),
    Dialect("lycoris_", "transformer", "LyCORIS, such as SimpleTuner"),
    Dialect("", None, "OneTrainer (original) or a model's own method"),
)


def dialect_of(name: str) -> Dialect:
    """The dialect of the name of a tensor."""
    return max((d for d in DIALECTS if name.startswith(d.prefix)), key=lambda dialect: len(dialect.prefix))


class Names:
    """The names that files may give the layers of a model."""

    def __init__(self, layers: Iterable[str]):
        self._found: dict[str, tuple[str, ...]] = {}
        own = set(layers)
        for name in own:
            for known in (name, _flat(name)):
                self._found[known] = (name,)
        numbers = {match[1] for name in own if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
        for original, ours in ORIGINAL.items():
            for number in numbers if "blocks.N." in original else ("",):
                targets = tuple(name.replace(".N.", f".{number}.") for name in ours)
                if all(name in own for name in targets):
                    numbered = original.replace(".N.", f".{number}.")
                    for known in (numbered, _flat(numbered)):
                        self._found[known] = targets

    def find(self, name: str) -> tuple[str, ...] | None:
        """Our layers for a name in a file, without its prefix; None if the model has none of it."""
        return self._found.get(name)


def _flat(name: str) -> str:
    return name.replace(".", "_")
