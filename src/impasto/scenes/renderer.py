"""Render scenes in two steps: `trace` finds what is visible and how it is lit, `shade` colours it.

All light is neutral, so the lit colour is that of the solid times one number per sample: colouring the same geometry
again is cheap, and shading cannot change a hue. Rays are intersected with solids in closed form. Shadows are soft:
a convex solid's signed distance along a ray is convex, so a golden-section search finds the closest approach to the
shadow ray, and the penumbra is a smooth step of that distance over the width of the light as seen from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Camera, Layout, arrange
from .solids import FAR, Body, Vector, distance, intersect
from .world import ALL_COLOURS, BACKGROUNDS, Scene

SUPERSAMPLING = 2  # samples per pixel and side
GAMMA = 2.2
LIGHT_WIDTH = 0.13  # tangent of half the apparent angle of the key light
AMBIENT, SKY, KEY, FILL = 0.24, 0.14, 0.68, 0.10  # linear light
GLOSS, GLOSS_EXPONENT = 0.38, 45.0
CONTACT, CONTACT_REACH = 0.55, 0.28  # ambient occlusion by a nearby surface: depth, and reach in world units
SEARCH_STEPS = 9
GOLDEN = 0.6180339887


@dataclass(frozen=True)
class GeometryBuffer:
    """The traced geometry of an image of H x W pixels with K solids.

    `diffuse` [K + 1, H, W] is the display-referred brightness of the background (first) and of each solid, times its
    share of the pixel; `gloss` [H, W] how far a highlight shifts any colour towards white; `ids` [H * s, W * s] uint8
    what each sample shows: 0 the background, i the i-th solid.
    """

    diffuse: Tensor
    gloss: Tensor
    ids: Tensor


def trace(
    scene: Scene,
    height: int,
    width: int,
    seed: int,
    supersampling: int = SUPERSAMPLING,
    crop: tuple[slice, slice] | None = None,
) -> GeometryBuffer:
    """Find what each sample of a height x width image shows, and its lighting. Colours have no effect.

    Args:
        crop: rows and columns in pixels, each a slice with start and stop: only these are traced.
    """
    return trace_layout(arrange(scene, height, width, seed), height, width, supersampling, crop)


def trace_layout(
    layout: Layout, height: int, width: int, supersampling: int = SUPERSAMPLING, crop: tuple[slice, slice] | None = None
) -> GeometryBuffer:
    """The same for a scene that is laid out already."""
    rows, columns = height * supersampling, width * supersampling
    studio = _studio(rows, columns)
    if crop is not None:
        layout = replace(layout, camera=layout.camera.cropped(*crop, height, width))
        cut = tuple(slice(side.start * supersampling, side.stop * supersampling) for side in crop)
        studio, rows, columns = studio[cut], cut[0].stop - cut[0].start, cut[1].stop - cut[1].start
    rays = layout.camera.rays(rows, columns)
    depth, normal, ids = _ground(layout.camera, rays)
    for number, body in enumerate(layout.bodies, 1):
        window = layout.camera.window(body, rows, columns)
        t, facing = intersect(body, layout.camera.eye, _cut(rays, window))
        nearer = t < depth[window]
        depth[window] = torch.where(nearer, t, depth[window])
        ids[window] = torch.where(nearer, number, ids[window])
        for into, value in zip(normal, facing, strict=True):
            into[window] = torch.where(nearer, value, into[window])
    diffuse, gloss = _light(layout, studio, rays, depth, normal, ids)
    parts = torch.stack([diffuse * (ids == number) for number in range(len(layout.bodies) + 1)])
    pooled = torch.nn.functional.avg_pool2d(torch.cat([parts, gloss[None]]), supersampling)
    return GeometryBuffer(pooled[:-1], pooled[-1], ids)


def shade(buffer: GeometryBuffer, colors: Sequence[str], background: str) -> Tensor:
    """Colour a traced geometry, with one colour name per solid. Returns the image [3, H, W] in [0, 1]."""
    palette = torch.tensor([BACKGROUNDS[background], *(ALL_COLOURS[color] for color in colors)])
    assert len(palette) == len(buffer.diffuse), "one colour per solid"
    image = (palette.T @ buffer.diffuse.flatten(1)).view(3, *buffer.gloss.shape)
    return torch.lerp(image, torch.ones(()), buffer.gloss).clamp_(0, 1)  # towards white, which keeps the hue


def render(scene: Scene, seed: int | None = None) -> Tensor:
    """The image [3, scene.height, scene.width] of a scene, float32 in [0, 1]; `seed` replaces the scene's own."""
    buffer = trace(scene, scene.height, scene.width, scene.seed if seed is None else seed)
    return shade(buffer, [solid.color for solid in scene.solids], scene.background)


def _cut(vector: Vector, window: tuple[slice, slice] | Tensor) -> Vector:
    x, y, z = vector
    return x[window], y[window], z[window]


def _along(origin: Vector | tuple[float, float, float], direction: Vector, t: Tensor) -> Vector:
    return origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2]


def _ground(camera: Camera, rays: Vector) -> tuple[Tensor, Vector, Tensor]:
    """The plane y = 0, which fills the frame: depth, upward normals, ids of zero."""
    depth = torch.where(rays[1] < -1e-3, -camera.eye[1] / rays[1], FAR)
    normal = torch.zeros_like(depth), torch.ones_like(depth), torch.zeros_like(depth)
    return depth, normal, torch.zeros(depth.shape, dtype=torch.uint8)


