"""What all routes of one server share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, ParamSpec, TypeVar

from ...checkpoints.adapters.file import AdapterDefaults
from ...checks import nearest, shown
from ...errors import CheckpointError
from ...pipelines.adapters import ChosenAdapter, adapter_defaults
from ..served import ServedModel
from ..service import Service
from .errors import ApiError
from .settings import HttpSettings
from .storage import Storage
from .uploads import longest_side

logger = logging.getLogger("impasto.serve")
P = ParamSpec("P")
T = TypeVar("T")


class Defaults(NamedTuple):
    """How to generate where a request does not say."""

    scheduler: str | None  # None: the model's own
    steps: int
    guidance_scale: float


@dataclass
class Context:
    """A service with its settings."""

    service: Service
    settings: HttpSettings
    storage: Storage | None = None
    #: Images that are decoded at the same time: each may need some hundred megabytes.
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    _defaults: dict[str, AdapterDefaults] = field(default_factory=dict)

    def model(self, name: str | None) -> ServedModel:
        """The model of this name or alias; the first one if there is no name. Raises ApiError (404)."""
        models, aliases = self.service.models, self.service.aliases
        if name is None:
            return next(iter(models.values()))
        found = models.get(aliases.get(name, name))
        if found is None:
            known = [*models, *aliases]
            raise ApiError(
                f"the model {shown(name)} is not served; there are {', '.join(known)}{nearest(name, known)}",
                "model",
                status=404,
                code="model_not_found",
            )
        return found

    def longest_side(self, model: ServedModel | None = None) -> int:
        """The longest side of an image, in pixels: of a model, or of any."""
        return max(longest_side(one) for one in ([model] if model else self.service.models.values()))

    def adapters(
        self, model: ServedModel, chosen: list[tuple[str, float]]
    ) -> tuple[tuple[ChosenAdapter, ...], Defaults]:
        """Adapters by their served names, which engines resolve, and how a model generates with them."""
        found = tuple(ChosenAdapter(name, weight) for name, weight in chosen)
        asked = AdapterDefaults.first(self.defaults_of(name) for name, _ in chosen)
        return found, Defaults(asked.scheduler if asked.scheduler in model.schedulers else None, *asked.numbers(model))

    def defaults_of(self, name: str) -> AdapterDefaults:
        """How an adapter of this served name asks to be used, whatever the model."""
        if name not in self._defaults:
            try:
                file = self.service.adapters[name]
                self._defaults[name] = adapter_defaults([ChosenAdapter(file)])
            except CheckpointError as error:  # reported when it is applied
                logger.warning("%s", error)
                self._defaults[name] = AdapterDefaults()
        return self._defaults[name]

    async def decode(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Work on images, in a thread."""
        async with self.decoding:
            return await asyncio.to_thread(work, *args, **kwargs)
