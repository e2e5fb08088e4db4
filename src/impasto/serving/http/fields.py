"""The fields of a request: one description each, from which they are read and documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...checks import finite, nearest, shown, text, whole_number
from ...errors import InputError
from .errors import ApiError

Schema = dict[str, Any]

#: Commas and opening brackets of JSON: each value takes 25 times its size, and base64, which may be long, has none.
MOST_VALUES = 100_000


class Kind:
    """What values a field takes."""

    def schema(self) -> Schema:
        """As JSON schema."""
        raise NotImplementedError

    def read(self, name: str, value: Any) -> Any:
        """The value, checked. Raises InputError."""
        raise NotImplementedError

    def from_text(self, name: str, value: str) -> Any:
        """The value of a form, where all are text."""
        return self.read(name, value)


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number."""

    least: int
    most: int

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}

    def read(self, name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():  # JSON does not distinguish 2 and 2.0
            value = int(value)
        return whole_number(name, value, self.least, self.most)

    def from_text(self, name: str, value: str) -> int:
        is_number = re.fullmatch(r"[+-]?[0-9]{1,20}", value.strip())
        return self.read(name, int(value) if is_number else value)


@dataclass(frozen=True)
class Number(Kind):
    """A finite number."""

    least: float
    most: float
    above: float | None = None

    def schema(self) -> Schema:
        least = {"minimum": self.least} if self.above is None else {"exclusiveMinimum": self.above}
        return {"type": "number", **least, "maximum": self.most}

    def read(self, name: str, value: Any) -> float:
        return finite(name, value, self.least, self.most, above=self.above)

    def from_text(self, name: str, value: str) -> float:
        try:
            return self.read(name, float(value) if len(value) < 50 else value)
        except ValueError as error:
            raise error if isinstance(error, InputError) else InputError(f"{name} must be a number") from error


@dataclass(frozen=True)
class Text(Kind):
    """A text; if it must say something, not of spaces alone."""

    most: int
    required: bool = False

    def schema(self) -> Schema:
        found: Schema = {"type": "string", "maxLength": self.most}
        # Python's spaces include some control characters, which those of other languages do not.
        return found | ({"minLength": 1, "pattern": r"[^\s\x1c-\x1f]"} if self.required else {})

    def read(self, name: str, value: Any) -> str:
        found = text(name, value, self.most)
        if self.required and not found.strip():
            raise InputError(f"{name} is empty")
        return found


@dataclass(frozen=True)
class OneOf(Kind):
    """A name of a list."""

    names: tuple[str, ...]
    hint: str = ""  # for errors: how to get another one

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.names)}

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names:
            hint = nearest(value, self.names) or self.hint
            raise InputError(f"{name} must be one of {', '.join(self.names)}, not {shown(value)}{hint}")
        return value


@dataclass(frozen=True)
class Flag(Kind):
    """True or false."""

    def schema(self) -> Schema:
        return {"type": "boolean"}

    def read(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, not {shown(value)}")
        return value

    def from_text(self, name: str, value: str) -> bool:
        return self.read(name, {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value))


@dataclass(frozen=True)
class Size(Kind):
    """``WIDTHxHEIGHT`` or ``auto``, which is None."""

    most: int  # pixels of a side

    def schema(self) -> Schema:
        side = _up_to(self.most)
        return {"type": "string", "pattern": f"^(auto|{side}x{side})$", "examples": ["auto", "256x256"]}

    def read(self, name: str, value: Any) -> tuple[int, int] | None:
        if value == "auto":
            return None
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value) if isinstance(value, str) else None
        if found is None:
            raise InputError(f"{name} must be auto or like 1024x1024 (width x height in pixels), not {shown(value)}")
        width, height = int(found[1]), int(found[2])
        for side in (width, height):
            whole_number(f"a side of {name}", side, 1, self.most)
        return width, height


@dataclass(frozen=True)
class Adapters(Kind):
    """A list of served adapters with their weights."""

    names: tuple[str, ...]
    most: int = 4

    def schema(self) -> Schema:
        if not self.names:
            return {"type": "array", "maxItems": 0}
        item = {
            "type": "object",
            "properties": {"name": OneOf(self.names).schema(), "weight": Number(-10, 10).schema()},
            "required": ["name"],
            "additionalProperties": False,
        }
        return {"type": "array", "items": item, "maxItems": self.most}

    def read(self, name: str, value: Any) -> list[tuple[str, float]]:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise InputError(f'{name} must be a list like [{{"name": "style", "weight": 0.8}}], not {shown(value)}')
        if value and not self.names:
            raise InputError(f"{name}: this server serves no adapters; start it with --lora NAME=FILE")
        if len(value) > self.most:
            raise InputError(f"{name} has {len(value)} adapters; at most {self.most} can be combined")
        found = []
        for item in value:
            unknown = set(item) - {"name", "weight"}
            if unknown or "name" not in item:
                raise InputError(f"{name}: an adapter has a name and perhaps a weight, not {shown(item)}")
            chosen = OneOf(self.names).read(f"{name}: name", item["name"])
            found.append((chosen, Number(-10, 10).read(f"{name}: weight", item.get("weight", 1.0))))
        return found

    def from_text(self, name: str, value: str) -> list[tuple[str, float]]:
        return self.read(name, parse_json(value.encode("utf-8", "replace"), name) if value.strip() else [])


def read_fields(fields: Mapping[str, Kind], given: Mapping[str, Any], *, texts: bool = False) -> dict[str, Any]:
    """The values of a request, checked. What is null or not given is left out.

    Args:
        texts: whether any value may be given as a text, as in forms.

    Raises:
        ApiError: an unknown field, or a value that cannot be used.
    """
    found = {}
    for name, value in given.items():
        kind = fields.get(name)
        if kind is None:
            raise unknown_field(name, fields)
        if value is None:
            continue
        try:
            found[name] = kind.from_text(name, value) if texts and isinstance(value, str) else kind.read(name, value)
        except InputError as error:
            raise ApiError(str(error), name, code="invalid_value") from error
    return found


#: What clients mean by the names that other interfaces have for these fields.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "width": "size, as in 256x256",
    "height": "size, as in 256x256",
    # OpenAI's client writes a list of objects into a form so:
    "lora[][name]": 'lora as a JSON text, as in [{"name": "style", "weight": 0.8}]',
    "lora[][weight]": 'lora as a JSON text, as in [{"name": "style", "weight": 0.8}]',
}


def unknown_field(name: str, fields: Iterable[str]) -> ApiError:
    """The error for a name that is none of these."""
    other = _OTHER_NAMES.get(name)
    hint = f"; did you mean {other}?" if other else nearest(name, fields)
    return ApiError(f"there is no field {shown(name)}{hint}", shown(name)[1:-1], code="unknown_parameter")


def parse_json(body: bytes, name: str = "the body") -> Any:
    """JSON as the standard has it: no NaN, no invalid Unicode, no depth without end, no more than ``MOST_VALUES``.

    Raises:
        InputError: it is something else.
    """
    values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if values > MOST_VALUES:
        raise InputError(f"{name} has {values:,} commas and opening brackets; at most {MOST_VALUES:,} are read")
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{name} is not JSON: {reason}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _up_to(most: int) -> str:
    """A regular expression of the numbers from 1 to ``most``."""
    digits, options = str(most), []
    if len(digits) > 1:
        options.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for i, digit in enumerate(digits):
        low, high = (1 if i == 0 else 0), int(digit) - (0 if i == len(digits) - 1 else 1)
        if high >= low:
            rest = len(digits) - i - 1
            options.append(f"{digits[:i]}[{low}-{high}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"({'|'.join(options)})"
