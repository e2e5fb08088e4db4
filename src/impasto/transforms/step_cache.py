"""Feature caching: what the blocks of a denoiser add changes little from step to step, so some steps reuse it.

Between two steps close to each other the blocks see nearly the same tokens, and what they add to them, their
residual, is nearly the same. On a step that is reused the blocks are left out and the last computed residual is
added to the tokens of this step, or one foretold from the last two. The patch embedding and the last layer always
run: they depend on the latents and on the timestep, and cost little.

Shapes: B rows (twice the pictures under guidance), N image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, InputError
from . import seam

Method = Literal["first-block", "interval", "taylor"]
METHODS: tuple[str, ...] = get_args(Method)

#: Without a value of one's own. Which of them suits a model is measured: ``benchmarks/lossy.py``.
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

    - ``"first-block"``: the first block always runs. Where its residual differs from that of the last computed step
      by less than ``threshold`` (mean absolute difference over mean absolute value), the other blocks' residual is
      reused. The criterion is that of TeaCache (Liu et al. 2024, 2411.19108), which looks at the modulated input of
      the first block and sums its changes up, scaled by a polynomial fitted to each model; the first block's
      residual needs no fit, and is compared with the computed step itself, so that nothing has to be summed up. One
      decision a step is made for the whole batch: a picture then depends, a little, on its batch mates. On a GPU the
      decision waits for the device once a step.
    - ``"interval"``: one step in ``interval`` is computed, as in FORA (Selvaraju et al. 2024, 2407.01425). What is
      kept is not each layer's output but the residual of all blocks together, as in Δ-DiT (Chen et al. 2024,
      2406.01125): one tensor [B, N, D] instead of two for each block.
    - ``"taylor"``: the same steps are computed, and the residual of the others is foretold from the last two computed
      ones, along a line: TaylorSeer (Liu et al. 2025, 2503.06923) of first order.

    A cache lives as long as one generation. Every denoising loop of the pipeline has one of its own, however many of
    them run in turns or in threads, and it begins empty; when the shape, the dtype or the device of the tokens
    changes (as where guidance ends), or the loop is given other embeddings, it is emptied. Calls of the model from
    outside of a loop, and those that record gradients, compute everything. Weights may be loaded and parts assigned
    between generations: each one looks up the transformer and its blocks again.

    Works with blocks compiled one by one (``block.compile()``), which are left out as a whole, but not with a model
    compiled as a whole, whose graph has no place to leave something out.

    Args:
        target: a pipeline whose ``denoise`` is a denoising loop; or a transformer, whose loop then says where it
            begins: ``with cache.generation(steps): ...``.
        method: which steps are reused, and how; see above.
        threshold: for "first-block", 0.1 by default; at 0 everything is computed.
        interval: for the others, 2 by default; at 1 everything is computed.
        first, last: so many steps at either end of a generation are computed in any case; ``first`` at least 1.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: an argument that cannot be used, or that the method does not have.
        ConfigurationError: the transformer has no list of blocks, is compiled as a whole, or is cached already.
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
        interval = DEFAULT_INTERVAL if interval is None else interval
        _check_whole("interval", interval, 1)
    _check_whole("first", first, 1)
    _check_whole("last", last, 0)
    return StepCache(target, Rule(method, threshold or 0.0, interval or 1, first, last))


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"cache_steps: {name} must be a whole number of {least} or more, not {value!r}")


class Rule(NamedTuple):
    """Which steps are computed."""

    method: Method
    threshold: float
    interval: int
    first: int
    last: int


class Computed(NamedTuple):
    """What is kept of a computed step."""

    step: int  # counted in its generation
    residual: Tensor  # [B, N, D], of all blocks, or of all but the first
    first_residual: Tensor | None  # [B, N, D], of the first block, where it decides


class Memory:
    """What one generation keeps between its steps: nothing at first.

    Args:
        count: how many calls of the model there will be; None where that is not known.
    """

    def __init__(self, owner: StepCache, count: Callable[[], int | None]):
        self.owner = owner
        self.reuses = False  # whether this step leaves blocks out
        self._count = count
        self._index = -1
        self._form: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self._steps: list[Computed] = []  # the last one or two
        self._entered: Tensor | None = None  # the tokens before the blocks whose residual is kept
        self._first_residual: Tensor | None = None

    def forget(self) -> None:
        self._steps = []

    def begin(self, x: Tensor) -> None:
        """A step begins, with tokens x."""
        form = (x.shape, x.dtype, x.device)
        if form != self._form:
            self.forget()
        self._form = form
        self._index += 1
        self.reuses = False

    def decide(self, rule: Rule, first_residual: Tensor | None) -> None:
        """Whether this step is reused."""
        self._first_residual = first_residual
        count = self._count()
        if not self._steps or self._index < rule.first or (count is not None and self._index >= count - rule.last):
            return
        latest = self._steps[-1]
        if first_residual is None:
            self.reuses = self._index - latest.step < rule.interval
        elif rule.threshold > 0.0:
            assert latest.first_residual is not None
            # In float32: means of many numbers. Not a number is not below the threshold, and is computed.
            change = (first_residual.float() - latest.first_residual.float()).abs().mean()
            self.reuses = bool(change < rule.threshold * latest.first_residual.float().abs().mean())

    def enter(self, x: Tensor) -> None:
        self._entered = x.clone()  # who computes next may write into it: a block, or the replay of a graph

    def leave(self, x: Tensor) -> None:
        """The tokens after the last block."""
        if self._entered is None:  # the blocks were not called from the first one on
            return
        step = Computed(self._index, x - self._entered, self._first_residual)
        self._steps = [*self._steps[-1:], step] if self.owner.rule.method == "taylor" else [step]
        self._entered = self._first_residual = None

    def residual(self) -> Tensor:
        """What the blocks would add in this step."""
        latest = self._steps[-1]
        if len(self._steps) < 2:
            return latest.residual
        before = self._steps[0]
        slope = (self._index - latest.step) / (latest.step - before.step)
        return torch.lerp(before.residual, latest.residual, 1.0 + slope)


#: The memory of the generation whose step is computed just now, in this thread.
_current: ContextVar[Memory | None] = ContextVar("impasto_step_cache", default=None)


class _Layer:
    """Around the call of one block."""

    def __init__(self, cache: StepCache, index: int, count: int):
        self._cache, self._index, self._count = cache, index, count

    def __call__(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        memory = _current.get()
        if memory is None or memory.owner is not self._cache or torch.is_grad_enabled():
            return call(x, *args, **kwargs)
        return self._cache.run_block(memory, self._index, self._count, x, lambda: call(x, *args, **kwargs))


class StepCache:
    """The handle of ``cache_steps``.

    ``computed`` and ``reused`` count the steps of all generations so far.
    """

    def __init__(self, target: Any, rule: Rule):
        self.rule = rule
        self.computed = 0
        self.reused = 0
        self._target = target
        self._layers: list[tuple[nn.Module, _Layer]] = []
        self._active = True
        self._loop: Callable[..., Any] | None = None  # the pipeline's own
        if isinstance(target, nn.Module):
            self._attach()
            return
        if not callable(getattr(target, "denoise", None)):
            raise InputError(
                f"cache_steps takes a pipeline with a denoising loop or a transformer, not {type(target).__name__}"
            )
        if isinstance(getattr(vars(target).get("denoise"), "__self__", None), StepCache):
            raise ConfigurationError("the steps of this pipeline are cached already; remove() that cache first")
        self._attach()
        self._loop = target.denoise
        target.denoise = self._denoise

    # --- undo ---

    def remove(self) -> None:
        """Compute every step again. Nothing is left behind."""
        self._active = False
        self._detach()
        if self._loop is not None and vars(self._target).get("denoise") == self._denoise:
            del self._target.denoise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # --- generations ---

    @contextmanager
    def generation(self, steps: int | None = None) -> Iterator[None]:
        """One generation of a loop of one's own: the calls of the model inside are its steps.

        Args:
            steps: how many there will be; without it the last ones are not known, and may be reused.
        """
        self._attach()
        with self._going_on(Memory(self, lambda: steps)):
            yield

    def _denoise(self, noise: Tensor, embeds: Any, **options: Any) -> Generator[Any, None, None]:
        """The pipeline's loop, every run of it with a memory of its own.

        A run's memory is the current one only while a step is computed, not while the loop waits for its driver: so
        runs may take turns.
        """
        assert self._loop is not None
        if self._active:
            self._attach()
        memory = Memory(self, self._count_steps)
        with closing(self._loop(noise, embeds, **options)) as loop:
            while True:
                with self._going_on(memory):
                    step = next(loop, None)
                if step is None:
                    return
                yield step
                if step.embeds is not embeds:  # what was computed belongs to another prompt
                    embeds = step.embeds
                    memory.forget()

    @contextmanager
    def _going_on(self, memory: Memory) -> Iterator[None]:
        token = _current.set(memory)
        try:
            yield
        finally:
            _current.reset(token)

    def _count_steps(self) -> int | None:
        timesteps = getattr(self._target.scheduler, "timesteps", None)
        return None if timesteps is None else len(timesteps)

    # --- blocks ---

    def _attach(self) -> None:
        """Stand around every block of the transformer that there is now."""
        blocks = self._blocks()
        in_place = [block for block, layer in self._layers if seam.is_around(block, layer)]
        if len(in_place) == len(blocks) and all(mine is theirs for mine, theirs in zip(in_place, blocks)):
            return
        self._detach()
        self._layers = [(block, _Layer(self, i, len(blocks))) for i, block in enumerate(blocks)]
        for block, layer in self._layers:
            seam.insert(block, layer)

    def _detach(self) -> None:
        for block, layer in self._layers:
            seam.take_out(block, layer)
        self._layers = []

    def _blocks(self) -> list[nn.Module]:
        model = self._target if isinstance(self._target, nn.Module) else getattr(self._target, "transformer", None)
        if model is None:
            raise InputError(f"cache_steps: this {type(self._target).__name__} has no transformer; assign one first")
        if hasattr(model, "_orig_mod"):
            raise ConfigurationError(
                "the steps of a transformer that torch.compile has wrapped cannot be cached: its graph has no place to "
                "leave blocks out. Compile the blocks one by one (`for block in transformer.transformer_blocks: "
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

    def run_block(self, memory: Memory, index: int, count: int, x: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """Block ``index`` of ``count`` on tokens x [B, N, D]: computed by ``call``, or left out."""
        if index == 0:
            memory.begin(x)
            if self.rule.method == "first-block":
                out = call()  # [B, N, D]
                memory.decide(self.rule, out - x)
                start = out
            else:
                memory.decide(self.rule, None)
                start = x
            if memory.reuses:
                self.reused += 1
                return start + memory.residual()
            self.computed += 1
            memory.enter(start)
            if self.rule.method != "first-block":
                out = call()
        elif memory.reuses:
            return x  # what this block would add is in it already
        else:
            out = call()
        if index == count - 1:
            memory.leave(out)
        return out
