"""Labels for auxiliary losses: of the cells of an image, known from its rendering, and of its caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import statement
from .world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene

CELL = 8  # pixels per side
#: Numbers of classes: the solid (0: none), the colour (COLOURS, then BACKGROUNDS), the shape and the size (0: none).
LABEL_CLASSES = (4, len(COLOURS) + len(BACKGROUNDS), 1 + len(SHAPES), 1 + len(SIZES))
#: Numbers of classes: colour, shape, size, relation to the next solid, background; 0: not said.
CAPTION_CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), 1 + len(SIZES), 1 + len(RELATIONS), 1 + len(BACKGROUNDS))


def label_cells(ids: Tensor, scenes: list[Scene]) -> Tensor:
    """The classes (LABEL_CLASSES) of what fills most of each cell, [N, 4, H / CELL, W / CELL] uint8.

    Args:
        ids: [N, H, W], per pixel: 0 the background, i the i-th solid of its scene.
    """
    share = torch.stack([F.avg_pool2d((ids == number).float(), CELL) for number in range(LABEL_CLASSES[0])])
    solid = share.argmax(0)  # [N, H / CELL, W / CELL]
    table = torch.zeros(len(scenes), LABEL_CLASSES[0], 3, dtype=torch.long)
    for row, scene in zip(table, scenes, strict=True):
        row[0, 0] = len(COLOURS) + list(BACKGROUNDS).index(scene.background)
        for number, item in enumerate(scene.solids, 1):
            classes = list(COLOURS).index(item.color), 1 + SHAPES.index(item.shape), 1 + SIZES.index(item.size)
            row[number] = torch.tensor(classes)
    shown = table[torch.arange(len(scenes))[:, None, None], solid]  # [N, H / CELL, W / CELL, 3]
    return torch.stack([solid, *shown.unbind(-1)], 1).to(torch.uint8)


def label_caption(scene: Scene, text: str) -> Tensor:
    """What a caption of a scene says of each of up to three solids, classes (CAPTION_CLASSES) [3, 5] int64."""
    labels = torch.zeros(LABEL_CLASSES[0] - 1, len(CAPTION_CLASSES), dtype=torch.long)
    with_size = statement(scene, with_size=True) in text
    for row, solid in zip(labels, scene.solids):
        row[0] = 1 + list(COLOURS).index(solid.color)
        row[1] = 1 + SHAPES.index(solid.shape)
        row[2] = 1 + SIZES.index(solid.size) if with_size else 0
    for row, relation in zip(labels, scene.relations):
        row[3] = 1 + RELATIONS.index(relation)
    if f"on a {scene.background} background" in text:
        labels[:, 4] = 1 + list(BACKGROUNDS).index(scene.background)
    return labels
