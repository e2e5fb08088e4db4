"""The lossy options: how much faster they are, how far from the lossless images, and the judge's score.

    python benchmarks/lossy.py [--prompts 200] [--steps 20] [--xl-steps 8] [--only interval ...] [--device cpu]

On the bundled model every option generates the same held-out prompts from the same seeds as the lossless pipeline. PSNR
is the mean over image pairs (100 dB if they are equal); the judge's score is the share of images in which everything
that the prompt says is right. Times are of whole calls. On an XL/2 with random weights (bfloat16, 512 px, 20 real text
tokens) only the denoising loop is timed. How many steps a cache that looks at its input reuses there says nothing about
a trained model, so the number of computed steps is given with the time.

All options run in every round, in a changing order; ratios are within a round. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import measure
from impasto import DPMSolverMultistepScheduler, ImpastoError, PixArtSigmaPipeline, PixArtTransformer2DModel
from impasto.pipelines.pixart import PromptEmbeds
from impasto.scenes.evaluate import evaluate
from impasto.transforms.guidance_interval import guide_between
from impasto.transforms.quantize import quantize
from impasto.transforms.step_cache import StepCache, cache_steps

LOSSLESS = "lossless"


class Option(NamedTuple):
    """A lossy option: its name and its changes, each a context manager that undoes it."""

    name: str
    changes: tuple[Callable[[Any], Any], ...]

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[StepCache | None]:
        with ExitStack() as stack:
            handles = [stack.enter_context(change(pipe)) for change in self.changes]
            yield next((handle for handle in handles if isinstance(handle, StepCache)), None)


def cached(method: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda pipe: cache_steps(pipe, method, **settings)


def guided(start: float, end: float) -> Callable[[Any], Any]:
    return lambda pipe: guide_between(pipe, start, end)


def quantized(method: Any) -> Callable[[Any], Any]:
    return lambda pipe: quantize(pipe.transformer, method)


OPTIONS = [
    Option(LOSSLESS, ()),
    *(Option(f"cache interval {n}", (cached("interval", interval=n),)) for n in (2, 3)),
    *(Option(f"cache taylor {n}", (cached("taylor", interval=n),)) for n in (2, 3)),
    *(Option(f"cache first-block {t:g}", (cached("first-block", threshold=t),)) for t in (0.1, 0.2, 0.3)),
    *(Option(f"guidance {a:g}-{b:g}", (guided(a, b),)) for a, b in ((0, 0.5), (0, 0.8), (0.1, 0.6), (0.2, 0.8))),
    Option("cache interval 2, guidance 0.2-0.8", (cached("interval", interval=2), guided(0.2, 0.8))),
    Option("cache interval 3, guidance 0.2-0.8", (cached("interval", interval=3), guided(0.2, 0.8))),
    *(Option(name, (quantized(name),)) for name in ("int8-weight-only", "int8-dynamic", "fp8", "nf4")),
]


class Quality(NamedTuple):
    """The quality of an option's images."""

    images: list[Tensor]  # each [3, H, W]
    judged: dict[str, Any]
    steps: dict[str, int] | None  # computed and reused, if there is a cache


# --- the bundled model ---


