"""A server under load and abuse for a while: nothing that it accepted may be lost, and its memory may not grow.

    python scripts/soak.py --minutes 20 --output soak.json

Starts ``impasto serve`` with the bundled model and a short queue. Clients ask for images of several sizes and numbers
of steps, edit images, or speak A1111's interface; some leave early, some read slowly, some send bad requests; once the
engine is killed. Memory is the sum of
the proportional set sizes (PSS) of the processes of the server, averaged over each minute. Linux only; needs
``impasto[serve]`` and httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

BAD: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": "a cube", "size": "huge"},
    {"prompt": "a cube", "n": 99},
    {"prompt": "a cube", "sead": 1},
    {"prompt": "x" * 30_000},
    {"prompt": "a cube", "model": "no-such-model"},
)
CLIENTS = {"plain": 6, "streaming": 3, "leaving": 3, "slow": 2, "bad": 1, "crowd": 1, "editing": 1, "a1111": 1}
#: Seconds between readings of the memory, which follows the work of each moment; a minute's is the mean.
SAMPLE = 5.0
OWN_SIZE = {"use_resolution_binning": False}  # images of several sizes, not all of one bin


class Soak:
    """The clients and what happened to their requests."""

    def __init__(self, url: str, end: float, rng: random.Random):
        self.url, self.end, self.rng = url, end, rng
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.latencies: list[float] = []
        self.restarted_after = 0.0

    def request(self, **more: Any) -> dict[str, Any]:
        rng = self.rng
        size = rng.choice(["128x128", "192x128", "128x192", "192x192", "256x256"])
        steps = rng.choice([4, 10, 20, 30])
        colours = rng.sample(["red", "blue", "green", "yellow"], 2)
        prompt = f"a {colours[0]} cube on top of a {colours[1]} sphere"
        return {
            "prompt": prompt,
            "size": size,
            "num_inference_steps": steps,
            "seed": rng.randrange(2**31),
            **OWN_SIZE,
            **more,
        }

    async def plain(self, client: httpx.AsyncClient) -> None:
        start = time.monotonic()
        answer = await client.post("/v1/images/generations", json=self.request())
        self.note("plain", answer)
        if answer.status_code == 200:
            self.latencies.append(time.monotonic() - start)
        else:
            await asyncio.sleep(1)

    async def streaming(self, client: httpx.AsyncClient, pause: float = 0.0, kind: str = "streaming") -> None:
        body = self.request(stream=True, partial_images=2)
        async with client.stream("POST", "/v1/images/generations", json=body) as answer:
            text = ""
            async for chunk in answer.aiter_text():
                text += chunk
                await asyncio.sleep(pause)
            if answer.status_code != 200:
                self.outcomes[f"{kind} {answer.status_code}"] += 1
                await asyncio.sleep(1)
            elif "image_generation.completed" in text:
                self.outcomes[f"{kind} done"] += 1
            elif "error" in text:
                self.outcomes[f"{kind} error in the stream"] += 1
            else:
                self.problems.append(f"a stream ended without an image or an error: {text[-300:]}")

    async def slow(self, client: httpx.AsyncClient) -> None:
        await self.streaming(client, 0.3, "slow")

    async def editing(self, client: httpx.AsyncClient) -> None:
        """Image to image, and half of the time inpainting of the lower half."""
        files = {"image": ("image.png", png((128, 128), "RGB", (200, 80, 40)), "image/png")}
        if self.rng.random() < 0.5:
            mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
            mask.paste((0, 0, 0, 0), (0, 64, 128, 128))
            files["mask"] = ("mask.png", encoded(mask), "image/png")
        fields = {"prompt": "a red cube", "seed": str(self.rng.randrange(2**31)), "num_inference_steps": "10"}
        answer = await client.post("/v1/images/edits", data=fields, files=files)
        self.note("editing", answer)
        await asyncio.sleep(1)

    async def a1111(self, client: httpx.AsyncClient) -> None:
        """Text to image or image to image, while another connection watches and sometimes interrupts."""
        body = {"prompt": "a blue sphere", "width": 128, "height": 128, "steps": self.rng.choice([4, 10, 20])}
        kind = self.rng.choice(["txt2img", "img2img"])
        if kind == "img2img":
            image = base64.b64encode(png((128, 128), "RGB", (40, 80, 200))).decode()
            body |= {"init_images": [image], "denoising_strength": 0.6}
        answering = asyncio.create_task(client.post(f"/sdapi/v1/{kind}", json=body))
        await asyncio.sleep(self.rng.uniform(0, 1))
        watched, interrupted = [await client.get("/sdapi/v1/progress")], self.rng.random() < 0.2
        if interrupted:
            watched.append(await client.post("/sdapi/v1/interrupt"))
        self.problems += [f"a1111: {each.url} {each.status_code}" for each in watched if each.status_code != 200]
        # Interrupted before its first preview, an image is answered with none.
        self.note("a1111", await answering, () if interrupted else ("images",))
        await asyncio.sleep(1)

    async def leaving(self, client: httpx.AsyncClient) -> None:
        try:
            async with asyncio.timeout(self.rng.uniform(0.01, 1.5)):
                answer = await client.post("/v1/images/generations", json=self.request(num_inference_steps=60))
            self.outcomes[f"leaving {answer.status_code}"] += 1
        except TimeoutError:
            self.outcomes["leaving left"] += 1
        await asyncio.sleep(0.5)

    async def bad(self, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/images/generations", json=self.rng.choice(BAD))
        if answer.status_code not in (400, 404, 429):
            self.problems.append(f"a bad request got {answer.status_code}: {answer.text[:200]}")
        self.outcomes[f"bad {answer.status_code}"] += 1
        await asyncio.sleep(0.2)

    async def crowd(self, client: httpx.AsyncClient) -> None:
        """More at once than the queue holds."""
        answers = await asyncio.gather(
            *(client.post("/v1/images/generations", json=self.request(num_inference_steps=4)) for _ in range(40))
        )
        for answer in answers:
            self.note("crowd", answer)
            if answer.status_code == 429 and not answer.headers.get("retry-after", "").isdigit():
                self.problems.append("a 429 has no Retry-After")
        await asyncio.sleep(20)

    def note(self, kind: str, answer: httpx.Response, image: Sequence[str | int] = ("data", 0, "b64_json")) -> None:
        self.outcomes[f"{kind} {answer.status_code}"] += 1
        if answer.status_code == 200:
            found = answer.json()
            for key in image:
                found = found[key]
            if not found:
                self.problems.append(f"{kind}: an answer has no image")
        if answer.status_code not in (200, 429, 500):
            self.problems.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

    async def client(self, kind: str) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            while time.monotonic() < self.end:
                try:
                    await getattr(self, kind)(client)
                except httpx.HTTPError as error:
                    self.problems.append(f"{kind}: {type(error).__name__}: {error}")
                    await asyncio.sleep(1)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def png(size: tuple[int, int], mode: str, colour: tuple[int, ...]) -> bytes:
    return encoded(Image.new(mode, size, colour))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in task.read_text().split()]
    return [pid, *(each for child in children for each in family(child))]


def pss(pid: int) -> int:
    """Bytes, of a process and its descendants."""
    total = 0
    for each in family(pid):
        try:
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{each}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) << 10 if found else 0
        except OSError:
            continue
    return total


def engine_of(pid: int) -> int:
    """The engine: of the descendants the one with the most memory."""
    return max(family(pid)[1:], key=pss)


async def soak(url: str, server: int, minutes: float, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    run = Soak(url, start + minutes * 60, random.Random(seed))
    memory: dict[str, float] = {}

    async def watch() -> None:
        for share in range(1, 21):
            samples: list[int] = []
            while (left := start + minutes * 3 * share - time.monotonic()) > 0:
                await asyncio.sleep(min(SAMPLE, left))
                samples.append(pss(server))
            memory[f"{minutes * share / 20:.1f}"] = statistics.fmean(samples) / 1e6
            if share == 3:
                os.kill(engine_of(server), signal.SIGKILL)

    clients = [run.client(kind) for kind, count in CLIENTS.items() for _ in range(count)]
    await asyncio.gather(watch(), *clients)
    async with httpx.AsyncClient(base_url=url) as client:
        metrics = (await client.get("/metrics")).text
    sorted_latencies = sorted(run.latencies)
    return {
        "minutes": minutes,
        "outcomes": dict(sorted(run.outcomes.items())),
        "problems": run.problems,
        "latency": {
            f"p{p}": sorted_latencies[min(len(sorted_latencies) - 1, len(sorted_latencies) * p // 100)]
            for p in (50, 90, 95, 99)
        },
        "mean latency": statistics.fmean(sorted_latencies),
        "PSS in MB, mean of each minute": memory,
        "PSS at the end over that at a quarter": [*memory.values()][-1] / [*memory.values()][4],
        "metrics": [line for line in metrics.split("\n") if line.startswith("impasto_") and "_bucket" not in line],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    command = [sys.executable, "-m", "impasto", "serve", "--port", str(given.port), "--queue", "24"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{given.port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if server.poll() is not None:
                print("the server ended before it was ready", file=sys.stderr)
                return 1
            time.sleep(0.2)
        found = asyncio.run(soak(url, server.pid, given.minutes, given.seed))
    finally:
        server.send_signal(signal.SIGTERM)
        found_status = server.wait(150)
    found["exit status"] = found_status
    text = json.dumps(found, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
