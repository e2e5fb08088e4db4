from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from impasto.scenes.layout import RADIUS
from impasto.scenes.renderer import SUPERSAMPLING, render, shade, trace
from impasto.scenes.solids import FAR, Body, distance, intersect
from impasto.scenes.world import ALL_SHAPES, BACKGROUNDS, FRAMES, RELATION_PAIRS, SHAPES, Scene, Solid

HUES = {"red": 0, "orange": 28, "yellow": 55, "green": 120, "cyan": 181, "blue": 230, "purple": 285}


def scene_of(*shapes: str, relations: tuple[str, ...] = (), color: str = "red", seed: int = 0) -> Scene:
    return Scene(tuple(Solid(shape, color, "large") for shape in shapes), relations, "gray", 64, 64, seed)


def hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in degrees, saturation and value of an image [3, H, W]."""
    r, g, b = image
    high, low = image.amax(0), image.amin(0)
    span = (high - low).clamp_min(1e-6)
    hue = torch.where(high == r, (g - b) / span % 6, torch.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
    return hue * 60, (high - low) / high.clamp_min(1e-6), high


def whole_pixels(ids: Tensor, number: int) -> Tensor:
    """The pixels [H, W] all samples of which show `number`."""
    return torch.nn.functional.avg_pool2d((ids == number).float()[None], SUPERSAMPLING)[0] == 1


def middle(ids: Tensor, number: int) -> tuple[float, float]:
    """Mean row and column of what is seen of a solid, as parts of the frame."""
    rows, columns = torch.nonzero(ids == number, as_tuple=True)
    return float(rows.float().mean() / ids.shape[0]), float(columns.float().mean() / ids.shape[1])


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_rays_meet_the_surface_that_distances_are_measured_from(shape: str) -> None:
    half = {"sphere": 0.8, "dome": 0.4}.get(shape, 0.9)
    body = Body(shape, 0.2, 0.9, -0.3, 0.8, half, 0.5 if shape == "cube" else 0.0)
    eye = (0.4, 3.0, 6.0)
    grid = torch.linspace(-0.3, 0.3, 61)
    ray = (grid[None] * torch.ones(61, 1), grid[:, None] * torch.ones(1, 61) - 0.35, -torch.ones(61, 61))
    t, normal = intersect(body, eye, ray)
    hit = t < FAR
    assert 100 < hit.sum() < hit.numel()
    x, y, z = (o + t * d for o, d in zip(eye, ray, strict=True))
    assert distance(body, (x[hit], y[hit], z[hit])).abs().max() < 1e-4
    nx, ny, nz = (n[hit] for n in normal)
    torch.testing.assert_close(nx**2 + ny**2 + nz**2, torch.ones_like(nx), atol=1e-4, rtol=0)
    # The normal is the direction in which the distance grows at unit rate.
    step = 0.01
    out = distance(body, (x[hit] + step * nx, y[hit] + step * ny, z[hit] + step * nz))
    assert ((out - step).abs() < 1e-3).float().mean() > 0.97
    # What misses is never inside.
    for depth in (5.0, 5.7, 6.3, 7.0):
        x, y, z = (o + depth * d for o, d in zip(eye, ray, strict=True))
        assert (distance(body, (x, y, z))[~hit] > -1e-4).all()


def test_same_scene_same_image() -> None:
    scene = scene_of("cube", "sphere", relations=("on top of",))
    assert torch.equal(render(scene), render(scene))
    assert not torch.equal(render(scene), render(replace(scene, seed=1)))
    assert torch.equal(render(scene, seed=1), render(replace(scene, seed=1)))


def test_colours_do_not_change_the_geometry() -> None:
    scene = scene_of("cube", "cone", relations=("behind",))
    buffer = trace(scene, 64, 64, 0)
    other = replace(scene, solids=(Solid("cube", "white", "large"), Solid("cone", "blue", "large")))
    torch.testing.assert_close(shade(buffer, ["white", "blue"], "gray"), render(other))


@pytest.mark.parametrize(("height", "width"), [*FRAMES, (48, 48), (80, 256)])
def test_images_have_the_size_asked_for_and_hold_every_solid(height: int, width: int) -> None:
    for seed in range(3):
        scene = replace(scene_of("cube", "sphere", "cone", relations=RELATION_PAIRS[seed]), height=height, width=width)
        image = render(scene, seed)
        assert image.shape == (3, height, width)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        ids = trace(scene, height, width, seed).ids
        border = torch.cat([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
        assert not border.any()
        assert set(ids.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", HUES)
def test_shading_keeps_the_hue(shape: str, color: str) -> None:
    for seed in range(3):
        scene = scene_of(shape, color=color, seed=seed)
        inside = whole_pixels(trace(scene, 64, 64, seed).ids, 1)
        hue, saturation, value = (channel[inside] for channel in hsv(render(scene)))
        off = (hue - HUES[color] + 180) % 360 - 180
        assert off.abs().quantile(0.95) < 4
        assert saturation.quantile(0.10) >= 0.75
        assert value.median() > 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_white_is_light_and_black_is_dark(shape: str) -> None:
    inside = whole_pixels(trace(scene_of(shape), 64, 64, 0).ids, 1)
    _, saturation, value = (channel[inside] for channel in hsv(render(scene_of(shape, color="white"))))
    assert value.median() > 0.7
    assert saturation.max() < 0.05
    _, _, value = (channel[inside] for channel in hsv(render(scene_of(shape, color="black"))))
    assert value.median() < 0.2


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_are_muted_and_told_apart_from_shadow_and_black(background: str) -> None:
    scene = replace(scene_of("cube"), background=background)
    empty = whole_pixels(trace(scene, 64, 64, 0).ids, 0)
    _, saturation, value = (channel[empty] for channel in hsv(render(scene)))
    assert saturation.max() < 0.35
    assert value.median() > 0.6
    assert value.min() > 0.25
    assert value.min() < 0.8 * value.median()  # there is a shadow


@pytest.mark.parametrize("first", ALL_SHAPES)
@pytest.mark.parametrize("second", ALL_SHAPES)
def test_relations_are_as_the_viewer_sees_them(first: str, second: str) -> None:
    for seed in range(3):
        for relation in ("to the left of", "to the right of", "on top of", "in front of", "behind"):
            scene = scene_of(first, second, relations=(relation,))
            ids = trace(scene, 64, 64, seed).ids
            (row_1, column_1), (row_2, column_2) = middle(ids, 1), middle(ids, 2)
            if relation == "to the left of":
                assert column_1 < column_2 - 0.2
            elif relation == "to the right of":
                assert column_1 > column_2 + 0.2
            elif relation == "on top of":
                assert row_1 < row_2 - 0.15
                assert abs(column_1 - column_2) < 0.06
            else:
                front, rear = (1, 2) if relation == "in front of" else (2, 1)
                lowest = {i: int(torch.nonzero((ids == i).any(1)).max()) for i in (front, rear)}
                assert lowest[front] > lowest[rear]
                shapes = {1: first, 2: second}
                areas = {i: int((ids == i).sum()) for i in (1, 2)}
                alone = int((trace(scene_of(shapes[rear]), 64, 64, seed).ids == 1).sum())
                # A single solid is drawn larger, by the ratio of the extents (4.5 : 3.3); depth adds some.
                assert areas[rear] > 0.35 * alone * (3.3 / 4.5) ** 2 * 0.8
                assert areas[front] > 0


def test_sizes_are_told_apart() -> None:
    def area(shape: str, size: str, seed: int) -> int:
        scene = Scene((Solid(shape, "red", size),), (), "gray", 64, 64, seed)
        return int((trace(scene, 64, 64, seed).ids == 1).sum())

    for shape in ALL_SHAPES:
        small = max(area(shape, "small", seed) for seed in range(5))
        large = min(area(shape, "large", seed) for seed in range(5))
        assert math.sqrt(large / small) > 1.3
    assert RADIUS["large"] / RADIUS["small"] >= 1.5


def test_a_crop_is_part_of_the_whole_image() -> None:
    scene = scene_of("cube", "sphere", "cylinder", relations=("on top of", "to the left of"))
    whole = trace(scene, 64, 96, 5)
    for top, left in ((0, 0), (24, 40), (32, 64)):
        rows, columns = slice(top, top + 32), slice(left, left + 32)
        part = trace(scene, 64, 96, 5, crop=(rows, columns))
        assert part.diffuse.shape[1:] == part.gloss.shape == (32, 32)
        assert (part.diffuse - whole.diffuse[:, rows, columns]).abs().mean() < 1e-4
        s = SUPERSAMPLING
        assert (part.ids == whole.ids[s * top : s * (top + 32), s * left : s * (left + 32)]).float().mean() > 0.999


def test_larger_images_show_the_same_scene() -> None:
    scene = scene_of("cylinder", "cube", relations=("in front of",))
    small, large = (trace(scene, side, side, 0) for side in (32, 128))
    pooled = torch.nn.functional.avg_pool2d(large.diffuse, 4)
    assert (pooled - small.diffuse).abs().mean() < 0.01
