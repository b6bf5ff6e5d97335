"""Two processes on the CPU (gloo): training goes through, replicas stay equal, odd sizes of data end."""

import json
from pathlib import Path

import pytest
from scripts import run_forked, run_forked_ranks
from tiny_run import DATA, MODEL, TRAINER, run_cli, text

SCRIPT = str(Path(__file__).with_name("ddp_run.py"))
DDP = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--progress_bar.refresh_rate=0"]


def run(folder, *arguments, start=run_forked):
    """By ranks that Lightning starts, or as torchrun would start them."""
    done = start(folder, SCRIPT, *arguments, seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)], done.stdout


@pytest.mark.slow
def test_fit_validate_and_predict(folder):
    # 7 windows to validate on (350 tokens), so two ranks with batches of 2 cannot share them evenly; 3 prompts.
    (folder / "text.txt").write_text(text(2400))
    flags = ["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=2"]
    save = ["--checkpoint.dirpath=saved", "--model.dropout=0.1", "--trainer.accumulate_grad_batches=2"]
    ranks, printed = run(folder, "fit", *MODEL, *DATA, *DDP, *flags, *save, "--model.balance_scope=global")
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["losses"] != ranks[1]["losses"]  # each rank has its own batches
    assert len(ranks[0]["losses"]) == len(ranks[1]["losses"]) == 12
    one = run_cli("validate", "--data.batch_size=7", "--ckpt_path=saved/last.ckpt", tiny=[*MODEL, *DATA, *TRAINER])
    loss = float(one.trainer.callback_metrics["val/loss"])  # of all 7 windows in one batch
    assert ranks[0]["val/loss"] == ranks[1]["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert ranks[0]["run_load"] == ranks[1]["run_load"]
    slots = 12 * 2 * 2 * 16 * 2  # micro-batches, ranks, batch, seq_len, top_k
    assert [sum(layer) for layer in ranks[0]["run_load"]] == [slots, slots]
    assert printed.count("load skew") == 1  # rank zero prints

    prompts = [f"--data.prompt={name}" for name in ("one", "two", "three")]
    predict = [*prompts, "--model.max_new_tokens=4", "--ckpt_path=saved/last.ckpt"]
    _, printed = run(folder, "predict", *predict, *DDP, start=run_forked_ranks)
    assert [printed.count(f"prompt {i}") for i in (1, 2, 3)] == [1, 1, 1]
