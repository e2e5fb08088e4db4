"""The geometry of the solids: intersection with rays, and distance from points.

Every solid has a local frame with its centre at the origin and y up, to which rays and points are transformed. Vectors
are three tensors x, y, z of shape [N], which is several times faster than [N, 3].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = tuple[Tensor, Tensor, Tensor]  # x, y, z
FAR = 1e9


@dataclass(frozen=True)
class Body:
    """A placed solid. `radius` is half its width, `half` half its height, `yaw` in radians."""

    shape: str
    x: float
    y: float
    z: float
    radius: float
    half: float
    yaw: float

    def to_local(self, v: Vector, translate: bool) -> Vector:
        x, y, z = v
        if translate:
            x, y, z = x - self.x, y - self.y, z - self.z
        if self.yaw:
            c, s = math.cos(self.yaw), math.sin(self.yaw)
            x, z = c * x - s * z, s * x + c * z
        return x, y, z

    def to_world(self, v: Vector) -> Vector:
        x, y, z = v
        if self.yaw:
            c, s = math.cos(self.yaw), math.sin(self.yaw)
            x, z = c * x + s * z, c * z - s * x
        return x, y, z

    @property
    def bound(self) -> float:
        """The radius of a bounding sphere about the centre."""
        if self.shape == "sphere":
            return self.radius
        return math.hypot(self.radius * (math.sqrt(2) if self.shape == "cube" else 1.0), self.half)

    def outline(self) -> Tensor:
        """World points [P, 3] of the surface whose convex hull is (nearly) the solid."""
        angle = torch.arange(24.0) * (2 * math.pi / 24)
        c, s = torch.cos(angle), torch.sin(angle)
        if self.shape in ("sphere", "dome"):
            lowest, rings = (0.0, 7) if self.shape == "dome" else (-math.pi / 2, 13)
            local = torch.cat(
                [
                    torch.stack([c * math.cos(b), torch.full_like(c, math.sin(b)), s * math.cos(b)], 1)
                    for b in torch.linspace(lowest, math.pi / 2, rings).tolist()
                ]
            )
            local = local * self.radius
            if self.shape == "dome":
                local[:, 1] -= self.half
        elif self.shape == "cube":
            signs = torch.tensor([-1.0, 1.0])
            local = torch.cartesian_prod(signs, signs, signs)
            local = local * torch.tensor([self.radius, self.half, self.radius])
        else:
            top_radius = self.radius if self.shape == "cylinder" else 0.0
            low = torch.stack([self.radius * c, torch.full_like(c, -self.half), self.radius * s], 1)
            high = torch.stack([top_radius * c, torch.full_like(c, self.half), top_radius * s], 1)
            local = torch.cat([low, high])
        world = torch.stack(self.to_world((local[:, 0], local[:, 1], local[:, 2])), 1)
        return world + torch.tensor([self.x, self.y, self.z])


def _slab(origin: Tensor, direction: Tensor, half: float) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / direction
    a, b = (-half - origin) * inverse, (half - origin) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def intersect(body: Body, origin: tuple[float, float, float], direction: Vector) -> tuple[Tensor, Vector]:
    """First hits of rays from one eye: distance t [N] (FAR if none) and unit normals in the world.

    `direction`, [N] each, need not have unit length; t is in its units.
    """
    eye = body.to_local(tuple(torch.tensor(c) for c in origin), translate=True)  # type: ignore[arg-type]
    ray = body.to_local(direction, translate=False)
    t, normal = _INTERSECT[body.shape](body, eye, ray)
    return t, body.to_world(normal)


def _roots(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Both roots of a t² + 2 b t + c, FAR if they are not real."""
    root = b * b - a * c
    real = root >= 0
    root = root.clamp_min(0).sqrt()
    low, high = (-b - root) / a, (-b + root) / a
    return torch.where(real, torch.minimum(low, high), FAR), torch.where(real, torch.maximum(low, high), FAR)


def _sphere(body: Body, eye: Vector, ray: Vector) -> tuple[Tensor, Vector]:
    (ox, oy, oz), (dx, dy, dz) = eye, ray
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    t, _ = _roots(a, b, ox * ox + oy * oy + oz * oz - body.radius**2)
    scale = 1 / body.radius
    return t, ((ox + t * dx) * scale, (oy + t * dy) * scale, (oz + t * dz) * scale)


def _cube(body: Body, eye: Vector, ray: Vector) -> tuple[Tensor, Vector]:
    sides = (body.radius, body.half, body.radius)
    slabs = [_slab(o, d, side) for o, d, side in zip(eye, ray, sides, strict=True)]
    enter = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
    leave = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
    t = torch.where(enter < leave, enter, FAR)
    x, y, z = (torch.where(s[0] == enter, -d.sign(), 0.0) for s, d in zip(slabs, ray, strict=True))
    return t, (x, y, z)


