"""Configurations: read, changed on the command line, checked, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.errors import CheckpointNotFoundError, InputError
from impasto.training.settings import recipe_files as recipes
from impasto.training.settings.config import differences
from impasto.training.settings.configuration import Configuration, TextToImageSettings

SMALL = """
steps: 10
optimizer: {name: muon, rate: 1e-3}
data:
  sources: [{path: images}]
  batch_size: 4
  sizes: [[16, 16]]
"""


def written(folder: Path, text: str = SMALL) -> str:
    path = folder / "small.yaml"
    path.write_text(text)
    return str(path)


def test_a_configuration_is_read_and_written_again(tmp_path: Path) -> None:
    first = recipes.read(written(tmp_path))
    assert first.optimizer.rate == 1e-3
    assert isinstance(first.objective, TextToImageSettings)
    again = recipes.read(written(tmp_path, recipes.text_of(first)))
    assert again == first
    like_numbers = recipes.read(written(tmp_path), ['data.sources.0.path="1e5"', 'output="1:30"'])
    assert recipes.read(written(tmp_path, recipes.text_of(like_numbers))) == like_numbers


def test_values_are_set_on_the_command_line(tmp_path: Path) -> None:
    changes = ["steps=20", "optimizer.rate=2e-5", "data.sources.0.path=other", "samples.prompts=[a red cube, b]"]
    changed = recipes.read(written(tmp_path), [*changes, "objective.kind=text-to-image", "schedule.warmup=5"])
    assert (changed.steps, changed.optimizer.rate, changed.optimizer.name) == (20, 2e-5, "muon")
    assert changed.data.sources[0].path == "other"
    assert changed.samples is not None
    assert changed.samples.prompts == ["a red cube", "b"]
    assert changed.schedule.warmup == 5


@pytest.mark.parametrize("name", ["lora", "finetune", "glm-image"])
def test_an_objective_without_a_kind_is_the_usual_one(name: str) -> None:
    change, kind = ("objective.spread=2", "flow-matching") if "glm" in name else ("objective.weighting=min-snr", None)
    found = recipes.read(name, ["objective=null", change]).objective
    assert found.kind == (kind or "text-to-image")
    assert found.model_dump()[change.split(".")[1].split("=")[0]] in (2, "min-snr")
    assert recipes.read("finetune", ["objective.weighting=min-snr"]).objective.kind == "text-to-image"


WRONG: dict[str, tuple[str, str]] = {
    "an unknown key": ("optimiser: {rate: 1}", "there is no 'optimiser' here; did you mean 'optimizer"),
    "an unknown key inside": ("optimizer: {rates: {}, lr: 1}", r"optimizer: there is no 'lr' here; there are .*rate"),
    "an unknown key in a list": (
        "data: {sources: [{pth: x}]}",
        r"data.sources.0: there is no 'pth' here; did you mean 'p",
    ),
    "a word for a number": ("steps: many", "steps: .*many"),
    "no steps": ("steps: null", "steps"),
    "a rate of zero": ("optimizer: {rate: 0}", "optimizer.rate: .*greater than 0"),
    "an unknown optimizer": ("optimizer: {name: adam}", "optimizer.name: .*'muon'"),
    "an unknown objective": ("objective: {kind: paint}", r"objective\.kind: must be one of .*lcm, .*, not 'paint'$"),
    "a misspelt objective": ("objective: {kind: autoencode}", r"objective\.kind: .*; did you mean 'autoencoder'\?$"),
    "an objective without a kind": ("objective: {vectors: 3}", "objective: there is no 'vectors' here"),
    "LoKr on int8": ("adapter: {kind: lokr, base: int8}", r"adapter: base: lokr needs ordinary weights, not int8"),
    "LoHa on nf4": ("adapter: {kind: loha, base: nf4}", r"adapter: base: loha needs ordinary weights, not nf4"),
    "a key of another objective": ("objective: {kind: autoencoder, tokens: 3}", "objective: there is no 'tokens' here"),
    "both sizes": ("data: {base: 512}", "data: give either base"),
    "a base without buckets": ("data: {base: 300, sizes: null}", "data.base: .*300"),
    "both share and repeats": (
        "data: {sources: [{path: a, share: 1}, {path: b, share: 1, repeats: 2}]}",
        "share and repeats contradict",
    ),
    "one share": ("data: {sources: [{path: a, share: 1}, {path: b}]}", "a share for each source, or for none"),
    "a folder without a path": (
        "data: {sources: [{kind: folder}]}",
        "data.sources.0: .*folder needs its path",
    ),
    "packed batches": (
        "data: {pack_pixels: 1000}\nobjective: {kind: lcm}",
        "data.pack_pixels: lcm takes batches of one size",
    ),
    "GLM-Image without its objective": (
        "{models: {family: glm-image, pipeline: x}, objective: {kind: text-to-image}}",
        "belong together",
    ),
    "a frozen transformer": ("models: {transformer: {train: false}}", "models.transformer.train: .* trains it"),
    "a trained autoencoder": ("models: {vae: {train: true}}", "models.vae.train: .* does not train it"),
    "an adapter and a trained text encoder": (
        "{adapter: {rank: 2}, models: {text_encoder: {train: true}}}",
        "give adapter.text_encoder_rank",
    ),
    "an adapter of a text encoder that is kept": (
        "{adapter: {text_encoder_rank: 2}, objective: {kind: lcm}}",
        "adapter.text_encoder_rank: lcm keeps the text encoder",
    ),
    "a trained text encoder in a distillation": (
        "{models: {text_encoder: {train: true}}, objective: {kind: dmd}}",
        "models.text_encoder.train: .* does not train it",
    ),
    "masks of an autoencoder": (
        "{data: {sources: [{path: x, mask_suffix: _m}]}, objective: {kind: autoencoder}}",
        "mask_suffix: autoencoder has no masks",
    ),
    "an adapter of an autoencoder": (
        "{adapter: {rank: 2}, objective: {kind: autoencoder}}",
        "adapter: autoencoder trains none",
    ),
    "GLM-Image with another autoencoder": (
        "{models: {family: glm-image, pipeline: x, vae: {start_from: y}}, objective: {kind: flow-matching}}",
        "models.vae: glm-image has that of models.pipeline",
    ),
    "one beta": ("optimizer: {betas: [0.9]}", "optimizer: muon has 2 betas, not 1"),
    "the confidence of AdamW": ("optimizer: {name: adamw, betas: [0.9, 0.99, 0.9]}", "adamw has 2 betas, not 3"),
    "two rates of Prodigy": (
        "optimizer: {name: prodigy, rates: {x: 1.0e-5}}",
        "prodigy has one rate for everything; leave rates out",
    ),
    "eps of CAME": ("optimizer: {name: came, eps: 1.0e-6}", "eps is not one of came's"),
    "agreement below what is trained": (
        "objective: {kind: text-to-image, timestep_range: [400, 1000], agreement: {below: 400}}",
        r"objective: agreement\.below: the first timestep that is trained is 400; give a higher one",
    ),
    "rollout beyond what is trained": (
        "objective: {kind: text-to-image, timestep_range: [400, 1000], rollout: {timestep_range: [300, 500]}}",
        r"rollout\.timestep_range, 300 to 500, must be within what is trained, 400 to 1000",
    ),
    "labels of tokens that skip": (
        "objective: {kind: text-to-image, labels: {block: 3, classes: [2]}, token_routing: {start: 2, end: 4}}",
        r"labels\.block, 3, needs all tokens, and token_routing skips 2 to 3",
    ),
    "the best of nothing": ("checkpoints: {result: best}", "checkpoints: result: best needs the value"),
    "a caption of a cache": (
        "data: {sources: [{kind: cache, path: x, caption: y}]}",
        "data.sources.0: caption has no effect on a source of the kind cache",
    ),
    "masks of shards": ("data: {sources: [{kind: shards, path: x, mask_suffix: _m}]}", "mask_suffix has no effect"),
    "crops of scenes": ("data: {sources: [{kind: scenes, crop: centre}]}", "crop has no effect .* scenes"),
    "a cache for an autoencoder": (
        "{data: {sources: [{kind: cache, path: x}]}, objective: {kind: autoencoder}}",
        "a cache has no images",
    ),
    "a cache and a folder": ("data: {sources: [{kind: cache, path: x}, {path: y}]}", "cannot be in one batch"),
    "generated images to validate on": (
        "validation: {source: {path: x, caption: y, generate: {count: 3}}}",
        "validation: source.generate",
    ),
    "a seed that is too large": (f"seed: {2**63}", "seed: .*less than"),
    "not a number": ("optimizer: {rate: .nan}", "optimizer.rate"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_name_the_key(name: str, tmp_path: Path) -> None:
    import yaml

    extra, message = WRONG[name]
    content: dict[str, Any] = yaml.safe_load(SMALL)
    for key, value in yaml.safe_load(extra).items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    content["optimizer"]["rate"] = float(content["optimizer"]["rate"])
    with pytest.raises(InputError, match=message) as caught:
        recipes.read(written(tmp_path, yaml.safe_dump(content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "not valid YAML"),
        ("- 1", "not a mapping"),
        ("", "not a mapping"),
        ("steps: 1\nsteps: 2", "twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("!!python/object/apply:os.mkdir [made]", "not valid YAML"),
        ("{" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipes.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps", "a.b=value"),
        ("=3", "a.b=value"),
        ("steps.more=3", "there is a value"),
        ("data.sources.1.path=x", "'1' is not one of the 1 entries"),
        ("optimizer.rate=[1", "--set optimizer.rate is not valid YAML"),
        ("output=*", r"--set output is not valid YAML: .*; put a text in double quotes: --set 'output=\"\.\.\.\"'"),
        ("data.sources.0.path=2024", r"data\.sources\.0\.path: must be a text, not 2024; put it in double quotes"),
        ("output=2024-01-01", r"output: must be a text, not datetime\.date\(2024, 1, 1\); put it in double quotes"),
        ("output=[a]", r"output: must be a valid string, not \['a'\]"),
        ("optimizer.speed=1", "there is no 'speed' here"),
    ],
)
def test_changes_that_cannot_be_made(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipes.read(written(tmp_path), [change])


def test_texts_in_quotes_may_look_like_numbers_or_yaml(tmp_path: Path) -> None:
    changed = recipes.read(written(tmp_path), ['data.sources.0.path="2024"', 'output="*"'])
    assert (changed.data.sources[0].path, changed.output) == ("2024", "*")


def test_unknown_names_and_files() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no recipe 'fintune'.*finetune"):
        recipes.read("fintune")
    with pytest.raises(CheckpointNotFoundError, match="cannot be read"):
        recipes.read("nowhere.yaml")


@pytest.mark.parametrize("name", list(recipes.recipes()))
def test_recipes_of_the_package_are_valid_and_described(name: str) -> None:
    assert 20 < len(recipes.recipes()[name]) < 110
    configuration = recipes.read(name)
    assert isinstance(configuration, Configuration)


def test_differences_are_named_by_their_keys() -> None:
    one = {"steps": 1, "optimizer": {"rate": 1, "eps": 0}, "only": 3}
    other = {"steps": 1, "optimizer": {"rate": 2, "eps": 0}}
    assert differences(one, other) == {"optimizer.rate": (1, 2), "only": (3, None)}


def test_recipes_follow_their_sources() -> None:
    read = {name: recipes.read(name) for name in recipes.recipes()}
    for name, recipe in read.items():
        few = recipe.data.batch_size <= 8 and recipe.objective.kind != "autoencoder"  # which has no timesteps
        assert (recipe.guard.spike == 0) == few, name
        if recipe.adapter is not None and few and recipe.validation is not None:
            assert recipe.validation.count <= 4, name  # so that a folder of 8 images is enough
        if recipe.data.base == 2048:
            assert recipe.validation is not None
            assert recipe.validation.count <= 32, name  # 50 MB each
    for name in (
        "pixart-alpha-256",
        "pixart-alpha-512",
        "pixart-alpha-1024",
        "pixart-alpha-align",
        "dreambooth",
        "lcm",
    ):
        assert read[name].optimizer.eps == 1e-10, name
    ratio = {name: recipe.data.sources[0].real_prompt_ratio for name, recipe in read.items()}
    assert [ratio[f"pixart-alpha-{stage}"] for stage in ("256", "align", "512", "1024")] == [1, 0, 1, 1]
