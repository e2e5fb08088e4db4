"""``parallelize``: one image on several processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ...checks import whole_number
from ...errors import ConfigurationError, InputError
from ...models.glm_image.model import GlmImageTransformer2DModel
from ...models.pixart.model import PixArtTransformer2DModel
from ...nn.changes import Handle, is_compiled, refuse_conflicts, unwrapped
from .guidance import PartOfRows
from .partition import Group
from .sequence import SequenceParallel


def parallelize(target: Any, *, guidance: bool | None = None, sequence: int | None = None) -> Parallel:
    """Let the processes of ``torchrun`` compute every step of a generation together.

    Every process has the whole model and makes the same calls, with the same arguments and seeds; each gets the same
    images. The latents are those of rank 0.

    - Guidance-parallel: half of the processes compute the rows with the prompt, the others those with the negative
      prompt. It exchanges one prediction a step.
    - Sequence-parallel (DeepSpeed-Ulysses, 2309.14509): each process has a part of the tokens of every image, and in
      self-attention a part of the heads. It exchanges all tokens twice in each layer. Batches of images of several
      sizes are divided in the same way.

    Both can be combined: 4 processes are 2 halves of guidance times 2 parts of the tokens.

    Args:
        target: a pipeline, or a transformer of PixArt or GLM-Image.
        guidance: whether the rows of a batch are divided between two halves of the processes. By default they are if
            ``target`` is a pipeline, the number of processes is even, and ``sequence`` leaves room for it.
        sequence: the number of parts of the tokens; by default all processes that guidance leaves.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: neither a pipeline with such a transformer nor one.
        ConfigurationError: the processes have not been joined; their number is not guidance times sequence; the heads
            of the attention are not divisible by ``sequence``; or another change of the transformer is in the way:
            step caching, compilation, attention processors or compressed keys. Nothing has been changed then.
    """
    transformer = unwrapped(getattr(target, "transformer", target))
    if not isinstance(transformer, PixArtTransformer2DModel | GlmImageTransformer2DModel):
        raise InputError(
            f"parallelize takes a pipeline of PixArt or GLM-Image or its transformer, not {type(target).__name__}"
        )
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigurationError(
            "the processes are not joined: start them with torchrun, and call torch.distributed.init_process_group()"
        )
    count = dist.get_world_size()
    if sequence is not None:
        sequence = whole_number("parallelize: sequence", sequence, error=ConfigurationError)
    if guidance is None:
        guidance = target is not transformer and count % 2 == 0 and sequence in (None, count // 2)
    halves = 2 if guidance else 1
    sequence = max(1, count // halves) if sequence is None else sequence
    if halves * sequence != count:
        raise ConfigurationError(
            f"guidance={guidance} and sequence={sequence} need {halves * sequence} processes, and there are {count}"
        )
    if getattr(target, "step_cache", None) is not None or getattr(transformer, "step_cache", None) is not None:
        raise ConfigurationError("a pipeline that caches steps cannot be parallel; remove() the cache first")
    if getattr(target, "compiled", None) is not None or transformer is not getattr(target, "transformer", target):
        raise ConfigurationError("a compiled pipeline cannot be parallel; remove() the handle of pipe.compile() first")
    blocks: list[Any] = list(transformer.transformer_blocks)
    heads = blocks[0].attn1.heads
    if heads % sequence:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigurationError(
            f"the {heads} heads of the attention cannot be divided among {sequence} processes; sequence must be one of "
            f"{fitting}, and guidance=True takes twice as many processes"
        )
    if sequence > 1 and any(getattr(block.attn1, "kv_compression", None) is not None for block in blocks):
        raise ConfigurationError("a model that compresses keys cannot be sequence-parallel; use guidance=True alone")
    if sequence > 1 and any(block.attn1.is_processed for block in blocks):
        raise ConfigurationError("attention processors see all tokens of an image; call set_default_attn_processor()")
    if any(is_compiled(block) for block in blocks):
        raise ConfigurationError("the blocks are compiled, and cannot be parallel: parallelize plain ones")
    refuse_conflicts(transformer, PartOfRows)
    return Parallel(transformer, blocks, halves, sequence)


class Parallel(Handle):
    """The handle of ``parallelize``.

    Attributes:
        guidance, sequence: how many parts the rows, and the tokens of each image, are divided into.
    """

    def __init__(self, transformer: Any, blocks: list[Any], guidance: int, sequence: int):
        self.guidance, self.sequence = guidance, sequence
        rank, ranks = dist.get_rank(), range(guidance * sequence)
        # Every process has to make all groups, in the same order.
        of_rows = [[r for r in ranks if r % sequence == part] for part in range(sequence)]
        of_tokens = [[r for r in ranks if r // sequence == half] for half in range(guidance)]
        rows, tokens = (_own_group(groups, rank) for groups in (of_rows, of_tokens))
        self._tokens = SequenceParallel(blocks, tokens) if sequence > 1 else None
        self._rows = PartOfRows(transformer, rows, sequence)

    def remove(self) -> None:
        """Let each process compute everything by itself."""
        self._rows.remove()
        if self._tokens is not None:
            self._tokens.remove()


def _own_group(groups: list[list[int]], rank: int) -> Group:
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    (own,) = [(ranks, group) for ranks, group in made if rank in ranks]
    return Group(own[1], own[0].index(rank), len(own[0]))
