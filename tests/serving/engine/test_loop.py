"""The engine: each image is the one that the pipeline generates by itself, whatever comes, goes or fails next to it."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Generator

from impasto import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaInpaintPipeline,
    PixArtSigmaPipeline,
)
from impasto.pipelines import inputs
from impasto.pipelines.adapters import ChosenAdapter
from impasto.pipelines.sampling import Run
from impasto.serving.engine import decoding, loop, stages
from impasto.serving.engine.stages import Stages
from impasto.serving.job import Failed, Finished, GivenImages, Job, Preview, Progress, RawImage

from ...tiny import tiny_pipeline
from .driving import images, keep_exact, make_engine, run

PROMPTS = ("a cat", "a red cube on a blue ball", "", "a small green cone in the desert", "hello world")


def job(id: str, **fields: Any) -> Job:
    return Job(id, "tiny", **{"prompt": "a cat", "width": 16, "height": 16, "steps": 3, **fields})


def array(image: RawImage) -> np.ndarray[Any, Any]:
    return np.frombuffer(image.pixels, np.uint8).reshape(image.height, image.width, 3).astype(int)


def test_an_image_is_generated_at_its_own_size_where_no_bin_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    for module in (stages, inputs):
        monkeypatch.setattr(module, "bins_for", lambda side: {1.0: (32, 32)})
    bins, own = (images(run(make_engine(pipe), [job("1", binning=binning)]))["1"] for binning in (True, False))
    monkeypatch.undo()
    (plain,) = images(run(make_engine(pipe), [job("1")])).values()
    assert (own.width, own.height) == (bins.width, bins.height) == (16, 16)
    assert own == plain != bins


def random_jobs(count: int, seed: int) -> list[Job]:
    """Jobs of all kinds: sizes, steps, guidance, schedulers, texts, and edits."""
    rng, jobs = random.Random(seed), []
    for i in range(count):
        width, height = rng.choice((8, 16, 20, 24)), rng.choice((8, 12, 16, 22))
        given, kind = None, rng.random()
        if kind < 0.4:
            pixels = RawImage(width, height, rng.randbytes(3 * width * height))
            mask = bytes([0] * (width * height // 2) + [255] * (width * height - width * height // 2))
            given = GivenImages((pixels,), mask if kind < 0.2 else None, rng.choice((0.6, 1.0)))
        jobs.append(
            job(
                str(i),
                prompt=rng.choice(PROMPTS),
                negative_prompt=rng.choice(PROMPTS),
                width=width,
                height=height,
                steps=rng.randint(2, 6),
                guidance_scale=rng.choice((1.0, 3.0, 4.5)),
                seed=rng.randrange(1000),
                scheduler=rng.choice((None, "dpm++", "ddim", "ddpm", "lcm")),
                given=given,
            )
        )
    return jobs


@pytest.mark.parametrize("solver", [{}, {"refine_below": 700, "guide_above": 500}], ids=["", "refining"])
def test_an_image_is_the_same_alone_and_in_any_company(monkeypatch: pytest.MonkeyPatch, solver: dict[str, int]) -> None:
    """Twenty random jobs, which join at random steps."""
    keep_exact(monkeypatch)
    pipe, jobs, rng = tiny_pipeline(PixArtSigmaPipeline), random_jobs(20, seed=5), random.Random(0)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **solver)
    alone: dict[str, RawImage] = {}
    for each in jobs:
        alone |= images(run(make_engine(pipe), [each]))
    engine, coming, shared = make_engine(pipe, most_running=12), list(jobs), []

    def join(turn: int) -> None:
        for _ in range(rng.choice((0, 1, 2, 5)) if turn else 3):
            if coming:
                engine.add(coming.pop(0))
        shared.append(engine.tally.image_steps)

    company = images(run(engine, (), join))
    assert max(shared) >= 8
    assert alone.keys() == company.keys() == {each.id for each in jobs}
    for each in jobs:
        one, other = alone[each.id], company[each.id]
        assert (one.width, one.height) == (each.width, each.height)
        assert (one.exact - other.exact).abs().max().item() <= 1e-5  # type: ignore[attr-defined]


def test_steps_without_guidance_are_charged_as_such() -> None:
    pipe, tokens = tiny_pipeline(PixArtSigmaPipeline), []
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, guide_above=500)
    engine = make_engine(pipe)
    run(engine, [job("1", steps=4, guidance_scale=3.0)], lambda turn: tokens.append(engine.tally.batch_tokens))
    found = [count for count in tokens if count]
    assert [count // min(found) for count in found] == [2, 2, 1, 1]


def test_images_are_those_of_the_pipeline() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    common: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "a dog"}
    fields: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "negative_prompt": "a dog", "seed": 7}
    rgb = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    given, mask = RawImage(16, 16, rgb.tobytes()), np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    jobs = [
        job("text", **fields),
        job("ddim", scheduler="ddim", **fields),
        job("image", given=GivenImages((given,), strength=0.5), **fields),
        job("least", given=GivenImages((given,), strength=5e-324), **fields),
        job("mask", given=GivenImages((given,), mask.tobytes(), 1.0), **fields),
        job("region", given=GivenImages((given,), mask.tobytes(), 1.0, padding=2), **fields),
    ]
    found = images(run(make_engine(pipe), jobs))
    edit = {"image": Image.fromarray(rgb), "height": 16, "width": 16, **common}
    masked = {**edit, "mask_image": Image.fromarray(mask)}
    other = PixArtSigmaPipeline.from_pipe(pipe, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    to_image, inpaint = (cls.from_pipe(pipe) for cls in (PixArtSigmaImg2ImgPipeline, PixArtSigmaInpaintPipeline))
    for each in (pipe, other, to_image, inpaint):
        each.set_progress_bar_config(disable=True)
    calls = {
        "text": lambda **seed: pipe("a cat", height=16, width=16, **common, **seed),
        "ddim": lambda **seed: other("a cat", height=16, width=16, **common, **seed),
        "image": lambda **seed: to_image("a cat", strength=0.5, **edit, **seed),
        "least": lambda **seed: to_image("a cat", strength=0.25, **edit, **seed),  # one step
        "mask": lambda **seed: inpaint("a cat", overlay=True, **masked, **seed),
        "region": lambda **seed: inpaint("a cat", padding_mask_crop=2, **masked, **seed),
    }
    for name, call in calls.items():
        expected = np.asarray(call(generator=[Generator().manual_seed(7)]).images[0]).astype(int)
        assert np.abs(array(found[name]) - expected).max() <= 1, name
    kept = mask == 0
    assert (array(found["mask"])[kept] == rgb[kept]).all()


def test_sizes_that_are_no_multiples_are_generated_nearby_and_resized() -> None:
    found = images(run(make_engine(tiny_pipeline(PixArtSigmaPipeline)), [job("1", width=17, height=11)]))
    assert (found["1"].width, found["1"].height) == (17, 11)


def test_events_come_in_order_with_previews_between_them() -> None:
    events = run(make_engine(tiny_pipeline(PixArtSigmaPipeline)), [job("1", steps=8, previews=3)])
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(9))
    assert [(i.number, i.image.width) for i in events if isinstance(i, Preview)] == [(0, 16), (1, 16), (2, 16)]
    assert isinstance(events[0], Progress)
    last = events[-1]
    assert isinstance(last, Finished)
    assert last.seconds.keys() == {"wait", "text", "denoise", "decode"}
    # The last preview is nearer to the image than the first one.
    distances = [np.abs(array(i.image) - array(last.image)).mean() for i in events if isinstance(i, Preview)]
    assert distances[-1] < distances[0]


def test_a_preview_estimates_the_image_without_noise() -> None:
    """After the last step but one of DDIM, the estimate is a whole image: as near as the last step changes it."""
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline, scheduler=DDIMScheduler()))
    events = run(engine, [job("1", steps=2, previews=1)])
    preview, last = (next(e for e in events if isinstance(e, kind)) for kind in (Preview, Finished))
    assert preview.number == 0
    assert preview.image.pixels != last.image.pixels


def test_previews_of_large_images_are_decoded_from_fewer_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = Stages.decode, []

    def noting(self: Stages, begun: Any, latents: Any) -> Any:
        sizes.extend(tuple(each.shape[-2:]) for each in latents)
        return decode(self, begun, latents)

    def previews() -> dict[str, np.ndarray[Any, Any]]:
        fields = {"prompt": "a red cube", "steps": 4, "previews": 1, "binning": False}
        jobs = [job("1", width=128, height=64, **fields), job("2", width=84, height=128, **fields)]
        events = run(make_engine(pipe), jobs)
        return {event.id: array(event.image) for event in events if isinstance(event, Preview)}

    pipe = PixArtSigmaPipeline.from_pretrained("builtin:scenes")
    monkeypatch.setattr(Stages, "decode", noting)
    whole = previews()
    assert Counter(sizes) == {(8, 16): 2, (16, 10): 2}  # 84 px are generated as 80, and resized
    sizes.clear()
    monkeypatch.setattr(stages, "PREVIEW_PIXELS", 48)
    small = previews()
    assert Counter(sizes) == {(8, 16): 1, (16, 10): 1, (4, 8): 1, (8, 5): 1}
    for id, image in whole.items():
        assert small[id].shape == image.shape
        assert 0 < np.abs(small[id] - image).mean() < 16  # of 255


def test_cancelled_and_late_jobs_end_at_the_next_step() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline))
    late = job("late", steps=50, deadline=time.time() - 1)

    def cancel(turn: int) -> None:
        if turn == 3:
            engine.cancel("cancelled")
            engine.cancel("unknown")

    events = run(engine, [job("cancelled", steps=50), late, job("good", steps=5)], cancel)
    ends = {event.id: event for event in events if isinstance(event, Failed | Finished)}
    assert isinstance(ends["good"], Finished)
    assert [(ends[id].reason, id) for id in ("cancelled", "late")] == [  # type: ignore[union-attr]
        ("cancelled", "cancelled"),
        ("deadline", "late"),
    ]
    assert max(event.step for event in events if isinstance(event, Progress) and event.id == "cancelled") == 3


def test_a_job_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An input that cannot be used, an adapter that is not there or does not fit, a step that raises, and NaN."""
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    misfit = tmp_path / "misfit.safetensors"
    save_file({f"transformer.proj_out.lora_{x}.weight": torch.ones(3, 3) for x in "AB"}, misfit)
    black = GivenImages((RawImage(16, 16, bytes(768)),), bytes(256))
    jobs = [
        job("black", given=black),
        job("adapter", adapters=(ChosenAdapter(str(tmp_path / "none.safetensors")),)),
        job("misfit", adapters=(ChosenAdapter(str(misfit)),)),
        job("raises", scheduler="ddim", seed=13),
        job("nan", seed=14),
        *(job(str(i), seed=i, width=12 + 4 * i) for i in range(3)),
    ]
    alone = images(run(make_engine(pipe), jobs[-3:]))
    step = DDIMScheduler.step

    def failing(self: Any, *args: Any, **options: Any) -> Any:
        if self.timesteps[2] == args[1]:
            raise RuntimeError("a fault")
        return step(self, *args, **options)

    monkeypatch.setattr(DDIMScheduler, "step", failing)
    engine = make_engine(pipe)

    def poison(turn: int) -> None:
        if turn == 2:
            begun: Run = engine.active["nan"].begun_now.run
            begun.latents = torch.full_like(begun.latents, torch.nan)

    events = run(engine, jobs, poison)
    reasons = {event.id: event.reason for event in events if isinstance(event, Failed)}
    assert reasons == {"black": "input", "adapter": "engine", "misfit": "input", "raises": "engine", "nan": "engine"}
    found = {event.id: event.image for event in events if isinstance(event, Finished)}
    assert {id: np.abs(array(found[id]) - array(alone[id])).max() <= 1 for id in alone} == dict.fromkeys(alone, True)


