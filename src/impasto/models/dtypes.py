"""The dtypes that loading takes."""

from __future__ import annotations

import torch

from ..checks import shown
from ..errors import InputError


def parse_dtype(dtype: torch.dtype | str | None, default: torch.dtype | None = torch.float32) -> torch.dtype | None:
    """The dtype for a ``torch.dtype`` or its name; None for ``"auto"`` (as stored); ``default`` for None."""
    if dtype is None:
        return default
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point type, such as torch.bfloat16, not {dtype}")
        return dtype
    if dtype == "auto":
        return None
    names = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
    found = getattr(torch, names.get(str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch.")), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {shown(dtype)} is unknown; use float32, bfloat16, float16 or auto")
    return found
