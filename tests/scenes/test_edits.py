"""Edits of scenes, and how they are judged."""

from __future__ import annotations

import numpy as np
import torch

from impasto.scenes.edits import sample_edit
from impasto.scenes.evaluate import KINDS, evaluate_edits, held_out_edits, judge_edits
from impasto.scenes.labels import CELL, LABEL_CLASSES, label_cells
from impasto.scenes.renderer import SUPERSAMPLING, shade, trace
from impasto.scenes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Solid, is_held_out, sample_scene


def drawn(scene: Scene) -> torch.Tensor:
    return shade(trace(scene, 128, 128, scene.seed), [solid.color for solid in scene.solids], scene.background)


def test_one_colour_changes_and_the_solid_is_named_without_doubt() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        edit = sample_edit(sample_scene(rng, 128, 128), rng)
        changed = [i for i, (a, b) in enumerate(zip(edit.source.solids, edit.target.solids, strict=True)) if a != b]
        assert changed == [edit.solid]
        old, new = edit.source.solids[edit.solid], edit.target.solids[edit.solid]
        assert (old.shape, old.size) == (new.shape, new.size)
        assert f"{old.color} {old.shape}" in edit.text
        assert edit.text.endswith(new.color)
        named = [(solid.color, solid.shape) for solid in edit.source.solids]
        assert named.count((old.color, old.shape)) == 1
        assert len({(solid.color, solid.shape) for solid in edit.target.solids}) == len(named)
        assert edit.source.relations == edit.target.relations
        assert edit.source.seed == edit.target.seed


def test_the_judge_tells_what_was_edited_from_what_was_not() -> None:
    edits = held_out_edits(12)
    assert edits == held_out_edits(12)
    assert [is_held_out(edit.target) for edit in edits] == [False, True] * 6
    right = judge_edits(edits, [drawn(edit.target) for edit in edits])
    left = judge_edits(edits, [drawn(edit.source) for edit in edits])
    assert right.counts()["whole"][0] >= 10
    assert left.counts()["whole"][0] == 0
    assert right.counts(KINDS[1])["whole"][1] == 6


def test_images_and_instructions_come_in_batches() -> None:
    targets = {edit.text: edit.target for edit in held_out_edits(7, seed=3)}
    sizes = []

    def edit(texts: list[str], images: list[torch.Tensor]) -> list[torch.Tensor]:
        sizes.append((len(texts), len(images)))
        assert all(image.shape == (3, 128, 128) for image in images)
        return [drawn(targets[text]) for text in texts[:-1]] + images[-1:]  # the last one is left as it was

    report = evaluate_edits(edit, n=7, seed=3, batch_size=4)
    assert sizes == [(4, 4), (3, 3)]
    assert [verdict.prompt.text for verdict in report.verdicts] == list(targets)
    assert not report.verdicts[3].score.whole
    assert not report.verdicts[6].score.whole
    assert report.counts()["whole"][0] >= 4


def test_cells_are_labelled_with_what_fills_them() -> None:
    scene = Scene((Solid("cube", "red", "large"),), (), "beige", 128, 128, 3)
    buffer = trace(scene, 128, 128, scene.seed)
    ids = buffer.ids[::SUPERSAMPLING, ::SUPERSAMPLING][None]
    labels = label_cells(ids, [scene])[0]  # [4, 16, 16]
    assert labels.shape == (4, 128 // CELL, 128 // CELL)
    solid = labels[0] == 1
    assert solid.any()
    assert not solid.all()
    assert (labels[1][solid] == list(COLOURS).index("red")).all()
    assert (labels[2][solid] == 1 + SHAPES.index("cube")).all()
    assert (labels[1][~solid] == len(COLOURS) + list(BACKGROUNDS).index("beige")).all()
    assert (labels[2][~solid] == 0).all()
    assert (labels[3] == (1 + SIZES.index("large")) * solid).all()
    assert all(int(labels[i].max()) < LABEL_CLASSES[i] for i in range(4))