def test_adapters_take_turns_and_leave_no_trace(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    file = tmp_path / "style.safetensors"
    write_adapter(pipe, file)
    style = (ChosenAdapter(str(file), 0.8),)
    engine = make_engine(pipe)
    plain, styled, again = (images(run(engine, [job("1", adapters=each)]))["1"] for each in ((), style, ()))
    assert np.abs(array(plain) - array(styled)).max() > 3
    assert plain.pixels == again.pixels
    mixed = [job(str(i), adapters=style if i % 2 else ()) for i in range(4)]
    found = images(run(engine, mixed))
    for i in range(4):
        assert np.abs(array(found[str(i)]) - array(styled if i % 2 else plain)).max() <= 1


def test_adapters_that_cannot_be_fused_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    file = tmp_path / "style.safetensors"
    write_adapter(pipe, file)
    engine = make_engine(pipe)
    plain = images(run(engine, [job("1")]))["1"]
    fuse = PixArtSigmaPipeline.fuse_lora

    def failing(self: Any) -> None:
        fuse(self)
        raise MemoryError

    monkeypatch.setattr(PixArtSigmaPipeline, "fuse_lora", failing)
    failed = run(engine, [job("1", adapters=(ChosenAdapter(str(file), 0.8),))])[-1]
    assert isinstance(failed, Failed)
    assert failed.reason == "resources"
    assert images(run(engine, [job("1")]))["1"].pixels == plain.pixels


def write_adapter(pipe: Any, file: Path) -> None:
    """A LoRA of rank 2 with random weights."""
    from safetensors.torch import save_file

    generator, tensors = Generator().manual_seed(3), {}
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_v")):
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    save_file(tensors, str(file))


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    seen: list[list[str]] = []
    encode = PixArtSigmaPipeline.encode_prompt

    def encode_prompt(self: Any, texts: list[str], **options: Any) -> Any:
        seen.append(list(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(PixArtSigmaPipeline, "encode_prompt", encode_prompt)
    engine = make_engine(pipe)
    run(engine, [job(str(i), prompt=PROMPTS[i % 2], negative_prompt="a dog") for i in range(6)])
    run(engine, [job("again", prompt=PROMPTS[0], negative_prompt="a dog")])
    assert seen == [[PROMPTS[0], "a dog", PROMPTS[1]]]


def test_embeddings_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Stages(tiny_pipeline(PixArtSigmaPipeline))
    one = kept.encode_texts(["a cat"])["a cat"]
    monkeypatch.setattr(stages, "KEPT_BYTES", one.nbytes)
    assert kept.encode_texts(["a dog", "a cat"]).keys() == {"a dog", "a cat"}
    assert [text for _, text in kept.texts] == ["a cat"]  # type: ignore[misc, has-type]


def test_large_images_are_decoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    decode = Stages.decode

    def counting(self: Stages, begun: Any, latents: Any) -> Any:
        counts.append(len(begun))
        return decode(self, begun, latents)

    monkeypatch.setattr(Stages, "decode", counting)
    jobs = [job(str(i)) for i in range(4)]
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    run(make_engine(pipe), jobs)
    pixels = (16 // pipe.vae_scale_factor) ** 2
    monkeypatch.setattr(decoding, "MOST_LATENT_PIXELS", 2 * pixels)
    run(make_engine(pipe), jobs)
    monkeypatch.setattr(decoding, "MOST_LATENT_PIXELS", pixels - 1)
    run(make_engine(pipe), jobs)
    assert counts == [4, 2, 2, 1, 1, 1, 1]


def test_a_preview_that_cannot_be_decoded_does_not_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Stages.decode

    def failing(self: Stages, begun: Any, latents: Any) -> Any:
        if len(failed) < 1:
            failed.append(begun)
            raise MemoryError
        return decode(self, begun, latents)

    failed: list[Any] = []
    monkeypatch.setattr(Stages, "decode", failing)
    events = run(make_engine(tiny_pipeline(PixArtSigmaPipeline)), [job("1", steps=6, previews=2)])
    assert [event.number for event in events if isinstance(event, Preview)] == [1]
    assert isinstance(events[-1], Finished)


def test_images_wait_until_there_is_room() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), need=lambda job: job.width, room=40)
    most = []
    jobs = [job(str(i), width=16) for i in range(5)]
    events = run(engine, [*jobs, job("wide", width=40)], lambda turn: most.append(engine.tally.running))
    assert max(most) == 2
    assert sum(isinstance(event, Finished) for event in events) == 6


def test_an_image_that_cannot_fit_fails_and_one_of_the_model_s_size_is_tried() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), need=lambda job: job.width * 10**9, room=20 * 10**9)
    wide, *_, small = run(engine, [job("wide", width=48), job("small", width=16)])
    assert isinstance(wide, Failed)
    assert wide.reason == "resources"
    assert "48.0 GB of memory, of 20.0 GB" in wide.message
    assert isinstance(small, Finished)
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), need=lambda job: job.width or 16, room=0)
    assert isinstance(run(engine, [job("own", width=16)])[-1], Finished)


