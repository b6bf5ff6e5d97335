"""`last.ckpt` is the newest whole state however a run ended; a file's score is of its own step; nothing is lost."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from counted_fit import At, Counter, counted_fit, names, saved_step, stop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

WORSE = {5: 1.0, 10: 2.0, 15: 3.0}  # validation losses


def kill(signal_number):
    return lambda trainer: os.kill(os.getpid(), signal_number)


@pytest.fixture(autouse=True)
def handlers():
    """What a run leaves must be what was there before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


#: How a run ends: its newest step, the exception, options, callbacks, where the module fails.
ENDS = {
    "steps": (12, None, {"steps": 12}, [], None),
    "epochs": (16, None, {"steps": -1, "max_epochs": 2}, [], None),
    "time, or a callback": (7, None, {}, [At("on_train_batch_end", 7, stop)], None),
    "Ctrl-C": (13, 130, {}, [At("on_train_batch_start", 13, kill(signal.SIGINT))], None),
    "SIGTERM": (13, 143, {}, [At("on_train_batch_start", 13, kill(signal.SIGTERM))], None),
    "Ctrl-C before the first validation": (2, 130, {}, [At("on_train_batch_start", 2, kill(signal.SIGINT))], None),
    "SIGTERM in a validation": (10, 143, {}, [At("on_validation_batch_start", 3, kill(signal.SIGTERM))], None),
    "Ctrl-C in the first validation": (5, 130, {}, [At("on_validation_batch_start", 1, kill(signal.SIGINT))], None),
    "an exception in a step": (12, RuntimeError, {}, [], ("training_step", 13)),
    "an exception after a step": (13, RuntimeError, {}, [], ("on_train_batch_end", 13)),
    "an exception in a validation": (10, RuntimeError, {}, [], ("validation_step", 3)),
}


def ended(folder, case, **more):
    """A run that ends so."""
    newest, outcome, options, callbacks, fail = ENDS[case]
    module = Counter(WORSE, fail)
    options = {"steps": 40, "val_check_interval": 5, **options, **more}
    expected = pytest.raises(SystemExit if isinstance(outcome, int) else outcome) if outcome else nullcontext()
    for callback in callbacks:
        callback.calls = 0
    with expected as raised:
        counted_fit(folder, options.pop("steps"), *callbacks, module=module, **options)
    if isinstance(outcome, int):
        assert raised.value.code == outcome
    return newest, module


@pytest.mark.parametrize("case", ENDS)
def test_the_newest_state_is_kept_however_a_run_ends(tmp_path, case):
    """Though every validation is worse than the first, and whether there was one at all."""
    newest, _ = ended(tmp_path, case)
    assert saved_step(tmp_path / "last.ckpt") == newest
    ranked = {path.name for path in tmp_path.glob("step=*.ckpt")}
    whole = newest >= 5 and "first validation" not in case
    assert ranked == ({"step=5-val_loss=1.000.ckpt"} if whole else set())
    assert not list(tmp_path.glob(".*"))


def spoil(trainer):
    with torch.no_grad():
        trainer.lightning_module.weight.fill_(torch.nan)
    raise RuntimeError("not a number")


@pytest.mark.parametrize(
    ("fail", "callbacks", "reason"),
    [
        (("optimizer_step", 8), [], "step 7 is not saved, the optimizer was in the middle of a step"),
        (None, [At("on_train_batch_end", 8, spoil)], "step 8 is not saved, its weights are not finite"),
    ],
)
def test_a_state_that_is_not_whole_never_takes_the_place_of_one_that_is(tmp_path, fail, callbacks, reason):
    for callback in callbacks:
        callback.calls = 0
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match=f"^checkpoint: {reason}$"):
        counted_fit(tmp_path, 12, *callbacks, module=Counter(WORSE, fail), val_check_interval=5)
    assert saved_step(tmp_path / "last.ckpt") == 5


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", ENDS)
def test_a_run_goes_on_exactly_from_wherever_it_ended(tmp_path, case, accumulate):
    """No batch twice, none lost, and the same random numbers; a micro-batch without its step is trained again."""
    torch.manual_seed(3)
    whole, _ = counted_fit(tmp_path / "whole", 20, val_check_interval=5, accumulate_grad_batches=accumulate)
    torch.manual_seed(3)
    _, first = ended(tmp_path, case, accumulate_grad_batches=accumulate)
    step = saved_step(tmp_path / "last.ckpt")
    assert step >= ENDS[case][0] // accumulate
    second, trainer = counted_fit(
        tmp_path, 20, val_check_interval=5, accumulate_grad_batches=accumulate, ckpt_path=tmp_path / "last.ckpt"
    )
    assert first.seen + second.seen == whole.seen
    assert trainer.global_step == 20
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 20  # what logs are numbered by


#: Validations every 10 steps.
LOSSES = {10: 5.666, 20: 5.239, 30: 6.0}


