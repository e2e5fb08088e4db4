"""What the trainer measures of a pipeline of the small world while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checks import whole_number
from ..errors import InputError
from .evaluate import ATTRIBUTES, held_out_prompts, judge_images


def check_pipeline(pipeline: Any, options: Mapping[str, Any]) -> dict[str, float]:
    """The shares of `ATTRIBUTES` that are right in images of held-out prompts, according to the judge.

    Args:
        options: `prompts`, how many (48); `seed` of the prompts (1; the tables of the documentation have 0); `batch`,
            how many at once (16). All others, such as `num_inference_steps` and `height`, are the pipeline's.

    Raises:
        InputError: an option is wrong.
    """
    given = dict(options)
    count, batch = (
        whole_number(name, given.pop(name, default), least=1) for name, default in (("prompts", 48), ("batch", 16))
    )
    prompts = held_out_prompts(count, whole_number("seed", given.pop("seed", 1), least=0))
    images: list[Any] = []
    for start in range(0, count, batch):
        some = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        try:
            images += pipeline([prompt.text for prompt in some], generator=generators, **given).images
        except TypeError as error:
            raise InputError(f"checks.scenes: {error}") from error
    counts = judge_images(prompts, images).counts()
    return {f"scenes {name}": counts[name][0] / max(1, counts[name][1]) for name in ATTRIBUTES}
