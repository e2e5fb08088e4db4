"""Command lines: whatever happens, one printable line on standard error, and a status that is not 0."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from impasto import __main__ as entry
from impasto.cli import pipelines

from .sandbox import ROOT, Outcome, copy_of, edit_json, run


def command(*arguments: str, folder: str = ".") -> None:
    """The command, as the console script starts it."""
    os.chdir(folder)
    sys.argv = ["impasto", *arguments]
    entry.main()


def command_in(folder: str, arguments: list[str]) -> None:
    command(*arguments, folder=folder)


def one_line(outcome: Outcome, status: int, *named: str) -> None:
    """Assert the status, and that one readable line on standard error names these things."""
    assert (outcome.kind, outcome.value) == ("exited", status), f"{outcome}"
    assert outcome.stderr.startswith("error: "), outcome.stderr
    assert outcome.stderr.endswith("\n")
    line = outcome.stderr[:-1]
    assert line.isprintable(), f"more than a line, or control characters: {outcome.stderr!r}"
    assert len(line) <= 1000
    for text in named:
        assert text in line, f"{text!r} is not named by: {line}"


# --- usage ---

USAGE: dict[str, tuple[list[str], str]] = {
    "no command": ([], "Missing command"),
    "an unknown command": (["fly"], "'fly'"),
    "a control character in a command": (["\x1b[2Jfly"], "No such command"),
    "an unknown option": (["info", "builtin:scenes", "--loud"], "--loud"),
    "an unknown global option": (["--loud", "info"], "--loud"),
    "debug after the command": (["info", "builtin:scenes", "--debug"], "--debug"),
    "no prompt": (["generate"], "PROMPT"),
    "no model": (["info"], "MODEL"),
    "two models": (["info", "a", "b"], "unexpected extra argument"),
    "steps of letters": (["generate", "x", "--steps", "many"], "--steps"),
    "steps of 5,000 digits": (["generate", "x", "--steps", "9" * 5000], "--steps"),
    "steps without a number": (["generate", "x", "--steps"], "--steps"),
    "steps of a fraction": (["generate", "x", "--steps", "2.5"], "--steps"),
    "a seed of letters": (["generate", "x", "--seed", "\x1b[31mred"], "--seed"),
    "guidance of letters": (["generate", "x", "--guidance-scale", "x" * 10_000], "--guidance-scale"),
    "height of letters": (["generate", "x", "--height", "tall"], "--height"),
    "an unknown scheduler": (["generate", "x", "--scheduler", "magic"], "--scheduler"),
    "an unknown dtype": (["generate", "x", "--dtype", "int4"], "--dtype"),
    "n of letters": (["evaluate", "--n", "\udcff"], "--n"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case: str) -> None:
    outcome = run(command_in, ".", USAGE[case][0])
    one_line(outcome, 2, USAGE[case][1], "--help)")


# --- values that no model takes: refused before a model is looked for ---

NOWHERE = ["--model", "no/such"]
VALUES: dict[str, tuple[list[str], str]] = {
    f"{option} {value[:12]}": ([*words, option, value], option)
    for words, option, values in (
        (["generate", "x", *NOWHERE], "--num-images", ("0", "-1", "1000000000", "9" * 4000)),
        (["generate", "x", *NOWHERE], "--steps", ("0", "-1", "1000000000")),
        (["generate", "x", *NOWHERE], "--height", ("0", "-8", "1000000000")),
        (["generate", "x", *NOWHERE], "--width", ("0", "1000000000")),
        (["generate", "x", *NOWHERE], "--batch-size", ("0", "-1", "1000000000")),
        (["generate", "x", *NOWHERE], "--seed", ("-1", "9223372036854775808")),
        (["generate", "x", *NOWHERE], "--guidance-scale", ("nan", "inf", "-inf", "1e400", "1e30", "-2000")),
        (["evaluate", *NOWHERE], "--n", ("0", "-1", "1000000000")),
        (["evaluate", *NOWHERE], "--steps", ("0",)),
        (["evaluate", *NOWHERE], "--batch-size", ("0", "1000000000")),
        (["evaluate", *NOWHERE], "--guidance-scale", ("nan",)),
        (["evaluate", *NOWHERE], "--seed", ("-1",)),
    )
    for value in values
} | {
    f"--memory-budget {value[:12]!r}": (["generate", "x", *NOWHERE, "--memory-budget", value], "--memory-budget")
    for value in ("", "lots", "1e400GB", "9" * 5000 + "GB", "0GB", "-1GB", "nan", "8GB\x1b[2J", "8 G\nB")
}


@pytest.mark.parametrize("case", VALUES)
def test_values(case: str) -> None:
    arguments, named = VALUES[case]
    one_line(run(command_in, ".", arguments), 1, named)


PROMPTS: dict[str, tuple[str, str]] = {
    "empty": ("", "empty"),
    "blank": (" \n\t", "empty"),
    "100,000 characters": ("a" * 100_000, "100,000 characters"),
    "not UTF-8": ("caf\udce9", "UTF-8"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(case: str) -> None:
    prompt, named = PROMPTS[case]
    one_line(run(command_in, ".", ["generate", prompt, *NOWHERE]), 1, "prompt", named)


# --- places ---

LONG = "x" * 300
PLACES: dict[str, tuple[list[str], str]] = {
    "info of nothing": (["info", "nothing"], "nothing"),
    "info of an empty name": (["info", ""], ""),
    "info of a file": (["info", "file"], "file"),
    "info of a device": (["info", "/dev/zero"], "/dev/zero"),
    "info of a long name": (["info", LONG], "xxx"),
    "info of a longer name": (["info", "y/" * 5000], "y/"),
    "info of a name that is not UTF-8": (["info", "caf\udce9"], "caf"),
    "info of a name with control characters": (["info", "\x1b[31mred\x07\n"], "x1b"),
    "info of an id with control characters": (["info", "owner/\x1b[31mname"], "x1b"),
    "info of an unknown bundled model": (["info", "builtin:\x1b[2J"], "builtin"),
    "info of a folder with control characters": (["info", "red\x1b[31m"], "red"),
    "info of an empty folder": (["info", "folder"], "model_index.json"),
    "output is a long name": (["generate", "x", "--output", LONG + ".png"], "xxx"),
    "output in a long folder": (["generate", "x", "--output", LONG + "/"], "xxx"),
    "output has no folder": (["generate", "x", "--output", "none/x.png"], "none"),
    "output in a file": (["generate", "x", "--output", "file/x.png"], "file"),
    "output is a file": (["generate", "x", "--output", "file.1"], "file.1"),
    "output is a folder of a file": (["generate", "x", "--output", "file/folder/"], "file"),
    "output is no image": (["generate", "x", "--output", "x.gif"], "x.gif"),
    "output is a device": (["generate", "x", "--output", "/dev/null"], "/dev/null"),
    "output in /proc": (["generate", "x", "--output", "/proc/new/"], "/proc/new"),
    "output with control characters": (["generate", "x", "--output", "\x1b[2J.gif"], "x1b"),
    "an empty output": (["generate", "x", "y", "--output", "x.png"], "x.png"),
    "evaluate into a folder": (["evaluate", "--output", "folder"], "folder"),
    "evaluate into nothing": (["evaluate", "--output", "none/x.json"], "none"),
    "evaluate into a long name": (["evaluate", "--output", LONG], "xxx"),
    "an unknown device": (["generate", "x", "--output", "x.png", "--device", "toaster\x1b"], "toaster"),
    "a device that is not there": (["generate", "x", "--output", "x.png", "--device", "cuda:99"], "cuda:99"),
    "a device of 5,000 digits": (["generate", "x", "--output", "x.png", "--device", "cuda:" + "9" * 5000], "cuda"),
    "an image for PixArt": (["generate", "x", "--output", "x.png", "--image", "x.png"], "--image"),
    "height that no model has": (["generate", "x", "--output", "x.png", "--height", "100000"], "height"),
    "a budget that is too small": (["generate", "x", "--output", "x.png", "--memory-budget", "1KB"], "budget"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    for name in ("file", "file.1"):
        (folder / name).touch()
    for name in ("folder", "red\x1b[31m"):
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("case", PLACES)
def test_places(places: Path, case: str) -> None:
    arguments, named = PLACES[case]
    one_line(run(command_in, str(places), arguments), 1, named)


@pytest.mark.parametrize("image", ["missing\x1b.png", "file", "folder", "/dev/zero"])
def test_images_to_refer_to(places: Path, glm_folder: Path, image: str) -> None:
    arguments = ["generate", "x", "--model", str(glm_folder), "--output", "x.png", "--image", image]
    one_line(run(command_in, str(places), arguments), 1, "cannot be read as an image", image[:7])


@pytest.mark.parametrize("deep", [[], ["--deep"]])
def test_what_a_checkpoint_says_is_not_printed_raw(pixart_folder: Path, tmp_path: Path, deep: list[str]) -> None:
    edit_json(copy_of(pixart_folder, tmp_path) / "model_index.json", _class_name="\x1b[2J\x1b]0;title\x07\n" * 9)
    for arguments in (["info", str(tmp_path), *deep], ["generate", "x", "--model", str(tmp_path)]):
        outcome = run(command_in, str(tmp_path), arguments)
        assert outcome.stdout.replace("\n", "").isprintable()
        if outcome.value:
            one_line(outcome, 1)


def test_info_of_good_checkpoints(pixart_folder: Path, glm_folder: Path) -> None:
    for folder in (pixart_folder, glm_folder):
        outcome = run(command_in, str(folder), ["info", ".", "--deep"])
        assert (outcome.value, outcome.stderr) == (0, "")
        assert "transformer" in outcome.stdout


# --- faults of libraries and of the machine ---


class Panic(BaseException):
    """As Rust's panics come to Python."""


