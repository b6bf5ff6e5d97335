"""A run is read as it was logged, whatever of its files is there."""

import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from written_run import write_run

from moe_lightning.report.compare import compare
from moe_lightning.report.read_run import disambiguate, read_run, run_folders
from moe_lightning.report.summary import headline, table

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
    assert run.events.curves["val/loss"].steps == [3, 6]  # optimizer steps taken
    assert (run.ranks, run.tokens_per_second()) == (1, summary["tokens_per_second"])
    assert run.time_ms("T_route") == summary["times_ms"]["T_route"]
    counts = [load.counts_LE for load in run.events.loads]
    assert [load.step for load in run.events.loads] == list(range(1, STEPS + 1))
    assert {c.shape for c in counts} == {(LAYERS, EXPERTS)}
    assert all((c.sum(1) == BATCH * SEQ_LEN * TOP_K).all() for c in counts)
    assert run.source.name == "sinkhorn/version_0"
    assert run.source.machine
    assert run.source.command.startswith("python")


def test_the_table_holds_what_was_logged(trained):
    folders, problems = run_folders([trained])
    runs = [read_run(folder) for folder in folders]
    assert problems == []
    found = table(runs, compare(runs))
    assert found.heads == [
        "steps",
        "tokens",
        "validation loss",
        "perplexity",
        "T_route, ms",
        "of the step",
        "step, ms",
        "load max/mean, evaluation",
        "load CV, evaluation",
        "tokens/s",
    ]
    for run, row in zip(runs, found.rows, strict=True):
        texts = [cell.text for cell in row.cells]
        assert texts[:2] == [str(STEPS), str(STEPS * BATCH * SEQ_LEN)]
        assert texts[2] == f"{run.summary['metrics']['val/loss']:.3f}"
        assert texts[7] == f"{run.last('expert_load_val/max_over_mean'):.2f}"
        assert texts[8] == f"{run.last('expert_load_val/cv'):.2f}"
        assert row.checkpoint.name in run.summary["checkpoint"]
        assert row.checkpoint.step == int(row.checkpoint.name.split("-")[0].removeprefix("step="))
    for column in range(2, len(found.heads)):
        assert any(row.cells[column].best for row in found.rows)
    cheapest = next(key for key in found.highlights if key.what == "cheapest routing")
    assert cheapest.label == min(runs, key=lambda run: run.time_ms("T_route")).label
    title, facts = headline(runs, 0)
    assert title == "Two runs of decoder_moe"
    assert "2 layers" in facts
    assert "6 steps" in facts


def test_a_folder_above_and_one_named_twice(trained):
    paths = [trained / "runs", trained / "runs/sinkhorn", trained / "runs/sinkhorn/version_0"]
    assert [folder.parent.name for folder in run_folders(paths)[0]] == ["naive_topk", "sinkhorn"]


def test_two_runs_of_a_router_are_told_apart(runs):
    (runs / "naive_topk/version_0").rename(runs / "naive_topk/version_1")
    named = disambiguate([read_run(folder) for folder in run_folders([runs])[0]] * 2)
    assert {run.label for run in named} == {"naive_topk naive_topk/version_1", "sinkhorn sinkhorn/version_0"}
    assert [run.label for run in disambiguate(named[:1])] == ["naive_topk naive_topk/version_1"]


def test_an_unfinished_run_and_one_of_events_alone(runs):
    folder = runs / "sinkhorn/version_0"
    finished = read_run(folder)
    (folder / "summary.json").unlink()
    run = read_run(folder)
    assert (run.router, run.steps()) == ("sinkhorn", STEPS)
    curves = finished.events.curves
    forward, backward = (curves[f"router_time/{way}/T_route_ms"].values for way in ("forward", "backward"))
    assert run.time_ms("T_route") == pytest.approx((sum(forward) + sum(backward)) / len(forward))
    assert run.time_ms("T_index") == pytest.approx(run.mean("router_time/forward/T_index_ms"))
    older = replace(run, events=run.events._replace(curves={"router_time/T_route_ms": curves["router_time/step_ms"]}))
    assert older.time_ms("T_route") == run.mean("router_time/step_ms")  # a run of before the directions were named
    assert run.checkpoint.name.startswith("step=")
    for name in ("run.json", "config.yaml"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.router, run.parameters, run.source.machine) == ("no router", None, "")
    found = table([run], compare([run]))
    assert found.rows[0].cells[found.heads.index("validation loss")].text == f"{finished.last('val/loss'):.3f}"
    assert "still training" in found.rows[0].state


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


