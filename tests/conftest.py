"""What holds for every test: its seed, its threads, what may run beside it; without a GPU the gpu-marked ones skip."""

import fcntl
import multiprocessing
import os
import random
import zlib
from collections.abc import Generator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Tiny tensors gain nothing from a second thread, and lose much where the cores are busy; processes started inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Processes of start method "forkserver" are forks of one that has imported these: they start in milliseconds.
# onnxscript is what a run imports late. Not onnxruntime, which starts a thread.
multiprocessing.set_forkserver_preload(
    ["pytest", "torch.utils.tensorboard", "moe_lightning.training.cli", "onnxscript"]
)

hypothesis.settings.register_profile("seeded", deadline=None, derandomize=True)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _environment() -> Generator[None]:
    """What a test leaves in the environment, as Lightning does with seeds and addresses, is not the next one's."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """For `--numprocesses auto`: one where there is a GPU, which one test at a time may fill.

    Else one more than cores: tests of several ranks wait for each other a third of their time.
    """
    return 0 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several processes none then works long when the others are done.

    That is `--dist loadfile --no-loadscope-reorder`. One process does all of a file: what its tests share is made once.
    """
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path in slow, item.path), reverse=True)


def _lock(path: Path, how: int) -> int:
    """Descriptor that holds it until it is closed."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, how)
    return descriptor


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` runs beside none of another process: tests share a room, which it has to itself."""
    door = _lock(Path(__file__), fcntl.LOCK_EX)  # whoever waits for the room keeps the next ones out
    room = _lock(Path(__file__).parent, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
    os.close(door)
    try:
        return (yield)
    finally:
        os.close(room)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch sees none")
