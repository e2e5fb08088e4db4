"""Latent consistency distillation (Luo et al. 2023, 2310.04378; as an adapter: 2311.05556).

The student learns to map any point of a trajectory of the teacher's ODE to its end, so a few steps generate an image.

Shapes: B images, C channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.adapters.file import AdapterDefaults
from ...errors import ConfigurationError
from ...schedulers.lcm import LCMScheduler
from ...schedulers.process import boundary_scalings
from ..data.sample import Batch
from ..running.randomness import Randomness
from .base import Loss
from .distillation import SCHEDULE, Distillation, Given, Values, distance


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(d² + c²) - c of the differences d (2310.14189, section 3.3), a mean for each image, [B]."""
    return ((a - b).square() + c**2).sqrt().sub(c).flatten(1).mean(1)


class LatentConsistency(Distillation):
    """The distance of the consistency function at x_t to that at x_s, where the teacher leads from x_t to x_s.

    2310.04378, sections 4.2 and 4.3, with DDIM as the solver, a fixed guidance scale, and the originals' distance.

    Args:
        intervals: of the teacher's schedule; s is the timestep before t in it.
        guidance_scale: of the teacher, in the pipelines' convention. The originals' 4.5 is 1 less.
        decay: of the average of the student's parameters that defines the target; 0: the student itself.
        huber: c of the distance.
    """

    adapter_defaults = AdapterDefaults("lcm", 4, 1.0)

    def __init__(
        self,
        *arguments: Any,
        intervals: int = 50,
        guidance_scale: float = 5.5,
        decay: float = 0.95,
        huber: float = 1e-3,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        if intervals > self.loss.steps:
            raise ConfigurationError(f"intervals is {intervals}, more than the {self.loss.steps} training timesteps")
        self.stride = self.loss.steps // intervals
        self.intervals, self.guidance_scale, self.decay, self.huber = intervals, guidance_scale, decay, huber
        self.target = Values(self.transformer, saved=True) if decay else None

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        device = next(self.transformer.parameters()).device
        count = len(batch.samples)
        x0 = self.latents(batch.samples, random, device)  # [B, C, H, W]
        noise = random.normal(x0.shape, device)
        t = (random.integers(self.intervals, [count]).to(device) + 1) * self.stride - 1  # [B]
        s = (t - self.stride).clamp(min=0)
        given, empty = (self.given(batch.samples, device, empty=empty) for empty in (False, True))

        # The teacher and the target come first: they use the parameters in whose place the student's are.
        xt = self.loss.add_noise(x0, noise, t)
        xs = self.ddim(xt, t, s, self.guided(xt, t, given, empty, self.guidance_scale))
        if self.target is None:
            with torch.no_grad():
                target = self.consistency(xs, s, given)
        else:
            with self.target.held():
                target = self.consistency(xs, s, given)
        each = pseudo_huber(self.consistency(xt, t, given), target, self.huber)
        return Loss(each, {})

    def consistency(self, x: Tensor, t: Tensor, given: Given) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x_0(x_t, t) (2310.04378, section 4.1)."""
        c_skip, c_out = boundary_scalings(t.float().view(-1, 1, 1, 1))
        result: Tensor = c_skip * x + c_out * self.original(x, t, self.predict(x, t, given))
        return result

    def after_step(self, step: int) -> None:
        if self.target is not None:
            self.target.follow(self.decay)

    def validation(self, batch: Batch, random: Randomness) -> Mapping[str, Tensor]:
        """The distance of the student's images of four steps to the teacher's of as many as there are intervals."""
        device = next(self.transformer.parameters()).device
        noise = self.noise_like(batch.samples, random, device)
        given, empty = (self.given(batch.samples, device, empty=empty) for empty in (False, True))
        with torch.no_grad():
            sampled = self.sample(noise, given, 4, random)
            expected = self.samples_of_teacher(noise, given, empty, self.intervals, self.guidance_scale)
        return {"distance": distance(sampled, expected).mean()}

    def scheduler(self, config: Mapping[str, Any]) -> LCMScheduler:
        """The sampler of the result, for the noise schedule in a scheduler's config."""
        taken = {name: config[name] for name in SCHEDULE if config.get(name) is not None}
        return LCMScheduler(**taken, original_inference_steps=self.intervals)

    @property
    def sampling(self) -> Mapping[str, Any]:
        return {
            "num_inference_steps": self.adapter_defaults.steps,
            "guidance_scale": self.adapter_defaults.guidance_scale,
        }

    def sample(self, noise: Tensor, given: Given, steps: int, random: Randomness) -> Tensor:
        """x_0 [B, C, H, W] by multistep sampling (2310.04378, algorithm 3), from the student's parameters."""
        picked = [int(i * self.intervals / steps) for i in range(steps)]
        times = [(self.intervals - i) * self.stride - 1 for i in picked]
        x = noise
        for i, time in enumerate(times):
            t = torch.full([len(x)], time, device=x.device)
            x = self.consistency(x, t, given)
            if i + 1 < steps:
                fresh = random.normal(x.shape, x.device)
                x = self.loss.add_noise(x, fresh, torch.full_like(t, times[i + 1]))
        return x
