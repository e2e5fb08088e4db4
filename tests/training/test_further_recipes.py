"""The recipes of distillation, subjects and words, from their files to results that pipelines load."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from impasto.errors import InputError
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.training.assembly.assemble import make_objective
from impasto.training.assembly.components import Components, load
from impasto.training.launch import launch
from impasto.training.settings import recipe_files as recipes
from impasto.training.settings.configuration import Configuration, SampleSettings

from ..tiny import write_pipeline
from .folders import write_images
from .runs import rows

RECIPES = ("lcm", "lcm-lora", "dmd", "dreambooth", "dreambooth-lora", "textual-inversion")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each family, and a folder of images of one subject."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "sigma")
    write_pipeline(place / "alpha", PixArtAlphaPipeline)
    write_images(place / "images", 8)
    return place


def tiny(name: str, place: Path, *changes: str) -> Configuration:
    """A recipe for 16 px, with tiny models and batches."""
    family = "sigma" if "Sigma" in str(recipes.read(name).models.pipeline) else "alpha"
    small = ["data.base=null", "data.sizes=[[16, 16]]", "data.workers=0", "data.batch_size=4", "micro_batch=null"]
    places = [f"models.pipeline={place / family}", f"data.sources.0.path={place / 'images'}"]
    return recipes.read(name, [*small, *places, "log_every=1", "schedule.warmup=0", *changes])


def test_every_recipe_has_a_line_that_explains_it() -> None:
    known = recipes.recipes()
    for name in RECIPES:
        assert len(known[name]) > 20
        assert recipes.read(name).output is None


@pytest.mark.parametrize("name", ["lcm", "dmd"])
def test_a_distilled_model_is_a_pipeline_with_its_scheduler(name: str, place: Path, tmp_path: Path) -> None:
    small = ["steps=2", "checkpoints.every=1", "validation={count: 2}", "samples={prompts: [a red cube]}"]
    small += ["objective.intervals=5"] if name == "lcm" else ["objective.pair_steps=1"]
    launch(tiny(name, place, *small), tmp_path)
    assert all(row["distance"] > 0 for row in rows(tmp_path))
    assert len(list((tmp_path / "samples").iterdir())) == 2
    scheduler = {"lcm": "LCMScheduler", "dmd": "DDPMScheduler"}[name]
    options: dict[str, Any] = {"num_inference_steps": 2} if name == "lcm" else {"timesteps": [400]}
    images = []
    import diffusers

    for cls in (PixArtAlphaPipeline, diffusers.PixArtAlphaPipeline):
        pipe = cls.from_pretrained(tmp_path / "result", torch_dtype=torch.float32)
        assert type(pipe.scheduler).__name__ == scheduler
        assert pipe.scheduler.config.beta_end == 0.02
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        given: dict[str, Any] = {"guidance_scale": 1.0, "generator": generator, "output_type": "np", **options}
        given |= {"height": 16, "width": 16, "use_resolution_binning": False}
        images.append(torch.as_tensor(pipe("a red cube", **given).images))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lcm", {}, {"num_inference_steps": 4, "guidance_scale": 1.0}),
        ("lcm", {"steps": 2}, {"num_inference_steps": 2, "timesteps": None, "guidance_scale": 1.0}),
        ("dmd", {}, {"timesteps": [400], "guidance_scale": 1.0}),
        ("dmd", {"steps": 3, "guidance_scale": 2}, {"num_inference_steps": 3, "timesteps": None, "guidance_scale": 2}),
        ("dreambooth", {}, {}),  # as the pipeline does
        ("dreambooth", {"timesteps": [9], "height": 32}, {"timesteps": [9], "height": 32}),
    ],
)
def test_samples_have_the_steps_of_what_is_trained(
    name: str, given: dict[str, Any], expected: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    wanted = tiny(name, place, "validation=null", "checkpoints.best=null")
    samples = SampleSettings(prompts=["a red cube"], **given)
    components = load(wanted, torch.device("cpu"))
    objective = make_objective(wanted, components)

    def generate(**taken: Any) -> SimpleNamespace:
        seen.append(taken)
        return SimpleNamespace(images=[])

    monkeypatch.setattr(Components, "pipeline", lambda self: generate)
    usual = {**objective.sampling, **objective.prompts(samples.prompts)}
    components.write_samples(samples, usual, None, 1)
    assert seen[0].pop("generator")
    assert seen == [{"prompt": ["a red cube"], **expected}]


def test_an_adapter_for_few_steps_says_so(place: Path, tmp_path: Path) -> None:
    from impasto.checkpoints.adapters.file import adapter_defaults

    small = ["steps=2", "validation=null", "checkpoints.best=null", "objective.intervals=5", "adapter.rank=2"]
    launch(tiny("lcm-lora", place, *small), tmp_path)
    (file,) = (tmp_path / "result").glob("*.safetensors")
    defaults = adapter_defaults(file)
    assert (defaults.scheduler, defaults.steps, defaults.guidance_scale) == ("lcm", 4, 1.0)
    pipe = PixArtSigmaPipeline.from_pretrained(place / "sigma")
    pipe.load_lora_weights(tmp_path / "result")
    assert pipe.get_active_adapters()


@pytest.mark.parametrize("name", ["dreambooth", "dreambooth-lora"])
def test_a_subject_is_learned(name: str, place: Path, tmp_path: Path) -> None:
    source = "{path: %s, caption: a photo of sks dog}" % (place / "images")
    changes = ["steps=12", "checkpoints.every=6", "ema=0", "optimizer.rate=1e-3", "clip=1"]
    changes.append(f"validation={{count: 8, source: {source}}}")
    if name == "dreambooth-lora":
        changes += [f"data.sources.1.path={tmp_path / 'class'}", "optimizer.rate=1e-2"]
        changes.append("data.sources.1.generate={count: 3, steps: 1}")
    launch(tiny(name, place, *changes), tmp_path / "run")
    losses = [row["validation"] for row in rows(tmp_path / "run") if "validation" in row]
    assert losses[-1] < losses[0]
    if name == "dreambooth-lora":
        assert len(list((tmp_path / "class").iterdir())) == 3


def test_a_word_is_learned(place: Path, tmp_path: Path) -> None:
    source = "{path: %s, caption: a photo of <subject>}" % (place / "images")
    changes = ["steps=20", "checkpoints.every=10", "optimizer.rate=0.3", "objective.start_from=red"]
    changes.append(f"validation={{count: 8, source: {source}}}")
    changes.append("samples={prompts: [a photo of <subject>, a red cube], steps: 2}")
    launch(tiny("textual-inversion", place, *changes), tmp_path)
    losses = [row["validation"] for row in rows(tmp_path) if "validation" in row]
    assert losses[-1] < losses[0]
    pipe = PixArtSigmaPipeline.from_pretrained(place / "sigma")
    pipe.load_textual_inversion(tmp_path / "result")
    assert "<subject>_3" in pipe.tokenizer.get_vocab()
    learned, other = ([*(tmp_path / "samples").glob(f"*-{i}.png")] for i in (0, 1))
    assert len({path.read_bytes() for path in learned}) == 2  # as the word is after each checkpoint
    assert len({path.read_bytes() for path in other}) == 1


def test_a_stage_starts_under_another_configuration(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "sigma" / "transformer" / "config.json").read_text())
    larger = "{start_from: %s, config: {sample_size: 16}, train: true}" % (place / "sigma")
    changes = [f"models.transformer={larger}", "steps=1", "objective.token_routing={start: 1, end: 2}"]
    launch(tiny("dreambooth", place, f"models.pipeline={place / 'sigma'}", *changes), tmp_path)
    after = json.loads((tmp_path / "result" / "transformer" / "config.json").read_text())
    assert (config["sample_size"], after["sample_size"], after["interpolation_scale"]) == (8, 16, 2.0)


def test_what_contradicts_itself_is_refused() -> None:
    for name, change, message in (
        ("dmd", "adapter={rank: 4}", "dmd trains none"),
        ("dmd", "objective.noise_levels=[9, 3]", "ascending"),
        ("dreambooth-lora", "data.sources.1.caption=null", "generate"),
        (
            "dreambooth",
            "objective={kind: text-to-image, agreement: {below: 500}, token_routing: {end: 2}}",
            "leave token_routing out",
        ),
        ("dreambooth", "objective={kind: text-to-image, timestep_range: [500, 500]}", "below the second.* is empty"),
        (
            "scenes-edges",
            "objective.rollout.timestep_range=[480, 250]",
            r"rollout.timestep_range: .*below the second; \(480, 250\) is empty",
        ),
        ("scenes-edges", "objective.rollout.timestep_range=[100, 900]", "100 to 900, must be within what is trained"),
        ("lcm", "objective.decay=0.9", "target_decay"),
        ("textual-inversion", "objective.vectors=0", "vectors"),
        ("textual-inversion", "export=pipeline", "the result of training a word is its file"),
        ("scenes-autoencoder", "samples={prompts: [a]}", "autoencoder has no model that generates images"),
        ("scenes-text-encoder", "samples={prompts: [a]}", "text-encoder has no model that generates images"),
    ):
        with pytest.raises(InputError, match=message):
            recipes.read(name, [change])
