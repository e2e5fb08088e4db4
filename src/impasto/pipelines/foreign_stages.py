"""A transformer that is called with the documented tensors alone, with the interface of our three stages.

It is another library's, or ours with code of others around its calls. The last stage does all of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ForeignContext(NamedTuple):
    text: Tensor  # [B, M, channels]
    mask: Tensor  # [B, M]

    @classmethod
    def concat(cls, contexts: Sequence[ForeignContext]) -> ForeignContext:
        """With masked zeros after shorter texts."""
        longest = max(context.text.shape[1] for context in contexts)
        missing = [longest - context.text.shape[1] for context in contexts]
        return cls(
            torch.cat([F.pad(context.text, (0, 0, 0, more)) for context, more in zip(contexts, missing, strict=True)]),
            torch.cat([F.pad(context.mask, (0, more)) for context, more in zip(contexts, missing, strict=True)]),
        )


class ForeignModulation(NamedTuple):
    timesteps: Tensor  # [steps]
    conditions: Mapping[str, Tensor | None]  # [1, ...] each

    def select(self, rows: slice) -> ForeignModulation:
        return self._replace(timesteps=self.timesteps[rows])

    def of_batch(self, batch: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The timestep [B] and the conditions [B, ...] of one step."""
        conditions = {name: None if x is None else x.expand(batch, -1) for name, x in self.conditions.items()}
        return self.timesteps.expand(batch), conditions


class ForeignStages:
    """PixArt's.

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
        timesteps, conditions = timestep.of_batch(len(x))
        return self._call(
            x,
            encoder_hidden_states=encoder_hidden_states.text,
            encoder_attention_mask=encoder_hidden_states.mask,
            timestep=timesteps,
            added_cond_kwargs=conditions,
            return_dict=return_dict,
        )


class ForeignGlmImageContext(NamedTuple):
    text: Tensor  # [B, M, channels]
    mask: Tensor | None  # [B, M]
    prior: Tensor  # [B, N]
    drop: Tensor  # [B]


class ForeignGlmImageStages:
    """GLM-Image's, as ``ForeignStages``."""

    def __init__(self, transformer: Any, call: Callable[..., Any]):
        self.dtype: torch.dtype = transformer.dtype
        self._call = call

    def encode_context(
        self, text: Tensor, mask: Tensor | None, prior: Tensor, drop: Tensor, height: int, width: int
    ) -> ForeignGlmImageContext:
        return ForeignGlmImageContext(text, mask, prior, drop)

    def modulate(self, timesteps: Tensor, size: Tensor, crop: Tensor) -> ForeignModulation:
        return ForeignModulation(timesteps, {"target_size": size, "crop_coords": crop})

    def __call__(
        self,
        x: Tensor,
        encoder_hidden_states: ForeignGlmImageContext,
        timestep: ForeignModulation,
        return_dict: bool,
        kv_caches: Any = None,
    ) -> Any:
        timesteps, conditions = timestep.of_batch(len(x))
        text, mask, prior, drop = encoder_hidden_states
        return self._call(
            hidden_states=x,
            encoder_hidden_states=text,
            prior_token_id=prior,
            prior_token_drop=drop[:, None].expand_as(prior),
            timestep=timesteps,
            **conditions,
            attention_kwargs=None,
            return_dict=return_dict,
            kv_caches=kv_caches,
            **({} if mask is None else {"attention_mask": mask}),
        )
