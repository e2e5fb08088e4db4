from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from impasto.errors import InputError
from impasto.scenes.check import check_pipeline
from impasto.scenes.evaluate import held_out_prompts
from impasto.scenes.renderer import render


class Renderer:
    """A pipeline that generates what prompts ask for."""

    def __init__(self, seed: int) -> None:
        self.scenes = {prompt.text: prompt.scene for prompt in held_out_prompts(24, seed)}
        self.batches: list[int] = []

    def __call__(self, prompts: list[str], generator: list[Any], num_inference_steps: int = 20) -> SimpleNamespace:
        assert len(generator) == len(prompts)
        self.batches.append(len(prompts))
        return SimpleNamespace(images=[render(self.scenes[text]) for text in prompts])


def test_what_is_right_in_images_of_held_out_prompts_is_measured() -> None:
    pipeline = Renderer(seed=5)
    shares = check_pipeline(pipeline, {"prompts": 24, "seed": 5, "batch": 10, "num_inference_steps": 4})
    assert pipeline.batches == [10, 10, 4]
    assert set(shares) == {
        f"scenes {name}" for name in ("colours", "shapes", "sizes", "relations", "background", "count", "whole")
    }
    assert all(share > 0.8 for share in shares.values())
    other = Renderer(seed=5)
    other.scenes = dict(zip(other.scenes, reversed(other.scenes.values()), strict=True))
    assert check_pipeline(other, {"prompts": 24, "seed": 5})["scenes whole"] < 0.3


@pytest.mark.parametrize("options", [{"prompts": 0}, {"batch": "many"}, {"seed": -1}, {"stops": 3}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        check_pipeline(Renderer(seed=1), options)
