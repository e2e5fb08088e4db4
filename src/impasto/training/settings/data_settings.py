"""The data of a run: its sources, the sizes of images, and batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config import Count, NotNegative, Positive, Section, Share
from .objective_settings import ClassImageSettings

OWN_KINDS = ("folder", "shards", "cache")
_CONTENT = ("caption", "needs_caption", "background", "metadata", "mask_suffix")
#: Settings that a kind of source does not have, and those that kinds of other programs do not have.
_NOT_OF: dict[str, tuple[str, ...]] = {"folder": (), "shards": ("metadata", "mask_suffix"), "cache": _CONTENT}
_NOT_OF_OTHERS = ("path", "crop", "flip", "real_prompt_ratio", *_CONTENT)


class SourceSettings(Section):
    """Where samples come from.

    Attributes:
        kind: ``folder`` of images with captions; ``shards`` of webdataset; ``cache``, made by ``impasto cache``; or one
            that this program adds, such as ``scenes``.
        path: of the folder or file.
        repeats: how often an epoch has each sample; fractions are allowed.
        share: of this source in an epoch, in any unit, in place of ``repeats``: of all sources, or of none.
        weight: of each sample's loss.
        crop: which part of an image that is larger than its bucket: ``random``, ``centre``, or a number of fixed crops.
            A cache has its own crop and flip; if given, they have to be the same.
        flip: whether half of the samples are mirrored.
        caption: of every image, in place of captions from files.
        metadata: a .jsonl or .json file of captions, if it is not one of those found by themselves.
        mask_suffix: of loss masks next to the images.
        generate: images of ``caption`` that the model generates before training, if the folder has too few.
        options: of a kind that this program adds.
    """

    kind: str = "folder"
    path: str | None = None
    repeats: Positive | None = None
    share: Positive | None = None
    weight: NotNegative = 1.0
    crop: Literal["random", "centre"] | Count = "random"
    flip: bool = False
    caption: str | None = None
    needs_caption: bool = True
    real_prompt_ratio: Share = 0.5
    background: str = "white"
    metadata: str | None = None
    mask_suffix: str | None = None
    generate: ClassImageSettings | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> SourceSettings:
        if self.kind in OWN_KINDS and self.path is None:
            raise ValueError(f"a source of the kind {self.kind} needs its path")
        if self.generate is not None and (self.kind != "folder" or self.caption is None):
            raise ValueError("generate is for a folder with a caption, which is the prompt")
        if self.kind in OWN_KINDS and self.options:
            raise ValueError(f"options are for kinds other than {', '.join(OWN_KINDS)}")
        fields = type(self).model_fields
        for name in _NOT_OF.get(self.kind, _NOT_OF_OTHERS):
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect on a source of the kind {self.kind}; leave it out")
        return self


class DataSettings(Section):
    """What is trained on, and in which sizes.

    Attributes:
        batch_size: of the global batch, over all processes.
        base: train at the aspect-ratio buckets of 256, 512, 1024, 2048 or 2880 px.
        sizes: buckets [height, width] in pixels, in place of ``base``.
        max_upscale: an image that would have to be enlarged by more than this factor is dropped.
        max_crop: an image that would lose more than this share of its area is dropped.
        pack_pixels: batches of mixed sizes, of up to this many pixels each, in place of ``batch_size`` images.
        workers: processes that read ahead.
        max_broken: how many samples may turn out to be broken: below 1 a share of all, else a number. Each process
            counts those that it reads.
    """

    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    batch_size: Count
    base: Literal[256, 512, 1024, 2048, 2880] | None = None
    sizes: list[tuple[Count, Count]] | None = None
    max_upscale: Positive = 2.0
    max_crop: Share = 0.5
    pack_pixels: Count | None = None
    workers: Annotated[int, Field(ge=0)] = 0
    max_broken: NotNegative = 0.01

    @model_validator(mode="after")
    def _sizes(self) -> DataSettings:
        if (self.base is None) == (self.sizes is None):
            raise ValueError("give either base (256, 512, 1024, 2048 or 2880) or sizes (a list of [height, width])")
        given = [source.share is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError("give a share for each source, or for none")
        if any(given) and any(source.repeats is not None for source in self.sources):
            raise ValueError("share and repeats contradict each other; give one of them")
        if len({source.kind == "cache" for source in self.sources}) > 1:
            raise ValueError("samples of a cache and others cannot be in one batch; cache all of the sources, or none")
        return self