def test_runs_of_equal_names_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path):
    folders = [
        write_run(tmp_path / "a/quickstart/version_0", "sinkhorn", 1),
        write_run(tmp_path / "b/quickstart/version_0", "sinkhorn", 1),
    ]
    named = disambiguate([read_run(folder) for folder in folders])
    assert [run.label for run in named] == ["sinkhorn a/quickstart/version_0", "sinkhorn b/quickstart/version_0"]
    assert [run.source.name for run in named] == ["a/quickstart/version_0", "b/quickstart/version_0"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", ""),
        ("summary.json", '{"router": "sinkhorn", "steps"'),
        ("summary.json", "[" * 100_000),
        ("summary.json", '{"loss": 1}'),
        ("summary.json", '{"steps": 3, "times_ms": {"T_route": "fast"}}'),
        ("summary.json", '{"steps": 3, "step_ms": NaN}'),
        ("summary.json", '{"steps": 3, "cv_L": 0.5}'),
        ("run.json", "[1]"),
        ("run.json", '{"command": "x", "machine": "big"}'),
        ("run.json", '{"command": "x", "ranks": "two"}'),
        ("config.yaml", "a: ["),
        ("config.yaml", "model: 3"),
        ("config.yaml", "model:\n  init_args: 3\n  data: 4\ndata: []"),
    ],
)
def test_a_file_that_is_not_ours_is_named_and_its_run_is_shown_without(runs, name, text):
    folder = runs / "naive_topk/version_0"
    (folder / name).write_text(text)
    run = read_run(folder)
    [problem] = run.problems
    assert re.match(
        rf"^report: \S*/{name} must hold what a run writes, got another \([^\n]+\); the run is shown without$", problem
    )
    found = table([run], compare([run]))
    assert found.rows[0].cells[found.heads.index("validation loss")].text != "\N{EN DASH}"


@pytest.mark.parametrize(
    "text", ["model: {init_args: 3}", "model: {init_args: {router: x, optimizer: [1]}}", "model: {class_path: 4}"]
)
def test_a_configuration_of_another_shape_is_no_crash(runs, text):
    folder = runs / "naive_topk/version_0"
    (folder / "config.yaml").write_text(text)
    run = read_run(folder)
    assert (run.problems, run.router, run.step_tokens()) == ([], "naive_topk", None)


def events_of(runs):
    [path] = (runs / "naive_topk/version_0").glob("events*")
    return path, path.read_bytes()


def test_a_damaged_event_file_is_named(runs):
    path, whole = events_of(runs)
    damaged = {
        "a flipped bit": whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
        "another file": b"no records at all in here",
        "a record that is no event": framed(b"\xff\xff garbage"),
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^report: an event file must be .*, got \S*{path.name} \([^\n]*$"):
            read_run(path.parent)


def test_an_event_file_that_ends_within_a_record_is_read_up_to_there(runs):
    path, whole = events_of(runs)
    length = len(whole)
    path.write_bytes(whole[: length * 2 // 3])
    run = read_run(path.parent)
    assert run.events.curves["train/loss"].steps[0] == 1
    assert len(run.problems) == 1  # the run has ended, so there is more that is not there
    assert "ends within a record" in run.problems[0]
    (path.parent / "summary.json").unlink()
    assert read_run(path.parent).problems == []  # it may be writing


@pytest.mark.parametrize("content", [b"", b"\x00"])
def test_event_files_without_a_figure(tmp_path, content):
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    with pytest.raises(ValueError, match=r"^report: event files must hold scalars, got .* without; .*$"):
        read_run(tmp_path)


def framed(data):
    head = struct.pack("<Q", len(data))
    return head + struct.pack("<I", masked_crc32c(head)) + data + struct.pack("<I", masked_crc32c(data))
