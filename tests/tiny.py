"""Small real parts for tests: a T5 tokenizer that was trained on a few words, a T5 encoder with random weights."""

from __future__ import annotations

import io
import json
import random
import tempfile
from functools import lru_cache
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

WORDS = """
    a an the and with of on in at to from into is are one two three red green blue yellow purple orange white black
    grey small large cube sphere cylinder cone picture photo painting drawing top left right front behind under above
    wall floor sky forest desert river light shadow cute cat dog cactus happy face , . hello world
"""


@lru_cache
def _sentencepiece_model() -> bytes:
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS.split(), k=10)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=128,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, model_max_length: int = 512) -> Path:
    """Write the files of a T5 tokenizer as the published checkpoints have them, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_sentencepiece_model())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": model_max_length,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@lru_cache
def tiny_tokenizer(model_max_length: int = 512) -> T5Tokenizer:
    """A T5 tokenizer of about a hundred pieces. Shared by all tests: do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        return T5Tokenizer.from_pretrained(write_tokenizer(Path(folder), model_max_length))


def tiny_text_encoder(d_model: int = 32, num_layers: int = 2, seed: int = 0) -> T5EncoderModel:
    """A T5 v1.1 encoder (gated gelu) with random weights, in evaluation mode; a new one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tiny_tokenizer()),
                d_model=d_model,
                d_kv=8,
                d_ff=2 * d_model,
                num_layers=num_layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        )
        for parameter in encoder.parameters():  # T5's own start leaves some weights too small to see a difference
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()