@pytest.mark.parametrize(
    ("save", "files"),
    [
        ({"every_n_train_steps": 5}, ["step=20-val_loss=5.239"]),
        ({"every_n_train_steps": 15}, ["step=30-val_loss=6.000"]),
        ({"every_n_train_steps": 7}, []),
        ({"every_n_train_steps": 5, "mode": "max"}, ["step=30-val_loss=6.000"]),
        ({"every_n_train_steps": 10, "save_top_k": 2}, ["step=10-val_loss=5.666", "step=20-val_loss=5.239"]),
        (
            {"every_n_train_steps": 5, "save_top_k": -1},
            [
                *("step=5", "step=10-val_loss=5.666", "step=15", "step=20-val_loss=5.239", "step=25"),
                *("step=30-val_loss=6.000", "step=32"),
            ],
        ),
        ({"every_n_train_steps": 8, "monitor": None}, ["step=32"]),
        ({"every_n_train_steps": 10, "monitor": None, "filename": "{val/loss:.1f}"}, ["step=32"]),
        ({"monitor": None}, ["step=32"]),
        ({"monitor": "train/loss", "filename": "{step}-{train/loss:.0f}", "every_n_train_steps": 10}, ["10-9"]),
        ({"save_last": "link", "every_n_train_steps": 16, "save_top_k": -1}, ["step=16", "step=32"]),
    ],
)
def test_a_file_is_ranked_and_named_by_a_value_of_its_own_step(tmp_path, save, files):
    counted_fit(tmp_path, 32, module=Counter(LOSSES), save=save, val_check_interval=10)
    assert names(tmp_path) == sorted([*(f"{name}.ckpt" for name in files), "last.ckpt"])
    for name in files:
        step = int(name.removeprefix("step=").partition("-")[0])
        assert saved_step(tmp_path / f"{name}.ckpt") == step
    assert saved_step(tmp_path / "last.ckpt") == 32


def test_the_best_is_that_of_the_values_and_a_link_leads_to_the_newest(tmp_path):
    _, trainer = counted_fit(tmp_path, 30, module=Counter(LOSSES), save={"save_last": "link"}, val_check_interval=10)
    assert Path(trainer.checkpoint_callback.best_model_path).name == "step=20-val_loss=5.239.ckpt"
    assert trainer.checkpoint_callback.best_model_score == torch.tensor(5.239)
    assert not (tmp_path / "last.ckpt").is_symlink()  # step 30 has no file of its own
    assert saved_step(tmp_path / "last.ckpt") == 30


def test_a_monitored_name_that_nobody_logs_is_an_error(tmp_path):
    with pytest.raises(MisconfigurationException, match="could not find the monitored key"):
        counted_fit(tmp_path, 12, save={"monitor": "val/los"}, val_check_interval=10)


def test_a_folder_of_another_run_is_refused_and_a_run_goes_on_in_its_own(tmp_path):
    counted_fit(tmp_path / "other", 3)
    counted_fit(tmp_path, 4)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"^checkpoint: dirpath must not hold the newest state of another run, got .*"):
        counted_fit(tmp_path, 6)
    with pytest.raises(ValueError, match="continue that run with --ckpt_path"):
        counted_fit(tmp_path, 6, ckpt_path=tmp_path / "other/last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
    counted_fit(tmp_path, 6, ckpt_path=tmp_path / "last.ckpt")
    assert names(tmp_path) == ["last.ckpt", "other"]
    assert saved_step(tmp_path / "last.ckpt") == 6


# ---- what cannot be read back ----------------------------------------------------------------------------


class Keeps(L.Callback):
    """Puts a value into the checkpoint."""

    def __init__(self, value, hook):
        self.value, self.hook = value, hook

    def state_dict(self):
        return {"deep": [0, {"here": self.value}]} if self.hook == "state_dict" else {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.hook == "on_save_checkpoint":
            checkpoint["mine"] = self.value


@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.float64(1), "numpy.float64"), (Path("a"), "pathlib.PosixPath"), (Counter, "type")],
)
def test_what_a_resume_could_not_read_is_refused_before_the_first_step_with_its_place(tmp_path, value, kind):
    module = Counter()
    with pytest.raises(ValueError, match=rf"got {kind} at callbacks.Keeps.deep.1.here; let state_dict of .* Keeps "):
        counted_fit(tmp_path, 4, Keeps(value, "state_dict"), module=module)
    assert not module.begun
    module = Counter()
    module.save_hyperparameters({"size": value})
    with pytest.raises(ValueError, match=rf"got {kind} at hyper_parameters.size; leave it out of save_hyperparameters"):
        counted_fit(tmp_path, 4, module=module)
    with pytest.raises(ValueError, match=rf"^checkpoint: .* got {kind} at mine; it was put there by"):
        counted_fit(tmp_path, 4, Keeps(value, "on_save_checkpoint"))
    assert not (tmp_path / "last.ckpt").exists()
