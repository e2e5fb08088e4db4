"""Methods that differ between families in nothing but their default values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def with_defaults(method: F, **defaults: Any) -> F:
    """A copy of the method with other default values."""
    plain = cast(FunctionType, method)
    values = [
        defaults.get(name, parameter.default)
        for name, parameter in inspect.signature(plain).parameters.items()
        if parameter.default is not parameter.empty
    ]
    copy = FunctionType(plain.__code__, plain.__globals__, plain.__name__, tuple(values), plain.__closure__)
    copy.__doc__, copy.__annotations__ = plain.__doc__, plain.__annotations__
    copy.__qualname__, copy.__module__ = plain.__qualname__, plain.__module__
    return cast(F, copy)
