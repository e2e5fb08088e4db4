"""Seconds from the start of ``impasto serve`` until it is ready, until its page can be used, and until a first image.

    python benchmarks/serving_start.py [--rounds 3] [--python ENVIRONMENT/bin/python]

The page can be used once its button to generate is enabled, in chromium that already runs. Needs
``impasto[serve,test-browser]``, httpx and chromium. With ``--python`` the server is of another environment, such as one
with ``impasto[serve]`` alone: transformers also imports accelerate, scipy and torchao where they are installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx
from playwright.sync_api import Browser, sync_playwright

import measure

IMAGE = {"prompt": "a red cube on top of a blue sphere"}


def one_start(browser: Browser, model: str, python: str) -> dict[str, float]:
    start = time.perf_counter()
    command = [python, "-m", "impasto", "serve", "--model", f"scenes={model}", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = _address(server)
        with httpx.Client(base_url=url, timeout=60) as client:
            client.get("/ready").raise_for_status()  # it announces its address when it is
            seconds = {"ready": time.perf_counter() - start}
            page = browser.new_page()
            page.goto(url)
            page.locator("#model option").first.wait_for(state="attached")
            page.locator("#generate:enabled").wait_for()
            seconds["page after ready"] = time.perf_counter() - start - seconds["ready"]
            page.close()
            before = time.perf_counter()
            client.post("/v1/images/generations", json=IMAGE).raise_for_status()
            # The page was opened meanwhile, which a client of the API would not do.
            seconds["first image"] = seconds["ready"] + time.perf_counter() - before
        return seconds
    finally:
        server.terminate()
        server.wait(30)


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if found:
            return found[0]
    raise SystemExit("the server has ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="builtin:scenes")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    path = os.environ.get("IMPASTO_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        found = [one_start(browser, options.model, options.python) for _ in range(options.rounds)]
        browser.close()
    environment = "this environment" if options.python == sys.executable else "another environment"
    result: dict[str, Any] = {"what": f"seconds from the start of impasto serve, {options.model}, {environment}"}
    for name in found[0]:
        values = [round(each[name], 2) for each in found]
        result[name] = {"median": statistics.median(values), "all": values}
    measure.write("serving-start", result)


if __name__ == "__main__":
    main()
