"""The engine against other policies, and an image alone against the same one in company.

    python benchmarks/serving.py --simulate [--requests 10000]
    python benchmarks/serving.py --load [--seconds 4] [--rounds 30] [--concurrency 8 32] [--dtype float32]
    python benchmarks/serving.py --company 500 [--dtype float32]
    python benchmarks/serving.py --load --model xl-512 --device cuda --dtype bfloat16

``--model xl-512``: XL/2 for 512 px with random weights, and sizes of 256 to 1024 tokens.
``--load``: closed loop: so many clients, each of which asks for the next image when it has one; five sizes of 64 to 256
tokens, 10, 20 or 30 steps. The policies take turns of ``--seconds``, ``--rounds`` times, with the same requests; each
goes on where it was, so short turns make it less important that a machine is slower for a while.
``--company``: random requests of all kinds, each alone, and all of them with up to 24 others at a time. No caches.
On the CPU with one thread, processor time is measured, so that other programs count less.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import measure
from impasto.pipelines.sampling import Run, advance
from impasto.serving.engine import stages
from impasto.serving.engine.costs import StepCosts, ascending
from impasto.serving.engine.loading import dummy_run, measure_costs, prepare_memory
from impasto.serving.engine.loop import Engine
from impasto.serving.engine.policy import Candidate, choose
from impasto.serving.engine.simulation import (
    SCENES_AVX2,
    Policy,
    Request,
    first_in_first_out,
    percentile,
    same_size,
    simulate,
    slowdowns,
)
from impasto.serving.job import Failed, Finished, GivenImages, Job, Progress, RawImage

POLICIES: dict[str, Policy] = {"fair": choose, "first in, first out": first_in_first_out, "same size": same_size}
#: Height and width in tokens: 64 to 256.
SIZES = ((8, 8), (8, 12), (8, 16), (12, 16), (16, 16))
STEPS = (10, 20, 30)
PROMPTS = (
    "a red cube to the left of a blue sphere",
    "a small green cone in front of a yellow cylinder",
    "a purple sphere",
    "two orange cubes under a grey sky",
)


# --- on a simulated clock ---


def run_simulation(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {}
    for concurrency in options.concurrency:
        for name, policy in POLICIES.items():
            rng = random.Random(0)
            requests = [Request((h * w,) * 2, steps) for h, w, steps in _mix(rng, options.requests)]
            start = time.process_time()
            seconds = simulate(requests, SCENES_AVX2, policy, concurrency=concurrency)
            smallest = [each for each in requests if each.tokens[0] == min(h * w for h, w in SIZES)]
            result[f"{name}, {concurrency} clients"] = {
                "images per second": round(len(requests) / seconds, 3),
                "p95 slowdown": round(percentile(slowdowns(requests, SCENES_AVX2), 95), 1),
                "p95 slowdown, smallest": round(percentile(slowdowns(smallest, SCENES_AVX2), 95), 1),
                "seconds to simulate": round(time.process_time() - start, 1),
            }
    what = f"{options.requests} simulated requests, recorded costs of the bundled model's first edition on AVX2"
    measure.write("serving-simulated", {"what": what, **result})


def _mix(rng: random.Random, count: int) -> list[tuple[int, int, int]]:
    return [(*rng.choice(SIZES), rng.choice(STEPS)) for _ in range(count)]


# --- load ---


class Finish(NamedTuple):
    """An image that is done."""

    tokens: int
    steps: int
    latency: float


@dataclass
class Done:
    """What one policy did in its turns."""

    seconds: float = 0.0
    steps: list[tuple[list[int], float]] = field(default_factory=list)  # tokens of the images in a step, seconds
    images: list[Finish] = field(default_factory=list)
    #: Steps of images of so many tokens in each turn, and its seconds.
    turns: list[tuple[Counter[int], float]] = field(default_factory=list)

    def rates(self, alone: dict[int, float]) -> list[float]:
        """Work per second in each turn: seconds that its steps take one at a time."""
        return [sum(alone[n] * count for n, count in taken.items()) / seconds for taken, seconds in self.turns]

    def rate(self, alone: dict[int, float]) -> float:
        """Of all turns. Images that are not done at the end count, too."""
        parts = zip(self.rates(alone), self.turns, strict=True)
        return sum(rate * seconds for rate, (_, seconds) in parts) / self.seconds

    def slowdowns(self, alone: dict[int, float], tokens: int | None = None) -> list[float]:
        """Latency relative to the steps by themselves; of all images, or those of so many tokens."""
        found = [one for one in self.images if tokens in (None, one.tokens)]
        return sorted(one.latency / (one.steps * alone[one.tokens]) for one in found)


def load_pipe(options: argparse.Namespace) -> Any:
    if options.model == "xl-512":
        return random_xl(options.device, getattr(torch, options.dtype))
    from impasto.memory.inspection import resolve_pipeline
    from impasto.registry import pipeline_class

    cls = pipeline_class(resolve_pipeline(options.model)[1])
    pipe = cls.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_xl(device: str, dtype: torch.dtype) -> Any:
    """XL/2 for 512 px, SDXL's autoencoder and a layer of T5 with random weights, and the bundled model's tokenizer."""
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    import impasto
    from image import SDXL_VAE, T5_XXL

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        parts = {
            "transformer": impasto.PixArtTransformer2DModel(
                sample_size=64, caption_channels=T5_XXL["d_model"], use_additional_conditions=False
            ),
            "vae": impasto.AutoencoderKL(**SDXL_VAE),
            "text_encoder": T5EncoderModel(T5Config(**{**T5_XXL, "num_layers": 1, "d_ff": 1024})),
        }
    torch.set_default_dtype(torch.float32)
    pipe = impasto.PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(Path(impasto.__file__).parent / "scenes" / "checkpoint" / "tokenizer"),
        scheduler=impasto.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
        **{name: part.eval() for name, part in parts.items()},
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def choose_clock(device: str) -> Callable[[], float]:
    """Processor time if there is one thread, else the time of day."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def requests_of(pipe: Any, count: int, seed: int) -> list[Job]:
    rng, unit, jobs = random.Random(seed), pipe.vae_scale_factor * pipe.transformer.config["patch_size"], []
    for i, (rows, columns, steps) in enumerate(_mix(rng, count)):
        jobs.append(
            Job(
                str(i),
                "model",
                rng.choice(PROMPTS),
                width=columns * unit * scale_of(pipe),
                height=rows * unit * scale_of(pipe),
                binning=False,
                steps=steps,
                seed=rng.randrange(2**32),
            )
        )
    return jobs


