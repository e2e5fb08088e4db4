"""Guidance-parallel: each process computes some rows of a batch, such as one of the two halves of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.glm_image.context import GlmImageContext, GlmImageModulation, GlmImageReferences
from ...models.pixart.text import Modulation, PixArtContext
from ...nn.changes import CALL, Change, of, unwrapped
from ...nn.outputs import Transformer2DModelOutput
from .partition import Group, check_lengths
from .sequence import CHANGE, UNDO


class PartOfRows(Change):
    """What is called in place of a transformer: the transformer, on some rows of the batch.

    All processes compute with the latents of rank 0, so that they cannot drift apart.

    Args:
        group: the processes among which the rows are divided.
        parts: into how many parts the tokens of each image are divided.
    """

    change = CHANGE
    undo = UNDO
    conflicts: ClassVar = (CHANGE, "cached", "compiled")  # of the transformer, and of the blocks inside

    def __init__(self, transformer: nn.Module, group: Group, parts: int = 1):
        self.transformer, self.group, self.parts = transformer, group, parts
        self.put(transformer, CALL)

    def remove(self) -> None:
        self.take(self.transformer, CALL)

    def __call__(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        encoder_hidden_states: Any = None,
        *args: Any,
        timestep: Any = None,
        kv_caches: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        call = self.before or self.transformer._call_impl
        latents: Any = _of_rank_0(hidden_states)
        count, rows = self.group.count, len(latents)
        made = isinstance(encoder_hidden_states, PixArtContext | GlmImageContext)
        made &= isinstance(timestep, Modulation | GlmImageModulation)
        made &= kv_caches is None or isinstance(kv_caches, GlmImageReferences)
        references = {} if kv_caches is None else {"kv_caches": kv_caches}
        if count == 1 or rows < count or not made or args or any(value is not None for value in kwargs.values()):
            more = {**references, **kwargs}  # without what may be among args
            if timestep is not None:
                more["timestep"] = timestep
            if not return_dict:
                more["return_dict"] = False
            return call(latents, encoder_hidden_states, *args, **more)
        patch = self.transformer.config["patch_size"]
        # All rows, not this process's alone: an error in one half would leave the other one waiting.
        check_lengths([x.shape[-2] // patch * (x.shape[-1] // patch) for x in latents], self.parts)
        bounds = [rows * rank // count for rank in range(count + 1)]
        own = slice(bounds[self.group.rank], bounds[self.group.rank + 1])
        if kv_caches is not None:
            references = {"kv_caches": kv_caches.for_batch(rows).select(own)}
        steps = timestep.embedded if isinstance(timestep, GlmImageModulation) else timestep.timestep
        found = call(
            latents[own],
            encoder_hidden_states.select(own),
            timestep=timestep if len(steps) == 1 else timestep.select(own),
            return_dict=False,
            **references,
        )[0]
        output = self._gathered(found, latents, bounds)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _gathered(self, found: Any, latents: Any, bounds: list[int]) -> Any:
        """The outputs of all rows, from those of this process's."""
        shapes = [(found[0].shape[0], *image.shape[1:]) for image in latents]
        numbers = [torch.Size(shape).numel() for shape in shapes]
        sizes = [sum(numbers[first:last]) for first, last in pairwise(bounds)]
        flat = torch.cat([image.flatten() for image in found])
        images = torch.cat(self.group.gather(flat, sizes)).split(numbers)
        outputs = [image.view(shape) for image, shape in zip(images, shapes, strict=True)]
        return torch.stack(outputs) if isinstance(latents, Tensor) else outputs


def agreed(transformer: nn.Module, x: Tensor) -> Tensor:
    """The values of rank 0 if a transformer is parallel, so that all processes continue with the same ones."""
    parallel = any(isinstance(change, PartOfRows) for change in of(unwrapped(transformer)))
    return _of_rank_0(x) if parallel else x  # type: ignore[return-value]


def _of_rank_0(latents: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    images = [latents] if isinstance(latents, Tensor) else list(latents)
    flat = torch.cat([image.flatten() for image in images])
    dist.broadcast(flat, src=0)
    parts = [part.view(image.shape) for part, image in zip(flat.split([x.numel() for x in images]), images)]
    return parts[0] if isinstance(latents, Tensor) else parts
