"""Training, benchmarks and the export where the packages of an extra are not installed."""

import re
import runpy
import sys
import tomllib

import pytest
from scripts import run_script
from tiny_run import ROOT, TINY, error_line

from moe_lightning.bench.__main__ import main as bench
from moe_lightning.utils.checks import check_installed

EXPORT, PLOTS = ("onnx", "onnxruntime", "onnxscript"), ("matplotlib",)
SCRIPT = f"""
import importlib.metadata
import sys

absent = {(*EXPORT, "onnx_ir", *PLOTS)}
sys.modules |= dict.fromkeys(absent)
distribution = importlib.metadata.distribution


def of_those_there(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)


importlib.metadata.distribution = of_those_there  # by which torchmetrics looks for matplotlib
from moe_lightning.training.cli import MoECLI

MoECLI()
"""


@pytest.fixture
def absent(monkeypatch):
    for package in (*EXPORT, *PLOTS):
        monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.slow
def test_a_run_needs_no_extra(folder):
    (folder / "without.py").write_text(SCRIPT)
    run = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--expert_load.image_every_n_steps=0"]
    done = run_script(folder, "without.py", "fit", *TINY, *run)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_needs_one_says_how_to_get_it(folder, absent, monkeypatch, capsys):
    assert error_line(capsys, "fit", "--trainer.max_steps=1") == (
        "expert_load.image_every_n_steps: matplotlib must be installed, got no matplotlib; run "
        "`pip install -e '.[plots]'` in the repository"
    )
    for name in [name for name in sys.modules if name.startswith("moe_lightning.export")]:
        monkeypatch.delitem(sys.modules, name)
    assert error_line(capsys, "fit", "--trainer.max_steps=1", "--onnx_export.enabled=true") == (
        "export: onnx, onnxruntime, onnxscript must be installed, got no onnx, onnxruntime, onnxscript; run "
        "`pip install -e '.[export]'` in the repository"
    )
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("moe_lightning.export", run_name="__main__")
    assert capsys.readouterr().err.startswith(
        "error: export: onnx, onnxruntime, onnxscript must be installed, got no onnx"
    )
    with pytest.raises(SystemExit, match="0"):
        bench(["router", "--help"])
    assert bench(["router", "--plot", "router.png"]) == 2
    assert capsys.readouterr().err == (
        "bench.router: --plot: matplotlib must be installed, got no matplotlib; run `pip install -e '.[plots]'` in the "
        "repository\n"
    )


def test_a_report_needs_no_onnx(tmp_path, absent, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("moe_lightning.export", "moe_lightning.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(
        sys, "argv", ["report", "--bench", str(ROOT / "docs/benchmarks/router_h200.json"), "--out", "x.html"]
    )
    monkeypatch.chdir(tmp_path)
    runpy.run_module("moe_lightning.report", run_name="__main__")
    assert (tmp_path / "x.html").stat().st_size > 10_000


def test_an_extra_has_these_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [re.match(r"\w+", need)[0] for need in extras["export"]] == list(EXPORT)
    assert [re.match(r"\w+", need)[0] for need in extras["plots"]] == list(PLOTS)


def test_only_what_is_missing_is_named(monkeypatch):
    check_installed("x", "plots", "json")
    monkeypatch.setitem(sys.modules, "csv", None)
    with pytest.raises(ValueError, match=r"x: json, csv must be installed, got no csv; run `pip install -e '.\[y\]'`"):
        check_installed("x", "y", "json", "csv")
