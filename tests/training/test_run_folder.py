"""Runs that start together get folders of their own."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny_run import error_line, run_cli

from moe_lightning.training.cli import claim_run_folder
from moe_lightning.utils.checkpoint_file import load_checkpoint


@pytest.fixture
def same_second(monkeypatch):
    """Each run looks for the next number before any has made a folder."""
    for logger in (CSVLogger, TensorBoardLogger):
        monkeypatch.setattr(logger, "_get_next_version", lambda self: 0)


def test_runs_of_one_name_that_start_together_keep_their_checkpoints(folder, same_second):
    for steps in (1, 2, 3):
        run_cli("fit", f"--trainer.max_steps={steps}")
    kept = {path.parts[1]: load_checkpoint(path)["global_step"] for path in _last_checkpoints(folder)}
    assert kept == {"version_0": 1, "version_1": 2, "version_2": 3}


def _last_checkpoints(folder):
    return [path.relative_to(folder) for path in folder.glob("lightning_logs/*/checkpoints/last.ckpt")]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_making_of_a_folder_is_the_claim(tmp_path, same_second, kind):
    loggers = [kind(tmp_path, name="run") for _ in range(3)]
    for logger in loggers:
        claim_run_folder(logger)
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert all(logger.log_dir == str(tmp_path / f"run/version_{logger.version}") for logger in loggers)
    given = kind(tmp_path, name="run", version="mine")
    claim_run_folder(given)
    assert given.version == "mine"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["version_0", "version_1", "version_2"]


def test_a_folder_that_cannot_be_made_is_one_line(folder, capsys):
    (folder / "lightning_logs").write_text("a file")
    assert error_line(capsys, "fit", "--trainer.max_steps=1").startswith(
        "logger: its folder must be one that can be made"
    )
