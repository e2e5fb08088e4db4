from __future__ import annotations

import torch

from impasto.scenes import editing
from impasto.scenes.renderer import render
from impasto.scenes.world import RIGHT, Scene, Solid

SCENE = Scene((Solid("sphere", "red", "large"), Solid("cone", "blue", "small")), (RIGHT,), "gray", seed=3)


def test_the_mask_covers_one_solid_and_not_the_other() -> None:
    image = torch.nn.functional.interpolate(render(SCENE)[None], (64, 64), mode="area")[0]
    red, blue = (image[0] > image[2] + 0.3), (image[2] > image[0] + 0.3)
    for index, own, other in ((0, red, blue), (1, blue, red)):
        mask = editing.mask_of(SCENE, index, 64)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask[own].mean() > 0.99
        assert mask[other].mean() < 0.15  # its edge, which the other solid covers in part
        assert mask.mean() < 0.5


def test_replaced_solids_differ_in_shape_and_colour_and_keep_their_size() -> None:
    for case in editing.repainted(12, 64, seed=1):
        source, target = case.source, case.target.scene
        changed = [(a, b) for a, b in zip(source.solids, target.solids) if a != b]
        assert len(changed) == 1
        old, new = changed[0]
        assert old.shape != new.shape
        assert old.color != new.color
        assert old.size == new.size
        assert f"{new.size} {new.color} {new.shape}" in case.target.text
        assert case.mask is not None
        assert case.mask.shape == (64, 64)


def test_cases_are_deterministic_and_their_images_are_square() -> None:
    for kind in (editing.kept, editing.changed):
        first, second = kind(4, 5), kind(4, 5)
        assert first == second
        assert all(case.image(32).shape == (3, 32, 32) for case in first)
    assert all(case.source == case.target.scene for case in editing.kept(4))
    assert all(case.source != case.target.scene for case in editing.changed(4))


def test_true_images_are_right_and_others_are_not() -> None:
    cases = editing.repainted(6, 64, seed=2)
    right = [render(case.target.scene) for case in cases]
    unchanged = [render(case.source) for case in cases]
    assert all(editing.shows_solids(editing.judge_cases(cases, right)))
    assert not any(editing.shows_solids(editing.judge_cases(cases, unchanged)))
    same = editing.same_geometry(unchanged, unchanged)
    assert all(all(flags) for flags in same.values())
    assert len(same["arrangements"]) == len(same["images"]) == 6
    assert not any(editing.same_geometry(unchanged, right)["images"])
