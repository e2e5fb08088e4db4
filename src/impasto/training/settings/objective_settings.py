"""The settings of the objectives other than plain training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .config import Count, NotNegative, Positive, Section, Share

Timestep = Annotated[int, Field(ge=0)]
#: What validation measures, by the kind of the objective; of the others "validation".
MEASURES = {
    "autoencoder": ("psnr",),
    "text-encoder": ("validation", "validation_right"),
    "lcm": ("distance",),
    "dmd": ("distance",),
}


class TokenRoutingSettings(Section):
    """Random tokens skip blocks in training (``transforms.token_routing``).

    Attributes:
        start, end: the blocks from ``start`` to ``end`` - 1 are skipped.
        rate: the share of tokens that skip them.
    """

    start: Timestep = 2
    end: Count
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Denoising(Section):
    """What objectives of a denoiser have in common.

    Attributes:
        prediction: what the transformer predicts; as the scheduler's config says, unless given.
        tokens: of a caption, at most; the family's, unless given.
        clean_captions: as the originals did, beyond lower case.
    """

    prediction: Literal["epsilon", "v_prediction"] | None = None
    tokens: Count | None = None
    clean_captions: bool = False


class LcmSettings(Denoising):
    """Latent consistency distillation (``objectives.lcm``): a few steps instead of many.

    Attributes:
        intervals: of the teacher's schedule.
        guidance_scale: of the teacher, in the pipelines' convention: the originals' 4.5 is 5.5 here.
        target_decay: of the average of the student that defines the target; 0: the student itself.
        huber: c of the distance sqrt(d² + c²) - c.
    """

    kind: Literal["lcm"]
    intervals: Count = 50
    guidance_scale: NotNegative = 5.5
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    huber: Positive = 1e-3


class DmdSettings(Denoising):
    """Distribution matching distillation (``objectives.dmd``): one step.

    Attributes:
        generator_timestep: of which the generator takes noise for an image with noise.
        noise_levels: the first and the last timestep at which images are compared.
        guidance_scale: of the teacher, in the pipelines' convention.
        regression_weight: of the distance to images that the teacher made of the same noise; 0 for none.
        pair_steps: of the teacher for these.
    """

    kind: Literal["dmd"]
    generator_timestep: Timestep = 400
    noise_levels: tuple[Timestep, Timestep] = (1, 950)
    guidance_scale: NotNegative = 7.5
    regression_weight: NotNegative = 0.25
    pair_steps: Count = 10

    @model_validator(mode="after")
    def _ascending(self) -> DmdSettings:
        if self.noise_levels[0] > self.noise_levels[1]:
            raise ValueError("noise_levels are the first and the last timestep, in ascending order")
        return self


class TextualInversionSettings(Denoising):
    """The embeddings of a new word (``objectives.textual_inversion``).

    Attributes:
        token: the word, which the captions hold.
        vectors: the number of its embeddings.
        start_from: known words from whose embeddings it starts; random ones, unless given.
        caption_dropout: the share of captions replaced by the empty one, from which the word learns nothing.
    """

    kind: Literal["textual-inversion"]
    token: str
    vectors: Count = 1
    start_from: str | None = None
    caption_dropout: Share = 0.0


class ClassImageSettings(Section):
    """Images that the model generates before training where a folder has too few (``jobs.class_images``).

    Attributes:
        count: of images in the folder.
        steps, guidance_scale: of their generation.
        batch_size: of images generated at once.
        seed: of the first image.
    """

    count: Count
    steps: Count = 20
    guidance_scale: NotNegative = 4.5
    batch_size: Count = 4
    seed: Timestep = 0
