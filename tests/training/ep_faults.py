"""Runs of `--trainer.strategy ddp_ep` in which something is wrong, one after the other, each by two forked ranks.

In its folder it leaves one for each run, with the ranks' logs; it prints what they ended with as JSON.
"""

import ctypes
import json
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from forked_ranks import fork_ranks, statuses
from tiny_run import run_cli, text

from moe_lightning.expert_parallel.collectives import Work
from moe_lightning.expert_parallel.expert_shards import ExpertShards
from moe_lightning.layers import MoE
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.training.strategy import WatchedDDPStrategy, watched_ddp
from moe_lightning.utils import checkpoint_file as checkpoint_io
from moe_lightning.utils.errors import plain_errors

#: Long enough for ranks that share a core; of the runs that wait for its end.
WAIT_SECONDS = 8
PR_SET_CHILD_SUBREAPER = 36
STRATEGY = [
    "--trainer.devices=2",
    "--trainer.strategy=moe_lightning.training.strategy.ExpertParallelStrategy",
    f"--trainer.strategy.timeout_seconds={WAIT_SECONDS}",
    f"--trainer.strategy.start_timeout_seconds={WAIT_SECONDS}",
]
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
SAVES = ["--checkpoint.dirpath=saved", "--checkpoint.every_n_train_steps=2", "--checkpoint.monitor=null"]
SAVES += ["--checkpoint.save_top_k=-1", "--checkpoint.filename=step={step}"]


def fit(*flags: str, steps: int = 6, strategy: list[str] = STRATEGY):
    with plain_errors():
        return run_cli("fit", *strategy, f"--trainer.max_steps={steps}", *SAVES, *flags)


def before(owner, name: str, act) -> None:
    """Call `act(*arguments)` before each call of `owner.name`."""
    method = getattr(owner, name)

    def wrapped(*arguments, **options):
        act(*arguments)
        return method(*arguments, **options)

    setattr(owner, name, wrapped)


def calls(number: int, act):
    """Call `act` in the call of this number alone, from one."""
    seen = 0

    def counting(*_):
        nonlocal seen
        seen += 1
        if seen == number:
            act()

    return counting


def terminate_other(rank: int):
    """SIGTERM to the other of the two ranks."""
    pids = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    return lambda: os.kill(pids[1 - rank], signal.SIGTERM)


# ---- runs ------------------------------------------------------------------------------------------------
def skipped_layer(rank: int, *flags: str) -> None:
    whole = MoE.forward
    steps = 0

    def forward(self, x, tokens):
        nonlocal steps
        steps += 1
        return (x, self.router(x.flatten(0, 1))) if steps == 3 else whole(self, x, tokens)

    if rank == 1:
        MoE.forward = forward
    fit("--model.n_layers=1", *flags)


def skipped_layer_symmetric(rank: int) -> None:
    skipped_layer(rank, "--trainer.strategy.dispatch=symmetric")


def log_on_rank_one(rank: int, **options) -> None:
    if rank == 1:
        before(LanguageModule, "training_step", lambda self, *_: self.log("mine", 7.0, **options))
    trainer = fit().trainer
    print("steps", trainer.global_step, "mine" in trainer.callback_metrics)


def metric_of_one_rank(rank: int) -> None:
    log_on_rank_one(rank)


def synced_metric_of_one_rank(rank: int) -> None:
    log_on_rank_one(rank, sync_dist=True)


def sigterm_while_rows_travel(rank: int) -> None:
    terminate = terminate_other(rank)
    if rank == 1:  # without it rank zero's exchange cannot end
        before(Work, "start", calls(9, terminate))
    fit(steps=40)


def sigterm_while_saving(rank: int) -> None:
    terminate = terminate_other(rank)
    if rank == 1:  # rank zero gathers the experts
        before(ExpertShards, "gather_optimizer_state", calls(1, terminate))
    else:  # rank one waits for the file
        before(checkpoint_io, "_append_digest", calls(1, terminate))
    fit(steps=40)


def sigterm_while_validating(rank: int) -> None:
    terminate = terminate_other(rank)
    if rank == 1:
        before(LanguageModule, "validation_step", calls(3, terminate))
    fit("--trainer.val_check_interval=3", "--data.batch_size=1", steps=40)


def full_disk(rank: int) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    before(checkpoint_io, "_append_digest", calls(4, full))  # a second last.ckpt
    fit()


def damaged_checkpoint(rank: int) -> None:
    fit(f"--ckpt_path={Path('../damaged.ckpt').resolve()}")


def other_weights(rank: int) -> None:
    torch.manual_seed(rank)
    fit("--seed_everything=false")


def five_experts(rank: int) -> None:
    fit("--model.num_experts=5")


def other_settings(rank: int) -> None:
    fit(f"--data.batch_size={2 + rank}", f"--trainer.max_epochs={1 + rank}", strategy=DDP)


