"""Mutate checkpoints, tokenizers, images and training states, and load the results.

    python scripts/fuzz.py --mutations 20000 --seed 0 --minutes 30

Whatever happens to a file, loading it must succeed or raise an ImpastoError within 10 seconds and 1 GB. Mutation i of a
seed is always the same; ``--only i`` repeats it and keeps its folder. Mutations run in forks of an imported process,
many per fork; if a fork dies, they run again one by one. Findings belong in ``tests/hostile/``.
Needs the checkout (it builds its small checkpoints with ``tests/tiny.py``) and POSIX.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MALLOC_ARENA_MAX"] = "2"  # an arena per thread would count towards the address space
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from impasto.errors import ImpastoError
from impasto.folders import JOURNAL, STAGING

MEMORY = 1 << 30
SECONDS = 10
BATCH = 40

Loader = Callable[[Path], object]


class Target(NamedTuple):
    """A folder that loads, the files to mutate, and how to load it."""

    folder: Path
    files: tuple[str, ...]
    load: Loader

    def copy(self, folder: Path) -> None:
        """An undamaged copy. A journal is valid only in the folder where it was made, so a copy gets its own."""
        shutil.copytree(self.folder, folder)
        journal = folder / STAGING / JOURNAL
        if journal.exists():
            content = {"inode": journal.parent.stat().st_ino, "files": ["config.json"], "remove": ["x"]}
            journal.write_text(json.dumps(content))


# --- what is loaded ---


def build_targets(root: Path) -> dict[str, Target]:
    from PIL import Image
    from tests import tiny, tiny_glm

    import impasto
    from impasto.checkpoints.weights import write_weights
    from impasto.memory.inspection import inspect_model
    from impasto.pipelines.image_files import GenerationSettings, save_image
    from impasto.pipelines.prompt_cache import PromptCache
    from impasto.training.distributed.processes import ALONE
    from impasto.training.distributed.storage import read_state, read_tensors, write_tensors

    pixart = tiny.write_pipeline(root / "pixart")
    published = root / "published"  # with a SentencePiece tokenizer
    tiny.write_pipeline(published)
    shutil.rmtree(published / "tokenizer")
    tiny.write_tokenizer(published / "tokenizer")
    sharded = root / "sharded"
    tiny.tiny_pipeline(impasto.PixArtSigmaPipeline).save_pretrained(sharded, max_shard_size="20KB")
    pickled = root / "pickled"
    transformer = tiny.tiny_transformer()
    transformer.save_config(pickled)
    torch.save(transformer.state_dict(), pickled / "diffusion_pytorch_model.bin")

    ours = {
        "vae": impasto.AutoencoderKL(**tiny_glm.VAE),
        "transformer": impasto.GlmImageTransformer2DModel(**tiny_glm.TRANSFORMER, sample_size=8),
        "scheduler": impasto.FlowMatchEulerDiscreteScheduler(**tiny_glm.SCHEDULER),
    }
    glm = root / "glm"
    impasto.GlmImagePipeline(**tiny_glm.text_parts(), **tiny_glm.prior_parts(), **ours).save_pretrained(glm)

    images = root / "images"
    images.mkdir()
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    for name in ("a.png", "a.jpg", "a.webp"):
        save_image(picture, images / name, GenerationSettings(prompt="a cube", steps=2, seed=7))
    state = root / "state"
    state.mkdir()
    write_tensors(state, transformer.state_dict(), {"step": 3}, ALONE)

    cached = root / "cached"
    pipe = impasto.PixArtSigmaPipeline.from_pretrained(pixart)
    pipe.enable_prompt_cache(cached / "cache")
    with torch.no_grad():
        pipe.encode_prompt("a cat")
    shutil.copytree(pixart / "tokenizer", cached / "tokenizer")
    assert isinstance(pipe.prompt_cache, PromptCache)

    pending = root / "pending"
    write_weights(transformer.state_dict(), pending)
    transformer.save_config(pending)
    (pending / STAGING).mkdir()
    shutil.copyfile(pending / "config.json", pending / STAGING / "config.json")
    (pending / STAGING / JOURNAL).touch()

    def load_images(folder: Path) -> None:
        from impasto.pipelines.image_files import open_image, read_settings

        refusal = None
        for path in sorted(folder.iterdir()):
            for read in (read_settings, open_image):
                try:
                    read(path)
                except ImpastoError as error:
                    refusal = error
        if refusal is not None:
            raise refusal

    def load_state(folder: Path) -> None:
        read_state(folder)
        read_tensors(folder, tiny.tiny_transformer().state_dict())

    def encode(folder: Path) -> None:
        pipe.enable_prompt_cache(folder / "cache", max_bytes="1MB")
        with torch.no_grad():
            assert bool(pipe.encode_prompt("a cat").prompt_embeds.isfinite().all())

    def load_transformer(folder: Path) -> None:
        impasto.PixArtTransformer2DModel.from_pretrained(folder)

    configs = ["model_index.json", *(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder"))]
    tokenizer = ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    weights = [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ]
    shards = [
        path.relative_to(sharded).as_posix()
        for path in sorted(sharded.rglob("*"))
        if path.name.endswith(("index.json", "00002.safetensors", "00002-of-00008.safetensors"))
    ]
    glm_files = [
        path.relative_to(glm).as_posix() for path in sorted(glm.rglob("*")) if path.suffix in (".json", ".jinja")
    ]

    def load_pipeline(folder: Path) -> None:
        impasto.PixArtSigmaPipeline.from_pretrained(folder)

    def load_glm(folder: Path) -> None:
        impasto.GlmImagePipeline.from_pretrained(folder)

    everything = (*configs, "scheduler/scheduler_config.json", *tokenizer, *weights)
    return {
        "configs": Target(pixart, (*configs, "scheduler/scheduler_config.json"), load_pipeline),
        "weights": Target(pixart, tuple(weights), load_pipeline),
        "tokenizer": Target(pixart, tuple(tokenizer), load_pipeline),
        "published tokenizer": Target(
            published, ("tokenizer/spiece.model", "tokenizer/tokenizer_config.json"), load_pipeline
        ),
        "indexes": Target(sharded, tuple(shards), load_pipeline),
        "GLM-Image": Target(glm, tuple(glm_files), load_glm),
        "inspection": Target(pixart, everything, lambda folder: inspect_model(folder)),
        "inspection of GLM-Image": Target(glm, tuple(glm_files), lambda folder: inspect_model(folder)),
        "pickled weights": Target(pickled, ("diffusion_pytorch_model.bin",), load_transformer),
        "journals": Target(pending, (f"{STAGING}/{JOURNAL}",), load_transformer),
        "images": Target(images, ("a.png", "a.jpg", "a.webp"), load_images),
        "training states": Target(state, ("state.json", "shard-00000.safetensors"), load_state),
        "prompt cache": Target(
            cached, tuple(f"cache/{path.name}" for path in sorted((cached / "cache").iterdir())), encode
        ),
    }


#: The relative number of mutations of each target.
SHARES = {
    "configs": 5,
    "weights": 4,
    "tokenizer": 4,
    "published tokenizer": 3,
    "indexes": 2,
    "GLM-Image": 3,
    "inspection": 4,
    "inspection of GLM-Image": 1,
    "pickled weights": 2,
    "journals": 1,
    "images": 4,
    "training states": 2,
    "prompt cache": 1,
}


# --- mutations ---

NASTY: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**18, -(10**9), 10**400, 1.5, -0.0, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "1", "NaN", "x" * 5000, "../x", "/etc/passwd", "\x1b[31m"),
    *("a/b", "..", "\0", "\ud800", "日本", "T5EncoderModel", "someone/kernel", "__import__('os')", [], {}, [[]]),
    *([1, 2, 3], ["a"], [None], [1e400, 1], {"a": 1}, {"": {}}, list(range(2000)), [[[[[[[[[[1]]]]]]]]]]),
]


def mutate_json(rng: random.Random, text: bytes) -> bytes:
    content = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(content))
        if not places:
            break
        owner, key = rng.choice(places)
        action = rng.randrange(10)
        if action < 6:
            owner[key] = rng.choice(NASTY)
        elif action == 6:
            del owner[key]
        elif action == 7 and isinstance(owner, dict):
            owner[rng.choice(["", "_x", "auto_map", "quantization_config", "x" * 300, str(key) + "x"])] = owner.pop(key)
        elif action == 8:
            other, name = rng.choice(places)
            with contextlib.suppress(Exception):
                # Copies, as one may lie within the other.
                owner[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(owner[key])
        else:
            owner[key] = [owner[key]] * rng.choice((0, 2, 100))
    try:
        made = json.dumps(content)
    except ValueError:  # an integer too long for Python's own text
        made = json.dumps(str(type(content)))
    if rng.random() < 0.1:
        made = made.replace(":", ": " + "[" * 5000, 1)
    if rng.random() < 0.1:
        made = made.replace("1", "1" * rng.choice((50, 5000)), 1)
    return made.encode("utf-8", "surrogatepass")


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [content]
    while waiting and len(waiting) < 100_000:
        owner = waiting.pop()
        keys: Any = list(owner) if isinstance(owner, dict) else range(len(owner)) if isinstance(owner, list) else ()
        for key in list(keys)[:500]:
            yield owner, key
            waiting.append(owner[key])


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if not data:
            break
        place = rng.randrange(min(len(data), rng.choice((64, 4096, 10**9))))
        action = rng.randrange(6)
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[place] = rng.choice((0, 255, 0x7F, 0x80))
        elif action == 2:
            del data[place : place + rng.choice((1, 4, 100, 10**9))]
        elif action == 3:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
        elif action == 4:
            data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
        else:
            start = rng.randrange(len(data))
            data[place:place] = data[start : start + rng.choice((8, 200))]
    return bytes(data)


def mutate_safetensors(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    action = rng.randrange(8)
    if action == 0:
        return (
            rng.choice((0, 1, length - 1, length + 1, 2**32, 2**63, len(content))).to_bytes(8, "little") + content[8:]
        )
    if action == 1:
        return content[: 8 + length] + mutate_bytes(rng, body)
    if action == 2:
        header = mutate_bytes(rng, header)
    else:
        header = mutate_json(rng, header)
    return len(header).to_bytes(8, "little") + header + body


def mutate(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    if rng.random() < 0.02:
        path.unlink()
        rng.choice((lambda: None, path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)))()
        return
    if path.suffix == ".safetensors" and rng.random() < 0.8:
        made = mutate_safetensors(rng, content)
    elif path.suffix == ".json" and rng.random() < 0.8:
        made = mutate_json(rng, content)
    else:
        made = mutate_bytes(rng, content)
    path.write_bytes(made)


# --- running ---


class Verdict(NamedTuple):
    number: int
    target: str
    outcome: str  # "loaded", the name of an ImpastoError, or "FAULT ..."
    detail: str


def run_one(targets: dict[str, Target], seed: int, number: int, folder: Path) -> Verdict:
    rng = random.Random(f"{seed} {number}")
    (name,) = rng.choices(list(SHARES), list(SHARES.values()))
    target = targets[name]
    shutil.rmtree(folder, ignore_errors=True)
    target.copy(folder)
    for file in rng.sample(target.files, min(len(target.files), rng.choice((1, 1, 1, 2)))):
        mutate(rng, folder / file)
    signal.alarm(SECONDS)
    try:
        target.load(folder)
    except ImpastoError as error:
        message = str(error)
        if len(message) > 4000 or not message.replace("\n", " ").isprintable():
            return Verdict(number, name, "FAULT message", f"{len(message)} characters: {message[:500]!r}")
        return Verdict(number, name, type(error).__name__, "")
    except BaseException as error:
        return Verdict(number, name, f"FAULT {type(error).__name__}", traceback.format_exc()[-3000:])
    finally:
        signal.alarm(0)
    return Verdict(number, name, "loaded", "")


def run_batch(targets: dict[str, Target], seed: int, numbers: list[int], folder: Path) -> list[Verdict]:
    """Run mutations in a fork; those that killed it, one by one."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with os.fdopen(write, "wb") as pipe:
            for number in numbers:
                pickle.dump(run_one(targets, seed, number, folder), pipe)
                pipe.flush()
        os._exit(0)
    os.close(write)
    verdicts = []
    with os.fdopen(read, "rb") as pipe, contextlib.suppress(EOFError):
        while True:
            verdicts.append(pickle.load(pipe))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(verdicts) < len(numbers):
        number = numbers[len(verdicts)]
        if len(numbers) == 1:
            (name,) = random.Random(f"{seed} {number}").choices(list(SHARES), list(SHARES.values()))
            reason = "hang" if status == -signal.SIGALRM else f"death, status {status}"
            return [Verdict(number, name, f"FAULT {reason}", "")]
        verdicts += run_batch(targets, seed, [number], folder)
        rest = numbers[len(verdicts) :]
        verdicts += run_batch(targets, seed, rest, folder) if rest else []
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time and print the progress")
    parser.add_argument("--only", type=int, help="run this mutation alone, in this process, and keep its folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="impasto-fuzz-"))
    targets = build_targets(root / "good")
    for name, target in targets.items():  # undamaged ones load, which also imports everything before the forks
        target.copy(root / "try")
        target.load(root / "try")
        shutil.rmtree(root / "try")
        assert name in SHARES
    if arguments.only is not None:
        print(run_one(targets, arguments.seed, arguments.only, root / "only"))
        print(f"the folder is {root / 'only'}")
        return 0
    began, found = time.monotonic(), list[Verdict]()
    for start in range(0, arguments.mutations, BATCH):
        numbers = list(range(start, min(start + BATCH, arguments.mutations)))
        for verdict in run_batch(targets, arguments.seed, numbers, root / "work"):
            found.append(verdict)
            if verdict.outcome.startswith("FAULT"):
                print(f"{verdict.number} {verdict.target}: {verdict.outcome}\n{verdict.detail}", flush=True)
        if time.monotonic() - began > 60 * arguments.minutes:
            print(f"stopped after {arguments.minutes:g} minutes")
            break
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for verdict in found:
        table[verdict.target][verdict.outcome] += 1
    for name in SHARES:
        print(f"{name}: " + ", ".join(f"{count} {outcome}" for outcome, count in table[name].most_common()))
    faults = sum(verdict.outcome.startswith("FAULT") for verdict in found)
    print(f"{len(found)} mutations, {faults} faults, {time.monotonic() - began:.0f} s, seed {arguments.seed}")
    shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
