"""Train a tokenizer on the captions of a data set: a sentencepiece unigram model in the layout of T5's.

    python examples/emoji/tokenizer.py runs/emoji/data/metadata.jsonl runs/emoji/tokenizer

The ids are those of T5: padding 0, the end of the text 1, unknown characters 2. Captions are in lower case, as a
pipeline of PixArt makes them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import sentencepiece

from impasto.errors import ImpastoError, InputError, OutputError
from impasto.files import make_folder, write_file
from impasto.training.data.listing import list_folder

LONGEST = 300  # tokens that a pipeline of PixArt-Σ reads


def train(captions: list[str], vocabulary: int) -> bytes:
    """The model file of a unigram tokenizer with at most ``vocabulary`` pieces."""
    stream = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=stream,
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()-",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocabulary} pieces can be trained: {error}") from error
    return stream.getvalue()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, help="a .jsonl file of captions, as impasto train reads it")
    parser.add_argument("out", type=Path, help="the folder of the tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4000, help="the number of pieces, at most")
    options = parser.parse_args(argv)
    if (options.out / "spiece.model").exists():
        raise OutputError(f"{options.out} has a tokenizer; another one would change the ids of trained models")
    entries = list_folder(options.metadata.parent, options.metadata)
    captions = [caption.lower() for entry in entries for caption in entry.captions.all]
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": LONGEST,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    model = train(captions, options.vocabulary)
    make_folder(options.out)
    write_file(options.out / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_file(options.out / "spiece.model", model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    print(f"{options.out} has a tokenizer of {pieces} pieces, trained on {len(captions)} captions")


if __name__ == "__main__":
    try:
        main()
    except ImpastoError as error:
        sys.exit(f"error: {error}")
