"""A disk that is full: one line each with the file's name, what was there stays, training goes on."""

import errno
import io
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from counted_fit import At, Counter, counted_fit, names, saved_step
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_fit import fit

from moe_lightning.callbacks import LogGuard, Trace, run_summary
from moe_lightning.utils import checkpoint_file as checkpoint_io
from moe_lightning.utils.errors import explain

#: More than what is left of a page.
WIDE = {f"wide/{i}": float(i) for i in range(2000)}


def full_disk(monkeypatch, *saves):
    """Those writes of a checkpoint, counted from one, break off as torch's do on a full disk."""
    calls = []
    save = torch.save

    def break_off(checkpoint, file):
        if isinstance(file, io.BytesIO):  # a look at a part of one
            return save(checkpoint, file)
        calls.append(checkpoint)
        if len(calls) not in saves:
            return save(checkpoint, file)
        file.write(b"some")
        full = OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598") from full

    monkeypatch.setattr(checkpoint_io.torch, "save", break_off)


def test_a_full_disk_keeps_what_was_there_and_the_next_checkpoint_is_tried(tmp_path, monkeypatch):
    losses = {5: 3.0, 10: 2.0, 15: 2.5}
    full_disk(monkeypatch, 3, 4)  # both files of step 10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = []
        look = At(
            "on_train_batch_start",
            11,
            lambda trainer: seen.extend((names(tmp_path), saved_step(tmp_path / "last.ckpt"))),
        )
        counted_fit(tmp_path, 16, look, module=Counter(losses), val_check_interval=5)
    assert seen == [["last.ckpt", "step=5-val_loss=3.000.ckpt"], 5]
    told = [str(warning.message) for warning in caught if "checkpoint: " in str(warning.message)]
    files = [tmp_path / "step=10-val_loss=2.000.ckpt", tmp_path / "last.ckpt"]
    assert told == [
        f"checkpoint: {file} must fit on the disk and be allowed there, got No space left on device; what it held "
        "before is still there; training goes on and tries again"
        for file in files
    ]
    assert names(tmp_path) == ["last.ckpt", "step=15-val_loss=2.500.ckpt"]  # the best of those that are there
    assert saved_step(tmp_path / "last.ckpt") == 16


def test_a_newest_state_that_could_not_be_written_in_the_end_is_an_error(tmp_path, monkeypatch):
    full_disk(monkeypatch, *range(3, 20))
    ended = []
    with pytest.raises(
        ValueError, match=r"^checkpoint: .*/last.ckpt must fit on the disk .*got No space left on device"
    ):
        counted_fit(
            tmp_path, 8, At("on_fit_end", 1, lambda trainer: ended.append(trainer.global_step)), val_check_interval=5
        )
    assert ended == [8]  # the closing table was printed
    assert saved_step(tmp_path / "last.ckpt") == 5
    assert names(tmp_path) == ["last.ckpt", "step=5-val_loss=9.000.ckpt"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs a file system that it may mount, got {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_really_full_for_a_while(small_disk):
    filler = small_disk / "filler"
    fill = At("on_train_batch_start", 7, lambda trainer: _fill(filler))
    free = At("on_train_batch_start", 12, lambda trainer: filler.unlink())
    with pytest.warns(UserWarning, match=r"last.ckpt must fit on the disk .* No space left on device"):
        counted_fit(small_disk / "s", 12, fill, free, val_check_interval=5)
    assert saved_step(small_disk / "s/last.ckpt") == 12
    assert not list((small_disk / "s").glob(".*"))


def test_logs_on_a_full_disk_cost_a_line_each_and_are_whole_up_to_there(small_disk, tmp_path):
    """Event files, which a thread writes, the CSV, and hparams.yaml; what is logged once there is room is there."""
    filler = small_disk / "filler"
    fill = At("on_train_batch_start", 3, lambda trainer: _fill(filler))
    free = At("on_train_batch_start", 7, lambda trainer: filler.unlink())
    loggers = [TensorBoardLogger(small_disk, name="run"), CSVLogger(small_disk, name="csv", flush_logs_every_n_steps=1)]
    wide = At("on_train_batch_end", 4, lambda trainer: [logger.log_metrics(WIDE, 4) for logger in trainer.loggers])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counted_fit(
            tmp_path / "saved", 10, LogGuard(), fill, free, wide, logger=loggers, log_every_n_steps=1, validation=0
        )
    told = [str(warning.message) for warning in caught if "cannot be written" in str(warning.message)]
    assert {Path(line.split()[1]).name.partition(".")[0] for line in told} == {
        "events",
        "version_0",
    }  # the file of TensorBoard, the folder of CSV
    assert len(told) == 2
    assert all("got No space left on device; training goes on, and what is logged is lost" in line for line in told)
    assert saved_step(tmp_path / "saved/last.ckpt") == 10
    steps = [event.step for event in EventAccumulator(loggers[0].log_dir).Reload().Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert {0, 1, 9} <= set(steps)  # before and after


def test_run_json_and_summary_json_on_a_full_disk_cost_a_line_each(small_disk, tmp_path):
    _fill(small_disk / "filler")
    for name in ("run.json", "summary.json"):
        with pytest.warns(UserWarning, match=rf"run_summary: .*{name} is not written, got No space left on device"):
            run_summary._write(small_disk / name, {"steps": "1" * 5000})
    assert names(small_disk) == ["filler"]


def test_a_trace_on_a_full_disk_costs_a_line(small_disk):
    _fill(small_disk / "filler")
    with pytest.warns(UserWarning, match=r"^trace: .* cannot be written to, got .*; training goes on without a trace$"):
        _, trainer, _ = fit([Trace(True, str(small_disk), wait=1, warmup=1, active=1)], batches=4)
    assert trainer.global_step == 4
    assert names(small_disk) == ["filler"]


def test_a_disk_that_is_full_at_the_start_is_one_line(small_disk):
    _fill(small_disk / "filler")
    with pytest.raises(OSError, match="No space") as full:
        (small_disk / "config.yaml").write_text("x" * 5000)
    assert explain(full.value) == (
        "disk: what a run writes must fit there, got No space left on device; make room, or choose another folder"
    )
    assert explain(OSError(errno.EROFS, "Read-only file system", "runs")) == (
        "disk: what a run writes must fit there, got Read-only file system at runs; make room, or choose another folder"
    )
    assert explain(OSError(errno.EBADF, "Bad file descriptor")) is None


def _fill(path):
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))