def exit_of_one_rank(rank: int) -> None:
    watched_ddp.PATIENCE_SECONDS = 1
    before(watched_ddp, "abort_process_group", lambda: print("left the others"))
    if rank == 1:
        before(LanguageModule, "training_step", calls(3, lambda: sys.exit(7)))
    fit()


def lost_agent(rank: int) -> None:
    os.environ |= {"TORCHELASTIC_RUN_ID": "run", "RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    before(watched_ddp, "abort_process_group", lambda: print("left the others"))
    if rank == 0:
        before(LanguageModule, "training_step", calls(3, lambda: os.kill(os.getppid(), signal.SIGKILL)))
    fit(steps=10**6, strategy=DDP)


class Timeouts(L.Callback):
    """Prints how long a collective would have waited in each batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        strategy = trainer.strategy
        groups = dist.group.WORLD, strategy._factory.group, strategy._barrier_group
        seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        print("timeouts", *map(int, seconds), int(strategy._factory._memory.signals.timeout_seconds))


def timeouts(rank: int) -> None:
    before(dist, "monitored_barrier", lambda _, timeout: print("barrier", int(timeout.total_seconds())))
    limits = {"timeout_seconds": 41, "start_timeout_seconds": 42, "barrier_timeout_seconds": 43}
    flags = [f"--trainer.strategy.{name}={seconds}" for name, seconds in limits.items()]
    callbacks = ["--trainer.callbacks+=ep_faults.Timeouts", "--trainer.strategy.dispatch=symmetric"]
    trainer = fit(*flags, *callbacks, "--trainer.limit_val_batches=0", steps=3).trainer
    work_alone(rank, trainer.strategy)


def work_alone(rank: int, strategy: WatchedDDPStrategy) -> None:
    """Rank one waits in a barrier for rank zero, who works until a longer collective of rank one has timed out."""
    short = dist.new_group(timeout=timedelta(seconds=3))
    strategy._set_timeout(timedelta(seconds=2))
    if rank == 0:
        assert Path("timed-out").read_text() == "yes"  # until rank one has written, or is gone
    else:
        pipe = os.open("timed-out", os.O_WRONLY)
        late = dist.all_reduce(torch.ones(1), group=short, async_op=True)

        def wait() -> None:
            try:
                late.wait()
            except RuntimeError:
                os.write(pipe, b"yes")
                os.close(pipe)

        threading.Thread(target=wait).start()
    strategy.barrier("work_alone")
    print("met")


def moved(name: str, *flags: str, steps: int, strategy: list[str] = STRATEGY):
    """Trained, or only loaded; and saved."""
    return lambda rank: fit(*flags, steps=steps, strategy=strategy).trainer.save_checkpoint(f"../{name}.ckpt")


# ---- all of them -----------------------------------------------------------------------------------------
def begin(work, folder: Path, name: str = "", world: int = 2) -> list[int]:
    folder = folder / (name or work.__name__)
    folder.mkdir()
    (folder / "text.txt").write_text(text(4000))
    os.mkfifo(folder / "timed-out")
    return fork_ranks(work, folder, world, WAIT_SECONDS)


def begin_under_agent(work, folder: Path) -> list[int]:
    """Ranks of another process, which they lose; they are then this one's to wait for."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    reads, writes = os.pipe()
    agent = os.fork()
    if agent == 0:
        pids = begin(work, folder)
        os.write(writes, json.dumps(pids).encode())
        print(f"{folder}: ended before their agent: {statuses(pids)}", file=sys.stderr)
        os._exit(1)
    os.close(writes)
    pids = json.loads(os.read(reads, 100))
    os.close(reads)
    assert statuses([agent]) == [-signal.SIGKILL]
    return pids


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    slow = skipped_layer, skipped_layer_symmetric, synced_metric_of_one_rank  # beside the others
    waiting = {work.__name__: begin(work, folder) for work in slow}
    ended = {}
    for name, world, flags, steps in (
        ("start-two", 2, [], 0),
        ("start-one", 1, [], 0),
        ("two", 2, [], 4),
        ("one", 1, ["--ckpt_path=../two.ckpt", "--data.batch_size=4"], 4),
        ("again", 2, ["--ckpt_path=../one.ckpt"], 4),
    ):
        work = moved(name, *flags, steps=steps, strategy=STRATEGY if world == 2 else [])
        ended[name] = statuses(begin(work, folder, name, world))
    content = bytearray((folder / "two.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "damaged.ckpt").write_bytes(content)
    for work in (
        metric_of_one_rank,
        sigterm_while_rows_travel,
        sigterm_while_saving,
        sigterm_while_validating,
        full_disk,
        damaged_checkpoint,
        other_weights,
        other_settings,
        five_experts,
        exit_of_one_rank,
        timeouts,
    ):
        ended[work.__name__] = statuses(begin(work, folder))
    ended["lost_agent"] = statuses(begin_under_agent(lost_agent, folder))
    ended |= {name: statuses(pids) for name, pids in waiting.items()}
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
