"""Make the bundled model from scratch: render, autoencoder, latents, tokenizer, text encoder and transformer, export.

    python scripts/build_scenes_model.py --out runs/scenes [--stage STAGE]

Every stage resumes where it was interrupted. Without --stage all but the last run in order: render, autoencoder,
latents, tokenizer, transformer, export, restore (which makes a run's folder from an exported checkpoint).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import chunks
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.scenes.captions import caption
from impasto.scenes.dataset import scene_batch
from impasto.scenes.evaluate import held_out_prompts, judge_images
from impasto.scenes.labels import CAPTION_CLASSES, LABEL_CLASSES, label_caption, label_cells
from impasto.scenes.world import is_held_out, sample_scene
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.training.data.sample import Batch, Sample
from impasto.training.objectives.autoencoder import Autoencoder, standardize
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.diffusion_loss import DiffusionLoss
from impasto.training.objectives.labels import LabelHead
from impasto.training.objectives.text_encoder import LabelledText, SlotReader, WarmStart
from impasto.training.objectives.text_to_image import Latents, TextToImage, initialize
from impasto.training.objectives.texts import Texts
from impasto.training.running import checkpoints
from impasto.training.running.loop import train
from impasto.training.running.run import Run
from impasto.training.settings.config import Settings

SEED = 2026
STAGES = ("render", "autoencoder", "latents", "tokenizer", "transformer", "export", "restore")
CHUNKS = 400  # of 256 images
GEOMETRIES, COLOURINGS, WORDINGS = 32, 8, 4
AUTOENCODER_CHUNKS, VALIDATION_CHUNK = 128, 8  # the validation images are square
FRAMES = [(128, 128)] * 4 + [(96, 160), (160, 96), (112, 144), (144, 112)]

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 0.13025,
    "mid_block_add_attention": False,
}


TEXT_ENCODER = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 4,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}
TRANSFORMER = {
    "num_attention_heads": 7,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 8,
    "cross_attention_dim": 224,
    "sample_size": 16,
    "patch_size": 2,
    "interpolation_scale": 1,
    "use_additional_conditions": False,
    "caption_channels": 128,
}
#: The noise of the published PixArt checkpoints.
SCHEDULER = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}
#: The records of a run -> the paths at which the run writes them.
RECORDS = {
    "autoencoder.jsonl": "autoencoder/log.jsonl",
    "warm_start.jsonl": "warm_start/log.jsonl",
    "transformer.jsonl": "transformer/log.jsonl",
}
MAX_TOKENS, TRAINED_TOKENS = 300, 32  # no caption of this world is longer than 32
PLATEAU = {"kind": "trapezoid", "floor": 0.02}
WARM_START = Settings(
    steps=400,
    optimizer={"rate": 2e-3, "betas": (0.9, 0.99)},
    schedule={**PLATEAU, "warmup": 50, "decay_share": 0.5},
    checkpoints={"every": 200},
    log_every=40,
)
BATCH, LABEL_BLOCK, LABEL_WEIGHT = 64, 4, 0.3


def transformer_settings(steps: int) -> Settings:
    return Settings(
        steps=steps,
        optimizer={"name": "muon", "rate": 2e-3, "betas": (0.9, 0.99)},
        schedule={**PLATEAU, "warmup": 200},
        ema=0.999,
        compile=True,
    )


def render(out: Path, count: int) -> None:
    """Chunks of images with several wordings of each caption; one frame size a chunk."""
    folder = out / "images"
    chunks.make_missing(folder, range(count), functools.partial(render_chunk, folder))


def render_chunk(folder: Path, chunk: int) -> None:
    height, width = FRAMES[chunk % len(FRAMES)]
    images, scenes, _, ids = scene_batch(SEED + chunk, GEOMETRIES, COLOURINGS, height, width)
    rng = np.random.default_rng([SEED, chunk])
    captions = [[caption(scene, rng) for _ in range(WORDINGS)] for scene in scenes]
    labels = label_cells(ids, scenes).numpy()
    path = chunks.path_of(folder, chunk)
    chunks.save(path, images=images.numpy(), captions=json.dumps(captions), labels=labels)


def load_images(out: Path, chunk: int) -> Tensor:
    """A chunk at half its rendered size, uint8 [N, 3, H, W]."""
    images = torch.from_numpy(np.load(chunks.path_of(out / "images", chunk))["images"])
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


def train_vae(out: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    folder = out / "autoencoder"
    validation = load_images(out, VALIDATION_CHUNK)[::COLOURINGS].float() / 127.5 - 1
    images = [load_images(out, chunk) for chunk in range(AUTOENCODER_CHUNKS) if chunk != VALIDATION_CHUNK]
    objective = Autoencoder(model)
    data = ByStep(functools.partial(chunks.image_batch, images, 16, SEED))
    train(
        objective, data, chunks.autoencoder_settings(steps), folder, lambda step: {"psnr": objective.psnr(validation)}
    )
    model.save_pretrained(folder / "model")


@torch.no_grad()
def encode(out: Path) -> None:
    """Standardize the latents' channels inside the autoencoder, and store the latents of every chunk."""
    model = AutoencoderKL.from_pretrained(out / "autoencoder" / "model").to(memory_format=torch.channels_last)
    if not (out / "vae" / "config.json").exists():
        latents = chunks.encode_images(model, torch.cat([load_images(out, chunk)[::2] for chunk in range(4)]))
        standardize(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        model.save_pretrained(out / "vae")
    chunks.make_missing(out / "latents", chunks.known(out / "images"), functools.partial(encode_chunk, out))


@torch.no_grad()
def encode_chunk(out: Path, chunk: int) -> None:
    latents = chunks.encode_images(chunks.fast_autoencoder(out / "vae"), load_images(out, chunk))
    scaled = (latents * AUTOENCODER["scaling_factor"]).half().contiguous()
    chunks.save(chunks.path_of(out / "latents", chunk), latents=scaled.numpy())


def train_tokenizer(out: Path) -> None:
    """A sentencepiece unigram model on the training captions, in T5's layout: pad 0, </s> 1, unk 2.

    With so few words the trainer has nothing to compress and spells most of them, so each is added as a piece.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    folder = out / "tokenizer"
    if (folder / "spiece.model").exists():  # another one would change the ids
        return
    folder.mkdir(parents=True, exist_ok=True)
    captions = [text for chunk in chunks.known(out / "images")[:40] for text in captions_of(out, chunk)]
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=stream,
        vocab_size=160,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'()-",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    model = ModelProto.FromString(stream.getvalue())
    known = {piece.piece for piece in model.pieces}
    for word in sorted({word.strip(",") for text in captions for word in text.split()}):
        if f"▁{word}" not in known:
            model.pieces.add(piece=f"▁{word}", score=-2.0)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": MAX_TOKENS,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def captions_of(out: Path, chunk: int) -> list[str]:
    """All wordings in a chunk, image by image."""
    stored = np.load(chunks.path_of(out / "images", chunk))
    return [text for texts in json.loads(str(stored["captions"])) for text in texts]


class Samples:
    """All images in memory, by frame size: latents, labels and captions."""

    def __init__(self, out: Path):
        frames: dict[torch.Size, tuple[list[Tensor], list[Tensor], list[str]]] = {}
        for chunk in chunks.known(out / "latents"):
            part = torch.from_numpy(np.load(chunks.path_of(out / "latents", chunk))["latents"])
            latents, labels, captions = frames.setdefault(part.shape[-2:], ([], [], []))
            latents.append(part)
            labels.append(torch.from_numpy(np.load(chunks.path_of(out / "images", chunk))["labels"]))
            captions.extend(captions_of(out, chunk))
        self.frames = [(torch.cat(latents), torch.cat(labels), texts) for latents, labels, texts in frames.values()]

    def batch(self, size: int, step: int) -> Batch:
        rng = np.random.default_rng([SEED, step])
        share = np.array([len(latents) for latents, _, _ in self.frames], dtype=float)
        latents, labels, captions = self.frames[rng.choice(len(self.frames), p=share / share.sum())]
        rows = rng.integers(len(latents), size=size)
        wordings = rows * WORDINGS + rng.integers(WORDINGS, size=size)
        still = torch.zeros(latents.shape[1:])  # latents are stored without the posterior's deviation
        samples = [
            Sample(posterior=(latents[row].float(), still), caption=captions[wording], labels=labels[row])
            for row, wording in zip(rows, wordings)
        ]
        return Batch(samples, 0, size, step)


def tokenize(tokenizer: T5Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    encoded = tokenizer(texts, padding="max_length", max_length=TRAINED_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def labelled_text(tokenizer: T5Tokenizer, size: int, step: int) -> LabelledText:
    """Captions of scenes that are never rendered, with labels of each solid."""
    rng = np.random.default_rng([SEED, 1, step])
    texts: list[str] = []
    labels: list[Tensor] = []
    while len(texts) < size:
        scene = sample_scene(rng, 128, 128)
        if is_held_out(scene):
            continue
        texts.append(caption(scene, rng))
        labels.append(label_caption(scene, texts[-1]))
    return LabelledText(*tokenize(tokenizer, texts), torch.stack(labels))


def make_objective(pipeline: PixArtSigmaPipeline, settings: Settings) -> TextToImage:
    """Stored latents have their scale already."""
    return TextToImage(
        pipeline.transformer,
        Texts(pipeline.tokenizer, pipeline.text_encoder, TRAINED_TOKENS, static=True),
        Latents({}),
        DiffusionLoss(pipeline.scheduler.betas, SCHEDULER["prediction_type"]),
        timesteps="stratified",
        bound_weight=0.02,
        label_head=LabelHead(pipeline.transformer, LABEL_BLOCK, LABEL_CLASSES),
        label_weight=lambda step: LABEL_WEIGHT * settings.share(step),
    )


def train_transformer(out: Path, settings: Settings) -> None:
    """Warm-start the text encoder, then train it and the transformer together."""
    torch.manual_seed(SEED)
    folder = out / "transformer"
    tokenizer = T5Tokenizer.from_pretrained(out / "tokenizer")
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT_ENCODER))
    transformer = PixArtTransformer2DModel(**TRANSFORMER)
    initialize(transformer)
    if checkpoints.latest(folder) is None:
        reader = SlotReader(TEXT_ENCODER["d_model"], 3, CAPTION_CLASSES)
        data = ByStep(functools.partial(labelled_text, tokenizer, 64))
        train(WarmStart(text_encoder, reader), data, WARM_START, out / "warm_start")
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    vae = AutoencoderKL.from_pretrained(out / "vae")
    pipeline = PixArtSigmaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(48, seed=1)  # different from those of the final table
    samples = Samples(out)

    def check(step: int) -> dict[str, float]:
        texts = [prompt.text for prompt in prompts]
        generators = [torch.Generator().manual_seed(i) for i in range(len(texts))]
        images = pipeline(texts, generator=generators, guidance_scale=4.5, num_inference_steps=20).images
        sheet = Image.new("RGB", (8 * 64, 6 * 64))
        for i, image in enumerate(images):
            sheet.paste(image, (i % 8 * 64, i // 8 * 64))
        sheet.save(folder / f"images_{step:06d}.png")
        counts = judge_images(prompts, images).counts()
        return {name: hit / max(1, n) for name, (hit, n) in counts.items()}

    data = ByStep(functools.partial(samples.batch, BATCH))
    train(make_objective(pipeline, settings), data, settings, folder, check)


def restore(out: Path, target: Path, records: Path) -> None:
    """Recreate the folder of a run from an exported checkpoint. Renders and latents are made again."""
    configuration = json.loads((records / "configuration.json").read_text())
    steps, autoencoder_steps = configuration["step"], configuration["autoencoder_settings"]["steps"]
    pipeline = PixArtSigmaPipeline.from_pretrained(target)
    pipeline.vae.save_pretrained(out / "autoencoder" / "model")
    shutil.copytree(target / "vae", out / "vae", dirs_exist_ok=True)
    shutil.copytree(target / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    for name, path in RECORDS.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records / name, out / path)
    settings = transformer_settings(steps)
    runs = {
        "transformer": Run(make_objective(pipeline, settings), settings),
        "autoencoder": Run(Autoencoder(pipeline.vae), chunks.autoencoder_settings(autoencoder_steps)),
    }
    for name, run in runs.items():
        done = run.settings.steps
        checkpoints.save(out / name, done, functools.partial(run.save, step=done), keep=1)


def export(out: Path, target: Path, records: Path) -> None:
    """Write the averaged models in float16, in the ordinary folder format, and the records of the run."""
    step, checkpoint = max(checkpoints.found(out / "transformer").items())
    (file,) = checkpoint.glob("*.safetensors")
    state = load_file(file)
    tokenizer = T5Tokenizer.from_pretrained(out / "tokenizer")
    text_encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **TEXT_ENCODER))
    transformer = PixArtTransformer2DModel(**TRANSFORMER)
    for name, model in (("transformer", transformer), ("text_encoder", text_encoder)):
        prefix = f"ema.{name}."
        averages = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        missing, unexpected = model.load_state_dict(averages, strict=False)
        # Only the tied copy of the embedding may be absent.
        assert not unexpected
        assert all("embed_tokens" in key for key in missing)
        model.half()
    vae = AutoencoderKL.from_pretrained(out / "vae", dtype=torch.float16)
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    PixArtSigmaPipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(target)
    shutil.copyfile(out / "tokenizer" / "spiece.model", target / "tokenizer" / "spiece.model")  # for older readers
    for path in target.rglob("*.*"):
        path.chmod(0o644)  # some writers create files that only their owner can read
    records.mkdir(parents=True, exist_ok=True)
    autoencoder_steps = max(checkpoints.found(out / "autoencoder"))
    for name, path in RECORDS.items():
        shutil.copyfile(out / path, records / name)
    configuration = {
        "seed": SEED,
        "step": step,
        "chunks": CHUNKS,
        "geometries": GEOMETRIES,
        "colourings": COLOURINGS,
        "wordings": WORDINGS,
        "text_encoder": TEXT_ENCODER,
        "transformer": TRANSFORMER,
        "autoencoder": AUTOENCODER,
        "scheduler": SCHEDULER,
        "settings": transformer_settings(step).model_dump(),
        "autoencoder_settings": chunks.autoencoder_settings(autoencoder_steps).model_dump(),
    }
    (records / "configuration.json").write_text(json.dumps(configuration, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--autoencoder-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=8000, help="of the transformer")
    root = Path(__file__).resolve().parents[1]
    target, records = root / "src" / "impasto" / "scenes" / "checkpoint", root / "docs" / "scenes" / "training"
    parser.add_argument("--target", type=Path, default=target, help="where the finished checkpoint goes")
    parser.add_argument("--records", type=Path, default=records, help="where logs and configuration of the run go")
    options = parser.parse_args()
    if options.stage in (None, "render"):
        render(options.out, options.chunks)
    if options.stage in (None, "autoencoder"):
        train_vae(options.out, options.autoencoder_steps)
    if options.stage in (None, "latents"):
        encode(options.out)
    if options.stage in (None, "tokenizer"):
        train_tokenizer(options.out)
    if options.stage in (None, "transformer"):
        train_transformer(options.out, transformer_settings(options.steps))
    if options.stage == "restore":
        restore(options.out, options.target, options.records)
    if options.stage in (None, "export"):
        export(options.out, options.target, options.records)


if __name__ == "__main__":
    main()
