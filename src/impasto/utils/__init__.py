"""Helpers that scripts import from ``diffusers.utils``, under the same names."""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from typing import Any

from ..lazy import publish, resolve

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.bin"
SAFETENSORS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

_HOMES = {
    "BaseOutput": "nn.outputs:BaseOutput",
    "PIL_INTERPOLATION": "pipelines.compat.images:FILTERS",
    "export_to_gif": "utils.images:export_to_gif",
    "get_logger": "utils.logging:get_logger",
    "is_compiled_module": "utils.torch_utils:is_compiled_module",
    "logging": "utils.logging:",
    "load_image": "utils.images:load_image",
    "make_image_grid": "utils.images:make_image_grid",
    "numpy_to_pil": "utils.images:numpy_to_pil",
    "pt_to_pil": "utils.images:pt_to_pil",
    "randn_tensor": "utils.torch_utils:randn_tensor",
    "torch_utils": "utils.torch_utils:",
}
publish(__name__, _HOMES, "export_utils", "loading_utils", "outputs", "pil_utils")
#: Names of packages that differ from those in ``is_..._available``.
_PACKAGES = {"bs4": "bs4", "opencv": "cv2", "flash_attn": "flash_attn", "torch_npu": "torch_npu"}


def __getattr__(name: str) -> Any:
    available = re.fullmatch(r"is_(\w+)_available", name)
    if available is not None:
        return partial(_is_installed, _PACKAGES.get(available[1], available[1]))
    return resolve(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None
