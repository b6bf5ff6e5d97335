"""A run is read as it was logged, whatever of its files is there."""

import json

import pytest
import torch

from moe_lightning.report.read_run import read_run, run_folders, told_apart
from moe_lightning.report.summary import headline, keys, table

STEPS, BATCH, SEQ_LEN, TOP_K, LAYERS, EXPERTS = 6, 2, 16, 2, 2, 4


def test_all_that_a_run_says(trained):
    folder = trained / "runs/sinkhorn/version_0"
    run, summary = read_run(folder), json.loads((folder / "summary.json").read_text())
    assert (run.router, run.model, run.steps()) == ("sinkhorn", "decoder_moe", STEPS)
    assert (run.sizes["n_layers"], run.sizes["num_experts"]) == (LAYERS, EXPERTS)
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = sum(v.numel() for name, v in saved.items() if name.startswith("network."))
    assert run.parameters == weights > run.active_parameters
    assert run.last("val/loss") == pytest.approx(summary["metrics"]["val/loss"], rel=1e-6)
    assert run.events.curves["val/loss"].steps == [2, 5]
    assert (run.ranks, run.tokens_per_second()) == (1, summary["tokens_per_second"])
    assert run.time_ms("T_route") == summary["times_ms"]["T_route"]
    counts = [load.counts_LE for load in run.events.loads]
    assert [load.step for load in run.events.loads] == list(range(STEPS))
    assert {c.shape for c in counts} == {(LAYERS, EXPERTS)}
    assert all((c.sum(1) == BATCH * SEQ_LEN * TOP_K).all() for c in counts)
    assert run.source.name == "sinkhorn/version_0"
    assert run.source.machine
    assert run.source.command.startswith("python")


def test_the_table_holds_the_printed_skew(trained):
    runs = [read_run(folder) for folder in run_folders([trained])]
    rows = table(runs)
    for run, row in zip(runs, rows, strict=True):
        texts = [cell.text for cell in row.cells]
        assert texts[5] == f"{max(run.summary['max_over_mean_L']):.2f}"
        assert texts[6] == f"{max(run.summary['cv_L']):.2f}"
        assert texts[0] == f"{run.summary['metrics']['val/loss']:.3f}"
        assert row.checkpoint.name in run.summary["checkpoint"]
    for column in range(len(rows[0].cells)):
        assert any(row.cells[column].best for row in rows)
    cheapest = next(key for key in keys(runs) if key.what == "cheapest routing")
    assert cheapest.label == min(runs, key=lambda run: run.time_ms("T_route")).label
    title, facts = headline(runs, 0)
    assert title == "Two runs of decoder_moe"
    assert "2 layers" in facts
    assert "6 steps" in facts


def test_a_folder_above_and_one_named_twice(trained):
    paths = [trained / "runs", trained / "runs/sinkhorn", trained / "runs/sinkhorn/version_0"]
    assert [folder.parent.name for folder in run_folders(paths)] == ["naive_topk", "sinkhorn"]


def test_two_runs_of_a_router_are_told_apart(runs):
    (runs / "naive_topk/version_0").rename(runs / "naive_topk/version_1")
    named = told_apart([read_run(folder) for folder in run_folders([runs])] * 2)
    assert {run.label for run in named} == {"naive_topk naive_topk/version_1", "sinkhorn sinkhorn/version_0"}
    assert [run.label for run in told_apart(named[:1])] == ["naive_topk naive_topk/version_1"]


def test_an_unfinished_run_and_one_of_events_alone(runs):
    folder = runs / "sinkhorn/version_0"
    finished = read_run(folder)
    (folder / "summary.json").unlink()
    run = read_run(folder)
    assert (run.router, run.steps()) == ("sinkhorn", STEPS)
    logged = finished.events.curves["router_time/T_route_ms"].values
    assert run.time_ms("T_route") == pytest.approx(sum(logged) / len(logged))
    assert run.checkpoint.name.startswith("step=")
    for name in ("run.json", "config.yaml"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.router, run.parameters, run.source.machine) == ("no router", None, "")
    assert table([run])[0].cells[0].text == f"{finished.last('val/loss'):.3f}"


def test_the_exported_pair_is_shown_when_it_is_whole(runs):
    folder = runs / "naive_topk/version_0"
    best = read_run(folder).checkpoint
    assert best.onnx is None
    pair = folder / "checkpoints" / best.name.replace(".ckpt", ".onnx")
    pair.mkdir()
    (pair / "__model__").write_bytes(b"x" * 1000)
    assert read_run(folder).checkpoint.onnx is None
    (pair / "__params__").write_bytes(b"x" * 2000)
    found = read_run(folder).checkpoint
    assert (found.onnx, found.onnx_megabytes) == (pair.name, 0.003)


@pytest.mark.parametrize(("name", "text"), [("summary.json", "{"), ("run.json", "[1]"), ("config.yaml", "a: [")])
def test_a_broken_file_is_named(runs, name, text):
    (runs / "naive_topk/version_0" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^report: \S*{name} must .*, got [^\n]+$"):
        read_run(runs / "naive_topk/version_0")