def _cylinder(body: Body, eye: Vector, ray: Vector) -> tuple[Tensor, Vector]:
    (ox, oy, oz), (dx, dy, dz) = eye, ray
    side_in, side_out = _roots(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - body.radius**2)
    cap_in, cap_out = _slab(oy, dy, body.half)
    enter = torch.maximum(side_in, cap_in)
    t = torch.where((enter < torch.minimum(side_out, cap_out)) & (side_in < FAR), enter, FAR)
    cap = cap_in > side_in
    scale = 1 / body.radius
    x = torch.where(cap, 0.0, (ox + t * dx) * scale)
    z = torch.where(cap, 0.0, (oz + t * dz) * scale)
    return t, (x, torch.where(cap, -dy.sign(), 0.0), z)


def _cone(body: Body, eye: Vector, ray: Vector) -> tuple[Tensor, Vector]:
    (ox, oy, oz), (dx, dy, dz) = eye, ray
    k = body.radius / (2 * body.half)  # radius gained per unit below the apex
    ay = oy - body.half  # height relative to the apex
    a = dx * dx + dz * dz - (k * dy) ** 2
    b = ox * dx + oz * dz - k * k * ay * dy
    low, high = _roots(a, b, ox * ox + oz * oz - (k * ay) ** 2)

    def on_side(t: Tensor) -> Tensor:
        y = oy + t * dy
        return torch.where((y.abs() <= body.half) & (t > 0), t, FAR)

    side = torch.minimum(on_side(low), on_side(high))
    base = (-body.half - oy) / dy
    px, pz = ox + base * dx, oz + base * dz
    base = torch.where((px * px + pz * pz <= body.radius**2) & (base > 0), base, FAR)
    t = torch.minimum(side, base)
    on_base = base < side
    px, pz = ox + t * dx, oz + t * dz
    length = (px * px + pz * pz).sqrt().clamp_min(1e-6) * math.sqrt(1 + k * k)
    x, z = torch.where(on_base, 0.0, px / length), torch.where(on_base, 0.0, pz / length)
    return t, (x, torch.where(on_base, -1.0, k / math.sqrt(1 + k * k)), z)


def _dome(body: Body, eye: Vector, ray: Vector) -> tuple[Tensor, Vector]:
    """The upper half of a ball whose centre is on the base."""
    (ox, oy, oz), (dx, dy, dz) = eye, ray
    oy = oy + body.half  # height above the base
    ball_in, ball_out = _roots(
        dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - body.radius**2
    )
    base = -oy / dy
    base_in, base_out = torch.where(dy > 0, base, -FAR), torch.where(dy < 0, base, FAR)
    enter = torch.maximum(ball_in, base_in)
    t = torch.where((enter < torch.minimum(ball_out, base_out)) & (ball_in < FAR), enter, FAR)
    below = base_in > ball_in
    scale = 1 / body.radius
    x, y, z = ((o + t * d) * scale for o, d in ((ox, dx), (oy, dy), (oz, dz)))
    return t, (torch.where(below, 0.0, x), torch.where(below, -1.0, y), torch.where(below, 0.0, z))


_INTERSECT = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone, "dome": _dome}


def distance(body: Body, point: Vector) -> Tensor:
    """Signed Euclidean distance [N] of world points to the surface, negative inside."""
    x, y, z = body.to_local(point, translate=True)
    if body.shape == "sphere":
        return (x * x + y * y + z * z).sqrt() - body.radius
    if body.shape == "cube":
        qx, qy, qz = x.abs() - body.radius, y.abs() - body.half, z.abs() - body.radius
        outside = (qx.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2 + qz.clamp_min(0) ** 2).sqrt()
        return outside + torch.maximum(torch.maximum(qx, qy), qz).clamp_max(0)
    ring = (x * x + z * z).sqrt()
    if body.shape == "cylinder":
        qr, qy = ring - body.radius, y.abs() - body.half
        outside = (qr.clamp_min(0) ** 2 + qy.clamp_min(0) ** 2).sqrt()
        return outside + torch.maximum(qr, qy).clamp_max(0)
    if body.shape == "dome":
        height = y + body.half  # above the base
        to_ball = (x * x + height * height + z * z).sqrt() - body.radius
        to_rim = ((ring - body.radius).clamp_min(0) ** 2 + height * height).sqrt()
        return torch.where(height < 0, to_rim, torch.maximum(to_ball, -height))
    # Cone: a triangle in the half-plane (ring, y); the nearer of slant and base, negative if inside both.
    rise = 2 * body.half
    slant = math.hypot(body.radius, rise)
    along = ((ring - body.radius) * -body.radius + (y + body.half) * rise) / slant  # from the rim upwards
    across = ((ring - body.radius) * rise + (y + body.half) * body.radius) / slant  # outwards
    to_slant = (across**2 + (along - along.clamp(0, slant)) ** 2).sqrt()
    below = y + body.half
    to_base = ((ring - body.radius).clamp_min(0) ** 2 + below**2).sqrt()
    nearest = torch.minimum(to_slant, to_base)
    return torch.where((across < 0) & (below > 0), -nearest, nearest)
