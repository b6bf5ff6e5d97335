import contextlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_run import run_cli, text

STEPS = 6


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """Folder with runs/naive_topk/version_0 and runs/sinkhorn/version_0, trained by the command line; not to change."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(text(4000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"]
    with contextlib.chdir(folder):
        for router in ("naive_topk", "sinkhorn"):
            named = [f"--trainer.logger.name={router}", f"--model.router={router}", "--router_timing.every_n_batches=1"]
            run_cli("fit", *flags, *logger, *named)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy of the runs, to change."""
    return shutil.copytree(trained / "runs", tmp_path / "runs")
