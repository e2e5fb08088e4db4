"""Train the judge that reads images of the small world back into scenes, and report how often it is right.

    python scripts/train_judge.py [--out runs/judge] [--stage render|train|report] [--start-from FOLDER]

Every stage resumes where it was interrupted. Without --stage all of them run in order. Unlike the generator, the judge
learns from all combinations, including those held out from the generator, and from the shape and the colour that only
adapters learn, because it has to read them. Arrangements are traced once, and coloured again each time they are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import chunks
from impasto.nn.machine import fast_dtype
from impasto.scenes.judge import CELL, SLOTS, WEIGHTS, Judge, JudgeOutput
from impasto.scenes.reading import ARRANGEMENTS, Reading, canonical, canonical_order, compare
from impasto.scenes.renderer import render as render_scene
from impasto.scenes.renderer import trace
from impasto.scenes.world import (
    ALL_COLOURS,
    ALL_SHAPES,
    BACKGROUNDS,
    SIZES,
    Scene,
    is_held_out,
    sample_arrangement,
    sample_scene,
    with_adapter_words,
)
from impasto.training.objectives.base import ByStep, Loss, Objective, Tensors
from impasto.training.running.checkpoints import load_state, save_state
from impasto.training.running.loop import train as train_loop
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import Settings

SEED, UNSEEN_SEED = 7102, 8102
CHUNKS = 31
ARRANGEMENTS_A_CHUNK = 256
FRAMES = [(128, 128), (96, 160), (128, 128), (160, 96), (128, 128), (112, 144), (128, 128), (144, 112)]
KEEP = {1: 0.5, 2: 0.7, 3: 1.0}  # share of the sampled arrangements to keep: three solids are the hardest to read
DIFFUSE_UNIT = 240  # brightness goes up to 1.05

STEPS = 4500
SETTLED_STEPS = 500  # the last steps, with batch normalization in evaluation mode
SETTLING_BATCHES = 100
BATCH = 32
CELL_WEIGHT = 1.0  # of locating the solids, relative to the answers
VALIDATION_SCENES = 384
REPORT_SCENES = 2000


def judge_settings(steps: int, rate: float = 2e-3) -> Settings:
    return Settings(
        steps=steps,
        seed=SEED,
        optimizer={"rate": rate, "weight_decay": 0.02},
        schedule={"kind": "cosine", "warmup": 100, "floor": 0.01},
        clip=5.0,
        log_every=200,
        checkpoints={"every": 200},
    )


def render(out: Path, count: int) -> None:
    """Chunks of traced arrangements of one frame size, solids in canonical order."""
    folder = out / "geometry"
    chunks.make_missing(folder, range(count), functools.partial(render_chunk, folder))


def render_chunk(folder: Path, chunk: int) -> None:
    height, width = FRAMES[chunk % len(FRAMES)]
    rng = np.random.default_rng([SEED, chunk])
    # Background and up to three solids, then the gloss.
    buffers = torch.zeros(ARRANGEMENTS_A_CHUNK, 5, height, width, dtype=torch.uint8)
    labels = np.zeros((ARRANGEMENTS_A_CHUNK, 7), dtype=np.int64)  # arrangement, shape and size of each solid
    for i in range(ARRANGEMENTS_A_CHUNK):
        scene = sample_arrangement(rng, height, width, ALL_SHAPES)
        while rng.random() > KEEP[len(scene.solids)]:
            scene = sample_arrangement(rng, height, width, ALL_SHAPES)
        buffer = trace(scene, height, width, scene.seed)
        order = [0] + [number + 1 for number in canonical_order(scene.relations)]
        buffers[i, : len(order)] = (buffer.diffuse[order] * DIFFUSE_UNIT).round().to(torch.uint8)
        buffers[i, 4] = (buffer.gloss * 255).round().to(torch.uint8)
        reading = canonical(scene)
        labels[i, 0] = ARRANGEMENTS.index(reading.relations)
        for slot, solid in enumerate(reading.solids):
            labels[i, 1 + 2 * slot] = ALL_SHAPES.index(solid.shape)
            labels[i, 2 + 2 * slot] = SIZES.index(solid.size)
    chunks.save(chunks.path_of(folder, chunk), buffers=buffers.numpy(), labels=labels)


def load(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Buffers [N, 5, H, W], labels [N, 7] and the share of each cell that a slot covers [N, 1 + SLOTS, h, w], uint8."""
    with np.load(path) as chunk:
        buffers, labels = torch.from_numpy(chunk["buffers"]), torch.from_numpy(chunk["labels"])
    solids = F.avg_pool2d((buffers[:, 1:4] > DIFFUSE_UNIT // 8).float(), CELL)
    cells = torch.cat([(1 - solids.sum(1, keepdim=True)).clamp_min(0), solids], 1)
    return buffers, labels, (cells * 255).round().to(torch.uint8)


def colour(buffers: Tensor, colours: Tensor, backgrounds: Tensor, random: Randomness) -> Tensor:
    """Images [B, 3, H, W] of traced arrangements: as `shade`, in slightly varied colors."""
    grounds = torch.tensor(list(BACKGROUNDS.values()))[backgrounds][:, None]  # [B, 1, 3]
    palette = torch.cat([grounds, torch.tensor(list(ALL_COLOURS.values()))[colours]], 1)  # [B, 1 + SLOTS, 3]
    palette = (palette + 0.025 * random.normal(palette.shape)).clamp(0, 1)
    layers = buffers.float()
    images = (palette.mT / DIFFUSE_UNIT) @ layers[:, :4].flatten(2)  # [B, 3, H * W]
    gloss = layers[:, 4:].flatten(2) / 255
    return torch.lerp(images, torch.ones(()), gloss).clamp_(0, 1).unflatten(2, layers.shape[2:])


def degrade(images: Tensor, random: Randomness, everything: bool = False) -> Tensor:
    """Degrade images as generators may: each defect in some of the images, or in all, to a varying degree."""
    batch, _, height, width = images.shape

    def few(share: float) -> Tensor:
        return torch.nonzero((random.uniform([batch]) < share) | everything).flatten()

    def amounts(low: float, high: float) -> Tensor:
        return low + (high - low) * random.uniform([batch, 1, 1, 1])

    # Light and colour: nearly the identity matrix, which also turns hues a little, and contrast about the middle.
    matrix = torch.eye(3) + 0.03 * random.normal([batch, 3, 3])
    matrix = matrix * (1 + 0.15 * (2 * random.uniform([batch, 1, 1]) - 1))
    shift = 0.06 * (2 * random.uniform([batch, 1, 1]) - 1) + 0.5 * (1 - matrix.sum(2, keepdim=True))
    images = torch.baddbmm(shift, matrix, images.flatten(2)).view_as(images)
    # Blur in two strengths; a negative share of the blur sharpens.
    for chosen, low, high in ((few(0.35), -0.5, 1.0), (few(0.2), 0.3, 1.0)):
        some = images[chosen]
        blurred = F.avg_pool2d(some, 3, 1, padding=1, count_include_pad=False)
        images[chosen] = torch.lerp(some, blurred, amounts(low, high)[chosen])
    # Stains and grain.
    chosen = few(0.3)
    stains = F.interpolate(random.normal([batch, 3, height // 8, width // 8]), (height, width), mode="bilinear")
    images[chosen] += (amounts(0.0, 0.045) * stains)[chosen]
    chosen = few(0.3)
    images[chosen] += (amounts(0.0, 0.05) * random.normal([batch, 3, height, width]))[chosen]
    # JPEG: coefficients of 8 x 8 blocks, rounded to steps that grow with the frequency.
    chosen = few(0.15)
    k = torch.arange(8.0)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) * torch.where(k > 0, 0.5, 8**-0.5)[:, None]
    blocks = images[chosen].unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # [b, 3, h, w, 8, 8]
    steps = (1 + k[:, None] + k[None]) * 0.02 * random.uniform([batch, 1, 1, 1, 1, 1])[chosen] + 1e-4
    waves = ((basis @ blocks @ basis.T) / steps).round() * steps
    images[chosen] = (basis.T @ waves @ basis).transpose(3, 4).flatten(4).flatten(2, 3)
    return images.clamp_(0, 1)


def losses(
    output: JudgeOutput, labels: Tensor, colours: Tensor, backgrounds: Tensor, cells: Tensor
) -> dict[str, Tensor]:
    counts = torch.tensor([len(relations) + 1 for relations in ARRANGEMENTS])[labels[:, 0]]
    present = torch.arange(SLOTS)[None] < counts[:, None]  # [B, SLOTS]
    return {
        "arrangement": F.cross_entropy(output.arrangement, labels[:, 0]),
        "shape": F.cross_entropy(output.shape[present], labels[:, 1::2][present]),
        "colour": F.cross_entropy(output.colour[present], colours[present]),
        "size": F.cross_entropy(output.size[present], labels[:, 2::2][present]),
        "background": F.cross_entropy(output.background, backgrounds),
        "cells": CELL_WEIGHT * F.cross_entropy(output.cells, cells.float() / 255),
    }


def unseen(
    name: str, count: int, folder: Path, adapter_words: bool = False, scale: int = 1
) -> tuple[list[Tensor], list[Scene]]:
    """Renders that are in no chunk: scenes as the world samples them, in all frame sizes and combinations.

    Args:
        adapter_words: each scene has the shape or the colour that only adapters learn.
        scale: of the frames, in pixels of the renders.
    """
    rng = np.random.default_rng([UNSEEN_SEED, *name.encode()])
    scenes = [sample_scene(rng) for _ in range(count)]
    if adapter_words:
        scenes = [with_adapter_words(scene, rng) for scene in scenes]
    path = folder / f"{name}_{count}_{scale}{'_adapter' if adapter_words else ''}.pt"
    if path.exists():
        return load_state(path)["images"], scenes
    scaled = [dataclasses.replace(scene, height=scale * scene.height, width=scale * scene.width) for scene in scenes]
    images = [render_scene(scene).mul(255).round().to(torch.uint8) for scene in scaled]
    save_state(path, {"images": images})
    return images, scenes


def accuracy(readings: list[Reading], scenes: list[Scene]) -> dict[str, tuple[int, int]]:
    """For each attribute, how often it is read right and how often it occurs."""
    scores = [compare(reading, scene) for reading, scene in zip(readings, scenes)]
    flags = {
        "solids counted": [score.count for score in scores],
        **{
            name: [flag for score in scores for flag in getattr(score, name)]
            for name in ("colours", "shapes", "sizes", "relations", "background")
        },
        "whole": [score.whole for score in scores],
    }
    return {name: (sum(values), len(values)) for name, values in flags.items()}


def sample(geometry: list[tuple[Tensor, Tensor, Tensor]], random: Randomness) -> tuple[Tensor, ...]:
    """A batch from one chunk in new colours, degraded: images, labels, colours, backgrounds and cells."""
    buffers, labels, cells = geometry[random.shared.integers(len(geometry))]
    chosen = random.integers(len(buffers), [BATCH])
    colours = random.integers(len(ALL_COLOURS), [BATCH, SLOTS])
    backgrounds = random.integers(len(BACKGROUNDS), [BATCH])
    images = degrade(colour(buffers[chosen], colours, backgrounds, random), random)
    return images, labels[chosen], colours, backgrounds, cells[chosen]


def answer(judge: Judge, images: Tensor) -> JudgeOutput:
    """The output of a judge in training, in float32. The judge itself averages in float32."""
    dtype = fast_dtype(torch.device("cpu"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return JudgeOutput(*(value.float() for value in judge(images).to_tuple()))


@torch.no_grad()
def settle(judge: Judge, geometry: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Measure the batch-normalization statistics again, evenly over all frame sizes."""
    norms = [module for module in judge.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    for number in range(SETTLING_BATCHES):
        answer(judge, sample(geometry, Randomness(SEED + 1, number))[0])


class Judging(Objective):
    """The errors of a judge's answers. Random numbers make the batches."""

    def __init__(self, judge: Judge, geometry: list[tuple[Tensor, Tensor, Tensor]], steps: int):
        super().__init__()
        self.judge, self.geometry, self.settled = judge, geometry, steps - SETTLED_STEPS

    def forward(self, batch: Tensors, random: Randomness) -> Loss:
        # A batch has one frame size, whose statistics differ from those of the mixture that the judge is used on.
        if batch.step == self.settled:
            settle(self.judge, self.geometry)
        if batch.step >= self.settled:
            self.judge.eval()
        images, *answers = sample(self.geometry, random)
        parts = losses(answer(self.judge, images), *answers)
        total = torch.stack(list(parts.values())).sum()
        return Loss(total.expand(BATCH), {f"loss {name}": value for name, value in parts.items()})


def train(out: Path, steps: int, start_from: Path | None = None) -> None:
    torch.manual_seed(SEED)
    judge = Judge() if start_from is None else Judge.from_pretrained(start_from)
    judge = judge.to(memory_format=torch.channels_last).train()
    geometry = [load(chunks.path_of(out / "geometry", chunk)) for chunk in chunks.known(out / "geometry")]
    images, scenes = unseen("validation", VALIDATION_SCENES, out)
    new_images, new_scenes = unseen("new words", VALIDATION_SCENES // 2, out, adapter_words=True)
    images, scenes = images + new_images, scenes + new_scenes

    def check(step: int) -> dict[str, float]:
        right = accuracy(judge.read(images), scenes)
        percent = {f"val {name}": 100 * value / count for name, (value, count) in right.items()}
        log = out / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if percent["val whole"] >= max((row.get("val whole", -1.0) for row in rows), default=-1.0):
            save_state(out / "best.pt", judge.state_dict())
        return percent

    settings = judge_settings(steps) if start_from is None else judge_settings(steps, 1e-3)
    train_loop(Judging(judge, geometry, steps), ByStep(lambda step: None, BATCH), settings, out, check)


def report(out: Path, docs: Path) -> None:
    """Store the best judge in float16, and its accuracy as stored."""
    judge = Judge()
    judge.load_state_dict(load_state(out / "best.pt"))
    judge.half().save_pretrained(WEIGHTS)
    judge = Judge.from_pretrained(WEIGHTS)
    images, scenes = unseen("report", REPORT_SCENES, out)
    worse = [degrade(image[None] / 255, Randomness(SEED, 0, i), everything=True)[0] for i, image in enumerate(images)]
    readings = judge.read(images)
    held = [i for i, scene in enumerate(scenes) if is_held_out(scene)]
    twice, same_scenes = unseen("report", REPORT_SCENES // 2, out, scale=2)
    new_images, new_scenes = unseen("report of new words", REPORT_SCENES // 2, out, adapter_words=True)
    tables = {
        "unseen renders": accuracy(readings, scenes),
        "of these, combinations that the generator never sees": accuracy(
            [readings[i] for i in held], [scenes[i] for i in held]
        ),
        "at twice the size": accuracy(judge.read(twice), same_scenes),
        "with the shape or the colour that only adapters learn": accuracy(judge.read(new_images), new_scenes),
        "each degraded by light and colour shifts, blur, stains, grain and JPEG": accuracy(judge.read(worse), scenes),
    }
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    constants = {
        name.lower(): value for name, value in globals().items() if name.isupper() and isinstance(value, int | float)
    }
    recipe = judge_settings(int(log[-1]["step"])).model_dump()
    content = {
        "recipe": {**constants, **recipe, "parameters": judge.num_parameters()},
        "renders": len(scenes),
        "accuracy": {
            title: {name: f"{100 * right / count:.2f} % ({right} of {count})" for name, (right, count) in table.items()}
            for title, table in tables.items()
        },
        "log": [{name: round(value, 4) for name, value in row.items()} for row in log],
    }
    text = json.dumps(content, indent=1)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "judge.json").write_text(text + "\n")
    print(json.dumps(content["accuracy"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judge"))
    parser.add_argument("--docs", type=Path, default=Path("docs/scenes"))
    parser.add_argument("--stage", choices=["render", "train", "report"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--start-from", type=Path, help="the weights of a trained judge, instead of random ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage in (None, "render"):
        render(options.out, CHUNKS)
    if options.stage in (None, "train"):
        train(options.out, options.steps, options.start_from)
    if options.stage in (None, "report"):
        report(options.out, options.docs)


if __name__ == "__main__":
    main()
