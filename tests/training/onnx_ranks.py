"""Runs of `--trainer.strategy ddp_ep` that export their checkpoints, one after the other, each by two forked ranks.

In its folder it leaves one for each run, with the ranks' logs; it prints what they ended with as JSON.
"""

import errno
import json
import sys
from pathlib import Path

import torch
from forked_ranks import fork_ranks, statuses
from tiny_run import run_cli, text

from moe_lightning.export import checkpoint_sync, model_files
from moe_lightning.training.cli import MoECLI
from moe_lightning.utils.errors import plain_errors

#: Of a collective: a rank that waits for one that does not come ends with an error.
WAIT_SECONDS = 30
FLAGS = ["--trainer.devices=2", "--trainer.strategy=moe_lightning.training.strategy.ExpertParallelStrategy"]
FLAGS += [f"--trainer.strategy.timeout_seconds={WAIT_SECONDS}", "--trainer.max_steps=4", "--trainer.logger=false"]
FLAGS += ["--checkpoint.dirpath=saved", "--checkpoint.every_n_train_steps=2", "--checkpoint.monitor=null"]
FLAGS += ["--checkpoint.filename=step={step}", "--onnx_export.enabled=true", "--trainer.limit_val_batches=0"]


def fit(*flags: str) -> None:
    with plain_errors():
        run_cli("fit", *FLAGS, *flags)


def first_write_fails() -> None:
    """On rank zero, which alone writes."""

    def save(graph, path, external_data):
        model_files.onnx_ir.save = whole
        raise OSError(errno.ENOSPC, "No space left on device")

    whole, model_files.onnx_ir.save = model_files.onnx_ir.save, save


def goes_on(rank: int) -> None:
    first_write_fails()
    fit()


def ends(rank: int) -> None:
    first_write_fails()
    fit("--onnx_export.on_error=raise")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    parser = MoECLI.subcommands()["fit"]
    MoECLI.subcommands = staticmethod(lambda: {"fit": parser})  # a quarter of the time
    assert checkpoint_sync  # imported once, before the ranks fork
    ended = {}
    for work in (goes_on, ends):
        (folder / work.__name__).mkdir()
        (folder / work.__name__ / "text.txt").write_text(text(4000))
        ended[work.__name__] = statuses(fork_ranks(work, folder / work.__name__, 2, WAIT_SECONDS))
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
