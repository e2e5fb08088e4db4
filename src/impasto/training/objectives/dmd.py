"""Distribution matching distillation to one step (Yin et al. 2023, 2311.18828).

The generator is the teacher at one timestep: it takes noise for x_t and its prediction of x_0 for the image. Two
denoisers of its images, the teacher and one that is trained on them, say in which direction they are unlike the
teacher's. Images that the teacher has generated from known noise keep the generator from forgetting modes.

Shapes: B images, C channels, H x W latent pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...schedulers import process
from ...schedulers.ddpm import DDPMScheduler
from ..data.sample import Batch, Sample
from ..running.randomness import Randomness
from .base import Loss
from .distillation import SCHEDULE, Distillation, Given, distance

#: The names under which samples have pairs, in ``extra``: the noise, and the teacher's latents, as it generates them.
PAIR = ("noise", "latents")


class DistributionMatching(Distillation):
    """2311.18828, equations 6 to 9, on latents; the regression is a squared error in place of LPIPS.

    Args:
        generator_timestep: of which the generator takes noise for x_t.
        noise_levels: the first and the last timestep at which distributions are compared.
        guidance_scale: of the teacher, in the pipelines' convention.
        regression_weight: of the distance to the teacher's images; 0 for none.
        pair_steps: of the teacher for pairs of noise and image, unless samples have them.
    """

    def __init__(
        self,
        *arguments: Any,
        generator_timestep: int = 400,
        noise_levels: tuple[int, int] = (1, 950),
        guidance_scale: float = 7.5,
        regression_weight: float = 0.25,
        pair_steps: int = 10,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        low, high = noise_levels
        if not (0 <= low <= high < self.loss.steps and 0 <= generator_timestep < self.loss.steps):
            raise ConfigurationError(
                f"noise_levels {low} to {high} and generator_timestep {generator_timestep} must be timesteps, 0 to "
                f"{self.loss.steps - 1}, in ascending order"
            )
        if any(not p.requires_grad for p in self.transformer.parameters()):
            raise ConfigurationError("this distillation trains the whole transformer; leave the adapter out")
        self.fake = copy.deepcopy(self.transformer)
        self.generator_timestep, self.noise_levels = generator_timestep, (low, high)
        self.guidance_scale, self.regression_weight, self.pair_steps = guidance_scale, regression_weight, pair_steps

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        device = next(self.transformer.parameters()).device
        count = len(batch.samples)
        z = self.noise_like(batch.samples, random, device)  # [B, C, H, W]
        low, high = self.noise_levels
        t, r = (random.integers(high - low + 1, [count]).to(device) + low for _ in range(2))  # [B] each
        noise, other = (random.normal(z.shape, device) for _ in range(2))
        given, empty = (self.given(batch.samples, device, empty=empty) for empty in (False, True))

        # The teacher comes first: it uses the parameters in whose place the generator's are. It sees the generator's
        # images, which are therefore made twice: here without gradients.
        with torch.no_grad():
            x = self.generate(z, given)
        direction = self.direction(x, t, noise, given, empty)
        pair = self.pair(batch.samples, z, given, empty, device)

        x = self.generate(z, given)
        matching = 0.5 * (x - (x - direction).detach()).square().flatten(1).mean(1)  # its gradient is the direction
        xr = self.loss.add_noise(x.detach(), other, r)
        denoising = self.denoising(xr, x.detach(), other, r, given)
        each = matching + denoising
        parts = {"matching": matching, "fake": denoising}
        if pair is not None:
            start, end = pair
            again = x if start is z else self.generate(start, given)
            parts["regression"] = (again - end).square().flatten(1).mean(1)
            each = each + self.regression_weight * parts["regression"]
        return Loss(each, {name: value.detach() for name, value in parts.items()})

    def generate(self, z: Tensor, given: Given) -> Tensor:
        """Images [B, C, H, W] of noise, in one step."""
        t = torch.full([len(z)], self.generator_timestep, device=z.device)
        return self.original(z, t, self.predict(z, t, given))

    @torch.no_grad()
    def direction(self, x: Tensor, t: Tensor, noise: Tensor, given: Given, empty: Given) -> Tensor:
        """(x_0 of the fake model - x_0 of the teacher) / mean |x - x_0 of the teacher| (equations 7 and 8).

        As in the paper's algorithm 2, which leaves out the factor that equation 7 has for each noise level.
        """
        xt = self.loss.add_noise(x, noise, t)
        real = self.original(xt, t, self.guided(xt, t, given, empty, self.guidance_scale))
        fake = self.original(xt, t, self.predict(xt, t, given, self.fake))
        size = (x - real).abs().flatten(1).mean(1).clamp(min=1e-8)  # [B]
        return (fake - real) / process.per_sample(size, x)

    def denoising(self, xt: Tensor, x: Tensor, noise: Tensor, t: Tensor, given: Given) -> Tensor:
        """The loss [B] of the fake model on the generator's images (equation 6)."""
        prediction = self.predict(xt, t, given, self.fake)
        target = process.prediction_target(self.loss.prediction_type, x, noise, *self.loss.levels(t))
        return (prediction - target).square().flatten(1).mean(1)

    def pair(
        self, samples: Sequence[Sample], z: Tensor, given: Given, empty: Given, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Noise and the teacher's images of it (equation 9): the samples' own, or new ones of z."""
        if not self.regression_weight:
            return None
        if all(name in sample.extra for sample in samples for name in PAIR):
            start, end = (torch.stack([sample.extra[name] for sample in samples]).to(device).float() for name in PAIR)
            return start, end
        return z, self.samples_of_teacher(z, given, empty, self.pair_steps, self.guidance_scale)

    def validation(self, batch: Batch, random: Randomness) -> Mapping[str, Tensor]:
        """The distance of the generator's images to the teacher's of the same noise."""
        device = next(self.transformer.parameters()).device
        z = self.noise_like(batch.samples, random, device)
        given, empty = (self.given(batch.samples, device, empty=empty) for empty in (False, True))
        steps = max(20, self.pair_steps)
        with torch.no_grad():
            sampled = self.generate(z, given)
            expected = self.samples_of_teacher(z, given, empty, steps, self.guidance_scale)
        return {"distance": distance(sampled, expected).mean()}

    def scheduler(self, config: Mapping[str, Any]) -> DDPMScheduler:
        """The sampler of the result, for the noise schedule in a scheduler's config; with ``timesteps=[400]``."""
        taken = {name: config[name] for name in SCHEDULE if config.get(name) is not None}
        return DDPMScheduler(**taken, clip_sample=False)

    @property
    def sampling(self) -> Mapping[str, Any]:
        return {"timesteps": [self.generator_timestep], "guidance_scale": 1.0}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.fake.transformer_blocks]
