"""What the distillations share: a teacher and other values of the trained parameters, and DDIM, by which it samples.

Shapes: B images, C channels, H x W latent pixels, M text tokens, D their channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...nn.changes import is_plain_tensor
from ...schedulers import process
from ..data.sample import Batch, Sample
from ..running.randomness import Randomness
from .text_to_image import TextToImage
from .texts import Text


class Values(nn.Module):
    """Other values of a model's trained parameters, in float32: those at the start, or their moving average.

    So a teacher or a target needs no second model, but memory for what is trained alone: of an adapter next to nothing.

    Args:
        saved: whether they belong to the state of a run. Those at the start do not, as they can be made again.
    """

    def __init__(self, model: nn.Module, saved: bool):
        super().__init__()
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in self.live.items():
            if not is_plain_tensor(parameter):
                raise ConfigurationError(
                    f"{name} is a {type(parameter).__name__}: distillation holds other values in the parameters, which "
                    f"sharded or quantized ones cannot; use parallel: ddp, or train an adapter"
                )
            self.register_buffer(name.replace(".", "/"), parameter.detach().float().clone(), persistent=saved)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block, the model holds these values, and no gradients are recorded."""
        kept = {name: parameter.data for name, parameter in self.live.items()}
        try:
            for name, parameter in self.live.items():
                parameter.data = self.get_buffer(name.replace(".", "/")).to(parameter.dtype)
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.live.items():
                parameter.data = kept[name]

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """value <- decay * value + (1 - decay) * parameter."""
        for name, parameter in self.live.items():
            self.get_buffer(name.replace(".", "/")).lerp_(parameter.detach().float(), 1 - decay)


class Given(NamedTuple):
    """What a denoiser is given in addition to latents and timesteps."""

    text: Text
    conditions: Mapping[str, Tensor] | None


#: What a scheduler's config says of the noise schedule and of the prediction.
SCHEDULE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)

Prediction = Callable[[Tensor, Tensor], Tensor]  # x_t [B, C, H, W], t [B] -> the prediction, of the same shape


class Distillation(TextToImage):
    """A student, a transformer or an adapter of one, that learns from its own weights at the start, the teacher."""

    unshardable = "it holds other values in its parameters"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, caption_dropout=0.0, **options)
        self.teacher = Values(self.transformer, saved=False)
        self.sampler: Any = None  # the scheduler with which the result generates, saved with it

    def export(self, folder: Path) -> None:
        """The transformer, and the scheduler that it needs."""
        super().export(folder)
        if self.sampler is not None:
            self.sampler.save_pretrained(folder / "scheduler")

    def flops(self, batch: Batch) -> float:
        """Not counted: the teacher and others compute, too."""
        return 0.0

    def given(self, samples: Sequence[Sample], device: torch.device, empty: bool = False) -> Given:
        """The samples' captions, or the empty one with its own mask, and their micro-conditions."""
        dropped = torch.full([len(samples)], empty)
        return Given(self.texts(samples, dropped), self.micro_conditions(samples, device))

    def predict(self, x: Tensor, t: Tensor, given: Given, transformer: Any = None) -> Tensor:
        """The prediction [B, C, H, W] in float32, without a learned variance."""
        model: Any = self.transformer if transformer is None else transformer
        text, mask = given.text
        output = model(
            x.to(model.dtype),
            text.to(x.device, model.dtype),
            t,
            given.conditions,
            encoder_attention_mask=mask.to(x.device),
        ).sample
        prediction: Tensor = output[:, : x.shape[1]].float()
        return prediction

    def guided(self, x: Tensor, t: Tensor, given: Given, empty: Given, scale: float) -> Tensor:
        """The teacher's prediction with classifier-free guidance (2207.12598), in the pipelines' convention."""
        with self.teacher.held():
            conditional = self.predict(x, t, given)
            if scale == 1.0:
                return conditional
            unconditional = self.predict(x, t, empty)
        return unconditional + scale * (conditional - unconditional)

    def original(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """x_0, given x_t and the prediction made from it."""
        return process.predicted_original(self.loss.prediction_type, prediction, x, *self.loss.levels(t))

    def ddim(self, x: Tensor, t: Tensor, s: Tensor, prediction: Tensor) -> Tensor:
        """x_s of x_t, by a step of DDIM (2010.02502, equation 12 with a sigma of 0)."""
        noise = process.predicted_noise(self.loss.prediction_type, prediction, x, *self.loss.levels(t))
        return process.add_noise(self.original(x, t, prediction), noise, *self.loss.levels(s))

    def samples_of_teacher(
        self, noise: Tensor, given: Given, empty: Given, steps: int, scale: float, first: int | None = None
    ) -> Tensor:
        """x_0 [B, C, H, W] of noise, by ``steps`` guided DDIM steps at evenly spaced timesteps from ``first``."""
        last = self.loss.steps - 1 if first is None else first
        times = [round(last * (steps - i) / steps) for i in range(steps)]
        x = noise
        for i, time in enumerate(times):
            t = torch.full([len(x)], time, device=x.device)
            prediction = self.guided(x, t, given, empty, scale)
            if i + 1 == steps:
                return self.original(x, t, prediction)
            x = self.ddim(x, t, torch.full_like(t, times[i + 1]), prediction)
        return x

    def noise_like(self, samples: Sequence[Sample], random: Randomness, device: torch.device) -> Tensor:
        """Noise [B, C, H, W] of the size of the samples' latents, without encoding them."""
        return random.normal([len(samples), self.transformer.in_channels, *self.latents.size(samples[0])], device)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The root of the mean squared difference of images, [B]."""
    return (a - b).float().square().flatten(1).mean(1).sqrt()
