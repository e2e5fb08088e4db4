"""A case of bad input, each in a process of its own: little memory, little time, and a standard input that never ends.

``run(function, *args)`` calls a function of a test module in a fork of one process that has imported everything. The
fork has an address space of its parent's size + 1 GB, 10 seconds, and an open pipe as standard input, so that what
asks, hangs or takes gigabytes is seen as such.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

ROOT = Path(__file__).parents[2]
MEMORY = 1 << 30  # bytes beyond those of the imported process
SECONDS = 10


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str  # "returned", "raised", "exited", "killed" (by a signal, named by ``error``)
    error: str  # the name of the error's class, or of the signal; "" if it returned
    ancestors: tuple[str, ...]  # the names of the error's class and its bases
    message: str
    value: Any  # what was returned, or the exit status
    stdout: str
    stderr: str
    trace: str

    @property
    def clear(self) -> bool:
        """Whether it raised an error of this package."""
        return self.kind == "raised" and "ImpastoError" in self.ancestors


def run(function: Callable[..., Any], *args: Any, memory: int = MEMORY, seconds: int = SECONDS) -> Outcome:
    """Call a function of a module's top level in a fork. Arguments and result must be picklable."""
    return _zygote().ask((function.__module__, function.__qualname__, args, memory, seconds))


def refused(outcome: Outcome, error: str, *named: str) -> None:
    """Assert that a case raised this class of error (or one below it), and that its message names these things."""
    assert outcome.clear, f"{outcome.kind} {outcome.error}: {outcome.message}\n{outcome.trace}{outcome.stderr}"
    assert error in outcome.ancestors, f"{outcome.error} is no {error}: {outcome.message}"
    assert len(outcome.message) < 2000, "a message should be read, not scrolled"
    for text in named:
        assert text in outcome.message, f"{text!r} is not named by: {outcome.message}"


# --- building damaged checkpoints ---


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a small checkpoint, to be damaged."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change some values of a JSON file (``...`` removes a key); NaN and infinities are written as Python does."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        if value is ...:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")


# --- the process that is forked ---


class _Zygote:
    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        command = [sys.executable, "-c", "from tests.hostile import sandbox; sandbox.serve()"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        atexit.register(self.process.kill)

    def ask(self, request: tuple[Any, ...]) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        _send(self.process.stdin, request)
        answer = _receive(self.process.stdout)
        assert isinstance(answer, Outcome), answer
        return answer


_running: list[_Zygote] = []


def _zygote() -> _Zygote:
    if not _running or _running[0].process.poll() is not None:
        _running[:] = [_Zygote()]
    return _running[0]


def _send(file: BinaryIO | Any, content: Any) -> None:
    data = pickle.dumps(content)
    file.write(struct.pack("<Q", len(data)) + data)
    file.flush()


def _receive(file: BinaryIO | Any) -> Any:
    header = file.read(8)
    if len(header) < 8:
        return None
    return pickle.loads(file.read(struct.unpack("<Q", header)[0]))


def serve() -> None:
    """The life of the process that is forked: import everything, then fork once for each request."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # whatever an import prints must not lie between the answers
    import torch

    torch.set_num_threads(1)  # no pool of threads, which a fork would lose
    import transformers  # noqa: F401
    from transformers import (  # noqa: F401
        ByT5Tokenizer,
        GlmImageForConditionalGeneration,
        GlmImageProcessor,
        T5EncoderModel,
        T5Tokenizer,
    )

    import impasto
    import impasto.cli
    import impasto.memory.plan

    for name in impasto.__all__:
        getattr(impasto, name)
    gc.collect()
    gc.freeze()
    while (request := _receive(requests)) is not None:
        try:
            if request[0] not in sys.modules:
                importlib.import_module(request[0])
                gc.collect()
                gc.freeze()  # a collection in a fork would touch, and so copy, every page
            answer: Any = _fork(*request)
        except BaseException:
            answer = traceback.format_exc()
        _send(answers, answer)


def _fork(module: str, name: str, args: tuple[Any, ...], memory: int, seconds: int) -> Outcome:
    read, write = os.pipe()
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            _child(write, stdout.fileno(), stderr.fileno(), module, name, args, memory, seconds)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            result = _receive(pipe)
        _, status = os.waitpid(child, 0)
        printed = []
        for file in (stdout, stderr):
            file.seek(0)
            printed.append(file.read(100_000).decode("utf-8", "replace"))
    code = os.waitstatus_to_exitcode(status)
    if result is None and code < 0:
        return Outcome("killed", signal.Signals(-code).name, (), "", None, *printed, "")
    if result is None:
        return Outcome("exited", "", (), "", code, *printed, "")
    return Outcome(*result[:5], *printed, result[5])


def _child(
    write: int, stdout: int, stderr: int, module: str, name: str, args: tuple[Any, ...], memory: int, seconds: int
) -> None:
    silent, _kept_open = os.pipe()
    os.dup2(silent, 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(i, "w", errors="backslashreplace", closefd=False) for i in (1, 2))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # each thread of transformers would take address space of its own
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    result: tuple[Any, ...]
    try:
        function: Any = sys.modules[module]
        for part in name.split("."):
            function = getattr(function, part)
        result = ("returned", "", (), "", function(*args), "")
        pickle.dumps(result)
    except SystemExit as stop:
        result = ("exited", "SystemExit", (), "", stop.code, "")
    except BaseException as error:
        names = tuple(cls.__name__ for cls in type(error).__mro__)
        result = ("raised", type(error).__name__, names, str(error), None, traceback.format_exc()[-4000:])
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed or full, as the case wanted it
            file.flush()
    with os.fdopen(write, "wb") as pipe:
        _send(pipe, result)
    os._exit(0)
