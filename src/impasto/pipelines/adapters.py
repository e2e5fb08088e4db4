"""Adapters as the command line, the page and the server choose them: a file and a weight each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints.adapters.file import SUFFIXES, AdapterDefaults
from ..checkpoints.adapters.file import adapter_defaults as read_defaults
from ..checks import finite, shown
from ..errors import ConfigurationError, InputError
from ..transforms.adapters import fused_size, locate

logger = logging.getLogger("impasto")


class ChosenAdapter(NamedTuple):
    """An adapter and the weight with which it acts."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> ChosenAdapter:
        """``FILE`` or ``FILE:WEIGHT``; the file may be a folder, ``builtin:NAME`` or a hub id.

        Raises:
            InputError: there is no file, or the weight is not a finite number.
        """
        source, colon, number = text.rpartition(":")
        is_name = not colon or source == "builtin" or os.path.exists(text) or "/" in number or number.endswith(SUFFIXES)
        if not (text if is_name else source):
            raise InputError("an adapter is given as FILE or FILE:WEIGHT")
        if is_name:
            return cls(text)
        try:
            weight = float(number)
        except ValueError:
            raise InputError(f"the weight of {shown(source, 200)} must be a number, not {shown(number)}") from None
        return cls(source, finite(f"the weight of {source}", weight))

    @property
    def name(self) -> str:
        """A short name, for lists and for what is written into images."""
        name = Path(self.source).name.rpartition(":")[2]
        return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def adapter_defaults(chosen: Sequence[ChosenAdapter]) -> AdapterDefaults:
    """How to generate with adapters: what the first of them says that says something.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return AdapterDefaults.first([read_defaults(locate(adapter.source)) for adapter in chosen])


def apply_adapters(pipe: Any, chosen: Sequence[ChosenAdapter]) -> None:
    """Make adapters part of a pipeline's weights where that can be, so that it is as fast as without any.

    Raises:
        CheckpointError: one is missing, damaged, or for another model. The pipeline is as before.
    """
    if chosen and load_adapters(pipe, chosen):
        pipe.unload_lora_weights()


def load_adapters(pipe: Any, chosen: Sequence[ChosenAdapter]) -> bool:
    """Load adapters and fuse them where that can be; ``unfuse_lora`` and ``unload_lora_weights`` undo it.

    Returns:
        whether they are fused.

    Raises:
        CheckpointError: one is missing, damaged, or for another model. The pipeline is as before.
    """
    names = [f"{i}_{adapter.name.replace('.', '_')}" for i, adapter in enumerate(chosen)]
    try:
        for name, adapter in zip(names, chosen):
            pipe.load_lora_weights(adapter.source, adapter_name=name)
        pipe.set_adapters(names, [adapter.weight for adapter in chosen])
    except Exception:
        pipe.unload_lora_weights()
        raise
    if not _has_room(pipe):
        logger.info("adapters stay as they are: fused layers would not fit into the memory budget")
        return False
    try:
        pipe.fuse_lora()
    except ConfigurationError as error:  # quantized weights
        logger.info("adapters stay as they are: %s", error)
        pipe.unfuse_lora()
        return False
    except Exception:  # such as a lack of memory
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        raise
    return True


def _has_room(pipe: Any) -> bool:
    """Whether a memory budget allows fused layers on the CPU, which take memory even if the weights are in a file."""
    plan = pipe.plan
    if plan is None or torch.device(plan.device).type != "cpu":
        return True
    return bool(plan.peak + sum(map(fused_size, pipe._loadable().values())) <= plan.budget)
