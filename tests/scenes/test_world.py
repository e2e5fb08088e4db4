from __future__ import annotations

import hashlib

import numpy as np
import pytest

from impasto.errors import InputError
from impasto.scenes.captions import caption, statement
from impasto.scenes.evaluate import held_out_edits, held_out_prompts
from impasto.scenes.source import ScenesSource
from impasto.scenes.world import (
    ADAPTER_COLOUR,
    ADAPTER_SHAPE,
    COLOURS,
    FRAMES,
    LEFT,
    ON_TOP,
    RELATIONS,
    RIGHT,
    SHAPES,
    Scene,
    Solid,
    is_held_out,
    recolour,
    sample_scene,
    with_adapter_words,
)


def pair(first: str, relation: str, second: str) -> Scene:
    solids = []
    for words in (first, second):
        color, shape = words.split()
        solids.append(Solid(shape, color, "large"))
    return Scene(tuple(solids), (relation,), "gray")


def test_sampling_is_deterministic_by_seed() -> None:
    def draw(seed: int) -> list[Scene]:
        rng = np.random.default_rng(seed)
        return [sample_scene(rng) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_sampling_covers_the_vocabulary() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(600)]
    assert {s.shape for scene in scenes for s in scene.solids} == set(SHAPES)
    assert {s.color for scene in scenes for s in scene.solids} == set(COLOURS)
    assert {r for scene in scenes for r in scene.relations} == set(RELATIONS)
    assert {(scene.height, scene.width) for scene in scenes} == set(FRAMES)
    counts = np.bincount([len(scene.solids) for scene in scenes], minlength=4)[1:] / len(scenes)
    np.testing.assert_allclose(counts, [0.25, 0.60, 0.15], atol=0.06)
    assert all(len({(s.color, s.shape) for s in scene.solids}) == len(scene.solids) for scene in scenes)


def test_scenes_captions_and_held_out_prompts_stay_as_the_models_were_trained_and_measured_on_them() -> None:
    source = ScenesSource(30, 5, frames=[(32, 48)], colourings=5)
    samples = [(source.scene(index), source.wordings(index)) for index in range(30)]
    found = [repr(samples), repr(held_out_prompts(100)), repr(held_out_edits(40))]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in found] == [
        "24b78745ac7f2913",
        "c3cd516556401bb6",
        "8dde1376d57186b8",
    ]


def test_the_shape_and_the_colour_of_adapters_are_in_no_ordinary_scene() -> None:
    rng = np.random.default_rng(4)
    assert ADAPTER_COLOUR not in COLOURS
    assert ADAPTER_SHAPE not in SHAPES
    kinds = {(True, False): 0, (False, True): 0, (True, True): 0}
    for _ in range(90):
        ordinary = sample_scene(rng)
        scene = with_adapter_words(ordinary, rng)
        changed = [(new, old) for new, old in zip(scene.solids, ordinary.solids, strict=True) if new != old]
        ((new, old),) = changed
        kinds[new.shape == ADAPTER_SHAPE, new.color == ADAPTER_COLOUR] += 1
        assert new.size == old.size
    assert min(kinds.values()) > 15


def test_recolouring_keeps_the_arrangement() -> None:
    scene = sample_scene(np.random.default_rng(1))
    other = recolour(scene, np.random.default_rng(2))
    assert [(s.shape, s.size) for s in scene.solids] == [(s.shape, s.size) for s in other.solids]
    assert (scene.relations, scene.seed) == (other.relations, other.seed)


def test_about_a_tenth_of_the_combinations_is_held_out() -> None:
    names = [f"{color} {shape}" for color in COLOURS for shape in SHAPES]
    held = [is_held_out(pair(a, relation, b)) for a in names for relation in RELATIONS for b in names if a != b]
    assert 0.08 < np.mean(held) < 0.12


def test_the_demo_prompt_is_trained() -> None:
    assert not is_held_out(pair("red cube", ON_TOP, "blue sphere"))


def test_a_combination_and_its_mirror_wording_are_held_out_together() -> None:
    names = [f"{color} {shape}" for color in COLOURS for shape in SHAPES]
    for a in names[::3]:
        for b in names[::5]:
            assert is_held_out(pair(a, LEFT, b)) == is_held_out(pair(b, RIGHT, a))


def test_canonical_caption() -> None:
    assert statement(pair("red cube", ON_TOP, "blue sphere")) == "a red cube on top of a blue sphere"
    assert statement(pair("orange cone", LEFT, "white cube"), with_size=True) == (
        "a large orange cone to the left of a large white cube"
    )
    three = Scene(
        (*pair("red cube", ON_TOP, "blue sphere").solids, Solid("cone", "green", "small")),
        (ON_TOP, LEFT),
        "beige",
    )
    assert statement(three) == "a red cube on top of a blue sphere, to the left of a green cone"


def test_captions_name_every_attribute_and_vary() -> None:
    rng = np.random.default_rng(0)
    sized = grounded = 0
    for _ in range(300):
        scene = sample_scene(rng)
        text = caption(scene, rng)
        assert text == text.lower()
        place = 0
        for index, solid in enumerate(scene.solids):
            place = text.index(f"{solid.color} {solid.shape}", place)
            if index:
                assert scene.relations[index - 1] in text
        size = any(f"{s.size} {s.color}" in text for s in scene.solids)
        assert size == all(f"{s.size} {s.color}" in text for s in scene.solids)
        sized += size
        grounded += f"on a {scene.background} background" in text
    assert 80 < sized < 160
    assert 80 < grounded < 160
    scene = pair("red cube", ON_TOP, "blue sphere")
    assert len({caption(scene, rng) for _ in range(200)}) > 15


@pytest.mark.parametrize(
    "make",
    [
        lambda: Solid("torus", "red", "small"),
        lambda: Solid("cube", "pink", "small"),
        lambda: Scene((), (), "gray"),
        lambda: Scene((Solid("cube", "red", "small"),), (LEFT,), "gray"),
        lambda: Scene((Solid("cube", "red", "small"),) * 2, ("under",), "gray"),
        lambda: Scene((Solid("cube", "red", "small"),) * 3, (LEFT, RIGHT), "gray"),
        lambda: Scene((Solid("cube", "red", "small"),), (), "crimson"),
    ],
)
def test_words_outside_the_world_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]
