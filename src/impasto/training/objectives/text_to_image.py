"""Training of a PixArt transformer on latents and captions.

Shapes: B images, C channels, H x W latent pixels, M text tokens, D their channels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigurationError, InputError
from ...family import pixels_per_latent
from ...models.autoencoder.model import AutoencoderKL
from ...models.pixart.model import PixArtTransformer2DModel
from ...pipelines.latents import scaled
from ...schedulers import process
from ...transforms.token_routing import TokenRouting
from ..data.sample import Batch, Sample, stacked
from ..running.randomness import Randomness
from .autoencoder import images_of
from .base import Loss, Objective, linear_weights
from .diffusion_loss import DiffusionLoss, Weighting, masked_mean
from .labels import LabelHead
from .rollout import Rollout, Selection
from .texts import Texts

Timesteps = Literal["uniform", "stratified"]


class Latents(nn.Module):
    """Samples -> latents as a denoiser takes them, from stored posteriors or by an autoencoder.

    Args:
        config: of the autoencoder, whose scale the latents have.
        vae: None if all samples have posteriors.
    """

    def __init__(self, config: Mapping[str, Any], vae: AutoencoderKL | None = None):
        super().__init__()
        self.config, self.vae = config, vae

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample], random: Randomness, device: torch.device) -> Tensor:
        """Samples of the posterior, [B, C, H, W] float32."""
        posteriors = [sample.posterior for sample in samples if sample.posterior is not None]
        if len(posteriors) == len(samples):
            mean, std = (stacked(tensors).to(device).float() for tensors in zip(*posteriors))
        else:
            mean, std = self.posterior(samples)
        noise = random.normal(mean.shape, device)
        return scaled(mean + std * noise, self.config)

    @torch.no_grad()
    def posterior(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the posteriors of images of one size, each [B, C, H, W] float32, unscaled."""
        if self.vae is None:
            raise InputError("the samples have images, and there is no autoencoder; give one, or cache the latents")
        images = images_of(samples, self.vae.device).to(self.vae.dtype, memory_format=torch.channels_last)
        distribution = self.vae.encode(images).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def size(self, sample: Sample) -> tuple[int, int]:
        """Height and width of a sample's latents."""
        if sample.posterior is not None:
            return sample.posterior[0].shape[-2], sample.posterior[0].shape[-1]
        assert sample.image is not None
        factor = pixels_per_latent(None if self.vae is None else self.vae.config)
        return sample.image.shape[-2] // factor, sample.image.shape[-1] // factor


