"""Whole runs, as ``impasto train`` starts them, on tiny models and folders of images."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from impasto.errors import CheckpointError, ConfigurationError, InputError
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.assembly.assemble import assemble, open_data, open_source
from impasto.training.data.sample import Sample
from impasto.training.distributed.parallel import chosen
from impasto.training.distributed.processes import ALONE, Processes
from impasto.training.launch import _held, launch, preview
from impasto.training.objectives.autoencoder import images_of, latent_moments
from impasto.training.settings import recipe_files as recipes
from impasto.training.settings.data_settings import SourceSettings

from ..tiny import write_pipeline
from .folders import write_images
from .runs import rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline and a folder of images."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "pipeline")
    write_images(place / "images")
    return place


def configuration(place: Path, **changes: Any) -> Any:
    content: dict[str, Any] = {
        "steps": 4,
        "models": {"pipeline": str(place / "pipeline")},
        "optimizer": {"rate": 3e-3},
        "data": {"sources": [{"path": str(place / "images")}], "batch_size": 8, "sizes": [[16, 16]]},
        "log_every": 2,
        "checkpoints": {"every": 2},
    }
    return recipes.checked({**content, **changes}, "test")


def test_a_transformer_is_trained_measured_sampled_and_saved(place: Path, tmp_path: Path) -> None:
    wanted = configuration(
        place,
        steps=24,
        micro_batch=3,
        ema=0.5,
        checkpoints={"every": 8, "keep": 1},
        validation={"count": 8},
        samples={"prompts": ["a red cube", "a blue cube"], "steps": 1},
        report={"progress": False, "peak_flops": 1e9},
    )
    launch(wanted, tmp_path)
    assert all(row["utilization"] > 0 for row in rows(tmp_path) if "images_per_second" in row)
    losses = [row["validation"] for row in rows(tmp_path) if "validation" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000024"]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 6
    assert recipes.read(str(tmp_path / "configuration.yaml")) == wanted
    result = tmp_path / "result"
    before = PixArtTransformer2DModel.from_pretrained(place / "pipeline" / "transformer").state_dict()
    trained = PixArtSigmaPipeline.from_pretrained(
        place / "pipeline", transformer=PixArtTransformer2DModel.from_pretrained(result / "transformer")
    )
    changed = [
        name for name, tensor in trained.transformer.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert len(changed) > 0.9 * len(before)
    assert not (result / "text_encoder").exists()


def test_new_models_are_trained_and_saved_as_a_pipeline(place: Path, tmp_path: Path) -> None:
    config = json.loads((place / "pipeline" / "transformer" / "config.json").read_text())
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    models = {
        "transformer": {"config": {**plain, "num_layers": 1}, "train": True},
        "text_encoder": {
            "config": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            "train": True,
        },
        "vae": {"start_from": str(place / "pipeline")},
        "tokenizer": str(place / "pipeline"),
        "scheduler": {"prediction_type": "v_prediction"},
    }
    launch(configuration(place, models=models, export="pipeline"), tmp_path)
    pipe = PixArtSigmaPipeline.from_pretrained(tmp_path / "result")
    assert len(pipe.transformer.transformer_blocks) == 1
    assert pipe.text_encoder.config.num_layers == 1
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_an_autoencoder_is_trained(place: Path, tmp_path: Path) -> None:
    models = {"vae": {"start_from": str(place / "pipeline"), "train": True}}
    wanted = configuration(
        place,
        steps=20,
        objective={"kind": "autoencoder"},
        models=models,
        validation={"count": 8},
        optimizer={"rate": 1e-2},
    )
    launch(wanted, tmp_path)
    psnr = [row["psnr"] for row in rows(tmp_path) if "psnr" in row]
    assert psnr[-1] > psnr[0] + 0.5
    vae = AutoencoderKL.from_pretrained(tmp_path / "result")
    assert vae.config.scaling_factor == 0.7
    means, deviations = latent_moments(vae, whole_batches(wanted))
    assert means.abs().max() > 0.05

    standardized = wanted.model_copy(update={"objective": wanted.objective.model_copy(update={"standardize": 32})})
    launch(standardized, tmp_path, resume=True)
    after = AutoencoderKL.from_pretrained(tmp_path / "result")
    means, deviations = latent_moments(after, whole_batches(wanted))
    assert means.abs().max() < 0.1
    assert (deviations * 0.7 - 1).abs().max() < 0.1
    (batch,) = itertools.islice(whole_batches(wanted), 1)
    image = images_of(batch[:1], torch.device("cpu"))
    pairs = [model.decode(model.encode(image).latent_dist.mode()).sample for model in (vae, after)]
    torch.testing.assert_close(*pairs, atol=1e-4, rtol=1e-3)


def test_latents_are_measured_in_one_process_and_in_micro_batches(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def moments(vae: AutoencoderKL, batches: Iterable[list[Sample]]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.extend(len(samples) for samples in batches)
        return torch.zeros(4), torch.ones(4)

    monkeypatch.setattr("impasto.training.launch.latent_moments", moments)
    models = {"vae": {"start_from": str(place / "pipeline")}}
    objective = {"kind": "autoencoder", "standardize": 16}
    wanted = configuration(place, steps=1, micro_batch=3, objective=objective, models=models)
    launch(wanted, tmp_path)
    assert sizes == [3, 3, 2, 3, 3, 2]
    made = assemble(wanted, tmp_path, writes=False).objective
    with pytest.raises(ConfigurationError, match=r"Autoencoder cannot be sharded, as objective\.standardize"):
        chosen(made, Processes(0, 2, parallel="fsdp"))


def whole_batches(wanted: Any) -> Iterator[list[Any]]:
    data, *_ = open_data(wanted, {})
    return (data.batch(step).samples for step in range(3))


def test_a_run_goes_on_only_if_asked_and_only_as_it_was(place: Path, tmp_path: Path) -> None:
    launch(configuration(place), tmp_path / "parts")
    with pytest.raises(InputError, match="has a run already, up to step-00000004; continue it with --resume"):
        launch(configuration(place), tmp_path / "parts")
    with pytest.raises(CheckpointError, match=r"optimizer\.rate=0\.003, and here it is 0\.001"):
        launch(configuration(place, optimizer={"rate": 1e-3}), tmp_path / "parts", resume=True)
    kept = recipes.read(str(tmp_path / "parts" / "configuration.yaml"))
    assert kept == configuration(place)  # also after what was refused
    with pytest.raises(CheckpointError, match=r"the data is not that of .*step-00000004: .*validation\.count"):
        launch(configuration(place, validation={"count": 8}), tmp_path / "parts", resume=True)
    longer = configuration(place, steps=8, log_every=1)
    launch(longer, tmp_path / "parts", resume=True)
    seconds = [row["seconds"] for row in rows(tmp_path / "parts")]
    assert seconds == sorted(seconds)
    launch(longer, tmp_path / "whole", resume=True)  # there is nothing to continue yet
    ends = []
    for folder in (tmp_path / "parts", tmp_path / "whole"):
        stored = PixArtTransformer2DModel.from_pretrained(folder / "result" / "transformer")
        ends.append(stored.state_dict())
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert rows(tmp_path / "parts")[-1]["loss"] == rows(tmp_path / "whole")[-1]["loss"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_result_without_checkpoints_is_not_overwritten(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with (
        pytest.raises(InputError, match=r"has the result of a run, and no checkpoint .*; give another --output"),
        _held(tmp_path, resume, ALONE),
    ):
        pass


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    with _held(tmp_path, resume=False, processes=ALONE):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        with pytest.raises(InputError, match="another process trains"), _held(tmp_path, resume=True, processes=ALONE):
            pass
    with _held(tmp_path, resume=False, processes=ALONE):
        assert worker.is_alive()
    worker.kill()
    worker.join()


def test_a_folder_in_which_another_process_trains_is_refused(place: Path, tmp_path: Path) -> None:
    wait = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2); print('here', flush=True); input()"
    command = [sys.executable, "-c", wait, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=r"another process trains in .*; give another --output"):
            launch(configuration(place), tmp_path)
        assert not (tmp_path / "configuration.yaml").exists()
        other.kill()
    launch(configuration(place, steps=1), tmp_path)  # a killed run leaves the folder free
    seen = []

    def check(pipe: Any, options: dict[str, Any]) -> dict[str, float]:
        with pytest.raises(InputError, match="another process trains"):
            launch(configuration(place), tmp_path, resume=True)
        seen.append(pipe)
        return {}

    launch(configuration(place, steps=2, checks={"again": {}}), tmp_path, resume=True, checks={"again": check})
    assert seen


def test_another_program_adds_sources_and_checks(place: Path, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def make(options: dict[str, Any]) -> Any:
        given.append(options)
        return open_source(SourceSettings(path=str(place / "images")), {})

    data = {"sources": [{"kind": "scenes", "options": {"count": 3}}], "batch_size": 8, "sizes": [[16, 16]]}
    wanted = configuration(place, steps=2, data=data, checks={"judge": {"n": 5}})
    seen = {"scenes": make}
    launch(
        wanted,
        tmp_path,
        sources=seen,
        checks={"judge": lambda pipe, options: {"judged": len(pipe.components) + options["n"]}},
    )
    assert given == [{"count": 3}]
    assert rows(tmp_path)[-1]["judged"] == 10
    with pytest.raises(InputError, match="no source 'scenes'; there are folder"):
        launch(wanted, tmp_path / "x", checks={"judge": lambda pipe, options: {}})
    with pytest.raises(InputError, match="checks: there is no 'judge'"):
        launch(wanted, tmp_path / "x", sources=seen)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": {}}, ConfigurationError, "models.tokenizer is not given"),
        ({"models": {"pipeline": "nowhere/at/all"}}, CheckpointError, "nowhere"),
        ({"validation": {"count": 20}}, InputError, "20 of 32 samples would be held out"),
    ],
)
def test_what_is_missing_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        launch(configuration(place, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "configuration.yaml").exists()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("transformer", {"config": {"num_layer": 1}}, "did you mean 'num_layers'"),
        ("vae", {"start_from": "pipeline", "config": {"latent_channel": 4}}, "did you mean 'latent_channels'"),
        ("text_encoder", {"config": {"num_layer": 1}, "train": True}, "did you mean 'num_layers'"),
        ("text_encoder", {"start_from": "pipeline", "config": {"dropout_rate": 0.0}}, "keeps its own"),
    ],
)
def test_settings_that_a_model_does_not_take_are_refused(
    name: str, settings: dict[str, Any], message: str, place: Path, tmp_path: Path
) -> None:
    if "start_from" in settings:
        settings = settings | {"start_from": str(place / settings["start_from"])}
    models = {"pipeline": str(place / "pipeline"), name: settings}
    with pytest.raises((ConfigurationError, InputError), match=message):
        launch(configuration(place, models=models), tmp_path / "run")


def test_a_trained_text_encoder_has_checkpoints(place: Path, tmp_path: Path) -> None:
    """``gradient_checkpointing`` reaches each model, and changes no number."""
    logs = []
    for on in (False, True):
        each = {"gradient_checkpointing": on}
        models = {"pipeline": str(place / "pipeline"), "transformer": each, "text_encoder": {"train": True, **each}}
        wanted = configuration(place, models=models)
        made = assemble(wanted, tmp_path / "none", writes=False).components
        assert (made.transformer.is_gradient_checkpointing, made.text_encoder.is_gradient_checkpointing) == (on, on)
        launch(wanted, tmp_path / str(on))
        logs.append([row["loss"] for row in rows(tmp_path / str(on)) if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_the_configuration_of_a_checkpoint_is_kept_with_it(place: Path, tmp_path: Path) -> None:
    launch(configuration(place), tmp_path)
    stored = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())["state"]["settings"]
    assert stored["optimizer"]["rate"] == 3e-3
    assert stored["data"]["batch_size"] == 8


def test_a_dry_run_shows_data_memory_and_time_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    wanted = configuration(place, steps=100, ema=0.9, micro_batch=4)
    text = preview(wanted, tmp_path / "run")
    assert "16 x 16: 32 images" in text
    assert "32 samples and 4 steps in an epoch" in text
    assert "100 steps: 25 epochs" in text
    numbers = {line.split(":")[0].strip(): line.split(": ")[1] for line in text.splitlines() if "MiB" in line}
    count = sum(
        p.numel() for p in PixArtTransformer2DModel.from_pretrained(place / "pipeline/transformer").parameters()
    )
    for name, times in (("gradients", 1), ("averages", 1), ("optimizer", 2)):
        assert float(numbers[name].removesuffix(" MiB")) == pytest.approx(times * 4 * count / 2**20, abs=0.06), name
    assert "images/s" in text
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_counted(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_images(tmp_path / "images")
    for name in ("000.png", "001.png"):
        (images / name).write_bytes(b"no image")
    (images / "002.png").write_bytes((images / "002.png").read_bytes()[:-30])  # its size can be read
    lines = (images / "metadata.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"file_name": "003.png", "text": ""})
    (images / "metadata.jsonl").write_text("\n".join(lines))
    data = {"sources": [{"path": str(images)}], "batch_size": 8, "sizes": [[16, 16]], "max_broken": 5}
    text = preview(configuration(place, data=data), tmp_path / "run")
    assert "16 x 16: 29 images" in text
    left_out = [line.strip() for line in text.splitlines() if "left out" in line]
    assert left_out == ["left out: 2: cannot be read as an image", "left out: 1: it has no caption"]
    launch(configuration(place, data=data), tmp_path / "run")
    assert "2 images are left out: cannot be read as an image" in caplog.text
    assert "1 images were left out while training: cannot be read as an image" in caplog.text


def test_a_dry_run_generates_no_class_images(place: Path, tmp_path: Path) -> None:
    generated = {"path": str(tmp_path / "class"), "caption": "a photo of a dog", "generate": {"count": 12}}
    data = {"sources": [{"path": str(place / "images")}, generated], "batch_size": 8, "sizes": [[16, 16]]}
    text = preview(configuration(place, data=data), tmp_path / "run")
    assert "16 x 16: 44 images" in text
    assert f"12 class images will be generated in {tmp_path / 'class'}" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("best", "objective", "validation", "message"),
    [
        ("validation", {"kind": "text-to-image"}, None, "validation needs a validation"),
        ("validation", {"kind": "lcm"}, {"count": 4}, "lcm measures distance, not validation"),
        ("psnr", {"kind": "text-to-image"}, {"count": 4}, "text-to-image measures validation, not psnr"),
        ("validaton", {"kind": "text-to-image"}, {"count": 4}, "text-to-image measures validation, not validaton"),
    ],
)
def test_the_best_value_has_to_be_measured(best: str, objective: Any, validation: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"checkpoints\.best: {message}"):
        configuration(Path(), checkpoints={"best": best}, objective=objective, validation=validation)


@pytest.mark.parametrize("name", ["lora", "dora", "glm-image-lora"])
def test_an_adapter_needs_no_more_than_eight_images(name: str) -> None:
    wanted = recipes.read(name).validation
    assert wanted is not None
    assert wanted.count <= 4


def test_the_weight_of_a_source_that_a_program_adds_counts() -> None:
    class Made:
        def __len__(self) -> int:
            return 3

        def size(self, index: int) -> tuple[int, int]:
            return 16, 16

        def read(self, index: int, target: tuple[int, int], rng: np.random.Generator) -> Sample:
            return Sample(torch.zeros(3, *target), weight=3.0)

    source = open_source(SourceSettings(kind="made", weight=0.5), {"made": lambda options: Made()})
    assert (len(source), source.size(0)) == (3, (16, 16))
    assert source.read(0, (16, 16), np.random.default_rng(0)).weight == 1.5


def test_an_exported_pipeline_has_frozen_components_as_they_were_stored(tmp_path: Path) -> None:
    """In training they compute in bfloat16."""
    from safetensors.torch import load_file

    write_pipeline(tmp_path / "pipeline")
    write_images(tmp_path / "images", 4, 16)
    content = {
        "steps": 1,
        "precision": "bfloat16",
        "models": {"pipeline": str(tmp_path / "pipeline")},
        "data": {
            "sources": [{"path": str(tmp_path / "images")}],
            "batch_size": 2,
            "sizes": [[16, 16]],
        },
        "export": "pipeline",
    }
    launch(recipes.checked(content, "test"), tmp_path / "run")
    for name, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before = load_file(tmp_path / "pipeline" / name / f"{file}.safetensors")
        after = load_file(tmp_path / "run" / "result" / name / f"{file}.safetensors")
        assert all(after[key].to(before[key].dtype).equal(before[key]) for key in after)


def test_the_result_samples_what_the_objective_predicts(place: Path, tmp_path: Path) -> None:
    wanted = configuration(place, objective={"kind": "text-to-image", "prediction": "v_prediction"})
    assert assemble(wanted, tmp_path).components.scheduler.config.prediction_type == "v_prediction"
