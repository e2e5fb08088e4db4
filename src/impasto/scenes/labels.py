"""Labels of the cells of an image, known from its rendering, for auxiliary losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import BACKGROUNDS, COLOURS, SHAPES, Scene

CELL = 8  # pixels per side
#: Numbers of classes: the solid (0: none), the colour (COLOURS, then BACKGROUNDS), the shape (0: none).
LABEL_CLASSES = (4, len(COLOURS) + len(BACKGROUNDS), 1 + len(SHAPES))


def label_cells(ids: Tensor, scenes: list[Scene]) -> Tensor:
    """The classes (LABEL_CLASSES) of what fills most of each cell, [N, 3, H / CELL, W / CELL] uint8.

    Args:
        ids: [N, H, W], per pixel: 0 the background, i the i-th solid of its scene.
    """
    share = torch.stack([F.avg_pool2d((ids == number).float(), CELL) for number in range(LABEL_CLASSES[0])])
    solid = share.argmax(0)  # [N, H / CELL, W / CELL]
    table = torch.zeros(len(scenes), LABEL_CLASSES[0], 2, dtype=torch.long)
    for row, scene in zip(table, scenes, strict=True):
        row[0, 0] = len(COLOURS) + list(BACKGROUNDS).index(scene.background)
        for number, item in enumerate(scene.solids, 1):
            row[number] = torch.tensor([list(COLOURS).index(item.color), 1 + SHAPES.index(item.shape)])
    shown = table[torch.arange(len(scenes))[:, None, None], solid]  # [N, H / CELL, W / CELL, 2]
    return torch.stack([solid, *shown.unbind(-1)], 1).to(torch.uint8)
