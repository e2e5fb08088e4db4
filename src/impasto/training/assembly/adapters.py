"""Training of adapters: which layers get one, and the file that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoints.adapters.file import AdapterDefaults
from ...checks import nearest, shown
from ...errors import InputError
from ...transforms.adapters.binding import adaptable
from ...transforms.adapters.injection import add
from ...transforms.adapters.layers import peft
from ...transforms.adapters.saving import save
from ..settings.configuration import AdapterSettings
from .components import Components

NAME = "default"


def add_adapters(settings: AdapterSettings, models: Components, seed: int) -> None:
    """Freeze the transformer and the text encoder, and give them new adapters, which change nothing yet.

    Args:
        seed: of the adapters' weights.

    Raises:
        InputError: a model has no layer of one of the names in ``targets``.
        MissingDependencyError: peft is missing.
    """
    check_targets("adapter.targets", settings.targets, models.transformer)
    if settings.text_encoder_rank is not None:
        check_targets("adapter.text_encoder_targets", settings.text_encoder_targets, models.text_encoder)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        add(models.transformer, adapter_config(settings, settings.rank, settings.targets), NAME)
        if settings.text_encoder_rank is not None:
            config = adapter_config(settings, settings.text_encoder_rank, settings.text_encoder_targets)
            add(models.text_encoder, config, NAME)


def check_targets(key: str, targets: Sequence[str], module: nn.Module) -> None:
    """Check that each target names layers: peft is content if one of them does."""
    parts = [name.split(".") for name in adaptable(module)]
    known = {".".join(each[i:]) for each in parts for i in range(len(each))}
    for target in targets:
        if target not in known:
            hint = nearest(target, sorted(known))
            raise InputError(f"{key}: the {type(module).__name__} has no linear layer {shown(target)}{hint}")


def adapter_config(settings: AdapterSettings, rank: int, targets: list[str]) -> Any:
    """peft's config of an adapter."""
    library = peft()
    alpha = rank if settings.alpha is None else settings.alpha
    if settings.kind in ("lokr", "loha"):
        kind = library.LoKrConfig if settings.kind == "lokr" else library.LoHaConfig
        return kind(r=rank, alpha=alpha, target_modules=targets, module_dropout=settings.dropout)
    return library.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=settings.dropout,
        use_rslora=settings.kind == "rslora",
        use_dora=settings.kind == "dora",
    )


def export_adapters(
    settings: AdapterSettings, models: Components, folder: Path, defaults: AdapterDefaults | None = None
) -> Path:
    """Write the adapter file, which ``load_lora_weights`` reads.

    Args:
        defaults: how to generate with it.
    """
    parts: dict[str, nn.Module] = {"transformer": models.transformer}
    if settings.text_encoder_rank is not None:
        parts["text_encoder"] = models.text_encoder
    return save(folder, parts, NAME, defaults=defaults)
