"""Two ranks that hold different experts save in a loop, one is killed at a random moment, twenty times; what was found.

The other rank must then end by itself, or this process would wait for it for ever.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import fork_ranks, statuses

from moe_lightning.expert_parallel.expert_shards import ExpertShards
from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.checkpoint_file import load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
path = folder / "saved" / "killed.ckpt"
torch.set_num_threads(1)
moments = random.Random(48)
EXPERTS, WIDTH, HIDDEN = 4, 64, 1024


def model() -> MoE:
    return MoE(ROUTERS["naive_topk"](WIDTH, EXPERTS, 2), Experts(WIDTH, HIDDEN, EXPERTS))


@torch.no_grad()
def content(step: int, shards: ExpertShards | None = None, module: MoE | None = None) -> dict:
    """A checkpoint in which every number says its step, and an expert's its expert too; gathered from shards if any."""
    if module is None:
        module = model()
    numbers_E11 = step + 100.0 * torch.arange(EXPERTS)[:, None, None]
    for parameter in module.parameters():
        parameter.fill_(step)
    for parameter in module.experts.parameters():
        parameter.copy_(shards.local_shard(numbers_E11) if shards else numbers_E11)
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        optimizer.state[parameter] = {"exp_avg": parameter.detach().clone()}
    state, moments_of = module.state_dict(), optimizer.state_dict()
    if shards:
        keep = shards.rank == 0
        state = shards.gather_model_state(state, keep)
        moments_of = shards.gather_optimizer_state(optimizer, moments_of, keep)
    return {"step": step, "state_dict": state, "optimizer": moments_of["state"]}


def save_for_ever(rank: int, first: int, ready: int) -> None:
    module = model()
    shards = ExpertShards(module, dist.group.WORLD, torch.device("cpu"))
    shards.shard_()
    os.write(ready, b".")
    step = first
    while True:
        whole = content(step, shards, module)
        if rank == 0:
            save_checkpoint(whole, path)
        dist.barrier()
        step += 1


began = time.perf_counter()
save_checkpoint(content(0), path)
one_save = time.perf_counter() - began

steps, leftovers, killed = [], 0, [0, 0]
for number in range(20):
    first = load_checkpoint(path)["step"] + 1
    reading, ready = os.pipe()
    pids = fork_ranks(lambda rank, first=first, ready=ready: save_for_ever(rank, first, ready), folder, number=number)
    os.close(ready)
    for _ in pids:
        assert os.read(reading, 1) == b".", "a rank ended before it saved"
    os.close(reading)
    victim = moments.randrange(2)
    signal.signal(signal.SIGALRM, lambda *_, pid=pids[victim]: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.2, 4) * one_save)
    ended = statuses(pids)
    assert ended[victim] == -signal.SIGKILL, ended
    assert ended[1 - victim] == 1, ended
    killed[victim] += 1
    found = load_checkpoint(path)
    expected = content(found["step"])
    for kind in ("state_dict", "optimizer"):
        torch.testing.assert_close(found[kind], expected[kind], rtol=0, atol=0)
    steps.append(found["step"])
    leftovers += len(list(path.parent.glob(".*.tmp")))

save_checkpoint(content(steps[-1] + 1), path)
files = sorted(file.name for file in path.parent.iterdir())
print(json.dumps({"steps": steps, "leftovers": leftovers, "killed": killed, "files_after_one_more_save": files}))
