"""Learned tokens: what they do to prompts, files of them, and that unloading leaves nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.errors import CheckpointError, InputError
from impasto.pipelines.learned_tokens import concepts_of, save_concepts
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.pipelines.prompts import prepare

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer

ROWS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def make(spare: int = 0) -> PixArtSigmaPipeline:
    encoder = tiny_text_encoder()
    if spare:  # T5's table has more rows than its tokenizer has tokens
        encoder.resize_token_embeddings(len(tiny_tokenizer()) + spare, mean_resizing=False)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    return tiny_pipeline(PixArtSigmaPipeline, tokenizer=tokenizer, text_encoder=encoder)


def embed(pipe: PixArtSigmaPipeline, prompt: str, clean: bool = True) -> Tensor:
    return pipe.encode_prompt(prompt, False, clean_caption=clean, max_sequence_length=16).prompt_embeds


def image(pipe: PixArtSigmaPipeline, prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="pt").images  # type: ignore[return-value]


@pytest.mark.parametrize("spare", [0, 2, 5])
def test_a_name_stands_for_its_embeddings_and_unloading_restores_everything(spare: int) -> None:
    pipe = make(spare)
    before, table = embed(pipe, "a <cat> on the wall"), pipe.text_encoder.get_input_embeddings().weight.clone()
    vocabulary = pipe.tokenizer.get_vocab()
    pipe.load_textual_inversion({"<cat>": ROWS, "<Dog>": ROWS[0]})
    assert concepts_of(pipe.tokenizer) == {"<cat>": ["<cat>", "<cat>_1", "<cat>_2"], "<Dog>": ["<Dog>"]}
    after = embed(pipe, "A <cat> on the WALL")
    ids = pipe.tokenizer("a <cat> <cat>_1 <cat>_2 on the wall").input_ids
    rows = pipe.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows[1:4], ROWS)
    expected = pipe.text_encoder(inputs_embeds=rows[None])[0][0]
    assert torch.allclose(after[0, : len(ids)], expected, atol=1e-5)
    assert not torch.equal(embed(pipe, "a <Dog>"), embed(pipe, "a"))

    pipe.unload_textual_inversion("<cat>")
    assert concepts_of(pipe.tokenizer) == {"<Dog>": ["<Dog>"]}
    kept = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<Dog>")]
    assert torch.equal(kept, ROWS[0])
    pipe.unload_textual_inversion()
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)
    assert pipe.text_encoder.config.vocab_size == len(table)
    assert pipe.tokenizer.get_vocab() == vocabulary
    assert torch.equal(embed(pipe, "a <cat> on the wall"), before)
    assert not vars(pipe.text_encoder).get("learned_rows")


def test_names_survive_cleaning_and_the_rest_is_cleaned() -> None:
    concepts = {"<Cat>": ["<Cat>", "<Cat>_1"]}
    assert prepare("A <b>big</b> <Cat>, @me HAPPY", True, concepts) == "a big <Cat> <Cat>_1 happy"
    assert prepare("A <Cat> Here", False, concepts) == "a <Cat> <Cat>_1 here"
    assert prepare("<Cat>_1", False, concepts) == "<Cat>_1"
    assert prepare("A <Cat> Here", False) == "a <cat> here"


def test_the_forms_of_files(tmp_path: Path) -> None:
    save_concepts(tmp_path / "learned_embeds.safetensors", {"<cat>": ROWS})
    assert torch.equal(load_file(tmp_path / "learned_embeds.safetensors")["<cat>"], ROWS)
    save_file({"emb_params": ROWS}, tmp_path / "a1111.safetensors")
    torch.save({"string_to_param": {"*": ROWS}, "name": "dog", "step": 1}, tmp_path / "a1111.pt")
    torch.save({"<cow>": ROWS[0]}, tmp_path / "learned_embeds.bin")
    pipe = make()
    sources: list[Any] = [tmp_path, tmp_path / "a1111.safetensors", str(tmp_path / "a1111.pt"), ROWS[1]]
    pipe.load_textual_inversion(sources, token=[None, "<a>", None, "<b>"])
    pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.bin")
    expected = {"<cat>": 3, "<a>": 3, "dog": 3, "<b>": 1, "<cow>": 1}
    assert {name: len(tokens) for name, tokens in concepts_of(pipe.tokenizer).items()} == expected
    assert pipe.maybe_convert_prompt(["a <a> <b>", "x"], pipe.tokenizer) == ["a <a> <a>_1 <a>_2 <b>", "x"]
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion(ROWS, token=["<x>", "<y>", "<z>"])
    assert list(concepts_of(pipe.tokenizer)) == ["<x>", "<y>", "<z>"]


def test_a_saved_pipeline_has_its_concepts(tmp_path: Path) -> None:
    pipe = make()
    pipe.load_textual_inversion({"<cat>": ROWS})
    pipe.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(image(again, "a <cat>"), image(pipe, "a <cat>"), atol=1e-5)
    assert float((image(again, "a <cat>") - image(again, "a dog")).abs().max()) > 1e-3
    again.unload_textual_inversion()
    assert concepts_of(again.tokenizer) == {}


def test_the_prompt_cache_knows_the_embeddings(tmp_path: Path) -> None:
    pipe = make()
    pipe.enable_prompt_cache(tmp_path)
    seen = []
    for rows in (ROWS[:1], ROWS[1:2]):
        pipe.load_textual_inversion({"<cat>": rows})
        seen.append(embed(pipe, "a <cat>"))
        assert torch.equal(embed(pipe, "a <cat>"), seen[-1])
        pipe.unload_textual_inversion()
    assert not torch.equal(*seen)


def test_what_cannot_be_loaded_changes_nothing(tmp_path: Path) -> None:
    pipe = make()
    vocabulary = pipe.tokenizer.get_vocab()
    (tmp_path / "learned_embeds.safetensors").write_bytes(b"nothing")
    torch.save({"<cat>": print}, tmp_path / "code.bin")
    nan = torch.full((1, 32), torch.nan)
    for source, options, error, message in (
        (ROWS, {}, InputError, "token="),
        ({"<cat>": ROWS[:, :8]}, {}, InputError, "8 channels"),
        ({"<cat>": nan}, {}, CheckpointError, "finite"),
        ({"<cat>": ROWS[None]}, {}, CheckpointError, "shape"),
        ({"<cat>": ROWS, "▁a": ROWS}, {}, InputError, "already has"),
        ({"<cat>": ROWS, "<cat>_1": ROWS}, {}, InputError, "already has"),
        ({"<cat>": ROWS}, {"token": " "}, InputError, "name"),
        ({"<cat>": ROWS}, {"wieght_name": "x"}, InputError, "wieght_name"),
        ([ROWS, ROWS], {"token": "<cat>"}, InputError, "list of as many"),
        (tmp_path, {}, CheckpointError, "damaged"),
        (tmp_path / "code.bin", {}, CheckpointError, "not loaded"),
        (tmp_path, {"weight_name": "../x"}, InputError, "weight_name"),
        (tmp_path, {"weight_name": "other.bin"}, CheckpointError, "weight_name"),
        (tmp_path / "missing", {}, CheckpointError, "does not exist"),
    ):
        with pytest.raises(error, match=message):
            pipe.load_textual_inversion(source, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no learned token"):
        pipe.unload_textual_inversion("<cat>")
    assert pipe.tokenizer.get_vocab() == vocabulary
