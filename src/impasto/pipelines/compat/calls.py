"""Calls of pipelines: what a callback reads of its own call, and what it sets for the steps that follow."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ...checks import shown
from ...errors import InputError
from ..inputs import check_tensor

#: Threads whose last call of a pipeline is remembered.
_MOST_THREADS = 64
#: What callbacks see as [negative; positive] where there is guidance.
_WITH_HALVES = ("prompt_embeds", "prompt_attention_mask")


class Call:
    """A call of a pipeline, or a loop that its caller drives. Each is known to its pipeline while it is in progress."""

    def __init__(self, pipe: Any, guidance_scale: float = 1.0, attention_kwargs: Mapping[str, Any] | None = None):
        self.pipe, self.thread = pipe, threading.get_ident()
        self.interrupted = False
        self.guidance_scale = guidance_scale  # of the next step
        self.attention_kwargs = attention_kwargs
        self.steps: int | None = None  # None before the loop begins
        self.timestep: Tensor | None = None  # of the step in progress

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Be known to the pipeline until the block ends, and then to those who read what the last call was."""
        self.pipe.in_progress.append(self)
        try:
            yield
        finally:
            self.pipe.in_progress.remove(self)
            if self.steps is not None:
                remember(self)


#: The call of a pipeline that this thread is in. Loops that a caller drives are not calls.
calling: ContextVar[Call | None] = ContextVar("impasto_call", default=None)
#: What the last calls were, by pipeline and thread, the latest at the end. A pipeline itself keeps nothing of a call.
_ended: weakref.WeakKeyDictionary[Any, dict[int, Call]] = weakref.WeakKeyDictionary()
_remembering = threading.RLock()  # garbage collection may end a loop, and so a call, in the thread that holds it


def remember(call: Call) -> None:
    """Keep the facts of a call as the last one of its pipeline in its thread."""
    facts = copy.copy(call)
    facts.pipe = facts.timestep = None
    with _remembering:
        calls = _ended.setdefault(call.pipe, {})
        calls.pop(call.thread, None)
        calls[call.thread] = facts
        if len(calls) > _MOST_THREADS:
            del calls[next(iter(calls))]


def call_of(pipe: Any) -> Call | None:
    """The call or loop in progress of this thread, or its last one, or else one of another thread."""
    own, thread, running = calling.get(), threading.get_ident(), list(pipe.in_progress)
    if own is not None and own.pipe is pipe:
        return own
    with _remembering:
        ended = list(_ended.get(pipe, {}).values())
    by_preference = [*ended, *running, *(x for x in (*ended, *running) if x.thread == thread)]
    return by_preference[-1] if by_preference else None


def call_back(pipe: Any, step: Any, callback: Callable[..., Any], names: Sequence[str]) -> None:
    """Call the callback after a step, and replace the step's latents and embeddings by those that it returns.

    With guidance, ``prompt_embeds`` and ``prompt_attention_mask`` are handed over as [negative; positive]. Both
    halves, the positive one alone, or a row for all images are accepted back; a negative half not given stays as it is.
    """
    own = {"latents": step.latents, **step.embeds._asdict()}
    guided = pipe.do_classifier_free_guidance and own["negative_prompt_embeds"] is not None
    handed = {name: _both_halves(own, name) if guided and name in _WITH_HALVES else own[name] for name in names}
    before = {name: _state(tensor) for name, tensor in handed.items()}
    returned = callback(pipe, step.index, step.timestep, dict(handed))
    if returned is not None and not isinstance(returned, Mapping):
        raise InputError(f"callback_on_step_end must return a dict of tensors or None, not {shown(returned)}")
    changed = dict[str, Any]()
    # Negative embeddings that are returned by themselves count more than the half of a pair.
    for name, value in sorted({**handed, **(returned or {})}.items(), key=lambda item: "negative" in str(item[0])):
        who = f"callback_on_step_end returned {shown(name)}, which"
        if name not in own:
            raise InputError(f"{who} is not a tensor of this pipeline; there are: {', '.join(own)}")
        old = handed.get(name, own[name])
        if value is old and (name not in before or _is_in_state(value, before[name])):
            continue
        if own[name] is None:
            raise InputError(f"{who} this call does not have; leave it out")
        negative = own.get(f"negative_{name}")
        shape: list[int | str] = [*own[name].shape]
        if name != "latents":
            shape[1] = "tokens"  # embeddings and masks are compared when they are used
        if name in _WITH_HALVES and isinstance(value, Tensor) and value.ndim == len(shape):
            rows, batch = len(value), len(own[name])
            shape[0] = rows if rows in (1, batch) or (rows == 2 * batch and negative is not None) else batch
        check_tensor(f"{name} that callback_on_step_end returned", value, shape, mask=name.endswith("mask"))
        padded = name in handed and name in _WITH_HALVES and value.shape[1] == old.shape[1]
        if name in _WITH_HALVES and len(value) == 2 * len(own[name]):
            other, value = value.chunk(2)
            changed[f"negative_{name}"] = other[:, : own[f"negative_{name}"].shape[1]] if padded else other
        elif name in _WITH_HALVES and len(value) < len(own[name]):  # the last row alone: guidance is cut off
            cut = name in handed and value.shape[1:] == old.shape[1:] and torch.equal(value, old[-1:])
            value = own[name] if cut else value.expand(len(own[name]), *value.shape[1:])
        changed[name] = value[:, : own[name].shape[1]] if padded else value
    if "latents" in changed:
        step.latents = changed.pop("latents").to(own["latents"])
    if changed:
        step.embeds = step.embeds._replace(**changed)


def _both_halves(tensors: Mapping[str, Any], name: str) -> Tensor:
    """[negative; positive], padded with zeros to one number of tokens."""
    halves = [tensors[f"negative_{name}"], tensors[name]]
    most = max(half.shape[1] for half in halves)
    return torch.cat([torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], dim=1) for x in halves])


def _state(tensor: Any) -> Any:
    """What a change in place changes: the count of such changes, or in inference mode, without one, a kept copy."""
    if not isinstance(tensor, Tensor):
        return None
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_in_state(tensor: Any, state: Any) -> bool:
    return torch.equal(tensor, state) if isinstance(state, Tensor) else _state(tensor) == state