class TextToImage(Objective):
    """The error of the predicted noise or velocity, and the bound of a learned variance.

    Args:
        caption_dropout: the share of captions replaced by the empty one, for classifier-free guidance.
        timesteps: ``uniform``, or ``stratified``: the same spread in every batch.
        timestep_range: those that are trained, from the first to below the second; None: all.
        bound_weight: of the variational bound, if the transformer predicts a variance.
        label_weight: of the loss of ``label_head``, at a step.
        agreement_below, agreement_weight: the weight of the squared difference of the predictions without and with the
            caption at timesteps below the first. An image with so little noise shows what its caption says: what
            differs there is error, which guidance multiplies.
        rollout: which inputs the model makes itself; None: none.
        routing: lets tokens of the transformer skip blocks in training.
        packed: whether batches have images of several sizes.
    """

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        texts: Texts,
        latents: Latents,
        loss: DiffusionLoss,
        *,
        caption_dropout: float = 0.1,
        timesteps: Timesteps = "uniform",
        timestep_range: tuple[int, int] | None = None,
        weighting: Weighting = "none",
        bound_weight: float = 1.0,
        label_head: LabelHead | None = None,
        label_weight: Callable[[int], float] = lambda step: 0.3,
        agreement_below: int = 0,
        agreement_weight: float = 0.0,
        rollout: Rollout | None = None,
        routing: TokenRouting | None = None,
        packed: bool = False,
    ):
        super().__init__()
        self.transformer, self.texts, self.latents, self.loss = transformer, texts, latents, loss
        self.text_encoder = texts.encoder
        self.caption_dropout, self.timesteps, self.bound_weight = caption_dropout, timesteps, bound_weight
        self.weights = loss.weights(weighting)  # [T]
        self.first_timestep, self.end_timestep = timestep_range or (0, loss.steps)
        for end in (self.end_timestep, 0 if rollout is None else rollout.high):
            if end > loss.steps:
                raise ConfigurationError(f"timestep_range ends at {end}, and there are {loss.steps} timesteps")
        self.label_head, self.label_weight = label_head, label_weight
        if agreement_below > loss.steps:
            raise ConfigurationError(
                f"agreement.below is a timestep, at most {loss.steps}, not {agreement_below}; start with half of "
                f"that, as guidance needs the difference at high noise"
            )
        self.agreement_below, self.agreement_weight = agreement_below, agreement_weight
        self.rollout, self.routing, self.packed = rollout, routing, packed
        if latents.vae is not None:
            self.freeze(latents.vae)

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        device = next(self.transformer.parameters()).device
        samples, count, sizes = batch.samples, len(batch.samples), of_one_size(batch.samples)
        x0 = [self.latents(samples[one], random[one], device) for one in sizes]  # of each size [b, C, H, W]
        dropped = random.uniform([count]) < self.caption_dropout
        text, mask = self.texts(samples, dropped)  # [B, M, D], [B, M]
        times = self.sample_timesteps(count, random)  # [B]
        t = times.to(device)
        noise = [random[one].normal(x.shape, device) for one, x in zip(sizes, x0)]
        known, rolled = x0, torch.zeros(count, dtype=torch.bool)
        if self.rollout is not None and self.training:
            rolled = self.rollout.chosen(times, random)
            known = self._roll(self.rollout, samples, sizes, x0, text, mask, t, rolled, random)
        xt = [self.loss.add_noise(y, e, t[one]) for one, y, e in zip(sizes, known, noise)]
        if known is not x0:  # what the noise would be, if there were only x_0 below it
            noise = [self.loss.noise_between(x, noisy, t[one]) for one, x, noisy in zip(sizes, x0, xt)]
        if self.routing is not None and self.training:
            self.routing.choose(self._scores(sizes, x0, random))

        outputs = self._predict(samples, xt, text, mask, t)
        losses = [
            self.loss(out, x, e, noisy, t[one], loss_mask(samples[one], x))
            for one, out, x, e, noisy in zip(sizes, outputs, x0, noise, xt)
        ]
        mse, bound = (torch.cat(each) for each in zip(*losses))  # [B] each
        weighted = self.weights.to(device)[t] * mse
        rolled = rolled.to(device)
        each = weighted + self.bound_weight * bound * ~rolled

        parts = by_timestep(mse.masked_fill(rolled, torch.nan), t, self.loss.steps)
        if self.rollout is not None and self.training:
            parts["rollout"] = mse.detach().where(rolled, torch.nan)
        if outputs[0].shape[1] > x0[0].shape[1]:
            parts["bound"] = bound
        labels = [sample.labels for sample in samples if sample.labels is not None]
        if self.label_head is not None and self.training and len(labels) == count:
            wrong = self.label_head([stacked(labels[one]).to(device) for one in sizes])
            each = each + self.label_weight(batch.step) * wrong
            parts["labels"] = wrong
        if self.agreement_weight and self.training:
            counts = (times < self.agreement_below) & ~dropped
            apart = self._disagreement(samples, xt, outputs, t, counts)
            counts = counts.to(device)
            each = each + self.agreement_weight * counts * apart
            parts["agreement"] = apart.detach().where(counts, torch.nan)
        return Loss(each, parts)

    def _disagreement(
        self,
        samples: Sequence[Sample],
        inputs: Sequence[Tensor],
        predictions: Sequence[Tensor],
        t: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """The squared difference [B] of the predictions without captions from those with them, weighted by loss masks.

        Both are drawn to each other: then the gradients of what they share cancel, and what is learned is to use the
        caption less. Drawn to a constant, the prediction without captions takes the other along, away from the data.

        Args:
            inputs, predictions: of the samples of each size, [b, C, H, W] and [b, C or 2C, H, W].
            counts: [B], on the host: those that are compared; of the others the result is 0, and means nothing.
        """
        device, channels = t.device, inputs[0].shape[1]
        some = Selection(samples, inputs, counts)
        text, mask = self.texts(some.samples, torch.ones(len(some.samples), dtype=torch.bool))
        alone = self._predict(some.samples, some.of(inputs), text, mask, t[some.places])
        found, start = [], 0
        for x, y in zip(alone, some.of(predictions)):
            difference = x[:, :channels].float() - y[:, :channels].float()
            mask_of_loss = loss_mask(some.samples[start : start + len(x)], x)
            found.append(masked_mean(difference.square(), mask_of_loss))
            start += len(x)
        return torch.zeros(len(samples), device=device).index_put(
            (torch.tensor(some.places, device=device),), torch.cat(found)
        )

    def _predict(
        self, samples: Sequence[Sample], inputs: Sequence[Tensor], text: Tensor, mask: Tensor, t: Tensor
    ) -> list[Tensor]:
        """What the transformer makes of the images of each size, [b, C, H, W]: [b, C or 2C, H, W]."""
        device, dtype = t.device, self.transformer.dtype
        images = [x.to(dtype) for x in inputs]
        output = self.transformer(
            images[0] if len(images) == 1 else [image for x in images for image in x],
            text.to(device, dtype),
            t,
            self.micro_conditions(samples, device),
            encoder_attention_mask=mask.to(device),
        ).sample
        if len(images) == 1:
            return [output]
        ends = list(itertools.accumulate(map(len, images)))
        return [torch.stack(output[end - len(x) : end]) for x, end in zip(images, ends)]

    @torch.no_grad()
    def _roll(
        self,
        rollout: Rollout,
        samples: Sequence[Sample],
        sizes: Sequence[slice],
        x0: Sequence[Tensor],
        text: Tensor,
        mask: Tensor,
        t: Tensor,
        rolled: Tensor,
        random: Randomness,
    ) -> list[Tensor]:
        """x_0 of each size [b, C, H, W]; of those that are rolled, what a sampler that began with it knows at t."""
        some = Selection(samples, x0, rolled)
        text, mask, t = text[some.places], mask[some.places], t[some.places]
        known, channels = some.of(x0), x0[0].shape[1]
        for number, above in enumerate(rollout.steps_above(random)):
            s = (t + above).clamp(max=self.loss.steps - 1)
            noise = some.of([random[one].normal(x.shape, t.device) for one, x in zip(sizes, x0)])
            levels = [self.loss.levels(times) for times in some.split(s)]
            xs = [process.add_noise(y, e, *level) for y, e, level in zip(known, noise, levels)]
            outputs = self._predict(some.samples, xs, text, mask, s)
            found = [
                process.predicted_original(self.loss.prediction_type, out[:, :channels].float(), x, *level)
                for out, x, level in zip(outputs, xs, levels)
            ]
            share = rollout.share_of_last if number else 1.0
            known = [torch.lerp(y, x, share) for y, x in zip(known, found)]
        return some.replaced(x0, known) if rolled.any() else list(x0)

    def _scores(self, sizes: Sequence[slice], x0: Sequence[Tensor], random: Randomness) -> Tensor | list[Tensor]:
        """Random numbers for the tokens of each image: [B, N], or B of [N]."""
        tokens = [x[0, 0].numel() // self.transformer.patch_size**2 for x in x0]
        scores = [random[one].uniform([len(x), n]) for one, x, n in zip(sizes, x0, tokens)]
        return scores[0] if len(sizes) == 1 else [row for of_size in scores for row in of_size]

    def sample_timesteps(self, count: int, random: Randomness) -> Tensor:
        span = self.end_timestep - self.first_timestep
        if self.timesteps == "uniform":
            return self.first_timestep + random.integers(span, [count])
        return self.first_timestep + (random.stratified(count, self.packed) * span).long().clamp(max=span - 1)

    def micro_conditions(self, samples: Sequence[Sample], device: torch.device) -> dict[str, Tensor] | None:
        """The original size [B, 2] in pixels and the aspect ratio [B, 1] of the training size, for alpha at 1024 px."""
        if not self.transformer.use_additional_conditions:
            return None
        sizes, ratios = [], []
        for sample in samples:
            height, width = _shape(sample)[-2:]
            sizes.append(sample.size or (height, width))
            ratios.append([height / width])
        return {
            "resolution": torch.tensor(sizes, dtype=torch.float32, device=device),
            "aspect_ratio": torch.tensor(ratios, dtype=torch.float32, device=device),
        }

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def flops(self, batch: Batch) -> float:
        """Products of the transformer: its layers on each image or text token, and attention to both kinds.

        Text tokens count with their padding. A backward pass takes as many for the activations, and again for the
        weights if they are trained.
        """
        config, (of_image, of_text) = self.transformer.config, self._block_weights
        width, layers = self.transformer.inner_dim, len(self.transformer.transformer_blocks)
        passes = 3 if next(self.transformer.transformer_blocks.parameters()).requires_grad else 2
        total = 0.0
        for sample in batch.samples:
            height, columns = self.latents.size(sample)
            tokens = height * columns / config["patch_size"] ** 2
            attention = 4 * tokens * width * (tokens + self.texts.tokens) * layers
            total += 2 * (of_image * tokens + of_text * self.texts.tokens) + attention
        again = self.agreement_below / self.loss.steps if self.agreement_weight else 0.0
        return total * passes * (1 + again * (1 - self.caption_dropout))

    @functools.cached_property
    def _block_weights(self) -> tuple[int, int]:
        """Weights of the blocks' matrices that multiply image tokens, and of those that multiply text tokens."""
        weights = linear_weights(self.transformer.transformer_blocks)
        of_text = sum(n for name, n in weights.items() if ".attn2.to_k" in name or ".attn2.to_v" in name)
        return sum(weights.values()) - of_text, of_text

    def export(self, folder: Path) -> None:
        """The models that were trained, each in its folder."""
        for name in ("transformer", "text_encoder"):
            model: Any = getattr(self, name)
            if model is not None and any(p.requires_grad for p in model.parameters()):
                model.save_pretrained(folder / name)


def of_one_size(samples: Sequence[Sample]) -> list[slice]:
    """Where the samples of one size are, next to each other: one slice, unless batches are packed."""
    found: list[slice] = []
    for _, some in itertools.groupby(samples, key=_shape):
        start = found[-1].stop if found else 0
        found.append(slice(start, start + len([*some])))
    return found


def _shape(sample: Sample) -> torch.Size:
    shown = sample.image if sample.image is not None else sample.posterior[0]  # type: ignore[index]
    return shown.shape


def by_timestep(losses: Tensor, t: Tensor, steps: int, buckets: int = 4) -> dict[str, Tensor]:
    """Losses [B] by buckets of their timestep, for the log: layout and color are decided at high noise."""
    edges = [steps * i // buckets for i in range(buckets + 1)]
    losses = losses.detach()
    return {
        f"t{low}_{high}": torch.where((t >= low) & (t < high), losses, torch.nan)
        for low, high in itertools.pairwise(edges)
    }


def loss_mask(samples: Sequence[Sample], x0: Tensor) -> Tensor | None:
    """The samples' masks at the size of latents [B, C, H, W]: [B, 1, H, W]; None if none has any."""
    if all(sample.loss_mask is None for sample in samples):
        return None
    size = (x0.shape[-2], x0.shape[-1])
    blank = torch.ones(1, *size)
    masks = [blank if s.loss_mask is None else F.adaptive_avg_pool2d(s.loss_mask, size) for s in samples]
    return torch.stack(masks).to(x0)


def initialize(transformer: PixArtTransformer2DModel) -> None:
    """Initialize as DiT (2212.09748, section 3.2) and PixArt-α: the gates make every block the identity.

    The caption projection preserves variance instead of using DiT's standard deviation of 0.02, with which a text of
    few channels would be so faint that attention to it stays uniform for thousands of steps.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = transformer.pos_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    for name, parameter in transformer.named_parameters():
        if "timestep_embedder" in name or name == "adaln_single.linear.weight":
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        elif ".attn2.to_out.0." in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
