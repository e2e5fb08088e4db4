from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from impasto.errors import InputError
from impasto.scenes.judge import WEIGHTS, Judge, as_tensor, bundled_judge, fit, read
from impasto.scenes.reading import ARRANGEMENTS, Reading, canonical, compare
from impasto.scenes.renderer import render
from impasto.scenes.world import (
    BEHIND,
    FRAMES,
    FRONT,
    LEFT,
    ON_TOP,
    RELATION_PAIRS,
    RELATIONS,
    RIGHT,
    Scene,
    Solid,
    sample_scene,
)

A, B, C = Solid("cube", "red", "large"), Solid("sphere", "blue", "small"), Solid("cone", "green", "large")


@cache
def renders(count: int = 60) -> tuple[list[Tensor], list[Scene]]:
    rng = np.random.default_rng(31_337)
    scenes = [sample_scene(rng) for _ in range(count)]
    return [render(scene) for scene in scenes], scenes


# --- the canonical form


@pytest.mark.parametrize(("relation", "mirror"), [(LEFT, RIGHT), (RIGHT, LEFT), (FRONT, BEHIND), (BEHIND, FRONT)])
def test_both_wordings_of_a_relation_have_one_canonical_form(relation: str, mirror: str) -> None:
    assert canonical(Scene((A, B), (relation,), "gray")) == canonical(Scene((B, A), (mirror,), "gray"))


def test_canonical_pairs_go_from_the_left_from_the_front_and_from_the_top() -> None:
    assert canonical(Scene((A, B), (RIGHT,), "pink")) == Reading((B, A), (LEFT,), "pink")
    assert canonical(Scene((A, B), (BEHIND,), "pink")) == Reading((B, A), (FRONT,), "pink")
    assert canonical(Scene((A, B), (ON_TOP,), "pink")) == Reading((A, B), (ON_TOP,), "pink")


def test_a_row_has_one_canonical_form() -> None:
    row = Reading((A, B, C), (LEFT, LEFT), "gray")
    assert canonical(Scene((A, B, C), (LEFT, LEFT), "gray")) == row
    assert canonical(Scene((C, B, A), (RIGHT, RIGHT), "gray")) == row


@pytest.mark.parametrize("relation", [LEFT, RIGHT, FRONT, BEHIND, ON_TOP])
def test_a_stack_comes_first(relation: str) -> None:
    assert canonical(Scene((A, B, C), (ON_TOP, relation), "gray")) == Reading((A, B, C), (ON_TOP, relation), "gray")


def test_every_scene_has_one_of_the_arrangements_and_no_arrangement_is_idle() -> None:
    scenes = [Scene((A,), (), "gray"), *(Scene((A, B), (r,), "gray") for r in RELATIONS)]
    scenes += [Scene((A, B, C), pair, "gray") for pair in RELATION_PAIRS]
    assert {canonical(scene).relations for scene in scenes} == set(ARRANGEMENTS)
    assert all(canonical(canonical(scene)) == canonical(scene) for scene in scenes)


def test_a_reading_out_of_canonical_form_is_refused() -> None:
    with pytest.raises(InputError, match="canonical"):
        Reading((A, B), (RIGHT,), "gray")
    with pytest.raises(InputError, match="canonical"):
        Reading((A,), (LEFT,), "gray")


# --- comparing


def test_a_scene_agrees_with_its_own_reading_in_every_wording() -> None:
    for relation in RELATIONS:
        scene = Scene((A, B), (relation,), "beige")
        assert compare(canonical(scene), scene).whole
    for pair in RELATION_PAIRS:
        scene = Scene((A, B, C), pair, "beige")
        assert compare(canonical(scene), scene).whole


def test_solids_that_changed_places_are_right_and_their_relation_is_wrong() -> None:
    score = compare(Reading((B, A), (LEFT,), "gray"), Scene((A, B), (LEFT,), "gray"))
    assert score.colours == score.shapes == (True, True)
    assert score.relations == (False,)
    assert not score.whole


def test_swapped_colours_are_wrong_and_the_relation_is_right() -> None:
    seen = Reading((Solid("cube", "blue", "large"), Solid("sphere", "red", "small")), (ON_TOP,), "gray")
    score = compare(seen, Scene((A, B), (ON_TOP,), "gray"))
    assert score.colours == (False, False)
    assert score.shapes == (True, True)
    assert score.relations == (True,)
    assert not score.whole


def test_one_wrong_colour_is_charged_to_its_solid_in_the_order_of_the_scene() -> None:
    scene = Scene((A, B), (RIGHT,), "gray")
    seen = Reading((B, Solid("cube", "green", "large")), (LEFT,), "gray")
    assert compare(seen, scene).colours == (False, True)


