"""Tags in prompts: ``<lora:NAME:0.8>``."""

from __future__ import annotations

import re

from ....checks import nearest
from ....errors import InputError
from ..fields import Adapters, Number

_TAG = re.compile(r"<(lora|lyco|hypernet):([^:<>]{1,200})(?::([^<>]{0,100}))?>", re.IGNORECASE)


def without_tags(prompt: str, adapters: Adapters) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its tags, and the names and weights of adapters in them.

    A weight is that of the transformer: text encoders are not adapted here.

    Raises:
        InputError: an adapter that is not served, or a weight that is none.
    """
    found: list[dict[str, object]] = []
    for kind, name, arguments in _TAG.findall(prompt):
        if kind.lower() == "hypernet":
            raise InputError(f"the prompt asks for the hypernetwork {name!r}, and this server has none; leave it out")
        if name not in adapters.names:
            known = f"there are {', '.join(adapters.names)}" if adapters.names else "it serves none"
            raise InputError(
                f"the prompt asks for the adapter {name!r}, which is not served; {known}{nearest(name, adapters.names)}"
            )
        found.append({"name": name, "weight": _weight(name, arguments)})
    return _TAG.sub("", prompt).strip() if found else prompt, adapters.read("lora", found)


def _weight(name: str, arguments: str) -> float:
    """Of ``0.8``, ``TEXT_ENCODER:TRANSFORMER`` or ``te=0.5:unet=0.8``."""
    plain = [part for part in arguments.split(":") if part and "=" not in part]
    named = dict(part.split("=", 1) for part in arguments.split(":") if "=" in part)
    text = named.get("unet", (plain[1:2] or plain[:1] or ["1"])[0])
    try:
        return Number(-10, 10).read(f"the weight of {name}", float(text))
    except ValueError as error:
        raise InputError(f"the weight of {name} must be a number from -10 to 10, not {text!r}") from error
