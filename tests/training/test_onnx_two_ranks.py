"""Experts spread over two ranks: the ONNX folder holds all of them; where it cannot be written no rank waits."""

import json
import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from scripts import run_forked

from moe_lightning.utils.checkpoint_file import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module")
def runs(folder):
    """Statuses of all runs by name."""
    done = run_forked(folder, str(Path(__file__).with_name("onnx_ranks.py")), str(folder), seconds=200)
    logs = "".join(f"{path}:\n{path.read_text()[-1500:]}" for path in folder.glob("*/log-*"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    return json.loads(done.stdout)


def test_all_experts_are_in_the_folder(runs, folder):
    assert runs["goes_on"] == [0, 0], (folder / "goes_on/log-0").read_text()[-3000:]
    saved = folder / "goes_on/saved"
    assert os.readlink(saved / "best") == os.readlink(saved / "last") == "step=4.onnx"
    assert sorted(os.listdir(saved)) == ["best", "last", "last.ckpt", "step=4.ckpt", "step=4.onnx"]
    graph = onnx.load(saved / "best/__model__", load_external_data=False).graph
    found = {i.name: torch.tensor(numpy_helper.to_array(i, str(saved / "best"))) for i in graph.initializer}
    stored = load_checkpoint(saved / "step=4.ckpt")["state_dict"]
    for name, value in stored.items():
        stem, _, which = name.rpartition(".")
        parts = [found[f"{stem}.{e}.{which}"] for e in range(4)] if ".experts." in name else found[name]
        assert torch.equal(torch.stack(parts) if isinstance(parts, list) else parts, value), name


def test_a_failure_is_told_by_rank_zero(runs, folder):
    logs = [(folder / f"goes_on/log-{rank}").read_text() for rank in (0, 1)]
    assert [log.count("training goes on without the ONNX folder of a checkpoint") for log in logs] == [1, 0]


def test_or_ends_both_ranks_in_one_line(runs, folder):
    assert runs["ends"] == [2, 2]
    for rank in (0, 1):
        log = (folder / f"ends/log-{rank}").read_text()
        [line] = [line for line in log.splitlines() if line.startswith("error: ")]
        assert "onnx_export: every checkpoint must become an ONNX folder, got" in line
        assert "No space left on device" in line
    assert sorted(os.listdir(folder / "ends/saved")) == ["last.ckpt", "step=2.ckpt"]
