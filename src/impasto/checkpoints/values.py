"""Checks of config values by the types of constructor arguments: ``num_layers: Count = 28``.

Types are ``int``, ``float``, ``bool``, ``str``, ``Sequence``, ``Literal`` and ``None``; ``Annotated`` adds bounds.
Numbers must be finite; booleans and strings do not count as numbers. The default of an argument is always allowed, so
it may be ``-inf``.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from ..checks import finite, flag, shown, whole_number
from ..errors import ConfigurationError


class Bounds(NamedTuple):
    """Bounds of a number, or of the length of a sequence."""

    least: float
    most: float
    above: float | None = None


MOST_CHANNELS = 65_536
#: Layers, heads, channels, pixels.
Count = Annotated[int, Bounds(1, MOST_CHANNELS)]
#: The width of each level of a pyramid, each with half the resolution of the previous one.
Levels = Annotated[Sequence[Count], Bounds(1, 16)]
Patch = Annotated[int, Bounds(1, 64)]
#: Training steps, for which tables are made.
Steps = Annotated[int, Bounds(2, 100_000)]
Offset = Annotated[int, Bounds(0, 100_000)]
Tokens = Annotated[int, Bounds(1, 2**24)]
Share = Annotated[float, Bounds(0, 1)]
Epsilon = Annotated[float, Bounds(0, 1, above=0)]
#: Factors and divisors of latents and positions.
Scale = Annotated[float, Bounds(1e-6, 1e6)]
Shift = Annotated[float, Bounds(-1e6, 1e6)]
#: Exponents of e in the shifts of schedules.
Exponent = Annotated[float, Bounds(-20, 20)]

_INT = Bounds(-(2**31), 2**31 - 1)
_FLOAT = Bounds(-math.inf, math.inf)
_LENGTH = Bounds(0, 100_000)


def check_arguments(owner: str, arguments: Mapping[str, Any], init: Any) -> dict[str, Any]:
    """The arguments of a constructor as plain values, with tuples as lists.

    Raises:
        ConfigurationError: one does not match its type; the message names ``owner`` and the argument.
    """
    hints = _hints(init)
    defaults = dict(zip(reversed(list(arguments)), reversed(init.__defaults__ or ()), strict=False))
    checked = {}
    for name, value in arguments.items():
        default = defaults.get(name)
        is_default = type(value) is type(default) and value == default
        found = value if is_default else check(f"{owner}: {name}", value, hints.get(name, Any))
        checked[name] = _as_written(value, found)
    return checked


def _as_written(value: Any, found: Any) -> Any:
    """The checked value, but an int if an int was given for a float, so that a config is saved unchanged."""
    if isinstance(found, list | tuple):
        return [_as_written(*pair) for pair in zip(value, found, strict=True)]
    return value if type(value) is int else found


@functools.cache
def _hints(init: Any) -> dict[str, Any]:
    return typing.get_type_hints(init, include_extras=True)


def check(name: str, value: Any, hint: Any) -> Any:
    """``value`` as a plain value of type ``hint``; ConfigurationError if it has another type."""
    bounds = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        return _check_union(name, value, typing.get_args(hint))
    if kind is Literal:
        if not any(isinstance(value, type(option)) and value == option for option in typing.get_args(hint)):
            allowed = ", ".join(map(repr, typing.get_args(hint)))
            raise ConfigurationError(f"{name} must be one of {allowed}, not {shown(value)}")
        return value
    if kind is bool:
        return flag(name, value, error=ConfigurationError)
    if kind is int:
        least, most, _ = bounds or _INT
        return whole_number(name, value, int(least), int(most), error=ConfigurationError)
    if kind is float:
        least, most, above = bounds or _FLOAT
        return finite(name, value, least, most, above=above, error=ConfigurationError)
    if kind is str:
        if not isinstance(value, str):
            raise ConfigurationError(f"{name} must be a string, not {shown(value)}")
        return value
    if isinstance(kind, type) and issubclass(kind, Sequence):
        least, most, _ = bounds or _LENGTH
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise ConfigurationError(f"{name} must be a list of {least:g} to {most:g} values, not {shown(value)}")
        item = typing.get_args(hint)[0]
        return [check(f"{name}[{i}]", entry, item) for i, entry in enumerate(value)]
    return value


def _check_union(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    lists = [option for option in kinds if typing.get_origin(option) is Sequence]
    return check(name, value, lists[0] if lists and isinstance(value, list | tuple) else kinds[0])
