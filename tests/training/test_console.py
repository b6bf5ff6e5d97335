"""What a run prints: nothing that nobody can act on, how far it is, and all of it on any terminal."""

import io
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import rich
from tiny_run import TINY, TRAINER, run_cli

from moe_lightning.callbacks import console as terminal
from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils.console import hide_framework_messages
from moe_lightning.utils.errors import plain_errors

LINES = ["--progress_bar.refresh_rate=1", "--progress_bar.line_every_seconds=30", "--throughput.enabled=false"]
#: Without auxiliary losses, so that the loss of a step is train/loss.
FIT = [
    "--model.balance_coef=0",
    "--model.z_coef=0",
    "--trainer.logger=false",
    "--trainer.log_every_n_steps=2",
    "--checkpoint.monitor=null",
]


@pytest.fixture
def ten_seconds_per_step(monkeypatch, losses):
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: 10.0 * len(losses)))
    return losses


def lines_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_without_a_terminal_a_line_every_so_often_says_how_far_training_is(folder, capsys, ten_seconds_per_step):
    run_cli("fit", *LINES, *FIT, "--trainer.max_steps=12", "--trainer.limit_val_batches=0")
    losses = ten_seconds_per_step
    assert lines_of(capsys) == [
        f"step 2 of 12: train/loss {losses[1]:.3f}, 0:01:40 left",
        f"step 6 of 12: train/loss {losses[5]:.3f}, 0:01:00 left",
        f"step 10 of 12: train/loss {losses[9]:.3f}, 0:00:20 left",
    ]


def test_a_validation_has_its_line(folder, capsys, ten_seconds_per_step):
    cli = run_cli("fit", *LINES, *FIT, "--trainer.max_steps=4", "--trainer.val_check_interval=4")
    loss, validation = ten_seconds_per_step[3], float(cli.trainer.callback_metrics["val/loss"])
    assert lines_of(capsys)[1:] == [f"step 4 of 4: train/loss {loss:.3f}, val/loss {validation:.3f}, 0:00:00 left"]


def test_a_line_has_the_tokens_per_second_of_all_ranks(folder, capsys, monkeypatch):
    monkeypatch.setattr("moe_lightning.callbacks.Throughput.run_tokens_per_second", lambda self: 12345.6)
    run_cli("fit", *LINES[:2], *FIT, "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    assert ", 12,346 tokens/s, 0:00:00 left" in lines_of(capsys)[0]


def test_where_there_is_no_last_step_no_time_left_is_made_up(folder, capsys, ten_seconds_per_step):
    step = LanguageModule.training_step

    def stopping(self, *args):
        self.trainer.should_stop = len(ten_seconds_per_step) >= 2
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", stopping)
        run_cli("fit", *LINES, *FIT, "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0")
    assert lines_of(capsys) == [f"step 2: train/loss {ten_seconds_per_step[1]:.3f}"]


@pytest.fixture
def console():
    """rich's one console, which Lightning's bar changes, as it was."""
    yield
    rich.reconfigure()


@pytest.mark.parametrize(
    "flags", [["--progress_bar.console_kwargs={force_terminal: true}"], ["--progress_bar.refresh_rate=0"]]
)
def test_a_terminal_has_its_bar_and_no_lines(folder, capsys, console, flags):
    run_cli("fit", *LINES, *FIT, *flags, "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    printed = capsys.readouterr().out
    assert ("Epoch 0" in printed) == ("force_terminal" in flags[0])
    assert "step 2 of 2" not in printed


def test_nothing_is_printed_that_nobody_can_act_on(folder, capsys, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run_cli("fit", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
        run_cli("validate", "--ckpt_path=lightning_logs/version_0/checkpoints/last.ckpt", tiny=TRAINER)
    seen = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]  # Python shows no others
    assert seen == []
    notes = [line for line in caplog.messages if line and not line.startswith("GPU available: ")]
    assert notes == [
        "`Trainer.fit` stopped: `max_steps=2` reached.",
        "Restoring states from the checkpoint path at lightning_logs/version_0/checkpoints/last.ckpt",
        "Loaded model weights from the checkpoint at lightning_logs/version_0/checkpoints/last.ckpt",
    ]
    printed = capsys.readouterr().out
    assert "FLOPs" not in printed
    assert "18.6 K parameters, 0.1 MB\n" in printed


def test_seeds_of_ranks_are_left_out_and_other_messages_stay(caplog):
    hide_framework_messages()
    logger = logging.getLogger("lightning.fabric.utilities.seed")
    for message in ("[rank: 1] Seed set to 42", "Seed set to 42", "[rank: 1] No seed found", "100% done"):
        logger.info(message)
    assert caplog.messages == ["[rank: 1] No seed found", "100% done"]


def test_a_terminal_that_lacks_characters_gets_the_whole_summary(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    save = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=café", "--trainer.max_steps=2"]
    with plain_errors():
        run_cli("fit", *save, "--trainer.val_check_interval=2")
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode("ascii")
    assert "+---" in printed
    assert "| val/perplexity" in printed
    assert "\ncheckpoint:  caf\\xe9/lightning_logs/version_0/checkpoints/step=2-val_loss=" in printed
    assert "\nlook at it:  tensorboard --logdir 'caf\\xe9/lightning_logs/version_0' --host 127.0.0.1\n" in printed


def test_text_that_a_terminal_lacks_is_generated_nevertheless(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with plain_errors():
        run_cli("predict", "--data.prompt=café", "--model.max_new_tokens=1", tiny=[*TINY[:-1], *TRAINER])
    sys.stdout.flush()
    assert "caf\\xe9" in sys.stdout.buffer.getvalue().decode("ascii")
