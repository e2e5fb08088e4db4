"""Make a small GLM-Image that generates and edits images of the small world: every component, in the released layout.

    python scripts/build_scenes_glm_image.py --out runs/scenes_glm_image [--stage STAGE]

Every stage resumes where it was interrupted. Without --stage all run in order.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

import chunks
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.glm_image.prior import target_offsets
from impasto.pipelines.glm_image import GlmImagePipeline
from impasto.pipelines.glyphs import encode_glyphs
from impasto.scenes.captions import caption
from impasto.scenes.edits import sample_edit
from impasto.scenes.evaluate import evaluate, evaluate_edits, held_out_edits
from impasto.scenes.labels import LABEL_CLASSES, label_cells
from impasto.scenes.renderer import SUPERSAMPLING, shade, trace
from impasto.scenes.world import Scene, is_held_out, recolour, sample_arrangement
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from impasto.training.objectives.autoencoder import Autoencoder
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.flow_matching import Batch, FlowMatching, Reference, initialize
from impasto.training.objectives.prior import Prior, Sequences, eager_attention, join
from impasto.training.objectives.visual_codebook import CodeReader, Images, VisualCodebook, tokenize
from impasto.training.running.checkpoints import load_state, save_state
from impasto.training.running.loop import train
from impasto.training.settings.config import Settings

SEED = 2027
STAGES = ("render", "autoencoder", "latents", "codebook", "tokens", "prior", "transformer", "export", "judge")
SIDE = 128  # pixels
CHUNKS, GEOMETRIES, COLOURINGS, WORDINGS = 250, 32, 4, 4  # each colouring is rendered twice: as it is, and edited
AUTOENCODER_CHUNKS = 48
SAID_CHUNKS = 1250  # for the prior; the images of most are not kept

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


# --- images ---


def render(out: Path, count: int) -> None:
    """Chunks of images before and after an edit, with captions and instructions."""
    folder = out / "images"
    chunks.make_missing(folder, range(count), functools.partial(render_chunk, folder))


def render_images(chunk: int) -> dict[str, Any]:
    """Images [2 N, 3, H, W]: N originals, then their edits. None shows a held-out combination."""
    rng = np.random.default_rng([SEED, chunk])
    count = GEOMETRIES * COLOURINGS
    images = torch.empty(2 * count, 3, SIDE, SIDE, dtype=torch.uint8)
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
                image = shade(buffer, [solid.color for solid in scene.solids], scene.background)
                images[row] = image.mul_(255).round_().to(torch.uint8)
                ids[row] = buffer.ids[::SUPERSAMPLING, ::SUPERSAMPLING]
            sources.append(edit.source)
            targets.append(edit.target)
            instructions.append(edit.text)
    scenes = [*sources, *targets]
    captions = [[caption(scene, rng) for _ in range(WORDINGS)] for scene in scenes]
    return {
        "images": images.numpy(),
        "captions": json.dumps(captions),
        "instructions": json.dumps(instructions),
        "labels": label_cells(ids, scenes).numpy(),
    }


def render_chunk(folder: Path, chunk: int) -> None:
    chunks.save(chunks.path_of(folder, chunk), **render_images(chunk))


def load_images(out: Path, chunk: int) -> Tensor:
    """A chunk, uint8 [2 N, 3, H, W]."""
    return torch.from_numpy(np.load(chunks.path_of(out / "images", chunk))["images"])


# --- the visual codebook and the prior ---

VISION = {
    "depth": 4,
    "hidden_size": 256,
    "num_heads": 8,
    "intermediate_size": 512,
    "image_size": SIDE // 2,  # the processor halves images
    "patch_size": 16,
    "attention_bias": True,
}
CODES = 512
QUANTISER = {"embed_dim": 8, "num_embeddings": CODES, "latent_channels": VISION["hidden_size"]}
#: Tokens after the codes, in the order of their ids: frames of an image, and sizes.
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
        "rope_theta": 10.0,  # columns rotate by 0.24 per step; with 10,000 it is 0.003
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


def halved(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] -> [N, 3, H / 2, W / 2], as the processor does it."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True)


class Halves:
    """All images in memory as the vision tower sees them, with their labels."""

    def __init__(self, out: Path, numbers: Sequence[int]):
        rendered = [np.load(chunks.path_of(out / "images", chunk)) for chunk in numbers]
        halves = [halved(torch.from_numpy(part["images"])) for part in rendered]
        self.images = torch.cat(halves)  # [N, 3, H / 2, W / 2]
        self.labels = torch.from_numpy(np.concatenate([part["labels"] for part in rendered]))  # [N, 4, H / 8, W / 8]

    def batch(self, size: int, step: int) -> Images:
        rows = torch.from_numpy(np.random.default_rng([SEED, step]).integers(len(self.images), size=size))
        return Images(self.images[rows].float() / 127.5 - 1, self.labels[rows])


def train_codebook(out: Path, steps: int) -> None:
    """The vision tower and the codes."""
    torch.manual_seed(SEED)
    folder = out / "codebook"
    model = build_prior(words=1024).model
    reader = CodeReader(QUANTISER["embed_dim"], LABEL_CLASSES, SIDE // 32)
    if chunks.steps_done(folder) < steps:  # the codes will change
        trained = [str(out / name) for name in ("prior", "transformer") if (out / name).exists()]
        if trained:
            raise SystemExit(
                f"{' and '.join(trained)} learned the present codes: move them away, or give another --out"
            )
        shutil.rmtree(out / "tokens", ignore_errors=True)
    images = Halves(out, chunks.known(out / "images")[1:])
    batch = functools.partial(images.batch, 128)
    objective = VisualCodebook(model, reader, batch, steps)
    train(objective, ByStep(batch), muon_settings(steps), folder)
    objective.finish()
    parts = {"visual": model.visual, "vqmodel": model.vqmodel}
    save_state(folder / "model.pt", {name: part.state_dict() for name, part in parts.items()})


def load_codebook(out: Path, prior: GlmImageForConditionalGeneration) -> None:
    for name, state in load_state(out / "codebook" / "model.pt").items():
        getattr(prior.model, name).load_state_dict(state)


def say(out: Path, count: int) -> None:
    """Store the tokens of images with their captions and instructions, which the prior learns from.

    It needs many more images than are kept (docs/scenes/glm_image.md says why); the others are rendered, turned into
    tokens and discarded.
    """
    chunks.make_missing(out / "tokens", range(count), functools.partial(say_chunk, out))


@torch.no_grad()
def say_chunk(out: Path, chunk: int) -> None:
    kept = chunks.path_of(out / "images", chunk)
    rendered = np.load(kept) if kept.exists() else render_images(chunk)
    prior = build_prior(words=1024)
    load_codebook(out, prior)
    tokens = tokenize(prior.model, halved(torch.from_numpy(rendered["images"])).float() / 127.5 - 1)
    texts = {name: rendered[name] for name in ("captions", "instructions")}
    chunks.save(chunks.path_of(out / "tokens", chunk), tokens=tokens.to(torch.int16).numpy(), **texts)


def make_processor(out: Path) -> GlmImageProcessor:
    """The image processor, and a tokenizer whose byte-level vocabulary comes after the codes."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    specials = [*(f"<v{code}>" for code in range(CODES)), *SPECIALS]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CODES + 512, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts_of(out, 20), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<start>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    images = GlmImageImageProcessorPil(
        patch_size=16,
        temporal_patch_size=1,
        merge_size=1,
        min_pixels=64 * 64,
        max_pixels=4 * SIDE * SIDE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
        "<start><image><end>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    return GlmImageProcessor(images, tokenizer, chat_template=template)


