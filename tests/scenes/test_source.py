from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from impasto.errors import InputError
from impasto.scenes.labels import CAPTION_CLASSES
from impasto.scenes.renderer import render
from impasto.scenes.source import SceneSample, ScenesSource
from impasto.scenes.world import ADAPTER_COLOUR, ADAPTER_SHAPE, ON_TOP, is_held_out


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_samples_show_their_scenes_and_depend_on_the_index_alone() -> None:
    source = ScenesSource(100, seed=3, frames=[(48, 48), (32, 64)])
    again = ScenesSource(7, seed=3, frames=[(48, 48), (32, 64)])
    for index in (5, 0, 6):
        sample = source.read(index, source.size(index), rng())
        scene = source.scene(index)
        assert sample.image is not None
        assert sample.image.shape == (3, *source.size(index))
        torch.testing.assert_close(sample.image, 2 * render(scene) - 1)
        assert sample.caption is not None
        assert all(f"{solid.color} {solid.shape}" in sample.caption for solid in scene.solids)
        other = again.read(index, again.size(index), rng())
        assert other.image is not None
        assert torch.equal(sample.image, other.image)
        assert sample.caption == other.caption
    assert {source.size(index) for index in range(4)} == {(48, 48), (32, 64)}
    assert ScenesSource(7, seed=4).scene(0) != source.scene(0)


def test_labels_are_those_of_the_latent_pixels() -> None:
    source = ScenesSource(4, frames=[(64, 64)])
    labels = source.read(1, (64, 64), rng()).labels
    assert labels is not None
    assert labels.shape == (4, 8, 8)
    assert set(labels[0].unique().tolist()) == set(range(1 + len(source.scene(1).solids)))


def test_a_whole_scene_is_rendered_at_any_scale() -> None:
    source = ScenesSource(4, frames=[(96, 64)])
    small, large = (source.read(2, size, rng()).image for size in ((48, 32), (96, 64)))
    assert small is not None
    assert large is not None
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.02


def test_crops_are_parts_of_the_frame_that_show_part_of_a_solid() -> None:
    source = ScenesSource(20, frames=[(64, 64), (48, 80)], crop=(32, 32))
    places = set()
    for index in range(12):
        assert source.size(index) == (32, 32)
        sample = source.read(index, (32, 32), rng(index))
        top, left = sample.crop
        places.add((top, left))
        whole = 2 * render(source.scene(index)) - 1
        assert sample.size == whole.shape[1:]
        assert sample.image is not None
        assert sample.labels is not None
        assert (sample.image - whole[:, top : top + 32, left : left + 32]).abs().mean() < 1e-3
        assert sample.labels[0].any()
    assert len(places) > 8


def test_held_out_combinations_never_appear_and_adapters_have_their_words() -> None:
    for kind in ("ordinary", "adapter"):
        source = ScenesSource(300, frames=[(8, 8)], kind=kind, stacks=0.5)
        scenes = [source.scene(index) for index in range(300)]
        assert not any(is_held_out(scene) for scene in scenes)
        words = [{word for solid in scene.solids for word in (solid.shape, solid.color)} for scene in scenes]
        new = {ADAPTER_SHAPE, ADAPTER_COLOUR}
        assert all(bool(shown & new) == (kind == "adapter") for shown in words)


def test_stacks_have_a_solid_on_another_and_often_a_single_colour() -> None:
    source = ScenesSource(400, frames=[(8, 8)], stacks=1.0)
    scenes = [source.scene(index) for index in range(400)]
    assert all(ON_TOP in scene.relations for scene in scenes)
    assert 60 < sum(len(scene.solids) == 3 for scene in scenes) < 140
    alike = [scene for scene in scenes if len({solid.color for solid in scene.solids}) == 1]
    assert 80 < len(alike) < 160
    assert all(len(set(scene.solids)) == len(scene.solids) for scene in scenes)
    some = [ScenesSource(400, frames=[(8, 8)], stacks=0.3).scene(index) for index in range(400)]
    assert 150 < sum(ON_TOP in scene.relations for scene in some) < 250  # 0.3, and a quarter of the others


def test_captions_alone_say_what_is_labelled() -> None:
    source = ScenesSource(40, images=False)
    sized = 0
    for index in range(40):
        sample, scene = source.read(index, (8, 8), rng(index)), source.scene(index)
        answers = sample.extra["answers"]
        assert sample.image is None
        assert sample.caption is not None
        assert answers.shape == (3, len(CAPTION_CLASSES))
        assert (answers < torch.tensor(CAPTION_CLASSES)).all()
        assert (answers[:, 0] > 0).sum() == (answers[:, 1] > 0).sum() == len(scene.solids)
        assert (answers[:, 3] > 0).sum() == len(scene.relations)
        assert bool(answers[0, 2]) == (f"{scene.solids[0].size} {scene.solids[0].color}" in sample.caption)
        assert bool(answers[0, 4]) == ("background" in sample.caption)
        sized += bool(answers[0, 2])
    assert 5 < sized < 30


def test_a_share_of_the_captions_gives_sizes() -> None:
    def count(sized: float) -> int:
        source = ScenesSource(40, images=False, sized=sized)
        texts = [source.read(index, (8, 8), rng(index)).caption or "" for index in range(40)]
        assert source.wordings(0) == ScenesSource(1, sized=sized).wordings(0)
        return sum("small" in text or "large" in text for text in texts)

    assert count(0) == 0 < count(0.4) < count(0.8) < 40 == count(1)


def test_colourings_share_an_arrangement() -> None:
    source = ScenesSource(9, frames=[(32, 32)], colourings=3)
    scenes = [source.scene(index) for index in range(9)]
    assert scenes[0].seed == scenes[1].seed == scenes[2].seed != scenes[3].seed
    assert len(set(scenes[:3])) == 3


def test_colours_of_a_scene_are_independent_in_every_colouring() -> None:
    for colourings in (1, 2):
        source = ScenesSource(1500, seed=7, frames=[(8, 8)], colourings=colourings)
        pairs = [s.solids for s in map(source.scene, range(colourings - 1, 1500, colourings)) if len(s.solids) == 2]
        second = Counter(solids[1].color for solids in pairs)
        assert min(second.values()) > 0.06 * len(pairs)  # of eight colours
        same = sum(solids[0].color == solids[1].color for solids in pairs)
        assert 0.06 * len(pairs) < same < 0.2 * len(pairs)


def test_samples_have_the_fields_of_the_trainer() -> None:
    data = pytest.importorskip("impasto.training.data.sample")
    assert [(f.name, f.default) for f in fields(SceneSample)] == [(f.name, f.default) for f in fields(data.Sample)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"colourings": 0},
        {"seed": -1},
        {"sized": 1.5},
        {"stacks": -0.1},
        {"frames": []},
        {"frames": [(60, 64)]},
        {"crop": (512, 512)},
        {"kind": "other"},
        {"kind": "adapter", "images": False},
    ],
)
def test_other_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ScenesSource(**{"count": 4, **wrong})  # type: ignore[arg-type]


def test_samples_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="no sample 4"):
        ScenesSource(4).read(4, (8, 8), rng())
