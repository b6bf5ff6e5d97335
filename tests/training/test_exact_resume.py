"""24 steps in one go and 10 + 14 with a restart in mid-epoch give bitwise the same losses (catalogue row 43)."""

import pytest
import torch
from scripts import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import ROOT, TINY, run_cli, text

from moe_lightning.callbacks import ExactResume
from moe_lightning.utils.checkpoint_file import load_checkpoint

STEPS = 24
# 620 characters: 32 windows of 17 tokens to train on, so 16 batches an epoch; one window to validate on.
CHARACTERS, BATCHES = 620, 16
SAVE = ["--checkpoint.monitor=null", "--checkpoint.save_top_k=-1"]
BASE = [
    "--model.dropout=0.1",
    "--trainer.val_check_interval=5",
    f"--model.optimizer.decay_steps={STEPS}",  # the schedule of a run in two parts is that of the whole
    "--model.optimizer.warmup_steps=4",
    "--model.optimizer.learning_rate=1e-2",
    *SAVE,
]


@pytest.fixture
def corpus(folder):
    (folder / "text.txt").write_text(text(CHARACTERS))
    return folder


def fit(losses, steps, *flags, saved="saved"):
    losses.clear()
    cli = run_cli("fit", *BASE, f"--checkpoint.dirpath={saved}", f"--trainer.max_steps={steps}", *flags)
    weights = {name: value.clone() for name, value in cli.model.state_dict().items()}
    return list(losses), weights, cli.trainer


def assert_bitwise_equal(left, right):
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


CASES = {
    "mid-epoch": (10, []),
    "after an epoch": (18, []),
    "accumulated": (10, ["--trainer.accumulate_grad_batches=2"]),
    "accumulated, odd": (7, ["--trainer.accumulate_grad_batches=2"]),
    "sinkhorn": (10, ["--model.router=sinkhorn"]),
    "clipped bf16": (10, ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=0.5"]),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_whole_run(corpus, losses, case):
    stop, flags = CASES[case]
    save = f"--checkpoint.every_n_train_steps={stop}"
    accumulated = 2 if case.startswith("accumulated") else 1
    whole, weights, trainer = fit(losses, STEPS, *flags, saved="whole")
    assert trainer.num_training_batches == BATCHES
    assert len(whole) == STEPS * accumulated
    assert len(set(whole)) == len(whole)  # dropout, order and learning: no two losses are the same
    assert (stop * accumulated) % BATCHES

    first, _, _ = fit(losses, stop, *flags, save)
    second, resumed, trainer = fit(losses, STEPS, *flags, "--ckpt_path=saved/last.ckpt", saved="second")
    assert first + second == whole
    assert trainer.global_step == STEPS
    assert_bitwise_equal(resumed, weights)


def test_resumed_from_a_checkpoint_made_after_validation(corpus, losses):
    whole, weights, _ = fit(losses, STEPS, "--checkpoint.monitor=val/loss", "--checkpoint.filename={step}")
    saved = sorted((corpus / "saved").glob("[0-9]*.ckpt"), key=lambda path: int(path.stem))
    stops = [int(path.stem) for path in saved]
    assert len(stops) >= 3
    for stop in stops[:3]:
        rest, resumed, _ = fit(losses, STEPS, f"--ckpt_path=saved/{stop}.ckpt", saved=f"from-{stop}")
        assert rest == whole[stop:]
        assert_bitwise_equal(resumed, weights)


@pytest.mark.slow
def test_resumed_in_a_new_process(corpus, losses):
    whole, _, _ = fit(losses, STEPS, saved="whole")
    train = [str(ROOT / "train.py"), "fit", *TINY, *BASE, "--checkpoint.every_n_train_steps=10"]
    log = ["--trainer.log_every_n_steps=1", "--model.balance_coef=0.01"]
    first = run_script(corpus, *train, *log, "--trainer.max_steps=10", "--checkpoint.dirpath=saved")
    assert first.returncode == 0, first.stderr
    second = run_script(corpus, *train, *log, f"--trainer.max_steps={STEPS}", "--ckpt_path=saved/last.ckpt")
    assert second.returncode == 0, second.stderr
    logged = []
    for version in sorted((corpus / "lightning_logs").iterdir())[-2:]:
        events = EventAccumulator(str(version)).Reload()
        parts = [events.Scalars(f"train/{name}") for name in ("loss", "balance_loss", "z_loss")]
        logged += [[event.value for event in step] for step in zip(*parts, strict=True)]
    assert len(logged) == STEPS
    # what was logged are the three terms, what was recorded is their fp32 sum: cross-entropy + (0 + balance + z)
    sums = [float(torch.tensor(ce) + (torch.tensor(balance) + torch.tensor(z))) for ce, balance, z in logged]
    assert sums == whole


def test_random_state_comes_back_once_and_late():
    callback = ExactResume()
    saved = callback.state_dict()
    expected = torch.rand(3)
    assert not torch.equal(torch.rand(3), expected)
    resumed = ExactResume()
    resumed.load_state_dict(saved)
    torch.rand(5)  # set-up may draw numbers
    resumed.on_train_batch_start(None, None, None, 0)
    assert torch.equal(torch.rand(3), expected)
    resumed.on_train_batch_start(None, None, None, 1)
    assert not torch.equal(torch.rand(3), expected)


def test_checkpoint_is_plain_torch(corpus, losses):
    fit(losses, 2, "--checkpoint.every_n_train_steps=2")
    plain = torch.load("saved/last.ckpt", weights_only=True)
    verified = load_checkpoint("saved/last.ckpt")
    assert plain["global_step"] == 2
    assert plain["hyper_parameters"] == verified["hyper_parameters"]
    assert_bitwise_equal(plain["state_dict"], verified["state_dict"])
    states = [state for name, state in plain["callbacks"].items() if name.startswith("ExactResume")]
    assert [state["cpu"].dtype for state in states] == [torch.uint8]
