"""The warm start of a text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from impasto.training.data.sample import Batch, Sample
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.text_encoder import SlotReader, WarmStart
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ...tiny import tiny_text_encoder
from ..runs import rows, settings

FIRST, SECOND = (10, 11, 12), (20, 21)  # the ids that answer for the first and for the second slot


def captions(step: int, batch: int = 32) -> Batch:
    """Two tokens with answers, fillers between, some shorter, and a second question that is always answered 0."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(30, 40, (batch, 6), generator=generator)
    labels = torch.zeros(batch, 2, 2, dtype=torch.long)
    labels[:, 0, 0] = torch.randint(len(FIRST), (batch,), generator=generator)
    labels[:, 1, 0] = torch.randint(len(SECOND), (batch,), generator=generator)
    ids[:, 1] = torch.tensor(FIRST)[labels[:, 0, 0]]
    ids[:, 3] = torch.tensor(SECOND)[labels[:, 1, 0]]
    texts = [" ".join(map(str, row[: 5 if i < batch // 2 else 6])) for i, row in enumerate(ids.tolist())]
    samples = [Sample(caption=text, extra={"answers": answers}) for text, answers in zip(texts, labels)]
    return Batch(samples, 0, batch, step)


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids that are written out, padded with 0."""
    rows = [[int(word) for word in text.split()] for text in texts]
    most = max(map(len, rows))
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    return ids, (ids > 0).long()


def test_learns_which_token_answers_for_which_slot(tmp_path: Path) -> None:
    encoder = tiny_text_encoder(num_layers=1)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    plan = settings(
        80,
        optimizer={"name": "adamw", "rate": 1e-2},
        schedule={"warmup": 10, "decay_share": 0.5},
        ema=0.0,
        log_every=8,
    )
    train(WarmStart(encoder, SlotReader(32, 2, (3, 2)), tokenize), ByStep(captions), plan, tmp_path)
    assert rows(tmp_path)[-1]["right"] > 0.95  # of four answers guessed: at most (1/3 + 1/2 + 2) / 4 = 0.71
    assert not encoder.training
    assert any(not torch.equal(p, before[name]) for name, p in encoder.named_parameters())


def test_validation_is_the_loss_and_the_share_of_right_answers(tmp_path: Path) -> None:
    encoder, reader, batch = tiny_text_encoder(num_layers=1), SlotReader(32, 2, (3, 2)), captions(0, 4)
    objective = WarmStart(encoder, reader, tokenize)
    each = objective(batch, Randomness(0, 0)).each
    assert each.shape == (4,)
    measured = objective.validation(batch, Randomness(0, 0))
    torch.testing.assert_close(measured["validation"], each.mean())
    assert 0 <= measured["validation_right"] <= 1
    objective.export(tmp_path)
    assert (tmp_path / "text_encoder" / "config.json").exists()


def test_captions_are_encoded_as_pipelines_encode_prompts() -> None:
    seen: list[str] = []

    def noted(texts: list[str]) -> tuple[Tensor, Tensor]:
        seen.extend(texts)
        return tokenize(["10 20"] * len(texts))

    samples = [Sample(caption=" A Red Cube", extra={"answers": torch.zeros(2, 2, dtype=torch.long)})]
    WarmStart(tiny_text_encoder(num_layers=1), SlotReader(32, 2, (3, 2)), noted)(
        Batch(samples, 0, 1, 0), Randomness(0, 0)
    )
    assert seen == ["a red cube"]


def test_one_answer_a_slot_and_question() -> None:
    answers = SlotReader(16, 3, (5, 2))(torch.randn(4, 7, 16), torch.ones(4, 7, dtype=torch.long))
    assert [tuple(a.shape) for a in answers] == [(4, 3, 5), (4, 3, 2)]


def test_the_reader_does_not_see_padding() -> None:
    reader = SlotReader(16, 2, (4,))
    hidden, mask = torch.randn(2, 6, 16), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    (clean,) = reader(hidden, mask)
    (noisy,) = reader(torch.where(mask[..., None] == 0, 1e3, hidden), mask)
    torch.testing.assert_close(clean, noisy)
    (other,) = reader(torch.where(mask[..., None] == 1, hidden + 1, hidden), mask)
    assert not torch.allclose(clean, other)


def test_slots_read_different_tokens_and_samples_stay_apart() -> None:
    reader = SlotReader(16, 2, (4,))
    hidden, mask = torch.randn(3, 6, 16), torch.ones(3, 6, dtype=torch.long)
    (together,) = reader(hidden, mask)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], reader(hidden[i : i + 1], mask[i : i + 1])[0])
    assert not torch.allclose(together[:, 0], together[:, 1])