def _light(
    layout: Layout, studio: Tensor, rays: Vector, depth: Tensor, normal: Vector, ids: Tensor
) -> tuple[Tensor, Tensor]:
    point = _along(layout.camera.eye, rays, depth)
    lx, ly, lz = layout.light
    nx, ny, nz = normal
    facing = nx * lx + ny * ly + nz * lz
    shadow, open_sky = torch.ones_like(depth), torch.ones_like(depth)
    for number, body in enumerate(layout.bodies, 1):
        _occlude(body, layout.light, point, (ids != number) & (facing > -0.2), ids != number, shadow, open_sky)
    solid = ids > 0
    # Contact shadow of the ground on downward surfaces close to it.
    low = CONTACT * torch.exp(-point[1].clamp_min(0) / CONTACT_REACH) * (0.5 - 0.5 * ny)
    open_sky = open_sky * (1 - low)

    key = ((facing + 0.12) / 1.12).clamp_min(0)  # slightly wrapped: the light is wide
    fill = (0.8 * nx + 0.1 * ny + 0.6 * nz).clamp_min(0)
    linear = (AMBIENT + SKY * ny) * open_sky + KEY * key * shadow + FILL * fill * open_sky
    # Fully lit ground has its nominal colour at any height of the light.
    floor = 0.40 * open_sky + 0.60 * shadow * (0.4 + 0.6 * open_sky)
    brightness = torch.where(solid, linear.clamp(0, 1), floor) ** (1 / GAMMA)
    brightness = torch.where(solid, brightness, brightness * studio)

    rx, ry, rz = rays
    size = (rx * rx + ry * ry + rz * rz).rsqrt()
    hx, hy, hz = lx - rx * size, ly - ry * size, lz - rz * size  # Blinn's half vector
    half = (hx * nx + hy * ny + hz * nz) * (hx * hx + hy * hy + hz * hz).rsqrt()
    gloss = GLOSS * half.clamp_min(0) ** GLOSS_EXPONENT * shadow * solid
    return brightness, gloss


def _occlude(
    body: Body,
    light: tuple[float, float, float],
    point: Vector,
    lit: Tensor,
    other: Tensor,
    shadow: Tensor,
    open_sky: Tensor,
) -> None:
    """Multiply into `shadow` the share of key light that `body` lets through, and into `open_sky` that of the sky."""
    lx, ly, lz = light
    cx, cy, cz = body.x - point[0], body.y - point[1], body.z - point[2]
    along = cx * lx + cy * ly + cz * lz  # distance along the shadow ray to the point nearest to the centre
    squared = cx * cx + cy * cy + cz * cz
    aside = (squared - along * along).clamp_min(0).sqrt()

    reached = lit & (along > -body.bound) & (aside < body.bound + LIGHT_WIDTH * (along.clamp_min(0) + body.bound))
    start = _cut(point, reached)
    if len(start[0]):
        low = (along[reached] - body.bound).clamp_min(0.0)
        high = (along[reached] + body.bound).clamp_min(0.02)
        closest, t = _closest_approach(body, start, light, low, high)
        width = LIGHT_WIDTH * t + 0.015
        part = (closest / (2 * width) + 0.5).clamp(0, 1)
        shadow[reached] *= part * part * (3 - 2 * part)

    close = other & (squared < (body.bound + 4 * CONTACT_REACH) ** 2)
    near = _cut(point, close)
    if len(near[0]):
        gap = distance(body, near).clamp_min(0)
        # Minus a constant, so that it fades to zero at four times the reach.
        open_sky[close] *= 1 - CONTACT * (torch.exp(-gap / CONTACT_REACH) - math.exp(-4)).clamp_min(0)


def _closest_approach(
    body: Body, start: Vector, light: tuple[float, float, float], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimum signed distance along each ray between `low` and `high`, and its position (golden-section search)."""

    def at(t: Tensor) -> Tensor:
        return distance(body, (start[0] + t * light[0], start[1] + t * light[1], start[2] + t * light[2]))

    span = high - low
    a, b = high - GOLDEN * span, low + GOLDEN * span
    fa, fb = at(a), at(b)
    for _ in range(SEARCH_STEPS):
        left = fa < fb
        high, low = torch.where(left, b, high), torch.where(left, low, a)
        kept, f_kept = torch.where(left, a, b), torch.where(left, fa, fb)
        new = low + high - kept  # the mirror image of the kept point
        f_new = at(new)
        below = new < kept
        a, b = torch.where(below, new, kept), torch.where(below, kept, new)
        fa, fb = torch.where(below, f_new, f_kept), torch.where(below, f_kept, f_new)
    first = fa < fb
    return torch.where(first, fa, fb), torch.where(first, a, b)


def _studio(rows: int, columns: int) -> Tensor:
    """The brightness of an empty studio [rows, columns]: a cove, softly lit from the upper left."""
    y = torch.linspace(-1, 1, rows)[:, None]
    x = torch.linspace(-1, 1, columns)[None]
    vignette = ((x + 0.25) ** 2 + (y + 0.1) ** 2) / 2.6
    wall = torch.sigmoid((-0.35 - y) * 5)  # the floor curves up into a slightly darker wall
    return (1.04 - 0.15 * vignette - 0.06 * wall).clamp(0.7, 1.05)
