"""How well a generator follows prompts of the small world that it was not trained on, according to the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import InputError
from .captions import caption, statement
from .edits import Edit, sample_edit
from .judge import ImageLike, Judge, as_tensor, bundled_judge
from .reading import Reading, Score, compare
from .renderer import render
from .sharpness import relative_sharpness
from .world import ADAPTER_COLOUR, ADAPTER_SHAPE, Scene, is_held_out, sample_scene, with_adapter_words

TRAINED, NEVER_TRAINED = KINDS = ("unseen prompt", "never trained")
NEW_WORDS = "new words"
# First words of the random seeds, which keep prompts and edits distinct from training samples, seeded by one number or
# by others (source.py).
PROMPT_STREAM, EDIT_STREAM, ADAPTER_STREAM = 40_507, 40_508, 40_511
ATTRIBUTES = ("colours", "shapes", "sizes", "relations", "background", "count", "whole")
MEANING = {
    "colours": "of each solid",
    "shapes": "of each solid",
    "sizes": "of each solid, if the prompt gives them",
    "relations": "each one that the prompt states",
    "background": "if the prompt gives it",
    "count": "the number of solids",
    "whole": "everything in the prompt",
    "words": "each shape and colour that only adapters know",
}


class Prompt(NamedTuple):
    """A prompt, the scene that it describes, and its kind (of `KINDS`, or `NEW_WORDS`)."""

    scene: Scene
    text: str
    kind: str

    @property
    def with_size(self) -> bool:
        return statement(self.scene, with_size=True) in self.text

    @property
    def with_background(self) -> bool:
        return f"on a {self.scene.background} background" in self.text


def held_out_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Sample `n` prompts in varied wording, alternating between two kinds.

    - "unseen prompt": a new scene all of whose combinations (colour, shape, relation, colour, shape) may occur in
      training, distributed like the training scenes: 25 % have one solid, 60 % two, 15 % three.
    - "never trained": a scene with a held-out combination (`is_held_out`), hence with two or three solids.

    Every scene is new, and no prompt is repeated. Only prompts of the second kind are certainly new: there are few ways
    to ask for a single solid, and training has seen most of them.
    """
    rng = np.random.default_rng([PROMPT_STREAM, seed])
    prompts: dict[str, Prompt] = {}
    while len(prompts) < n:
        kind = KINDS[len(prompts) % 2]
        scene = sample_scene(rng)
        text = caption(scene, rng)
        if is_held_out(scene) == (kind == NEVER_TRAINED) and text not in prompts:
            prompts[text] = Prompt(scene, text, kind)
    return list(prompts.values())


def adapter_prompts(n: int, seed: int = 0) -> list[Prompt]:
    """Sample `n` prompts of the kind `NEW_WORDS`: each has the dome, cyan or both, which only adapters know.

    Otherwise they are like the "unseen prompt"s of `held_out_prompts`.
    """
    rng = np.random.default_rng([ADAPTER_STREAM, seed])
    prompts: dict[str, Prompt] = {}
    while len(prompts) < n:
        scene = with_adapter_words(sample_scene(rng), rng)
        text = caption(scene, rng)
        if not is_held_out(scene):
            prompts.setdefault(text, Prompt(scene, text, NEW_WORDS))
    return list(prompts.values())


def held_out_edits(n: int, seed: int = 0, height: int = 128, width: int = 128) -> list[Edit]:
    """Sample `n` edits of new scenes, whose results alternate between the kinds of `held_out_prompts`."""
    rng = np.random.default_rng([EDIT_STREAM, seed])
    edits: list[Edit] = []
    while len(edits) < n:
        kind = KINDS[len(edits) % 2]
        edit = sample_edit(sample_scene(rng, height, width), rng)
        if is_held_out(edit.target) == (kind == NEVER_TRAINED):
            edits.append(edit)
    return edits


class Verdict(NamedTuple):
    """One image: its prompt, what the judge sees, and what is right."""

    prompt: Prompt
    reading: Reading
    score: Score

    @property
    def words(self) -> tuple[bool, ...]:
        """For each shape and colour of the prompt that only adapters know, whether the solid has it."""
        flags = list[bool]()
        for solid, colour, shape in zip(self.prompt.scene.solids, self.score.colours, self.score.shapes):
            flags += [colour] * (solid.color == ADAPTER_COLOUR) + [shape] * (solid.shape == ADAPTER_SHAPE)
        return tuple(flags)

    def flags(self, attribute: str) -> tuple[bool, ...]:
        value: bool | tuple[bool, ...] = self.words if attribute == "words" else getattr(self.score, attribute)
        return (value,) if isinstance(value, bool) else value


