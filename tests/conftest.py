"""Shared set-up: no test needs a network."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# On a busy machine a node that is slow to answer is not dead. Ray ends the driver of a dead one.
os.environ.update({"RAY_health_check_timeout_ms": "120000"})
# Test processes that run at once share the cores, and so do the processes that they start.
if workers := int(os.getenv("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch


def pytest_collection_finish() -> None:
    """What is imported stays, so garbage need not be looked for among its millions of objects."""
    gc.freeze()
    gc.collect()  # few objects are left to look at, so garbage is found no later than before


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for each kind of device: milliseconds
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