FAULTS: dict[str, tuple[Any, str]] = {
    "no memory": (MemoryError(), "too little memory"),
    "no memory for torch": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "memory"),
    "no memory on CUDA": (RuntimeError("CUDA out of memory. Tried to allocate\n20 GiB"), "too little memory"),
    "no memory for C++": (RuntimeError("std::bad_alloc"), "too little memory"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/tmp/a\x1b"), "No space left on device: /tmp/a"),
    "a forbidden file": (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied: a"),
    "an error of reading": (OSError("bad\nthings"), "unexpected OSError: bad things"),
    "a broken pipe elsewhere": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    "a missing key": (KeyError("wei\x1bght"), "unexpected KeyError"),
    "many lines": (ValueError("line\n" * 10_000), "unexpected ValueError: line line"),
    "a million characters": (RuntimeError("x" * 1_000_000), "unexpected RuntimeError"),
    "an end of input": (EOFError("Ran out of input"), "unexpected EOFError"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError"),
    "a failed assertion": (AssertionError(), "unexpected AssertionError"),
    "a failed import": (ImportError("No module named 'x'"), "unexpected ImportError"),
    "a panic": (Panic("called `Option::unwrap()`"), "unexpected Panic"),
    "an exit in a library": (SystemExit("go away"), "error"),
}


def faulty(case: str, *options: str) -> None:
    def fail(*_: Any) -> None:
        warnings.warn("a warning\nof two lines", stacklevel=1)
        raise FAULTS[case][0]

    pipelines.load = fail  # type: ignore[assignment]
    command(*options, "generate", "x", "--output", "x.png", folder="/tmp")


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case: str) -> None:
    one_line(run(faulty, case), 1, FAULTS[case][1])


def evaluate_onto_full_disk(folder: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    os.replace = full
    command("evaluate", "--n", "1", "--steps", "1", "--output", "report.json", folder=folder)


def test_a_full_disk_under_a_report(tmp_path: Path) -> None:
    outcome = run(evaluate_onto_full_disk, str(tmp_path), seconds=60)
    last = outcome.stderr.splitlines()[-1]
    assert (outcome.kind, outcome.value) == ("exited", 1), outcome
    assert last.startswith("error: report.json cannot be written: No space left on device"), outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback() -> None:
    outcome = run(faulty, "a missing key", "--debug")
    assert outcome.kind == "raised"
    assert outcome.error == "KeyError"


def interrupted() -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    pipelines.load = fail  # type: ignore[assignment]
    command("generate", "x", "--output", "x.png", folder="/tmp")


def test_an_interruption_that_a_library_raises() -> None:
    outcome = run(interrupted)
    assert (outcome.value, outcome.stderr) == (130, "interrupted\n")


def logging_raw() -> None:
    def fail(*_: Any) -> None:
        logging.getLogger("impasto").warning("a file \x1b[2J says\n%s", "x" * 5000)
        raise MemoryError

    pipelines.load = fail  # type: ignore[assignment]
    command("generate", "x", "--output", "x.png", folder="/tmp")


def test_log_lines_are_one_printable_line_each() -> None:
    first, second = run(logging_raw).stderr.splitlines()
    assert first.startswith("WARNING: a file \\x1b[2J says xxx")
    assert first.isprintable()
    assert len(first) <= 1000
    assert second.startswith("error: ")


def writing_to(place: str, arguments: list[str]) -> None:
    if place == "closed by its reader":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(place, os.O_WRONLY)
    os.dup2(write, 1)
    command(*arguments)


@pytest.mark.parametrize("place", ["/dev/full", "closed by its reader"])
@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["info", "builtin:scenes"], ["generate", "--help"]])
def test_output_that_cannot_be_written(place: str, arguments: list[str]) -> None:
    reason = "No space left" if place == "/dev/full" else "Broken pipe"
    one_line(run(writing_to, place, arguments), 1, reason)


