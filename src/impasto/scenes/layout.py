"""From a scene to geometry: the positions of its solids, the camera that frames them, and the light.

World axes: x to the viewer's right, y up, z towards the viewer; the ground is y = 0. Lengths are in radii of a
large solid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .solids import FAR, Body, intersect
from .world import BEHIND, FRONT, LEFT, ON_TOP, RIGHT, Scene

RADIUS = {"small": 0.64, "large": 1.0}
PROPORTIONS = {
    "sphere": (1.0, 1.0),
    "cube": (0.78, 0.78),
    "cylinder": (0.75, 0.84),
    "cone": (0.94, 0.98),
    "dome": (1.04, 0.52),
}
# World units across the shorter side of the frame, by number of solids, so that sizes can be distinguished.
EXTENT = {1: 3.3, 2: 4.5, 3: 5.6}
CAMERA_DISTANCE = 14.0
MARGIN = 0.05  # share of the frame left empty on each side
MIN_VISIBLE = 0.5  # share of the silhouette of every solid, if solids overlap
ATTEMPTS = 24


@dataclass(frozen=True)
class Camera:
    """A pinhole above the ground, pitched down; `center` and `half` (u, v) frame the image plane at distance 1."""

    pitch: float
    center: tuple[float, float]
    half: tuple[float, float]

    @property
    def axes(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Forward and up, unit vectors; right is +x."""
        c, s = math.cos(self.pitch), math.sin(self.pitch)
        return (0.0, -s, -c), (0.0, c, -s)

    @property
    def eye(self) -> tuple[float, float, float]:
        (_, fy, fz), _ = self.axes
        return 0.0, 0.8 - CAMERA_DISTANCE * fy, -CAMERA_DISTANCE * fz

    def project(self, points: Tensor) -> Tensor:
        """World points [P, 3] to image plane coordinates [P, 2]: u to the right, v up."""
        forward, up = (torch.tensor(axis) for axis in self.axes)
        seen = points - torch.tensor(self.eye)
        depth = seen @ forward
        return torch.stack([seen[:, 0] / depth, seen @ up / depth], 1)

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Directions through the centres of height x width samples, each [height, width]."""
        u = self.center[0] + self.half[0] * ((torch.arange(width) + 0.5) * (2 / width) - 1)
        v = self.center[1] - self.half[1] * ((torch.arange(height) + 0.5) * (2 / height) - 1)
        (_, fy, fz), (_, uy, uz) = self.axes
        ones = torch.ones(height, width)
        rows = v[:, None] * ones
        return u[None] * ones, fy + uy * rows, fz + uz * rows

    def cropped(self, rows: slice, columns: slice, height: int, width: int) -> Camera:
        """The camera that sees only these rows and columns of a height x width frame."""
        return Camera(
            self.pitch,
            (
                self.center[0] + self.half[0] * ((columns.start + columns.stop) / width - 1),
                self.center[1] - self.half[1] * ((rows.start + rows.stop) / height - 1),
            ),
            (
                self.half[0] * (columns.stop - columns.start) / width,
                self.half[1] * (rows.stop - rows.start) / height,
            ),
        )

    def window(self, body: Body, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of a height x width frame that contain `body`."""
        low, high = self.bounds([body])
        left, right = (((u - self.center[0]) / self.half[0] + 1) / 2 * width for u in (low[0], high[0]))
        bottom, top = ((1 - (v - self.center[1]) / self.half[1]) / 2 * height for v in (low[1], high[1]))
        pad = 1 + 0.01 * max(height, width)
        return (
            slice(max(0, int(top - pad)), max(0, min(height, math.ceil(bottom + pad)))),
            slice(max(0, int(left - pad)), max(0, min(width, math.ceil(right + pad)))),
        )

    def bounds(self, bodies: list[Body]) -> tuple[list[float], list[float]]:
        seen = self.project(torch.cat([body.outline() for body in bodies]))
        return seen.amin(0).tolist(), seen.amax(0).tolist()


@dataclass(frozen=True)
class Layout:
    bodies: tuple[Body, ...]
    camera: Camera
    light: tuple[float, float, float]  # unit vector towards the key light


def _body(shape: str, size: str, rng: np.random.Generator) -> Body:
    radius, half = (RADIUS[size] * part for part in PROPORTIONS[shape])
    # A rotated cube shows two sides and is recognizable.
    yaw = float(rng.choice([-1, 1]) * rng.uniform(0.30, 0.70)) if shape == "cube" else 0.0
    return Body(shape, 0.0, half, 0.0, radius, half, yaw)


def _moved(body: Body, x: float, y: float, z: float) -> Body:
    return Body(body.shape, float(x), float(y), float(z), body.radius, body.half, body.yaw)