@dataclass(frozen=True)
class Report:
    """The judge's verdicts and their totals; of whole scenes also their `relative_sharpness`."""

    verdicts: tuple[Verdict, ...]
    sharpness: float | None = None

    def counts(self, kind: str | None = None) -> dict[str, tuple[int, int]]:
        """How often each of `ATTRIBUTES`, and "words" if prompts have some, is right, and how often it was requested.

        Args:
            kind: of the prompts; None: all.
        """
        names = (*ATTRIBUTES, "words") if any(verdict.words for verdict in self.verdicts) else ATTRIBUTES
        some = [verdict for verdict in self.verdicts if kind in (None, verdict.prompt.kind)]
        flags = {name: [flag for verdict in some for flag in verdict.flags(name)] for name in names}
        return {name: (sum(values), len(values)) for name, values in flags.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of its prompts."""
        return tuple(dict.fromkeys(verdict.prompt.kind for verdict in self.verdicts))

    def table(self) -> str:
        """Percentages and counts as text: a line per attribute, a column per kind of prompt and one for all."""
        columns = {"all": self.counts(), **{kind: self.counts(kind) for kind in self.kinds}}
        lines = [f"{'':12}" + "".join(f"{title:>23}" for title in columns)]
        for name in columns["all"]:
            cells = (
                f"{100 * right / asked:.1f} % ({right}/{asked})" if asked else "-"
                for right, asked in (column[name] for column in columns.values())
            )
            lines.append(f"{name:12}" + "".join(f"{cell:>23}" for cell in cells) + f"   {MEANING[name]}")
        if self.sharpness is not None:
            meaning = "power of the top octave, relative to renders of the same scenes"
            empty = " " * 23 * len(self.kinds)
            lines.append(f"{'sharpness':12}{f'{100 * self.sharpness:.1f} %':>23}{empty}   {meaning}")
        images = ", ".join(f"{columns[kind]['whole'][1]} {kind}" for kind in self.kinds)
        lines.append(f"{len(self.verdicts)} images: {images}.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same numbers, and each prompt with its reading, for JSON."""
        return {
            "sharpness": None if self.sharpness is None else round(self.sharpness, 4),
            "accuracy": {
                title: {
                    name: {"right": right, "asked": asked, "percent": round(100 * right / asked, 2) if asked else None}
                    for name, (right, asked) in self.counts(kind).items()
                }
                for title, kind in (("all", None), *((kind, kind) for kind in self.kinds))
            },
            "images": [
                {
                    "prompt": prompt.text,
                    "kind": prompt.kind,
                    "seen": {
                        "solids": [f"{solid.size} {solid.color} {solid.shape}" for solid in reading.solids],
                        "relations": list(reading.relations),
                        "background": reading.background,
                    },
                    "whole": score.whole,
                }
                for prompt, reading, score in self.verdicts
            ],
        }


def _require_as_many(readings: Sequence[Reading], count: int, what: str) -> None:
    if len(readings) != count:
        raise InputError(f"there are {len(readings)} images for {count} {what}; give one for each")


def judge_images(prompts: Sequence[Prompt], images: Sequence[ImageLike], judge: Judge | None = None) -> Report:
    """Read `images`, one per prompt, and compare them with the prompts.

    Raises:
        InputError: another number of images.
    """
    readings = (judge or bundled_judge()).read(images)
    _require_as_many(readings, len(prompts), "prompts")
    verdicts = []
    for prompt, seen in zip(prompts, readings):
        score = compare(seen, prompt.scene, with_size=prompt.with_size, with_background=prompt.with_background)
        verdicts.append(Verdict(prompt, seen, score))
    return Report(tuple(verdicts))


def judge_edits(edits: Sequence[Edit], images: Sequence[ImageLike], judge: Judge | None = None) -> Report:
    """Read edited `images`, and compare them with the instructions: one new colour, and everything else kept.

    Raises:
        InputError: another number of images.
    """
    readings = (judge or bundled_judge()).read(images)
    _require_as_many(readings, len(edits), "edits")
    kinds = (NEVER_TRAINED if is_held_out(edit.target) else TRAINED for edit in edits)
    return Report(
        tuple(
            Verdict(Prompt(edit.target, edit.text, kind), reading, compare(reading, edit.target))
            for edit, kind, reading in zip(edits, kinds, readings)
        )
    )


def evaluate(
    generate: Callable[[list[str]], Sequence[ImageLike]],
    n: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    judge: Judge | None = None,
    sample: Callable[[int, int], list[Prompt]] = held_out_prompts,
) -> Report:
    """Generate images for held-out prompts, judge them, and compare their sharpness with that of renders.

    Args:
        generate: takes up to `batch_size` prompts and returns as many images of any size: PIL images, or tensors
            [3, H, W], float in [0, 1] or uint8.
        n: how many prompts.
        judge: the bundled one by default.
        sample: gives the prompts for `n` and `seed`: `held_out_prompts`, half of each kind, or `adapter_prompts`.

    Raises:
        InputError: `n` or `batch_size` is less than one, or `generate` returns the wrong number or type.
    """
    prompts = sample(n, seed)
    images = _in_batches(generate, n, batch_size, [prompt.text for prompt in prompts])
    report = judge_images(prompts, images, judge)
    sharpness = relative_sharpness((prompt.scene for prompt in prompts), map(as_tensor, images))
    return replace(report, sharpness=sharpness)


def evaluate_edits(
    edit: Callable[[list[str], list[Tensor]], Sequence[ImageLike]],
    n: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    judge: Judge | None = None,
) -> Report:
    """Edit images by held-out instructions, and judge the results.

    Args:
        edit: takes up to `batch_size` instructions and as many images [3, 128, 128], float32 in [0, 1], and returns as
            many images, of the types that `evaluate` takes.
        n: how many edits, half of each kind of `held_out_edits`.
        judge: the bundled one by default.

    Raises:
        InputError: `n` or `batch_size` is less than one, or `edit` returns the wrong number or type.
    """
    edits = held_out_edits(n, seed)
    texts, sources = [asked.text for asked in edits], [render(asked.source) for asked in edits]
    return judge_edits(edits, _in_batches(edit, n, batch_size, texts, sources), judge)


def _in_batches(
    generate: Callable[..., Sequence[ImageLike]], n: int, batch_size: int, texts: list[str], *sources: list[Any]
) -> list[ImageLike]:
    if n < 1 or batch_size < 1:
        raise InputError(f"n and batch_size must be at least 1, not {n} and {batch_size}.")
    images: list[ImageLike] = []
    for start in range(0, n, batch_size):
        some = [given[start : start + batch_size] for given in (texts, *sources)]
        generated = generate(*some)
        if len(generated) != len(some[0]):
            raise InputError(f"{len(some[0])} images were requested, and {len(generated)} returned.")
        images.extend(generated)
    return images
