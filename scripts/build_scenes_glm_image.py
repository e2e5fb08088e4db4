"""Make a small GLM-Image that draws and edits the small world, from nothing: every part, in the released layout.

    python scripts/build_scenes_glm_image.py --out runs/scenes_glm_image [--stage STAGE]

Every stage resumes where it was interrupted. Without --stage all run in order.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GlmImageConfig, GlmImageForConditionalGeneration

from impasto.models.autoencoder_kl import AutoencoderKL
from impasto.scenes.captions import caption
from impasto.scenes.edits import sample_edit
from impasto.scenes.labels import LABEL_CLASSES, label_cells
from impasto.scenes.renderer import SUPERSAMPLING, shade, trace
from impasto.scenes.world import Scene, is_held_out, recolour, sample_arrangement
from impasto.training.autoencoder import AutoencoderRecipe, train_autoencoder
from impasto.training.state import save_state
from impasto.training.visual_codebook import CodebookRecipe, CodeReader, Pictures, tokenise, train_visual_codebook

SEED = 2027
STAGES = ("render", "autoencoder", "latents", "codebook", "prior", "transformer", "export")
SIDE = 128  # pixels of a picture
CHUNKS, GEOMETRIES, COLOURINGS, WORDINGS = 250, 32, 4, 4  # each colouring is drawn twice: as it is, and edited
AUTOENCODER_CHUNKS = 48

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 48, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": SIDE,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}


# --- pictures ---


def render(out: Path, chunks: int) -> None:
    """Chunks of pictures and of what an edit makes of them, with captions and instructions. All cores work at it."""
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [chunk for chunk in range(chunks) if not (folder / f"{chunk:04d}.npz").exists()]
    in_parallel(functools.partial(render_chunk, folder), missing)


def in_parallel(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """One process a core, with one thread each."""
    with multiprocessing.get_context("spawn").Pool(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.map(work, items, chunksize=1)


def render_chunk(folder: Path, chunk: int) -> None:
    """Pictures [2 N, 3, H, W]: N as they are, and the same edited. No combination that is held out is among them."""
    rng = np.random.default_rng([SEED, chunk])
    count = GEOMETRIES * COLOURINGS
    pictures = torch.empty(2 * count, 3, SIDE, SIDE, dtype=torch.uint8)
    ids = torch.empty(2 * count, SIDE, SIDE, dtype=torch.uint8)
    sources: list[Scene] = []
    targets: list[Scene] = []
    instructions: list[str] = []
    for _ in range(GEOMETRIES):
        arrangement = sample_arrangement(rng, SIDE, SIDE)
        buffer = trace(arrangement, SIDE, SIDE, arrangement.seed)
        for _ in range(COLOURINGS):
            edit = sample_edit(recolour(arrangement, rng), rng)
            while is_held_out(edit.source) or is_held_out(edit.target):
                edit = sample_edit(recolour(arrangement, rng), rng)
            for row, scene in ((len(sources), edit.source), (count + len(sources), edit.target)):
                picture = shade(buffer, [solid.color for solid in scene.solids], scene.background)
                pictures[row] = picture.mul_(255).round_().to(torch.uint8)
                ids[row] = buffer.ids[::SUPERSAMPLING, ::SUPERSAMPLING]
            sources.append(edit.source)
            targets.append(edit.target)
            instructions.append(edit.text)
    scenes = [*sources, *targets]
    captions = [[caption(scene, rng) for _ in range(WORDINGS)] for scene in scenes]
    path = folder / f"{chunk:04d}.npz"
    temporary = path.with_suffix(".tmp.npz")
    np.savez(
        temporary,
        pictures=pictures.numpy(),
        captions=json.dumps(captions),
        instructions=json.dumps(instructions),
        labels=label_cells(ids, scenes).numpy(),
    )
    os.replace(temporary, path)


def load_pictures(out: Path, chunk: int) -> Tensor:
    """A chunk, uint8 [2 N, 3, H, W]."""
    return torch.from_numpy(np.load(out / "pictures" / f"{chunk:04d}.npz")["pictures"])


# --- the visual codebook and the prior ---

VISION = {
    "depth": 4,
    "hidden_size": 256,
    "num_heads": 8,
    "intermediate_size": 512,
    "image_size": SIDE,
    "patch_size": 32,
    "attention_bias": True,
}
CODES = 512
QUANTISER = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": VISION["hidden_size"]}
#: Behind the codes: what frames a picture, and sizes. Their order is that of their numbers.
SPECIALS = ("<start>", "<end>", "<image>", "<sop>", "<eop>", "<pad>", "<unk>")
LANGUAGE = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vision_vocab_size": CODES + 2,
    "max_position_embeddings": 1024,
    "eos_token_id": CODES + 1,
    "pad_token_id": CODES + SPECIALS.index("<pad>"),
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 3, 3],
    },
}


def build_prior(words: int) -> GlmImageForConditionalGeneration:
    config = GlmImageConfig(
        text_config={"vocab_size": words, **LANGUAGE},
        vision_config=VISION,
        vq_config=QUANTISER,
        image_token_id=CODES + SPECIALS.index("<image>"),
        image_start_token_id=CODES,
        image_end_token_id=CODES + 1,
    )
    return GlmImageForConditionalGeneration(config)


class Chunks:
    """All pictures in memory, and what belongs to them."""

    def __init__(self, out: Path, chunks: Sequence[int]):
        rendered = [np.load(out / "pictures" / f"{chunk:04d}.npz") for chunk in chunks]
        self.pictures = torch.from_numpy(np.concatenate([part["pictures"] for part in rendered]))  # [N, 3, H, W]
        self.labels = torch.from_numpy(np.concatenate([part["labels"] for part in rendered]))  # [N, 3, H / 8, W / 8]

    def batches(self, size: int, seed: int) -> Iterator[Pictures]:
        rng = np.random.default_rng([SEED, seed])
        while True:
            rows = torch.from_numpy(rng.integers(len(self.pictures), size=size))
            yield Pictures(self.pictures[rows].float() / 127.5 - 1, self.labels[rows])


def steps_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return int(json.loads(log.read_text().splitlines()[-1])["step"]) if log.exists() else 0


def train_codebook(out: Path, steps: int) -> None:
    """The vision tower and the codes; then the tokens of every picture."""
    torch.manual_seed(SEED)
    folder = out / "codebook"
    model = build_prior(words=1024).model
    reader = CodeReader(QUANTISER["embed_dim"], LABEL_CLASSES, SIDE // 32)
    known = sorted(int(path.stem) for path in (out / "pictures").glob("[0-9]???.npz"))
    chunks = Chunks(out, known[1:])
    recipe = CodebookRecipe(steps=steps, save_every=250)
    train_visual_codebook(model, reader, chunks.batches(128, steps_done(folder)), recipe, folder)
    parts = {"visual": model.visual, "vqmodel": model.vqmodel}
    save_state(folder / "model.pt", {name: part.state_dict() for name, part in parts.items()})
    for chunk in known:
        pixels = load_pictures(out, chunk).float() / 127.5 - 1
        tokens = tokenise(model, pixels).to(torch.int16)
        np.save(folder / f"{chunk:04d}.npy", tokens.numpy())


# --- the autoencoder ---


def train_vae(out: Path, start: Path, steps: int) -> None:
    """8 times smaller. Its inner stages begin as the bundled model's, which is of 64 pixels and 4 times smaller."""
    torch.manual_seed(SEED)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    folder = out / "autoencoder"
    own, known = model.state_dict(), AutoencoderKL.from_pretrained(start).float().state_dict()
    for name, value in known.items():
        stage = re.match(r"encoder\.down_blocks\.(\d+)\.", name)
        if stage:  # one more comes before it
            name = f"encoder.down_blocks.{int(stage[1]) + 1}.{name[stage.end() :]}"
        if name in own and own[name].shape == value.shape:
            own[name].copy_(value)
    chunks = [load_pictures(out, chunk) for chunk in range(AUTOENCODER_CHUNKS)]
    validation = chunks[0][::8].float() / 127.5 - 1
    batches = random_pictures(chunks[1:], 16, seed=SEED + steps_done(folder))
    train_autoencoder(model, batches, AutoencoderRecipe(steps=steps), folder, validation)
    model.save_pretrained(folder / "model")


def random_pictures(chunks: list[Tensor], batch: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        chunk = chunks[rng.integers(len(chunks))]
        yield chunk[torch.from_numpy(rng.integers(len(chunk), size=batch))].float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes_glm_image"))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--autoencoder-steps", type=int, default=900)
    parser.add_argument("--codebook-steps", type=int, default=2500)
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    if options.stage in (None, "render"):
        render(options.out, options.chunks)
    if options.stage in (None, "autoencoder"):
        train_vae(options.out, root / "src" / "impasto" / "scenes" / "checkpoint" / "vae", options.autoencoder_steps)
    if options.stage in (None, "codebook"):
        train_codebook(options.out, options.codebook_steps)


if __name__ == "__main__":
    main()
