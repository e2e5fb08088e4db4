"""A component of a single file -> tensors and a config under our names, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import CheckpointError
from ..stored import listing
from . import files
from .configs import Guess, autoencoder_config, glm_image_config, pixart_config
from .names import PIXART, PIXART_EXTRAS, Renamed, join_autoencoder, split_autoencoder


class Component(NamedTuple):
    """A component under our names."""

    class_name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    #: What the original format stores in addition, for the way back.
    extras: dict[str, Tensor]
    #: Sentences about values of the config that are not in the file.
    assumed: list[str]


def component_of(file: files.SingleFile, class_name: str, given: Mapping[str, Any]) -> Component:
    """The component of one of our classes in a file.

    Args:
        given: values of the config that are known.

    Raises:
        CheckpointError: there is none, or names in it are unknown; the message has them.
        InputError: a value that the file does not contain has to be given.
    """
    part = file.part(class_name)
    found, extras = part.tensors, dict[str, Tensor]()
    unknown: list[str] = []
    if part.kind is files.ORIGINAL:
        extras = {name: found[name] for name in PIXART_EXTRAS if name in found}
        found, unknown = PIXART.split({name: x for name, x in found.items() if name not in extras})
    elif part.kind is files.LDM_AUTOENCODER:
        found, unknown = split_autoencoder(found)
    if unknown:
        raise CheckpointError(
            f"{file.path} holds {len(unknown)} tensors that {part.kind.description} does not have: {listing(unknown)}"
        )
    guess = _config(class_name, found, extras, file.path.name, given)
    return Component(class_name, found, guess.config, extras, guess.assumed)


def _config(
    class_name: str, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor], name: str, given: Mapping[str, Any]
) -> Guess:
    if class_name == "AutoencoderKL":
        return autoencoder_config(tensors, name, given)
    if class_name == "GlmImageTransformer2DModel":
        return glm_image_config(tensors, given)
    return pixart_config(tensors, extras, name, given)


def to_original(class_name: str, tensors: Mapping[str, Tensor], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a component in its original format.

    Raises:
        CheckpointError: there is no such format, or it lacks some of these tensors.
    """
    if class_name == "PixArtTransformer2DModel":
        renamed: Renamed = PIXART.join(tensors)
    elif class_name == "AutoencoderKL":
        renamed = join_autoencoder(tensors)
    else:
        raise CheckpointError(f"a {class_name} has no other format than folders")
    strange = [name for name in extras if name not in PIXART_EXTRAS]
    if strange:
        raise CheckpointError(f"the tensors kept for the original format have other names: {listing(strange)}")
    if renamed.unknown:
        raise CheckpointError(f"the original format has no place for {listing(renamed.unknown)}")
    return {**renamed.tensors, **extras}