def generators(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def generate_and_judge(pipe: Any, option: Option, options: argparse.Namespace) -> Quality:
    images: list[Tensor] = []

    def generate(prompts: list[str]) -> Sequence[Tensor]:
        generated = pipe(
            prompts,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=generators(len(images), len(prompts)),
            output_type="pt",
        ).images
        images.extend(generated.float().cpu())
        return list(generated.float().cpu())

    with option.applied(pipe) as cache:
        report = evaluate(generate, n=options.prompts, batch_size=options.batch)
    steps = None if cache is None else {"computed": cache.computed, "reused": cache.reused}
    return Quality(images, report.to_dict()["accuracy"]["all"], steps)


def psnr(images: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """dB, for images in [0, 1]."""
    errors = [(a - b).square().mean().clamp_min(1e-10) for a, b in zip(images, references, strict=True)]
    return float((-10 * torch.stack(errors).log10()).mean())


def bundled_run(options: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    pipe = PixArtSigmaPipeline.from_pretrained("builtin:scenes").to(options.device)
    # As published checkpoints are sampled: a solver, and guidance at every step.
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, refine_below=0, guide_above=-1)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a large {colour} cube on top of a blue sphere" for colour in ("red", "green", "yellow", "purple")]
    prompts = (prompts * options.batch)[: options.batch]

    def run() -> None:
        pipe(
            prompts,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=generators(0, len(prompts)),
            output_type="pt",
        )

    return pipe, run


# --- XL/2 ---


def xl_run(options: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """An XL/2 with random weights, and its denoising loop for one guided image of 512 px."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = PixArtTransformer2DModel(
            sample_size=64, caption_channels=4096, use_additional_conditions=False, num_layers=options.xl_layers
        )
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = PixArtSigmaPipeline(None, None, None, model.eval().to(options.device), DPMSolverMultistepScheduler())
    masks = torch.zeros(2, 1, 300, dtype=torch.long)
    masks[0, :, :20] = 1
    masks[1, :, :1] = 1  # the empty prompt is one token
    texts = torch.randn(2, 1, 300, 4096, dtype=torch.bfloat16)
    embeds = PromptEmbeds(texts[0], masks[0], texts[1], masks[1])
    noise = torch.randn(1, 4, 64, 64)

    def run() -> None:
        for _ in pipe.denoise(noise, embeds, num_inference_steps=options.xl_steps):
            pass

    return pipe, run


# --- times ---


def time_in_turns(
    pipe: Any, run: Callable[[], None], chosen: Sequence[Option], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Seconds of every option in every round, and the speed-up over the lossless run of the same round."""
    seconds: dict[str, list[float]] = {option.name: [] for option in chosen}
    steps: dict[str, Any] = {}
    run()  # the first one allocates and packs
    for turn in range(options.rounds):
        for option in (*chosen[turn % len(chosen) :], *chosen[: turn % len(chosen)]):
            with option.applied(pipe) as cache:
                synchronize(options.device)
                start = time.perf_counter()
                run()
                synchronize(options.device)
                seconds[option.name].append(time.perf_counter() - start)
                steps[option.name] = None if cache is None else {"computed": cache.computed, "reused": cache.reused}
    results = {}
    for name, values in seconds.items():
        ratios = [plain / value for plain, value in zip(seconds[LOSSLESS], values, strict=True)]
        results[name] = {
            "seconds": [round(value, 4) for value in values],
            "median": round(statistics.median(values), 4),
            "spread": [round(min(values), 4), round(max(values), 4)],
            "speed-ups": [round(ratio, 3) for ratio in ratios],
            "speed-up": round(statistics.median(ratios), 3),
            "steps": steps[name],
        }
    return results


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


# --- the report ---


def available(pipe: Any, chosen: Sequence[Option], absent: dict[str, str]) -> list[Option]:
    """The options that this machine supports; the reasons for the others go into ``absent``."""
    found = []
    for option in chosen:
        try:
            with option.applied(pipe):
                found.append(option)
        except ImpastoError as error:
            absent[option.name] = str(error)
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown; "-" means not measured in this run."""
    scenes, xl, quality = results["scenes"], results["xl"], results["quality"]
    lines = [
        "| Option | Speed-up | PSNR, dB | Judge: all right, % | Speed-up, XL/2 at 512 px (computed steps) |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys([*quality, *scenes, *xl]):
        judged = quality.get(name)
        large = xl.get(name)
        cells = [
            name,
            f"{scenes[name]['speed-up']:.2f}" if name in scenes else "-",
            "-" if judged is None or name == LOSSLESS else f"{judged['psnr']:.1f}",
            "-" if judged is None else f"{judged['judge']['whole']['percent']:.1f}",
            "-" if large is None else f"{large['speed-up']:.2f}" + _computed(large["steps"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | not available here: {why} | | | |" for name, why in results["not available"].items()]
    return "\n".join(lines)


def _computed(steps: dict[str, int] | None) -> str:
    return "" if steps is None else f" ({steps['computed']} of {steps['computed'] + steps['reused']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts to generate and judge; 0: none")
    parser.add_argument("--steps", type=int, default=20, help="of the bundled model")
    parser.add_argument("--guidance-scale", type=float, default=4.5)
    parser.add_argument("--batch", type=int, default=8, help="images at once")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each option; 0: none")
    parser.add_argument("--xl-steps", type=int, default=8, help="of the XL/2; 0 skips it")
    parser.add_argument("--xl-layers", type=int, default=28, help="fewer for a quick trial")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only options whose name contains one of these words")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="a JSON file; by default a dated one in benchmarks/results")
    options = parser.parse_args()
    chosen = [o for o in OPTIONS if o.name == LOSSLESS or not options.only or any(w in o.name for w in options.only)]

    results: dict[str, Any] = {"quality": {}, "scenes": {}, "xl": {}, "not available": {}}
    pipe, run = bundled_run(options)
    chosen = available(pipe, chosen, results["not available"])
    reference: Quality | None = None
    for option in chosen if options.prompts else []:
        found = generate_and_judge(pipe, option, options)
        reference = found if reference is None else reference  # the first option is the lossless one
        results["quality"][option.name] = {
            "psnr": round(psnr(found.images, reference.images), 2),
            "judge": found.judged,
            "steps": found.steps,
        }
        quality = results["quality"][option.name]
        print(f"{option.name}: {quality['psnr']} dB, judge {quality['judge']['whole']['percent']} %", flush=True)
    if options.rounds:
        results["scenes"] = time_in_turns(pipe, run, chosen, options)
    del pipe, run
    if options.xl_steps and options.rounds:
        pipe, run = xl_run(options)
        results["xl"] = time_in_turns(pipe, run, available(pipe, chosen, results["not available"]), options)

    settings = {key: value for key, value in vars(options).items() if key != "output"}
    results = {
        "date": datetime.date.today().isoformat(),
        "what": "lossy options on builtin:scenes (whole calls, float32) and XL/2 of random weights (loop, bfloat16)",
        "settings": settings,
        **results,
        "machine": measure.machine(),
    }
    target = options.output or measure.RESULTS / f"{results['date']}-lossy.json"
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(f"written to {target}")


if __name__ == "__main__":
    main()
