from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from impasto.errors import InputError
from impasto.scenes.captions import statement
from impasto.scenes.evaluate import (
    ATTRIBUTES,
    KINDS,
    NEVER_TRAINED,
    TRAINED,
    Prompt,
    adapter_prompts,
    evaluate,
    evaluate_edits,
    held_out_prompts,
    judge_images,
)
from impasto.scenes.renderer import render
from impasto.scenes.world import ADAPTER_COLOUR, ADAPTER_SHAPE, LEFT, Scene, Solid, is_held_out

N = 24


def drawn(scene: Scene) -> Tensor:
    return render(scene)


@cache
def scenes() -> dict[str, Scene]:
    return {prompt.text: prompt.scene for prompt in held_out_prompts(N, seed=1)}


def true_renders(prompts: list[str]) -> list[Tensor]:
    return [drawn(scenes()[prompt]) for prompt in prompts]


def swapped_colours(prompts: list[str]) -> list[Tensor]:
    images = []
    for prompt in prompts:
        scene = scenes()[prompt]
        colours = [solid.color for solid in scene.solids]
        if len(set(colours)) == 1:  # nothing to swap
            colours = ["red" if colours[0] == "blue" else "blue"] * len(colours)
        colours = colours[1:] + colours[:1]
        solids = tuple(Solid(s.shape, color, s.size) for s, color in zip(scene.solids, colours))
        images.append(drawn(Scene(solids, scene.relations, scene.background, scene.height, scene.width, scene.seed)))
    return images


def test_prompts_are_deterministic_distinct_and_of_both_kinds() -> None:
    prompts = held_out_prompts(40, seed=3)
    assert prompts == held_out_prompts(40, seed=3)
    assert prompts != held_out_prompts(40, seed=4)
    assert len({prompt.text for prompt in prompts}) == 40
    assert [prompt.kind for prompt in prompts[:4]] == [TRAINED, NEVER_TRAINED] * 2
    assert all(is_held_out(prompt.scene) == (prompt.kind == NEVER_TRAINED) for prompt in prompts)
    assert {len(prompt.scene.solids) for prompt in prompts} == {1, 2, 3}


def test_prompts_tell_their_scene() -> None:
    for prompt in held_out_prompts(30):
        assert statement(prompt.scene, prompt.with_size) in prompt.text
        assert ("background" in prompt.text) == prompt.with_background


def test_what_a_prompt_tells_is_found() -> None:
    scene = Scene((Solid("cube", "red", "small"), Solid("cone", "blue", "large")), (LEFT,), "light blue")
    bare = Prompt(scene, "a red cube to the left of a blue cone", TRAINED)
    assert not bare.with_size
    assert not bare.with_background
    full = Prompt(
        scene, "there is a small red cube to the left of a large blue cone, on a light blue background", TRAINED
    )
    assert full.with_size
    assert full.with_background


def test_true_renders_are_right() -> None:
    report = evaluate(true_renders, n=N, seed=1, batch_size=7)
    counts = report.counts()
    assert counts["whole"][1] == N
    for name in ("colours", "shapes", "relations", "background", "count"):
        right, asked = counts[name]
        assert right >= 0.95 * asked, name
    assert counts["whole"][0] >= 0.9 * N
    kinds = [report.counts(kind) for kind in KINDS]
    for name in ATTRIBUTES:
        assert tuple(map(sum, zip(*(kind[name] for kind in kinds)))) == counts[name]


def test_renders_are_as_sharp_as_renders_and_blurred_ones_are_not() -> None:
    def blurred(prompts: list[str]) -> list[Tensor]:
        return [F.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0] for image in true_renders(prompts)]

    assert evaluate(true_renders, n=4, seed=1).sharpness == pytest.approx(1)
    report = evaluate(blurred, n=4, seed=1)
    assert report.sharpness is not None
    assert 0 < report.sharpness < 0.3
    assert f"{100 * report.sharpness:.1f} %" in report.table()


def test_words_that_only_adapters_know_are_counted_by_themselves() -> None:
    prompts = {prompt.text: prompt.scene for prompt in adapter_prompts(N, seed=1)}
    words = [word for scene in prompts.values() for solid in scene.solids for word in (solid.color, solid.shape)]
    asked = words.count(ADAPTER_COLOUR) + words.count(ADAPTER_SHAPE)
    assert N <= asked < 2 * N
    assert not any(is_held_out(scene) for scene in prompts.values())

    def without(texts: list[str]) -> list[Tensor]:
        plain = {"color": {ADAPTER_COLOUR: "blue"}, "shape": {ADAPTER_SHAPE: "cube"}}
        images = []
        for scene in (prompts[text] for text in texts):
            solids = (
                replace(s, color=plain["color"].get(s.color, s.color), shape=plain["shape"].get(s.shape, s.shape))
                for s in scene.solids
            )
            images.append(render(replace(scene, solids=tuple(solids))))
        return images

    right = evaluate(lambda texts: [render(prompts[text]) for text in texts], N, 1, sample=adapter_prompts)
    wrong = evaluate(without, N, 1, sample=adapter_prompts)
    assert right.counts()["words"][0] >= 0.9 * asked == 0.9 * right.counts()["words"][1]
    assert wrong.counts()["words"][0] <= 0.1 * asked
    assert f"{N} images: {N} new words." in right.table()
    assert "words" not in evaluate(true_renders, n=2, seed=1).counts()


def test_swapped_colours_are_caught() -> None:
    multiple = sum(len(scene.solids) > 1 for scene in scenes().values())
    report = evaluate(swapped_colours, n=N, seed=1)
    right, asked = report.counts()["whole"]
    assert right <= asked - multiple + 1
    assert report.counts()["shapes"][0] >= 0.7 * report.counts()["shapes"][1]


def test_pil_images_and_a_wrong_image() -> None:
    def gray(prompts: list[str]) -> list[Image.Image]:
        return [Image.new("RGB", (128, 128), (181, 181, 184)) for _ in prompts]

    assert evaluate(gray, n=6, seed=1).counts()["whole"][0] == 0


def test_the_table_shows_percentages_with_counts() -> None:
    report = evaluate(true_renders, n=8, seed=1)
    table = report.table()
    right, asked = report.counts(NEVER_TRAINED)["whole"]
    assert asked == 4
    assert f"{100 * right / asked:.1f} % ({right}/{asked})" in table
    assert all(word in table for word in (*ATTRIBUTES, *KINDS))
    assert "8 images" in table


def test_the_dict_is_json_with_every_image() -> None:
    report = evaluate(true_renders, n=4, seed=1)
    content = json.loads(json.dumps(report.to_dict()))
    assert [image["prompt"] for image in content["images"]] == [p.text for p in held_out_prompts(4, seed=1)]
    assert content["accuracy"]["all"]["count"]["asked"] == 4


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="3 images were requested, and 1 returned"):
        evaluate(lambda prompts: [torch.rand(3, 128, 128)], n=3)
    with pytest.raises(InputError, match="at least 1"):
        evaluate(true_renders, n=0)
    with pytest.raises(InputError, match="not 3 and 0"):
        evaluate(true_renders, n=3, batch_size=0)
    with pytest.raises(InputError, match="not 0 and 16"):
        evaluate_edits(lambda texts, images: images, n=0)
    prompts = held_out_prompts(2)
    with pytest.raises(InputError, match="there are 1 images for 2 prompts"):
        judge_images(prompts, [torch.rand(3, 128, 128)])