def scale_of(pipe: Any) -> int:
    """Sizes grow with the model's: the bundled one has the largest of them, 256 tokens."""
    config = pipe.transformer.config
    return max(1, config["sample_size"] // config["patch_size"] // 16)


class Stopwatch:
    """A clock that stands still except in ``with`` blocks."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._shown, self._since = 0.0, float("nan")
        self._runs = False

    def __call__(self) -> float:
        return self._shown + (self._clock() - self._since if self._runs else 0.0)

    def __enter__(self) -> None:
        self._since, self._runs = self._clock(), True

    def __exit__(self, *_: Any) -> None:
        self._shown, self._runs = self(), False


class UniformCurve:
    """Steps of images of one size, measured between the turns: what packed ones are compared with."""

    def __init__(self, pipe: Any, costs: StepCosts, clock: Callable[[], float]):
        self.pipe, self.costs, self.clock = pipe, costs, clock
        side = pipe.transformer.config["sample_size"] // pipe.transformer.config["patch_size"]
        sizes = [((side // 2, side // 2), 1), *(((side, side), images) for images in (1, 2, 4, 8))]
        self.seconds: dict[tuple[tuple[int, int], int], list[float]] = {size: [] for size in sizes}
        self.runs = dict[tuple[tuple[int, int], int], list[Run]]()

    def measure(self) -> None:
        """A step of each batch."""
        for batch, seconds in self.seconds.items():
            (rows, columns), images = batch
            if batch not in self.runs or self.runs[batch][0].index >= self.runs[batch][0].end:
                self.runs[batch] = [dummy_run(self.pipe, rows, columns) for _ in range(images)]
            start = self.clock()
            advance(self.runs[batch])
            if self.pipe.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(self.clock() - start)

    def medians(self) -> StepCosts:
        points = []
        for ((rows, columns), images), seconds in self.seconds.items():
            tokens = rows * columns
            own = percentile(sorted(seconds), 50) - self.costs.quadratic * images * tokens**2
            points.append((images * tokens, own))
        return StepCosts(ascending(points), ascending(points), self.costs.quadratic)


class ClosedLoop:
    """So many clients of an engine, which go on in each turn where they were in the one before."""

    def __init__(
        self, pipe: Any, costs: StepCosts, policy: Policy, jobs: list[Job], clients: int, clock: Callable[[], float]
    ):
        self.policy, self.clients, self.done = policy, clients, Done()
        self.clock = Stopwatch(clock)
        self.engine = Engine(pipe, costs, choose=self._choose, clock=self.clock)
        self.coming, self.asked = iter(jobs), dict[str, tuple[Job, float]]()
        self.chosen: list[int] = []
        self.taken = Counter[int]()

    def _choose(self, *arguments: Any) -> list[Candidate]:
        found = self.policy(*arguments)
        self.chosen = [tokens for each in found for tokens in each.tokens]
        return found

    def serve(self, seconds: float) -> None:
        """One turn."""
        self.taken, start = Counter(), self.clock()
        with self.clock:
            while self.clock() < start + seconds:
                self._tick()
            self.done.seconds = self.clock()
        self.done.turns.append((self.taken, self.done.seconds - start))

    def _tick(self) -> None:
        while len(self.asked) < self.clients:
            job = next(self.coming)
            self.asked[job.id] = job, self.clock()
            self.engine.add(job)
        events, tally = self.engine.tick()
        if tally.batch_tokens:
            self.done.steps.append((self.chosen, tally.seconds["denoise"]))
        for event in events:
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Progress) and event.step:
                self.taken[self._tokens(self.asked[event.id][0])] += 1
            if isinstance(event, Finished):
                job, at = self.asked.pop(event.id)
                assert job.steps is not None
                self.done.images.append(Finish(self._tokens(job), job.steps, self.clock() - at))

    def _tokens(self, job: Job) -> int:
        return self.engine.stages.tokens_of(job)


def seconds_alone(one_at_a_time: Done) -> dict[int, float]:
    """Seconds of a step of an image of so many tokens by itself: medians."""
    found: dict[int, list[float]] = {}
    for tokens, seconds in one_at_a_time.steps:
        found.setdefault(tokens[0], []).append(seconds)
    return {tokens: percentile(sorted(seconds), 50) for tokens, seconds in found.items()}


def run_load(options: argparse.Namespace) -> None:
    prepare_memory(limited=False)
    pipe, clock = load_pipe(options), choose_clock(options.device)
    if hasattr(pipe.scheduler, "guides"):  # work is counted in steps, so all of a size have to cost the same
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, refine_below=0, guide_above=-1)
    costs = measure_costs(pipe, options.measuring, clock)
    jobs = requests_of(pipe, 100_000, seed=0)
    result: dict[str, Any] = {}
    for clients in options.concurrency:
        loops = {name: ClosedLoop(pipe, costs, each, jobs, clients, clock) for name, each in POLICIES.items()}
        curve = UniformCurve(pipe, costs, clock)
        for _ in range(options.rounds):
            for loop in loops.values():
                loop.serve(options.seconds)
            curve.measure()
        done = {name: loop.done for name, loop in loops.items()}
        result[f"{clients} clients"] = compare(done, curve.medians())
    name = f"serving-load-{options.dtype}" + ("-gpu" if options.device == "cuda" else "")
    what = f"closed loop, {options.model}, {options.dtype}, {options.seconds:g} s a turn, {options.rounds} rounds"
    curves = {"uniform": costs.uniform, "packed": costs.packed, "quadratic": costs.quadratic}
    target = measure.write(name, {"what": what, "clock": clock.__name__, "costs": curves, **result})
    plot(result, costs, target.with_suffix(".png") if options.plot is None else Path(options.plot))


def compare(done: dict[str, Done], uniform: StepCosts) -> dict[str, Any]:
    """What the policies did with as many clients."""
    fair, others = done["fair"], [name for name in done if name != "fair"]
    alone = seconds_alone(done["first in, first out"])
    if not {n for each in done.values() for taken, _ in each.turns for n in taken} <= alone.keys():
        raise SystemExit("too few turns: taking one image at a time has not come to images of every size")
    rates = {name: each.rate(alone) for name, each in done.items()}
    ratios = {name: _ratios(fair.rates(alone), done[name].rates(alone)) for name in others}
    smallest = {name: each.slowdowns(alone, min(alone)) for name, each in done.items()}
    # Steps are all that sharing makes cheaper: what they gain, and what they would gain at the cost of uniform ones.
    taken = sum(seconds for _, seconds in fair.steps)
    apart = sum(alone[n] for tokens, _ in fair.steps for n in tokens) / 2  # both halves of guidance are counted
    as_uniform = sum(uniform.seconds(tokens) for tokens, _ in fair.steps)
    against = [seconds / uniform.seconds(tokens) for tokens, seconds in fair.steps if len({*tokens}) > 1]
    return {
        "images": {name: len(each.images) for name, each in done.items()},
        "images per second": {name: round(len(each.images) / each.seconds, 4) for name, each in done.items()},
        "seconds of a step alone, by tokens": alone,
        "work per second": {name: round(rate, 4) for name, rate in rates.items()},
        "throughput against": {name: round(rates["fair"] / rates[name], 3) for name in others},
        "quartiles of the turns": {n: [round(percentile(r, q), 3) for q in (25, 50, 75)] for n, r in ratios.items()},
        "p95 slowdown": {name: _p95(each.slowdowns(alone)) for name, each in done.items()},
        "p95 slowdown, smallest": {name: _p95(each) for name, each in smallest.items()},
        "p50 slowdown, smallest": {name: _median(each) for name, each in smallest.items()},
        "uniform curve, medians between the turns": uniform.uniform,
        "gain of the steps alone": round(apart / taken, 3),
        "gain of the steps alone, if they cost as much as uniform ones": round(apart / as_uniform, 3),
        "seconds of steps / of everything": {
            n: round(sum(s for _, s in d.steps) / d.seconds, 3) for n, d in done.items()
        },
        "packed step against uniform curve, median": _median(against),
        "packed steps": len(against),
        "tokens of a step, median": _median([float(sum(tokens)) for tokens, _ in fair.steps]),
    }


def _ratios(these: list[float], those: list[float]) -> list[float]:
    return sorted(one / other for one, other in zip(these, those, strict=True) if other)


def _p95(values: list[float]) -> float | None:
    return round(percentile(sorted(values), 95), 2) if values else None


def _median(values: list[float]) -> float | None:
    return round(percentile(sorted(values), 50), 3) if values else None


def plot(result: dict[str, Any], costs: StepCosts, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: it needs matplotlib (pip install impasto[train])")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rate, slow, curve) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, key, title in (
        (rate, "work per second", "throughput (1: steps of one image at a time)"),
        (slow, "p95 slowdown, smallest", "smallest size: p95 of latency / time alone"),
    ):
        for i, name in enumerate(POLICIES):
            values = [found[key][name] or 0 for found in result.values()]
            axis.bar([x + 0.27 * (i - 1) for x in range(len(values))], values, 0.25, label=name)
        axis.set_xticks(range(len(result)), list(result))
        axis.set_title(title, fontsize=10)
    slow.legend(fontsize=8, loc="upper left")
    for name, points in (("one size", costs.uniform), ("several sizes, packed", costs.packed)):
        curve.plot(*zip(*points), marker="o", label=name)
    curve.set_title("seconds of a step by its tokens, without attention", fontsize=10)
    curve.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"plot in {path}")


# --- company ---


class ExactImage(RawImage):
    exact: Tensor


def run_company(options: argparse.Namespace) -> None:
    original = stages.as_raw

    def as_raw(image: Tensor) -> RawImage:
        raw = original(image)
        exact = ExactImage(raw.width, raw.height, raw.pixels)
        object.__setattr__(exact, "exact", image)
        return exact

    stages.as_raw = as_raw  # type: ignore[assignment]
    pipe = load_pipe(options)
    costs = SCENES_AVX2  # with which as many as possible share steps
    jobs = random_jobs(pipe, options.company, seed=1)
    engine, coming, rng = Engine(pipe, costs, most_running=24), list(jobs), random.Random(2)
    company: dict[str, RawImage] = {}
    shared: list[int] = []
    while coming or not engine.idle:
        for _ in range(rng.choice((0, 1, 2, 4)) if len(engine.entries) < 24 else 0):
            if coming:
                engine.add(coming.pop(0))
        if engine.idle:
            continue
        company |= _finished(engine)
        shared.append(engine.tally.image_steps)
    worst = dict[str, float]()
    single = Engine(pipe, costs)
    for job in jobs:
        single.add(job)
        found: dict[str, RawImage] = {}
        while not single.idle:
            found |= _finished(single)
        difference = (found[job.id].exact - company[job.id].exact).abs().max().item()  # type: ignore[attr-defined]
        worst[job.id] = difference
    ordered = sorted(worst.values())
    result = {
        "what": f"{len(jobs)} random requests, each alone and in company, {options.model}, {options.dtype}",
        "largest pixel difference in [0, 1]": ordered[-1],
        "in units of 1/255": round(ordered[-1] * 255, 5),
        "by scheduler": {
            name or "the model's": max((worst[job.id] for job in jobs if job.scheduler == name), default=0.0)
            for name in (None, "ddim", "ddpm", "lcm")
        },
        "99th percentile": percentile(ordered, 99),
        "median": percentile(ordered, 50),
        "images in a step, mean": round(sum(shared) / len(shared), 2),
        "images in a step, most": max(shared),
        "worst": next(repr(replace(job, given=None)) for job in jobs if worst[job.id] == ordered[-1]),
    }
    measure.write(f"serving-company-{options.dtype}", result)


def _finished(engine: Engine) -> dict[str, RawImage]:
    found = {}
    for event in engine.tick()[0]:
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        if isinstance(event, Finished):
            found[event.id] = event.image
    return found


def random_jobs(pipe: Any, count: int, seed: int) -> list[Job]:
    """Requests of all kinds: sizes, steps, guidance, schedulers, texts, and edits."""
    rng, unit, jobs = random.Random(seed), pipe.vae_scale_factor * pipe.transformer.config["patch_size"], []
    for i, (rows, columns, _) in enumerate(_mix(rng, count)):
        height, width, given, kind = rows * unit, columns * unit, None, rng.random()
        if kind < 0.3:
            mask = bytes([0] * (width * height // 2) + [255] * (width * height - width * height // 2))
            pixels = RawImage(width, height, rng.randbytes(3 * width * height))
            given = GivenImages((pixels,), mask if kind < 0.15 else None, rng.choice((0.5, 0.8, 1.0)))
        scheduler = rng.choice((None, "ddim", "ddpm", "lcm"))
        jobs.append(
            Job(
                str(i),
                "model",
                rng.choice(PROMPTS),
                negative_prompt=rng.choice(("", "a sphere")),
                width=width,
                height=height,
                steps=rng.randint(4, 12),
                guidance_scale=1.0 if scheduler == "lcm" else rng.choice((1.0, 2.0, 4.5)),  # as LCM is used
                seed=rng.randrange(2**32),
                scheduler=scheduler,
                given=given,
                binning=False,
            )
        )
    return jobs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--company", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--model", default="builtin:scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn of a policy")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--measuring", type=float, default=20.0, help="seconds of measuring what steps cost")
    parser.add_argument("--requests", type=int, default=10_000, help="of a simulation")
    parser.add_argument("--plot", help="where to write the plot; next to the result if not given")
    given = parser.parse_args()
    if not (given.simulate or given.load or given.company):
        parser.error("give --simulate, --load or --company")
    if given.simulate:
        run_simulation(given)
    if given.load:
        run_load(given)
    if given.company:
        run_company(given)
