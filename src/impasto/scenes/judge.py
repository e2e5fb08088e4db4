"""The judge: a small convolutional network that recognizes the scene in an image of the small world.

First it locates the solids: each cell of 8 x 8 pixels is assigned to the background or to one of three slots, which are
the solids in the canonical order of `reading.py`. Shape, colour and size of a solid are read from the features averaged
over the cells of its slot; the arrangement (how many solids there are, and how they are related) from all features.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoints.config import records_config
from ..checkpoints.values import Count
from ..errors import InputError
from ..models.base import Model
from ..nn.outputs import BaseOutput
from .reading import ARRANGEMENTS, Reading
from .world import ALL_COLOURS, ALL_SHAPES, BACKGROUNDS, FRAMES, SIZES, Solid

SLOTS = 3
CELL = 8  # pixels per side
WEIGHTS = Path(__file__).parent / "judge_weights"

ImageLike = Tensor | Image.Image


@dataclass
class JudgeOutput(BaseOutput):
    """Logits. Those of slots that are not in the arrangement are meaningless."""

    arrangement: Tensor  # [B, len(ARRANGEMENTS)]
    shape: Tensor  # [B, SLOTS, len(ALL_SHAPES)]
    colour: Tensor  # [B, SLOTS, len(ALL_COLOURS)]
    size: Tensor  # [B, SLOTS, len(SIZES)]
    background: Tensor  # [B, len(BACKGROUNDS)]
    cells: Tensor  # [B, 1 + SLOTS, H / CELL, W / CELL]: background, slots


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Judge(Model):
    """Reads images of one to three solids.

    Args:
        fine_channels, coarse_channels: of the features at strides 4 and 8.
        hidden_channels: between pooled features and answers.
        blocks: residual blocks at each of the two strides.
    """

    stored_lists: ClassVar[Mapping[str, str]] = {"blocks": "coarse"}

    @records_config
    def __init__(
        self, fine_channels: Count = 48, coarse_channels: Count = 80, hidden_channels: Count = 96, blocks: Count = 2
    ):
        super().__init__()
        # A wide kernel at stride 4 keeps the content of 4 x 4 pixels, at a third of the cost of two stages at stride 2.
        self.stem = nn.Sequential(
            nn.Conv2d(5, fine_channels, 8, stride=4, padding=2, bias=False), nn.BatchNorm2d(fine_channels), nn.ReLU()
        )
        self.fine = nn.Sequential(*(ResidualBlock(fine_channels) for _ in range(blocks)))
        self.down = nn.Sequential(
            nn.Conv2d(fine_channels, coarse_channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(coarse_channels),
            nn.ReLU(),
        )
        self.coarse = nn.ModuleList(ResidualBlock(coarse_channels) for _ in range(blocks))
        self.context = nn.Linear(coarse_channels, coarse_channels)
        self.to_cells = nn.Conv2d(coarse_channels, 1 + SLOTS, 1)
        pooled = coarse_channels + 1
        self.solid = nn.Sequential(nn.Linear(pooled + 2 * coarse_channels, hidden_channels), nn.ReLU())
        self.scene = nn.Sequential(nn.Linear(SLOTS * pooled + 2 * coarse_channels, hidden_channels), nn.ReLU())
        self.to_shape = nn.Linear(hidden_channels, len(ALL_SHAPES))
        self.to_colour = nn.Linear(hidden_channels, len(ALL_COLOURS))
        self.to_size = nn.Linear(hidden_channels, len(SIZES))
        self.to_arrangement = nn.Linear(hidden_channels, len(ARRANGEMENTS))
        self.to_background = nn.Linear(pooled, len(BACKGROUNDS))

    def forward(self, images: Tensor) -> JudgeOutput:
        """Read images [B, 3, H, W] in [0, 1], H and W multiples of 8, ideally one of `FRAMES`."""
        batch, _, height, width = images.shape
        y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
        x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
        places = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, -1, -1, -1)
        h = torch.cat([images * 2 - 1, places], 1)  # [B, 5, H, W]
        h = self.fine(self.stem(h.contiguous(memory_format=torch.channels_last)))  # [B, F, H/4, W/4]
        h = self.down(h)  # [B, C, H/8, W/8]
        for block in self.coarse:
            # The slot of a solid depends on where the others are, possibly outside the receptive field.
            h = block(h + self.context(h.mean((2, 3)))[:, :, None, None])
        cells = self.to_cells(h).float()  # [B, 1 + S, H/8, W/8]

        features = h.float().flatten(2).mT  # [B, N, C]
        shares = cells.softmax(1).flatten(2)  # [B, 1 + S, N]
        area = shares.sum(2, keepdim=True)  # [B, 1 + S, 1]
        means = shares @ features / (area + 1)  # the 1 keeps the mean of an empty slot small
        slots = torch.cat([means, (area + 1).log()], 2)  # [B, 1 + S, C + 1]
        whole = torch.cat([features.mean(1), features.amax(1)], 1)  # [B, 2C]
        solids = self.solid(torch.cat([slots[:, 1:], whole[:, None].expand(-1, SLOTS, -1)], 2))  # [B, S, hidden]
        scene = self.scene(torch.cat([slots[:, 1:].flatten(1), whole], 1))  # [B, hidden]
        return JudgeOutput(
            arrangement=self.to_arrangement(scene),
            shape=self.to_shape(solids),
            colour=self.to_colour(solids),
            size=self.to_size(solids),
            background=self.to_background(slots[:, 0]),
            cells=cells,
        )

    @torch.no_grad()
    def read(self, images: Tensor | Sequence[ImageLike], batch_size: int = 64) -> list[Reading]:
        """What each image shows.

        Args:
            images: a batch [B, 3, H, W], or images of any sizes: PIL images, or tensors [3, H, W], float in
                [0, 1] or uint8. Sizes other than `FRAMES` are scaled to one of these.

        Raises:
            InputError: something else.
        """
        fitted = [fit(as_tensor(image)) for image in images]
        readings: dict[int, Reading] = {}
        for frame in {image.shape for image in fitted}:
            members = [i for i, image in enumerate(fitted) if image.shape == frame]
            for start in range(0, len(members), batch_size):
                some = members[start : start + batch_size]
                batch = torch.stack([fitted[i] for i in some]).to(self.device, self.dtype)
                readings.update(zip(some, to_readings(self(batch))))
        return [readings[i] for i in range(len(fitted))]


def to_readings(output: JudgeOutput) -> list[Reading]:
    """The most likely answers."""
    arrangements, backgrounds = output.arrangement.argmax(1).tolist(), output.background.argmax(1).tolist()
    answers = torch.stack([output.shape.argmax(2), output.colour.argmax(2), output.size.argmax(2)], 2).tolist()
    colours, grounds = tuple(ALL_COLOURS), tuple(BACKGROUNDS)
    readings = []
    for arrangement, background, slots in zip(arrangements, backgrounds, answers):
        relations = ARRANGEMENTS[arrangement]
        solids = (Solid(ALL_SHAPES[shape], colours[colour], SIZES[size]) for shape, colour, size in slots)
        readings.append(Reading(tuple(solids)[: len(relations) + 1], relations, grounds[background]))
    return readings


def as_tensor(image: ImageLike) -> Tensor:
    """An image as float32 [3, H, W] in [0, 1]."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"An image is a PIL image or a tensor [3, height, width], not {found}.")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point() or not -0.01 <= float(image.min()) <= float(image.max()) <= 1.01:
        raise InputError("An image tensor holds floats in [0, 1] or uint8; scale it first, as in (x + 1) / 2.")
    return image.float().clamp(0, 1)


def fit(image: Tensor) -> Tensor:
    """Scale [3, H, W] into the frame of the nearest aspect ratio, padded by repeating the border.

    Images of twice a frame's size are averaged over 2 x 2 pixels.
    """
    _, height, width = image.shape
    if (height, width) in FRAMES:
        return image
    if (height / 2, width / 2) in FRAMES:
        return F.avg_pool2d(image, 2)
    rows, columns = min(FRAMES, key=lambda frame: abs(np.log(frame[0] / frame[1] * width / height)))
    scale = min(rows / height, columns / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    scaled = F.interpolate(image[None], inner, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (rows - inner[0]) // 2, (columns - inner[1]) // 2
    padding = (left, columns - inner[1] - left, top, rows - inner[0] - top)
    return F.pad(scaled, padding, mode="replicate")[0]


@functools.cache
def bundled_judge() -> Judge:
    """The trained judge that comes with the package, on the CPU in float32."""
    return Judge.from_pretrained(WEIGHTS, local_files_only=True)


def read(images: Tensor | Sequence[ImageLike]) -> list[Reading]:
    """What each image shows, according to the bundled judge; see `Judge.read`."""
    return bundled_judge().read(images)
