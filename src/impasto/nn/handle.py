"""What a function that changes a module or a pipeline from outside returns."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Handle:
    """``remove()`` undoes the change, and so does leaving the handle's ``with`` block."""

    def remove(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