def texts_of(out: Path, count: int) -> Iterator[str]:
    for chunk in chunks.known(out / "tokens")[:count]:
        stored = np.load(chunks.path_of(out / "tokens", chunk))
        yield from (text for texts in json.loads(str(stored["captions"])) for text in texts)
        yield from json.loads(str(stored["instructions"]))
        yield "<sop>4 4<eop><sop>16 16<eop>"


class Sayings:
    """Prompts of all images and edits in memory, and the tokens that answer them.

    As in the released model, an answer begins with a small image of 16 x 16 tokens. Here the image itself has only
    4 x 4, so the small one is empty: the same code everywhere. Most of the training sees only its last few tokens.
    """

    GRID = SIDE // 32
    SMALL = 16
    EMPTY = 0  # the code of the small image
    LAST = 4  # how many of its tokens a shortened answer has
    EMPTY_WEIGHT = 0.02

    def __init__(self, out: Path, tokenizer: PreTrainedTokenizerFast, numbers: Sequence[int]):
        self.tokenizer = tokenizer
        size = f"<sop>{self.GRID} {self.GRID}<eop>"
        self.captions: list[list[str]] = []  # of each image, in several wordings
        self.instructions: list[str] = []
        codes, pairs = [], []
        for chunk in numbers:
            stored = np.load(chunks.path_of(out / "tokens", chunk))
            first = sum(len(part) for part in codes)
            codes.append(torch.from_numpy(stored["tokens"]).long())
            count = len(codes[-1]) // 2
            pairs += [(first + i, first + count + i) for i in range(count)]
            for texts in json.loads(str(stored["captions"])):
                self.captions.append([f"{text}{size}<sop>{self.SMALL} {self.SMALL}<eop><start>" for text in texts])
            self.instructions += [f"{text}{size}<start>" for text in json.loads(str(stored["instructions"]))]
        self.codes = torch.cat(codes)  # [N, GRID * GRID]
        self.pairs = torch.tensor(pairs)  # [edits, 2]: indices of the source and the result

    def batch(self, size: int, edits: float, whole: float, step: int) -> Sequences:
        """``edits`` and ``whole``: the shares of batches of edits and of full-length answers."""
        rng = np.random.default_rng([SEED, step])
        grid, small = (self.GRID, self.GRID), (self.SMALL, self.SMALL)
        padding: int = self.tokenizer.pad_token_id
        kind = rng.random()
        if kind < edits:
            rows = rng.integers(len(self.pairs), size=size)
            tokens, positions = zip(*(self.asked(int(row)) for row in rows), strict=True)
            targets = self.codes[self.pairs[rows, 1]]
            return join(tokens, positions, targets, target_offsets([grid]), padding, "edited")
        full = kind < edits + whole
        empty, count = (self.SMALL**2, size // 4) if full else (self.LAST, size)
        rows = rng.integers(len(self.captions), size=count)
        wordings = rng.integers(WORDINGS, size=count)
        texts = [self.captions[row][wording] for row, wording in zip(rows, wordings, strict=True)]
        prompts = [torch.tensor(ids) for ids in self.tokenizer(texts).input_ids]
        places = [torch.arange(len(ids)).expand(3, -1) for ids in prompts]
        targets = torch.cat([torch.full((count, empty), self.EMPTY), self.codes[rows]], dim=1)
        offsets = target_offsets([small, grid])[:, -targets.shape[1] :]
        weights = torch.cat([torch.full((empty,), self.EMPTY_WEIGHT), torch.ones(self.GRID**2)])
        name = "generated_in_full" if full else "generated"
        return join(prompts, places, targets, offsets, padding, name)._replace(weights=weights)

    def asked(self, edit: int) -> tuple[Tensor, Tensor]:
        """An edit's prompt after the tokens of its image, and the positions of its tokens, [3, S]."""
        text = torch.tensor(self.tokenizer(self.instructions[edit]).input_ids)
        frame = torch.tensor([CODES, CODES + 1])  # <start>, <end>
        tokens = torch.cat([frame[:1], self.codes[self.pairs[edit, 0]], frame[1:], text])
        image = 1 + target_offsets([(self.GRID, self.GRID)])
        after = 1 + self.GRID + torch.arange(1 + len(text))
        return tokens, torch.cat([torch.zeros(3, 1, dtype=torch.long), image, after.expand(3, -1)], dim=1)


def train_language_model(out: Path, steps: int) -> None:
    """The prior: from captions and instructions to tokens."""
    torch.manual_seed(SEED)
    processor = make_processor(out)
    processor.save_pretrained(out / "processor")
    known = chunks.known(out / "tokens")
    sayings = Sayings(out, processor.tokenizer, known[2:])
    unseen = Sayings(out, processor.tokenizer, known[:2])
    model = build_prior(len(processor.tokenizer))
    folder = out / "prior"
    checks = [unseen.batch(256, edits, 0.0, 0) for edits in (0.0, 1.0)]
    objective = Prior(model)
    data = ByStep(functools.partial(sayings.batch, 64, 0.4, 0.15))
    with eager_attention(model):
        train(objective, data, muon_settings(steps), folder, lambda step: objective.check(checks))
    save_state(folder / "model.pt", model.state_dict())


# --- the autoencoder ---


def train_vae(out: Path, steps: int) -> None:
    """It reduces sides 8 times."""
    torch.manual_seed(SEED)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    folder = out / "autoencoder"
    images = [load_images(out, chunk) for chunk in range(AUTOENCODER_CHUNKS)]
    validation = images[0][::8].float() / 127.5 - 1
    objective = Autoencoder(model)
    data = ByStep(functools.partial(chunks.image_batch, images[1:], 16, SEED))
    train(
        objective, data, chunks.autoencoder_settings(steps), folder, lambda step: {"psnr": objective.psnr(validation)}
    )
    model.save_pretrained(folder / "model")


# --- the transformer ---

#: The glyphs of quoted text, of which this world has none.
TEXT_ENCODER = {
    "vocab_size": 384,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "text_embed_dim": TEXT_ENCODER["d_model"],
    "time_embed_dim": 128,
    "condition_dim": 16,
    "sample_size": SIDE // 8,
    "prior_vq_quantizer_codebook_size": CODES,
}
#: Without a shift, so that noise levels and timesteps agree.
SCHEDULER = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.0, "max_shift": 0.0}