def test_large_images_leave_places_for_smaller_ones() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), most_running=8)
    seen: list[set[str]] = []
    jobs = [job(f"large {i}", width=24) for i in range(9)] + [job(f"small {i}") for i in range(3)]
    run(engine, jobs, lambda turn: seen.append({*engine.active}))
    assert seen[1] == {*(f"large {i}" for i in range(6)), "small 0", "small 1"}


def test_the_beginning_of_an_image_is_charged_to_it() -> None:
    """Each look at this clock takes a second."""
    seconds = count()
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), clock=lambda: float(next(seconds)))
    engine.add(job("1", steps=9))
    engine.tick()
    served, spent = engine.active["1"].candidate.served, engine.active["1"].text
    assert served > spent > 0
    assert engine.level >= spent


def test_freed_memory_is_returned_while_images_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on by a second with each reading: several readings in a turn, and one return in five seconds."""
    returned: list[float] = []
    now = count()
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), clock=lambda: float(next(now)))
    monkeypatch.setattr(loop, "return_freed_memory", lambda: returned.append(float(next(now))))
    images(run(engine, [job("1", steps=6)]))
    assert len(returned) >= 2
    assert all(later - earlier > loop.KEEP_FREED for earlier, later in pairwise(returned))


def test_steps_are_taken_while_an_image_is_decoded() -> None:
    """On this clock a layer takes as long as a step."""
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), clock=count().__next__)
    engine.add(job("short", steps=1))
    engine.add(job("long", steps=60))
    meanwhile = 0
    while "short" in engine.entries:
        decodes = bool(engine.decoder.batch)
        events, _ = engine.tick()
        meanwhile += decodes and any(isinstance(event, Progress) and event.id == "long" for event in events)
    assert meanwhile >= 1


def test_room_is_kept_for_what_is_decoded() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), need=lambda job: 30, room=40, clock=count().__next__)
    together = 0

    def watch(turn: int) -> None:
        nonlocal together
        together = max(together, len({*engine.active} | {each.entry.job.id for each in engine.decoder.batch}))

    events = run(engine, [job("1", previews=1), job("2")], watch)
    assert together == 1
    assert sum(isinstance(event, Finished) for event in events) == 2


def test_an_image_that_is_cancelled_while_it_is_decoded_leaves_the_others_of_its_batch() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), clock=count().__next__)
    cancelled = set[str]()

    def cancel_one(turn: int) -> None:
        if len(engine.decoder.batch) == 2 and not cancelled:
            cancelled.add(engine.decoder.batch[0].entry.job.id)
            engine.cancel(*cancelled)

    events = run(engine, [job("1"), job("2")], cancel_one)
    assert {event.id for event in events if isinstance(event, Failed)} == cancelled
    assert {event.id for event in events if isinstance(event, Finished)} == {"1", "2"} - cancelled
    assert engine.decoder.idle


def test_what_nobody_waits_for_is_not_decoded_further() -> None:
    engine = make_engine(tiny_pipeline(PixArtSigmaPipeline), clock=count().__next__)
    run(engine, [job("1")], lambda turn: engine.cancel("1") if engine.decoder.batch else None)
    assert engine.decoder.work is None
    assert engine.decoder.idle
