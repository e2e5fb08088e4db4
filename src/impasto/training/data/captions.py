"""The captions of an image: short ones by people, long ones by machines, and which of them a sample has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checks import MAX_CHARACTERS, shown, text
from ...errors import InputError

#: The fields of a record that hold captions: a string, or a list of strings.
SHORT_FIELDS = ("text", "caption", "prompt", "texts", "captions")
LONG_FIELDS = ("dense", "long_caption", "sharegpt4v")


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions of one image, without empty ones."""

    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.short or self.long)

    @property
    def all(self) -> tuple[str, ...]:
        """The short ones, then the long ones."""
        return self.short + self.long

    def choose(self, rng: np.random.Generator, real_prompt_ratio: float) -> str | None:
        """A short caption with probability ``real_prompt_ratio``, else a long one; if one is missing, the other.

        It always draws two numbers, so that what is drawn after them does not depend on the captions.
        """
        kind, which = rng.random(2)
        chosen = self.short if kind < real_prompt_ratio else self.long
        chosen = chosen or self.all
        return chosen[int(which * len(chosen))] if chosen else None


def captions_of(record: Mapping[str, Any]) -> Captions:
    """The captions in the fields of a record; other fields are ignored.

    Raises:
        InputError: a caption is not a text.
    """
    return Captions(_texts(record, SHORT_FIELDS), _texts(record, LONG_FIELDS))


def _texts(record: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        value = record.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for each in values:
            if not isinstance(each, str):
                raise InputError(f"{name} must be a text or a list of texts, not {shown(value)}")
            found.append(text(name, each, MAX_CHARACTERS).strip())
    return tuple(dict.fromkeys(each for each in found if each))
