"""Feature caching: the residual of a denoiser's blocks changes little from step to step, so some steps reuse it.

The residual is what the blocks add to the tokens. A reused step skips the blocks and adds the last computed residual,
or one extrapolated from the last two. The patch embedding and the last layer always run: they cost little.

Shapes: B rows (two for each image with guidance), N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..checks import whole_number
from ..errors import ConfigurationError, InputError
from ..nn.changes import CALL, Change, Handle, of, refuse_conflicts, unwrapped

Method = Literal["first-block", "interval", "taylor"]
METHODS: tuple[str, ...] = get_args(Method)

#: Used if no value is given. ``benchmarks/lossy.py`` measures which value suits a model.
DEFAULT_THRESHOLD = 0.1
DEFAULT_INTERVAL = 2


def cache_steps(
    target: Any,
    method: Method = "first-block",
    *,
    threshold: float | None = None,
    interval: int | None = None,
    first: int = 1,
    last: int = 1,
) -> StepCache:
    """Let some steps of every generation reuse what the transformer's blocks computed in an earlier one.

    - ``"first-block"``: the first block always runs. If its residual differs from that of the last computed step
      by less than ``threshold`` (mean absolute difference over mean absolute value), the other blocks' residual is
      reused. The criterion is that of TeaCache (Liu et al. 2024, 2411.19108), which accumulates changes of the
      first block's modulated input, scaled by a polynomial fitted to each model. The first block's residual needs no
      fit, and is compared with the last computed step itself, so nothing is accumulated. Each step makes one
      decision for the whole batch, so an image depends slightly on the others in its batch. On a GPU the decision
      synchronizes with the device once a step.
    - ``"interval"``: one step in ``interval`` is computed, as in FORA (Selvaraju et al. 2024, 2407.01425). Instead of
      each layer's output, the residual of all blocks together is kept, as in Δ-DiT (Chen et al. 2024, 2406.01125):
      one tensor [B, N, D] instead of two for each block.
    - ``"taylor"``: the same steps are computed, and the residual of the others is linearly extrapolated from the last
      two computed ones: first-order TaylorSeer (Liu et al. 2025, 2503.06923).

    A cache lasts for one generation. Each denoising loop of the pipeline has its own, even if several loops take turns
    or run in threads. It starts empty, and is cleared when the shape, dtype or device of the tokens changes, when
    guidance begins or ends, and when the loop is given other embeddings. Calls of the model outside of a loop, and
    calls that record gradients, compute everything. Weights may be loaded and components assigned between
    generations: each one looks up the transformer and its blocks again.

    Works with blocks compiled one by one (``block.compile()``), which are skipped whole, but not with a model compiled
    as a whole, whose graph cannot skip anything.

    Args:
        target: a pipeline whose ``denoise`` is a denoising loop; or a transformer, whose generations are then marked
            by ``with cache.generation(steps): ...``.
        method: which steps are reused, and how; see above.
        threshold: for "first-block", 0.1 by default; at 0 everything is computed.
        interval: for the other methods, 2 by default; at 1 everything is computed.
        first, last: this many steps at the start and the end are always computed; ``first`` at least 1.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: an argument cannot be used, or the method does not have it.
        ConfigurationError: the transformer has no list of blocks or is compiled as a whole, or the steps of the
            pipeline are cached already.
    """
    if method not in METHODS:
        raise InputError(f"cache_steps: there is no method {method!r}; use one of {', '.join(METHODS)}")
    if method == "first-block":
        if interval is not None:
            raise InputError('cache_steps: "first-block" has no interval; give a threshold, or method="interval"')
        threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        if not isinstance(threshold, int | float) or not 0.0 <= threshold < float("inf"):
            raise InputError(f"cache_steps: threshold must be a number of 0 or more, not {threshold!r}")
    else:
        if threshold is not None:
            raise InputError(f'cache_steps: "{method}" has no threshold; give an interval, or method="first-block"')
        interval = whole_number("cache_steps: interval", DEFAULT_INTERVAL if interval is None else interval)
    first = whole_number("cache_steps: first", first)
    last = whole_number("cache_steps: last", last, 0)
    return StepCache(target, Rule(method, threshold or 0.0, interval or 1, first, last))


class Rule(NamedTuple):
    """Which steps are computed."""

    method: Method
    threshold: float
    interval: int
    first: int
    last: int


class Computed(NamedTuple):
    """What is kept of a computed step."""

    step: int  # its index in the generation
    residual: Tensor  # [B, N, D], of all blocks, or of all but the first
    first_residual: Tensor | None  # [B, N, D], of the first block, for "first-block"


class Memory:
    """What one generation keeps between its steps; empty at first.

    Args:
        count: how many calls of the model there will be; None if unknown.
    """

    def __init__(self, owner: StepCache, count: int | None):
        self.owner = owner
        self.others = 0  # how many results a block has in addition to the image tokens
        self._count = count
        self._index = -1
        self._reuses = False  # whether this step skips blocks
        self._form: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self._steps: list[Computed] = []  # the last one or two
        self._entered: Tensor | None = None  # the tokens before the blocks whose residual is kept
        self._first_residual: Tensor | None = None

    @contextmanager
    def current(self, step: int | None = None) -> Iterator[None]:
        """The context in which a step is computed; it is closed between steps, so loops may take turns.

        Args:
            step: its index; if None, every call of the model is the next step.
        """
        self._index = self._index if step is None else step - 1
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def run_block(self, index: int, count: int, x: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Block ``index`` of ``count`` on tokens x [B, N, D]: computed by ``call``, or skipped."""
        if index > 0 and self._reuses:
            return x  # the residual of this block is already included
        if index > 0:
            out = call()  # [B, N, D]
        else:
            first = call() if self.owner.rule.method == "first-block" else None
            self._begin(x, None if first is None else first - x)
            start = x if first is None else first  # the tokens before the blocks that may be skipped
            if self._reuses:
                self.owner.reused += 1
                return start + self._residual()
            self.owner.computed += 1
            self._entered = start.clone()  # a block or the replay of a captured graph may overwrite it
            out = call() if first is None else first
        if index == count - 1 and self._entered is not None:  # None: the first block was not called
            step = Computed(self._index, out - self._entered, self._first_residual)
            self._steps = [*self._steps[-1:], step] if self.owner.rule.method == "taylor" else [step]
            self._entered = self._first_residual = None
        return out

    def _begin(self, x: Tensor, first_residual: Tensor | None) -> None:
        """Begin a step with tokens x, and decide whether it reuses a residual."""
        form, rule = (x.shape, x.dtype, x.device), self.owner.rule
        if form != self._form:
            self._form, self._steps = form, []
        self._index += 1
        self._first_residual, self._reuses = first_residual, False
        ends = self._count is not None and self._index >= self._count - rule.last
        if not self._steps or self._index < rule.first or ends:
            return
        latest = self._steps[-1]
        if first_residual is None:
            self._reuses = self._index - latest.step < rule.interval
        elif rule.threshold > 0.0:
            assert latest.first_residual is not None
            # In float32: means of many numbers. With NaN the comparison is false, and the step is computed.
            change = (first_residual.float() - latest.first_residual.float()).abs().mean()
            self._reuses = bool(change < rule.threshold * latest.first_residual.float().abs().mean())

    def _residual(self) -> Tensor:
        """What the blocks would add in this step."""
        before, latest = self._steps[0], self._steps[-1]
        if latest is before:
            return latest.residual
        slope = (self._index - latest.step) / (latest.step - before.step)
        return torch.lerp(before.residual, latest.residual, 1.0 + slope)


