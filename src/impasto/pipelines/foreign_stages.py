"""Another library's PixArt transformer, unchanged, with the interface of our three stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ForeignContext(NamedTuple):
    text: Tensor  # [B, M, channels]
    mask: Tensor  # [B, M]

    @classmethod
    def concat(cls, contexts: Sequence[ForeignContext]) -> ForeignContext:
        return cls(torch.cat([context.text for context in contexts]), torch.cat([context.mask for context in contexts]))


class ForeignModulation(NamedTuple):
    timesteps: Tensor  # [steps]
    conditions: Mapping[str, Tensor | None]  # [1, ...] each

    def select(self, rows: slice) -> ForeignModulation:
        return self._replace(timesteps=self.timesteps[rows])


class ForeignStages:
    """The last stage does all of the work.

    Args:
        call: the transformer, or what replays its captured graph.
    """

    def __init__(self, transformer: Any, call: Callable[..., Any]):
        self.dtype: torch.dtype = transformer.dtype
        self._call = call

    def encode_context(self, text: Tensor, mask: Tensor) -> ForeignContext:
        return ForeignContext(text, mask)

    def modulate(self, timesteps: Tensor, conditions: Mapping[str, Tensor | None]) -> ForeignModulation:
        return ForeignModulation(timesteps, conditions)

    def __call__(
        self, x: Tensor, encoder_hidden_states: ForeignContext, timestep: ForeignModulation, return_dict: bool
    ) -> Any:
        batch = len(x)
        return self._call(
            x,
            encoder_hidden_states=encoder_hidden_states.text,
            encoder_attention_mask=encoder_hidden_states.mask,
            timestep=timestep.timesteps.expand(batch),
            added_cond_kwargs={n: None if c is None else c.expand(batch, -1) for n, c in timestep.conditions.items()},
            return_dict=return_dict,
        )