def build_text_encoder() -> tuple[ByT5Tokenizer, T5EncoderModel]:
    torch.manual_seed(SEED)
    return ByT5Tokenizer(), T5EncoderModel(T5Config(**TEXT_ENCODER)).eval()


@torch.no_grad()
def encode(out: Path) -> None:
    """Put the latents' mean and deviation into the autoencoder's config; then encode every chunk."""
    if not (out / "vae" / "config.json").exists():
        model = AutoencoderKL.from_pretrained(out / "autoencoder" / "model").to(memory_format=torch.channels_last)
        latents = chunks.encode_images(model, torch.cat([load_images(out, chunk)[::8] for chunk in range(8)]))
        statistics = {
            "latents_mean": latents.mean((0, 2, 3)).tolist(),
            "latents_std": latents.std((0, 2, 3)).tolist(),
        }
        measured = AutoencoderKL(**AUTOENCODER, **statistics)
        measured.load_state_dict(model.state_dict())
        measured.save_pretrained(out / "vae")
    chunks.make_missing(out / "latents", chunks.known(out / "images"), functools.partial(encode_chunk, out))


@torch.no_grad()
def encode_chunk(out: Path, chunk: int) -> None:
    model = chunks.fast_autoencoder(out / "vae")
    latents = chunks.encode_images(model, load_images(out, chunk))
    mean, std = (torch.tensor(model.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    standardised = ((latents - mean) / std).half().contiguous()
    chunks.save(chunks.path_of(out / "latents", chunk), latents=standardised.numpy())


class Latents:
    """The latents and tokens of all images in memory."""

    def __init__(self, out: Path, numbers: Sequence[int]):
        latents, codes = (
            [torch.from_numpy(np.load(chunks.path_of(out / name, chunk))[name]) for chunk in numbers]
            for name in ("latents", "tokens")
        )
        halves = [len(part) // 2 for part in latents]
        firsts = np.cumsum([0, *(len(part) for part in latents[:-1])])
        self.sources = torch.cat([first + torch.arange(half) for first, half in zip(firsts, halves, strict=True)])
        self.half = halves[0]
        self.latents = torch.cat(latents)  # [N, C, h, w]
        grid = torch.cat(codes).long().view(-1, SIDE // 32, SIDE // 32)
        # A token of the prior is four of the transformer's.
        self.tokens = grid.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)

    def batch(self, size: int, edits: float, text: Tensor, step: int) -> Batch:
        """``text``: the glyphs [1, M, channels] of no text. A batch of edits is half as large and costs the same."""
        rng = np.random.default_rng([SEED, step])
        if rng.random() >= edits:
            rows = torch.from_numpy(rng.integers(len(self.latents), size=size))
            return Batch(self.latents[rows].float(), self.tokens[rows], text.expand(size, -1, -1))
        before = self.sources[rng.integers(len(self.sources), size=size // 2)]
        after = before + self.half
        if rng.random() < 0.5:  # the reverse is an edit as well
            before, after = after, before
        reference = Reference(self.latents[before].float(), self.tokens[before])
        return Batch(self.latents[after].float(), self.tokens[after], text.expand(size // 2, -1, -1), reference)


def train_transformer(out: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    latents = Latents(out, chunks.known(out / "latents"))
    tokenizer, text_encoder = build_text_encoder()
    text = encode_glyphs(tokenizer, text_encoder, [""], 2048, "cpu")[0]
    model = GlmImageTransformer2DModel(**TRANSFORMER)
    initialize(model)
    folder = out / "transformer"
    data = ByStep(functools.partial(latents.batch, 64, 0.3, text))
    train(FlowMatching(model, spread=2.2), data, muon_settings(steps), folder)
    model.save_pretrained(folder / "model")


# --- recipes and progress ---


def muon_settings(steps: int) -> Settings:
    """Of the codebook, the prior and the transformer."""
    return Settings(
        steps=steps,
        optimizer={"name": "muon", "rate": 2e-3, "betas": (0.9, 0.99)},
        schedule={"kind": "trapezoid", "warmup": 200, "floor": 0.02},
        ema=0.999,
        compile=True,
        checkpoints={"every": 250},
    )


#: The training stages; each has a folder of this name in a run, with a log.
TRAINED = ("autoencoder", "codebook", "prior", "transformer")


def record(out: Path, records: Path) -> None:
    """Copy the logs, and record the configuration of the run."""
    records.mkdir(parents=True, exist_ok=True)
    done = {}
    for name in TRAINED:
        shutil.copyfile(out / name / "log.jsonl", records / f"{name}.jsonl")
        done[name] = chunks.steps_done(out / name)
    made = {"autoencoder": chunks.autoencoder_settings}
    settings = {name: made.get(name, muon_settings)(steps).model_dump() for name, steps in done.items()}
    configuration = {
        "seed": SEED,
        "chunks": len(chunks.known(out / "images")),
        "said_chunks": len(chunks.known(out / "tokens")),
        "geometries": GEOMETRIES,
        "colourings": COLOURINGS,
        "wordings": WORDINGS,
        "settings": settings,
        "autoencoder": AUTOENCODER,
        "vision": VISION,
        "quantiser": QUANTISER,
        "language": LANGUAGE,
        "text_encoder": TEXT_ENCODER,
        "transformer": TRANSFORMER,
        "scheduler": SCHEDULER,
    }
    (records / "configuration.json").write_text(json.dumps(configuration, indent=2) + "\n")


# --- the whole ---


def export(out: Path, target: Path) -> None:
    """Write the averaged models in float16, in the ordinary folder format."""
    tokenizer, text_encoder = build_text_encoder()
    processor = GlmImageProcessor.from_pretrained(out / "processor")
    prior = build_prior(len(processor.tokenizer))
    prior.load_state_dict(load_state(out / "prior" / "model.pt"))
    load_codebook(out, prior)
    prior.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=0.9)
    GlmImagePipeline(
        tokenizer=tokenizer,
        processor=processor,
        text_encoder=text_encoder.half(),
        vision_language_encoder=prior.eval().half(),
        vae=AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float16),
        transformer=GlmImageTransformer2DModel.from_pretrained(out / "transformer" / "model", dtype=torch.float16),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    ).save_pretrained(target)


def judge(target: Path, records: Path, count: int) -> None:
    """What the bundled judge finds right in images and in edits; numbers, and sheets of images."""
    pipe = GlmImagePipeline.from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    records.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 20, "guidance_scale": 2.0}
    generated: list[Image.Image] = []
    sources: list[Image.Image] = []
    edited: list[Image.Image] = []

    def call(made: list[Image.Image], texts: list[str], **more: Any) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(len(made) + i) for i in range(len(texts))]
        images = pipe(texts, generator=generators, **options, **more).images
        made += images
        return images

    def edit(texts: list[str], images: list[Tensor]) -> list[Image.Image]:
        given = [Image.fromarray(x.mul(255).round().byte().permute(1, 2, 0).numpy()) for x in images]
        sources.extend(given)
        return call(edited, texts, image=[[image] for image in given])

    of_prompts = evaluate(functools.partial(call, generated), count)
    of_edits, edits = evaluate_edits(edit, count), held_out_edits(count)
    objects = [
        colour and shape
        for verdict in of_prompts.verdicts
        for colour, shape in zip(verdict.score.colours, verdict.score.shapes, strict=True)
    ]
    named = [verdict.score.colours[asked.solid] for verdict, asked in zip(of_edits.verdicts, edits, strict=True)]
    kept = [  # all that is there in the colours and shapes that it should have
        verdict.score.count and all((*verdict.score.colours, *verdict.score.shapes)) for verdict in of_edits.verdicts
    ]
    summary = {
        "solids of the right colour and shape": [sum(objects), len(objects)],
        "edits whose colour is the new one": [sum(named), count],
        "edits after which every solid has its colour and shape, and there is no other": [sum(kept), count],
    }
    print(of_prompts.table(), of_edits.table(), json.dumps(summary, indent=1), sep="\n\n")
    judged = {"summary": summary, "text_to_image": of_prompts.to_dict(), "image_to_image": of_edits.to_dict()}
    (records / "judged.json").write_text(json.dumps(judged, indent=1) + "\n")
    pairs = [image for pair in zip(sources, edited, strict=True) for image in pair]
    for name, images in (("generated", generated[:32]), ("edited", pairs[:32])):
        sheet = Image.new("RGB", (8 * SIDE, 4 * SIDE))
        for i, image in enumerate(images):
            sheet.paste(image, (i % 8 * SIDE, i // 8 * SIDE))
        sheet.save(records / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes_glm_image"))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--said-chunks", type=int, default=SAID_CHUNKS)
    parser.add_argument("--autoencoder-steps", type=int, default=900)
    parser.add_argument("--codebook-steps", type=int, default=1700)
    parser.add_argument("--prior-steps", type=int, default=9000)
    parser.add_argument("--transformer-steps", type=int, default=9000)
    parser.add_argument("--judged", type=int, default=200, help="images, and as many edits")
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--target", type=Path, help="where the finished checkpoint goes; OUT/checkpoint if not given")
    records = root / "docs" / "scenes" / "glm_image"
    parser.add_argument("--records", type=Path, default=records, help="where logs and images of the run go")
    options = parser.parse_args()
    target = options.target or options.out / "checkpoint"
    if options.stage in (None, "render"):
        render(options.out, options.chunks)
    if options.stage in (None, "autoencoder"):
        train_vae(options.out, options.autoencoder_steps)
    if options.stage in (None, "latents"):
        encode(options.out)
    if options.stage in (None, "codebook"):
        train_codebook(options.out, options.codebook_steps)
    if options.stage in (None, "tokens"):
        say(options.out, max(options.chunks, options.said_chunks))
    if options.stage in (None, "prior"):
        train_language_model(options.out, options.prior_steps)
    if options.stage in (None, "transformer"):
        train_transformer(options.out, options.transformer_steps)
    if options.stage in (None, "export"):
        export(options.out, target)
        record(options.out, options.records)
    if options.stage in (None, "judge"):
        judge(target, options.records, options.judged)


if __name__ == "__main__":
    main()