# --- in processes of their own ---


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "impasto", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, **options)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["during the first imports", "during those of torch"])
def test_signals(number: signal.Signals, when: str, tmp_path: Path) -> None:
    process = started("generate", "a cube", "--steps", "9000", "--output", f"{tmp_path}/x.png", stdout=-1)
    proc = Path(f"/proc/{process.pid}")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        handled = int(proc.joinpath("status").read_text().split("SigCgt:")[1].split()[0], 16)
        settled = handled >> (signal.SIGTERM - 1) & 1  # from the first lines of impasto/__main__.py on
        if settled and (when == "during the first imports" or "libtorch" in proc.joinpath("maps").read_text()):
            break
        time.sleep(0.002)
    process.send_signal(number)
    assert ended(process) == (-number, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_signals_that_are_ignored_stay_ignored() -> None:
    process = started(
        "--version", stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "")


def test_a_closed_standard_output() -> None:
    status, stderr = ended(started("info", "builtin:scenes", preexec_fn=lambda: os.close(1)))
    assert status == 1
    assert stderr == "error: standard output is closed; leave it open, or send it to a file or to /dev/null\n"


def test_a_full_standard_output_at_the_last_flush() -> None:
    with open("/dev/full", "w") as full:
        status, stderr = ended(started("--version", stdout=full))
    assert status == 1
    assert stderr.count("\n") == 1
    assert "No space left on device" in stderr


def test_importing_the_command_line_touches_no_signal() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    code = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15)]\n"
        "import impasto.cli, impasto.__main__\n"
        "assert before == [signal.getsignal(n) for n in (2, 15)]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