def _reach(body: Body) -> float:
    """Half the visible width."""
    if body.shape == "cube":
        return body.radius * (math.cos(body.yaw) + math.sin(abs(body.yaw)))
    return body.radius


def _place(scene: Scene, rng: np.random.Generator) -> list[Body]:
    """Place the last solid on the ground, then each earlier one in its relation to the next."""
    bodies = [_body(solid.shape, solid.size, rng) for solid in scene.solids]
    stacks = [[len(bodies) - 1]]  # groups that stand on the ground together, lowest solid first
    sides: list[str] = []
    for index in reversed(range(len(scene.relations))):
        if scene.relations[index] == ON_TOP:
            stacks[-1].append(index)
        else:
            stacks.append([index])
            sides.append(scene.relations[index])
    x = z = 0.0
    for number, stack in enumerate(stacks):
        if number:
            here = max(_reach(bodies[i]) for i in stack)
            there = max(_reach(bodies[i]) for i in stacks[number - 1])
            side = sides[number - 1]
            if side in (LEFT, RIGHT):
                x += (-1 if side == LEFT else 1) * (here + there + rng.uniform(0.12, 0.45))
                z += rng.uniform(-0.25, 0.25)
            else:
                assert side in (FRONT, BEHIND)
                x += rng.choice([-1, 1]) * (here + there) * rng.uniform(0.35, 0.75)
                z += (1 if side == FRONT else -1) * (here + there) * rng.uniform(0.95, 1.35)
        ground = 0.0
        for i in stack:
            bodies[i] = _moved(bodies[i], x, ground + bodies[i].half, z)
            # What stands on a point or a dome sinks in slightly; otherwise it would seem to hover.
            sink = {"cone": 0.44, "sphere": 0.05, "dome": 0.10}.get(bodies[i].shape, 0.0) * bodies[i].half
            ground += 2 * bodies[i].half - sink
    middle = (x / 2, z / 2)
    return [_moved(b, b.x - middle[0], b.y, b.z - middle[1]) for b in bodies]


def _frame(bodies: list[Body], pitch: float, height: int, width: int, rng: np.random.Generator) -> Camera:
    """A camera whose frame contains all solids, at slightly random positions."""
    camera = Camera(pitch, (0.0, 0.0), (1.0, 1.0))
    low, high = camera.bounds(bodies)
    unit = EXTENT[len(bodies)] * rng.uniform(0.97, 1.05) / 2 / CAMERA_DISTANCE
    half = [unit * side / min(height, width) for side in (width, height)]
    inner = 1 - 2 * MARGIN
    zoom = max(1.0, *((high[i] - low[i]) / (2 * half[i] * inner) for i in (0, 1)))
    half = [side * zoom for side in half]
    center = []
    for i, bias in ((0, 0.0), (1, 0.15)):  # slightly more room above than below looks natural
        slack = half[i] * inner - (high[i] - low[i]) / 2
        center.append((low[i] + high[i]) / 2 + slack * (bias + rng.uniform(-0.4, 0.4)))
    return Camera(pitch, (center[0], center[1]), (half[0], half[1]))


def visible_parts(bodies: list[Body], camera: Camera, height: int = 40, width: int = 40) -> list[float]:
    """For each body, the share of its silhouette that no other body hides."""
    rays = camera.rays(height, width)
    depths = torch.stack([intersect(body, camera.eye, rays)[0] for body in bodies])
    nearest = depths.argmin(0)
    return [
        float(((nearest == i) & (depth < FAR)).sum() / (depth < FAR).sum().clamp_min(1))
        for i, depth in enumerate(depths)
    ]


def arrange(scene: Scene, height: int, width: int, seed: int) -> Layout:
    """Lay out a scene, deterministically; colours and background have no effect."""
    rng = np.random.default_rng(seed)
    overlap = FRONT in scene.relations or BEHIND in scene.relations
    # A high camera shows depth; from a low one, what stands on top hides less of what carries it.
    pitch = float(rng.uniform(0.25, 0.35) if ON_TOP in scene.relations and not overlap else rng.uniform(0.36, 0.46))
    best: tuple[float, list[Body], Camera] | None = None
    for _ in range(ATTEMPTS):
        bodies = _place(scene, rng)
        camera = _frame(bodies, pitch, height, width, rng)
        visible = min(visible_parts(bodies, camera)) if overlap else 1.0
        if best is None or visible > best[0]:
            best = visible, bodies, camera
        if visible >= MIN_VISIBLE:
            break
    assert best is not None
    azimuth, elevation = rng.uniform(0.65, 1.15), rng.uniform(0.85, 1.05)  # upper left, on the viewer's side
    light = (
        -math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
        math.cos(azimuth) * math.cos(elevation),
    )
    return Layout(tuple(best[1]), best[2], light)