def test_a_missing_solid_is_wrong_in_everything() -> None:
    score = compare(Reading((B,), (), "gray"), Scene((A, B), (LEFT,), "gray"))
    assert score.colours == score.shapes == score.sizes == (False, True)
    assert score.relations == (False,)
    assert not score.count


def test_a_solid_too_many_spoils_only_the_whole() -> None:
    score = compare(Reading((A, B, C), (LEFT, LEFT), "gray"), Scene((A, B), (LEFT,), "gray"))
    assert all(score.colours + score.shapes + score.sizes + score.relations + score.background)
    assert not score.count
    assert not score.whole


def test_sizes_and_background_count_only_if_told() -> None:
    scene = Scene((A, B), (LEFT,), "gray")
    seen = Reading((Solid("cube", "red", "small"), B), (LEFT,), "pink")
    assert compare(seen, scene, with_size=False, with_background=False).whole
    assert compare(seen, scene, with_size=False).background == (False,)
    assert compare(seen, scene, with_background=False).sizes == (False, True)
    assert not compare(seen, scene, with_size=False).whole
    assert not compare(seen, scene, with_background=False).whole


# --- reading


def test_the_bundled_judge_reads_fresh_renders() -> None:
    images, scenes = renders()
    scores = [compare(reading, scene) for reading, scene in zip(read(images), scenes)]
    for name in ("colours", "shapes", "sizes", "relations", "background"):
        assert np.mean([flag for score in scores for flag in getattr(score, name)]) >= 0.97, name
    assert np.mean([score.count for score in scores]) >= 0.97


def test_it_reads_slightly_imperfect_images() -> None:
    images, scenes = renders()
    generator = torch.Generator().manual_seed(0)
    noisy = [(0.95 * p + 0.02 * torch.randn(p.shape, generator=generator)).clamp(0, 1) for p in images]
    worse = [torch.nn.functional.avg_pool2d(p, 3, 1, 1, count_include_pad=False) for p in noisy]
    scores = [compare(reading, scene) for reading, scene in zip(read(worse), scenes)]
    for name in ("colours", "shapes", "relations"):
        assert np.mean([flag for score in scores for flag in getattr(score, name)]) >= 0.93, name


def test_an_image_reads_the_same_in_every_form_and_company() -> None:
    images, _ = renders()
    one = images[1]
    image = Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy())
    alone = read(one[None])[0]
    assert read([image]) == read([(one * 255).round().byte()]) == [alone]
    assert read(images[:8])[1] == alone


def test_other_sizes_are_read() -> None:
    scenes = [s for s in renders()[1] if (s.height, s.width) == (128, 128)][:8]
    large = [render(Scene(s.solids, s.relations, s.background, 256, 256, s.seed)) for s in scenes]
    scores = [compare(reading, scene) for reading, scene in zip(read(large), scenes)]
    assert np.mean([flag for score in scores for flag in score.colours + score.shapes]) >= 0.95


@pytest.mark.parametrize("size", [(256, 256), (64, 64), (300, 500), (500, 300), (128, 130), (40, 400)])
def test_fitting_keeps_proportions_and_fills_a_frame(size: tuple[int, int]) -> None:
    ramp = torch.linspace(0.2, 0.8, size[1]).expand(3, *size)
    fitted = fit(ramp)
    assert tuple(fitted.shape[1:]) in FRAMES
    assert 0.19 <= float(fitted.min()) <= float(fitted.max()) <= 0.81


def test_frames_are_left_as_they_are() -> None:
    image = torch.rand(3, 96, 160)
    assert fit(image) is image


@pytest.mark.parametrize(
    "image", [torch.rand(1, 8, 8), torch.rand(3, 8), 2 * torch.ones(3, 8, 8), torch.ones(3, 8, 8).long(), "a.png"]
)
def test_what_is_no_image_is_refused(image: object) -> None:
    with pytest.raises(InputError):
        as_tensor(image)  # type: ignore[arg-type]


def test_it_is_saved_and_loaded(tmp_path: object) -> None:
    judge = Judge(fine_channels=8, coarse_channels=8, hidden_channels=8, blocks=1).eval()
    judge.save_pretrained(str(tmp_path))
    again = Judge.from_pretrained(str(tmp_path))
    image = torch.rand(1, 3, 32, 48)
    assert again.config.blocks == 1
    torch.testing.assert_close(again(image).arrangement, judge(image).arrangement)


def test_the_bundled_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 900_000
    assert bundled_judge().num_parameters() <= 450_000
