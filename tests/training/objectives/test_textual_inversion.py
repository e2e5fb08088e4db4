"""Textual inversion: only the new rows learn, and pipelines read what comes out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.errors import ConfigurationError, InputError
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.data.sample import Batch, Sample
from impasto.training.distributed.parallel import chosen
from impasto.training.distributed.processes import Processes
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.textual_inversion import TextualInversion
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ...tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer
from ..runs import settings
from ..teachers import parts, teacher


def images(step: int, caption: str = "a photo of <toy>") -> Batch:
    """A concept: the upper half is that of one known caption, the lower half that of the other."""
    mean = torch.ones(4, 4, 4)
    mean[:, :2] = -1
    samples = [Sample(posterior=(mean, torch.zeros(4, 4, 4)), caption=caption) for _ in range(8)]
    return Batch(samples, 0, 8, step, 8)


def objective(**options: Any) -> TextualInversion:
    given: dict[str, Any] = {"token": "<toy>", "vectors": 2, "timesteps": "stratified", "caption_dropout": 0.0}
    return TextualInversion(*parts(teacher(), "v_prediction"), **{**given, **options})


def test_only_the_new_rows_learn_and_a_pipeline_reads_them(tmp_path: Path) -> None:
    one = objective()
    assert [name for name, p in one.named_parameters() if p.requires_grad] == ["rows"]
    before = copy.deepcopy(one.state_dict())
    measured = [float(one(images(0), Randomness(1, 0)).each.mean())]
    plan = settings(30, optimizer={"name": "adamw", "rate": 0.3}, ema=0.0)
    train(one, ByStep(images), plan, tmp_path)
    measured.append(float(one(images(0), Randomness(1, 0)).each.mean()))
    assert measured[1] < 0.95 * measured[0]
    for name, value in one.state_dict().items():
        assert torch.equal(value, before[name]) is (name != "rows"), name
    assert "<toy>" not in tiny_tokenizer().get_vocab()

    one.export(tmp_path / "result")
    encoder, tokenizer = tiny_text_encoder(num_layers=1), copy.deepcopy(tiny_tokenizer())
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=encoder, tokenizer=tokenizer)
    pipe.load_textual_inversion(tmp_path / "result")
    embeds = pipe.encode_prompt("A photo of <toy>", False, max_sequence_length=8).prompt_embeds
    text, mask = one.texts(images(0).samples[:1], torch.tensor([False]))
    torch.testing.assert_close(embeds[:, : mask.shape[1]], text, rtol=1e-4, atol=1e-5)


def test_where_it_starts() -> None:
    table = tiny_text_encoder(num_layers=1).get_input_embeddings().weight
    ids = tiny_tokenizer()("red cat", add_special_tokens=False).input_ids
    assert torch.equal(objective(start_from="Red cat", vectors=3).rows, table[[*ids, ids[0]]])
    assert torch.equal(objective().rows, objective().rows)
    assert not torch.equal(objective().rows, objective(seed=1).rows)


def test_it_is_not_sharded() -> None:
    """The texts read the parameter, in place of which shards would be trained."""
    assert chosen(objective(), Processes(0, 2, parallel="auto")) == "ddp"
    with pytest.raises(ConfigurationError, match="TextualInversion cannot be sharded"):
        chosen(objective(), Processes(0, 2, parallel="fsdp"))


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(InputError, match="does not hold"):
        objective()(images(0, "a photo of a cat"), Randomness(0, 0))
    with pytest.raises(InputError, match="already has"):
        objective(token="▁a")
    with pytest.raises(InputError, match="vectors"):
        objective(vectors=0)
    with pytest.raises(InputError, match="no tokens"):
        objective(start_from=" ")