#: The memory of the generation whose step this thread is computing.
_current: ContextVar[Memory | None] = ContextVar("impasto_step_cache", default=None)


class CachedCall(Change):
    """What is called in place of a block, outside of its compiled graph and its hooks, which run if the block does.

    A later ``block.compile()`` overwrites it, so it is put back at the start of the next generation.
    """

    change = "cached"
    undo = "remove() the handle of cache_steps()"
    varies = True
    conflicts: ClassVar = ("parallel",)

    def __init__(self, cache: StepCache, block: nn.Module, index: int, count: int):
        self._cache: StepCache | None = cache
        self.block, self._index, self._count = block, index, count

    def remove(self) -> None:
        self._cache = None  # offloading may call this object until the end of the generation
        self.take(self.block, CALL)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self.before or self.block._call_impl
        memory, cache = _current.get(), self._cache
        if memory is None or memory.owner is not cache or torch.is_grad_enabled():
            return call(x, *args, **kwargs)
        # GLM-Image's blocks also return keys and values, which no loop needs.
        rest: tuple[Any, ...] = (None,) * memory.others

        def compute() -> Tensor:
            nonlocal rest
            out = call(x, *args, **kwargs)
            if isinstance(out, Tensor):
                return out
            rest = tuple(out[1:])
            memory.others = len(rest)
            first: Tensor = out[0]
            return first

        tokens = memory.run_block(self._index, self._count, x, compute)
        return (tokens, *rest) if memory.others else tokens


