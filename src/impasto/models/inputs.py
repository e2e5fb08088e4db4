"""Checks of what the transformers are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


def as_batches(latents: Tensor | Sequence[Tensor], channels: int, patch_size: int) -> list[Tensor]:
    """Latents [B, C, H, W] as they are, or B of [C, H, W] as B of [1, C, H, W].

    Raises:
        InputError: another shape.
    """
    batches = [latents] if isinstance(latents, Tensor) else [image[None] for image in latents]
    for one in batches:
        shape = list(one.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % patch_size or shape[3] % patch_size or 0 in shape[2:]:
            raise InputError(
                f"hidden_states has shape {shape}; expected [batch, {channels}, height, width] with sides that "
                f"{patch_size} divides"
            )
    if not batches:
        raise InputError("hidden_states is an empty list; give the latents of at least one image")
    return batches


def check_text(text: Tensor, mask: Tensor | None, channels: int | None, mask_name: str) -> None:
    """Check text embeddings [B, M, channels] and their mask [B, M] or bias [B, 1, M].

    Raises:
        InputError: another shape.
    """
    if not isinstance(text, Tensor) or text.ndim != 3 or (channels is not None and text.shape[2] != channels):
        found = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise InputError(f"encoder_hidden_states has shape {found}; expected [batch, tokens, {channels}]")
    batch, tokens = text.shape[:2]
    if mask is not None and mask.shape != (batch, tokens) and mask.shape != (batch, 1, tokens):
        raise InputError(
            f"{mask_name} has shape {list(mask.shape)}; expected {[batch, tokens]} (1 keeps) or "
            f"{[batch, 1, tokens]} (a bias)"
        )


def as_timesteps(timestep: Tensor | float | None, batch: int, device: torch.device) -> Tensor:
    """A timestep for each image, or one for all: [B] or [1].

    Raises:
        InputError: none, or another number of them.
    """
    if timestep is None:
        raise InputError("timestep is None; give one number for the batch or one for each image")
    timesteps = torch.as_tensor(timestep, device=device).reshape(-1)
    if timesteps.shape[0] != 1 and timesteps.shape[0] != batch:
        raise InputError(f"timestep has {timesteps.shape[0]} values for {batch} images; give 1 or {batch}")
    return timesteps


def check_batch(images: int, texts: int | None, steps: int) -> None:
    """Raise InputError unless there are as many texts (None: no text) and timesteps as images, or one timestep."""
    if texts is not None and texts != images:
        raise InputError(f"encoder_hidden_states holds {texts} texts for {images} images")
    if steps != 1 and steps != images:
        raise InputError(f"timestep holds {steps} rows for {images} images; give 1 or {images}")


def check_prior(
    prior_token_id: Tensor,
    prior_token_drop: Tensor | None,
    batch: int,
    grid: tuple[int, int],
    sides: tuple[int, int],
) -> Tensor:
    """The prior's tokens [B, N] or [N], and which are dropped, [B, N], [B] or [N] -> both, [B, N, 2].

    Args:
        grid: rows and columns of image tokens.
        sides: of the latents, for messages.

    Raises:
        InputError: another shape, or numbers that are not whole.
    """
    tokens = grid[0] * grid[1]
    if prior_token_id.ndim == 1:
        prior_token_id = prior_token_id.expand(batch, -1)
        if prior_token_drop is not None and prior_token_drop.shape == (tokens,):
            prior_token_drop = prior_token_drop.expand(batch, -1)
    if prior_token_id.shape != (batch, tokens):
        raise InputError(
            f"prior_token_id has shape {list(prior_token_id.shape)}; latents of {sides[0]} x {sides[1]} are "
            f"{grid[0]} x {grid[1]} tokens, of {batch} images: expected {[batch, tokens]}"
        )
    if prior_token_id.is_floating_point() or prior_token_id.dtype == torch.bool:
        raise InputError(f"prior_token_id holds numbers of tokens, not {prior_token_id.dtype}")
    dropped = torch.zeros_like(prior_token_id)
    if prior_token_drop is not None:
        if prior_token_drop.shape != (batch,) and prior_token_drop.shape != (batch, tokens):
            raise InputError(
                f"prior_token_drop has shape {list(prior_token_drop.shape)}; expected {[batch, tokens]} or {[batch]}"
            )
        dropped = prior_token_drop.bool().view(batch, -1).expand(-1, tokens).to(prior_token_id.dtype)
    return torch.stack([prior_token_id, dropped], dim=-1)


def require_none(arguments: Mapping[str, Any], because: str) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise InputError(f"{because} {given[0]} already: leave {', '.join(given)} out")
