"""Forks a process that saves in a loop, kills it at a random moment, twenty times; reports what it found as JSON."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint

path = Path(sys.argv[1])
torch.set_num_threads(1)
moments = random.Random(48)


def content(step: int) -> dict:
    return {"first": step, "weight": torch.full((500_000,), float(step)), "last": step}


began = time.perf_counter()
save_checkpoint(content(0), path)
one_save = time.perf_counter() - began

steps, leftovers = [], 0
for _ in range(20):
    start = load_checkpoint(path)["first"]
    child = os.fork()
    if child == 0:
        step = start
        while True:
            step += 1
            save_checkpoint(content(step), path)
    signal.signal(signal.SIGALRM, lambda *args, child=child: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.2, 4) * one_save)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    found = load_checkpoint(path)
    assert found["first"] == found["last"]
    assert torch.equal(found["weight"], content(found["first"])["weight"])
    steps.append(found["first"])
    leftovers += len(list(path.parent.glob(".*.tmp")))

save_checkpoint(content(steps[-1] + 1), path)
files = sorted(file.name for file in path.parent.iterdir())
print(json.dumps({"steps": steps, "leftovers": leftovers, "files_after_one_more_save": files}))