class StepCache(Handle):
    """The handle of ``cache_steps``.

    ``computed`` and ``reused`` count the steps of all generations so far.
    """

    def __init__(self, target: Any, rule: Rule):
        self.rule = rule
        self.computed = 0
        self.reused = 0
        self._target = target
        self._calls: list[CachedCall] = []
        if not isinstance(target, nn.Module):
            if not hasattr(target, "step_cache"):
                raise InputError(
                    f"cache_steps takes a pipeline with a denoising loop or a transformer, not {type(target).__name__}"
                )
            if target.step_cache is not None:
                raise ConfigurationError("the steps of this pipeline are cached already; remove() that cache first")
            if getattr(unwrapped(getattr(target, "transformer", None)), "step_cache", None) is not None:
                raise ConfigurationError(
                    "the transformer of this pipeline caches steps already, by enable_cache(); call "
                    "pipe.transformer.disable_cache() first"
                )
        self._attach()
        if not isinstance(target, nn.Module):
            target.step_cache = self

    def remove(self) -> None:
        """Compute every step again. All changes are undone."""
        self._detach()
        if getattr(self._target, "step_cache", None) is self:
            self._target.step_cache = None

    @contextmanager
    def generation(self, steps: int | None = None) -> Iterator[None]:
        """One generation of a custom loop: the calls of the model inside are its steps.

        Args:
            steps: how many there will be; if not given, the last steps are unknown and may be reused.
        """
        with self.memory(steps).current():
            yield

    def memory(self, steps: int | None) -> Memory:
        """An empty memory for a generation of so many steps with the current transformer."""
        self._attach()
        return Memory(self, steps)

    def _attach(self) -> None:
        """Change the call of every block of the current transformer."""
        blocks = self._blocks()
        if [call.block for call in self._calls if call in of(call.block)] == blocks:
            return
        self._detach()
        for block in blocks:
            refuse_conflicts(block, CachedCall)
        self._calls = [CachedCall(self, block, i, len(blocks)) for i, block in enumerate(blocks)]
        for call in self._calls:
            call.put(call.block, CALL)

    def _detach(self) -> None:
        for call in self._calls:
            call.remove()
        self._calls = []

    def _blocks(self) -> list[nn.Module]:
        model = self._target if isinstance(self._target, nn.Module) else getattr(self._target, "transformer", None)
        if model is None:
            raise InputError(f"cache_steps: this {type(self._target).__name__} has no transformer; assign one first")
        if unwrapped(model) is not model:
            raise ConfigurationError(
                "the steps of a transformer that torch.compile has wrapped cannot be cached: its graph cannot skip "
                "blocks. Compile the blocks one by one (`for block in transformer.transformer_blocks: "
                "block.compile()`), or remove() the cache."
            )
        blocks = getattr(model, "transformer_blocks", None)
        least = 2 if self.rule.method == "first-block" else 1
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < least:
            raise ConfigurationError(
                f"cache_steps: {type(model).__name__} has no list transformer_blocks of {least} blocks or more, "
                f"which {self.rule.method!r} needs"
            )
        return list(blocks)
