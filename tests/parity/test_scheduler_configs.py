"""Configs of our schedulers in every scheduler of diffusers, and theirs in ours."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest

import impasto

OURS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
)
GIVEN = {
    "num_train_timesteps": 500,
    "beta_end": 0.03,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "shift": 2.0,
    "steps_offset": 1,
    "use_karras_sigmas": True,
}


def built(cls: Any, given: Mapping[str, Any]) -> Any:
    """With the given values that it has arguments for; None if it cannot be built of them or lacks a library."""
    parameters = inspect.signature(cls.__init__).parameters
    try:
        return cls(**{name: value for name, value in given.items() if name in parameters})
    except (TypeError, ValueError, ImportError, NotImplementedError):
        return None


def names_of_diffusers() -> list[str]:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [name for name in names if built(getattr(diffusers, name), {}) is not None]


THEIRS = names_of_diffusers()


@pytest.fixture(autouse=True)
def _without_timesteps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two schedulers compute a thousand timesteps one by one when they are built. Here only configs are compared."""
    for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        monkeypatch.setattr(getattr(diffusers, name), "_sigma_to_t", lambda self, sigma, log_sigmas: sigma)


def content(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config for comparison: lists for tuples, defaulted names in order."""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {**listed, "_use_default_values": sorted(listed.get("_use_default_values", []))}


def test_there_are_schedulers_to_compare() -> None:
    assert len(THEIRS) >= 40
    assert {"EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "SASolverScheduler"} <= set(THEIRS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [{}, GIVEN], ids=["defaults", "given"])
@pytest.mark.parametrize("other", THEIRS)
@pytest.mark.parametrize("ours", OURS)
def test_configs_go_both_ways_as_among_themselves(ours: str, other: str, given: dict[str, Any]) -> None:
    mine, reference, foreign = getattr(impasto, ours), getattr(diffusers, ours), getattr(diffusers, other)
    source = built(foreign, given)
    source = built(foreign, {}) if source is None else source
    expected, unused = reference.from_config(source.config, return_unused_kwargs=True, extra=1)
    taken, ours_unused = mine.from_config(source.config, return_unused_kwargs=True, extra=1)
    assert content(taken.config) == content(expected.config)
    assert content(ours_unused) == content(unused)
    assert mine.extract_init_dict(source.config)[1] == reference.extract_init_dict(source.config)[1]

    expected = foreign.from_config(built(reference, given).config)
    assert content(foreign.from_config(built(mine, given).config).config) == content(expected.config)
    # and back: what only the other class knows is kept on the way
    back = foreign.from_config(taken.config)
    assert content(back.config) == content(foreign.from_config(reference.from_config(source.config).config).config)


@pytest.mark.parametrize("ours", OURS)
def test_loaded_configs_have_the_keys_of_diffusers(ours: str, tmp_path: Path) -> None:
    mine, reference = getattr(impasto, ours), getattr(diffusers, ours)
    source = diffusers.EulerDiscreteScheduler(interpolation_type="log_linear", num_train_timesteps=300)
    mine.from_config(source.config).save_pretrained(tmp_path / "ours")
    reference.from_config(source.config).save_pretrained(tmp_path / "theirs")
    files = [json.loads((tmp_path / name / "scheduler_config.json").read_text()) for name in ("ours", "theirs")]
    assert files[0] == files[1]
    assert files[0]["interpolation_type"] == "log_linear"
    for place in ("ours", "theirs"):
        assert content(mine.from_pretrained(tmp_path, place).config) == content(
            reference.from_pretrained(tmp_path, place).config
        )
    loaded, unused = mine.from_pretrained(tmp_path / "theirs", None, True, extra=1, force_download=False, mirror="x")
    assert unused == reference.from_pretrained(tmp_path / "theirs", None, True, extra=1)[1]
    arguments = {name: value for name, value in loaded.config.items() if name != "interpolation_type"}
    assert content(mine(**arguments).config) == content(reference(**arguments).config)
    assert repr(mine()) == repr(reference())
    assert mine().to_json_string() == reference().to_json_string()


def test_models_have_the_private_keys_of_diffusers(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24,
        "caption_channels": 10, "sample_size": 8,
    }  # fmt: skip
    arguments = set(inspect.signature(diffusers.PixArtTransformer2DModel.__init__).parameters)
    found = []
    for library in (impasto, diffusers):
        cls: Any = library.PixArtTransformer2DModel
        model, folder = cls(**options), tmp_path / library.__name__
        constructed = dict(model.config)  # saving changes it in diffusers
        model.save_pretrained(folder)
        loaded = cls.from_pretrained(str(folder))
        private = []
        for config in (constructed, loaded.config, cls.from_config(loaded.config).config):
            private.append({name: value for name, value in config.items() if name.startswith("_")})
            defaulted = sorted(arguments.intersection(config.get("_use_default_values", [])))  # we have deprecated ones
            private[-1] |= {"_use_default_values": defaulted}
            if "_name_or_path" in config:
                private[-1] |= {"_name_or_path": config["_name_or_path"] == str(folder)}
        found.append(private)
    assert found[0] == found[1]
    assert found[0][1]["_name_or_path"] is True


def test_the_path_of_a_model_is_not_written(tmp_path: Path) -> None:
    """diffusers writes it, and with it names of users and of their folders."""
    impasto.AutoencoderKL(norm_num_groups=2, block_out_channels=[2]).save_pretrained(tmp_path / "first")
    impasto.AutoencoderKL.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("first", "second")]
    assert texts[0] == texts[1]
