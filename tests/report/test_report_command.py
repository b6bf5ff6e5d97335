"""The command: a page or an error in one line, and never half a file."""

import json
import re
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from moe_lightning.report.command import main
from moe_lightning.training.errors import plain_errors

RECORDS = Path(__file__).parents[2] / "docs/benchmarks"
DRAWN = sorted(path for path in RECORDS.glob("*.json") if re.match(r"(ep|link|layer|router|route|kernels)_", path.name))


def error_line(capsys, *arguments):
    with pytest.raises(SystemExit) as stop, plain_errors():
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.count("\n") == 1, printed
    return printed.rstrip("\n")


@pytest.mark.parametrize("record", DRAWN, ids=lambda path: path.stem)
def test_every_figure_names_its_record(record, tmp_path, capsys):
    main(["--bench", str(record), "--out", str(tmp_path / "deep/page.html")])
    page = (tmp_path / "deep/page.html").read_text()
    head = json.loads(record.read_text())
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert figures
    for figure in figures:
        assert record.name in figure
        assert head["commit"]["id"][:7] in figure
        assert (head["machine"]["gpus"] or [head["machine"]["cpu"]])[0] in figure
        assert head["command"].replace("&", "&amp;") in figure
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/page.html"]
    assert "runs: 0, records: 1" in capsys.readouterr().out


def test_both_links_stand_in_one_figure(tmp_path):
    names = ["ep_nvlink_h200.json", "ep_through_host_h200.json"]
    main(["--bench", *(str(RECORDS / name) for name in names), "--out", str(tmp_path / "page.html")])
    figures = re.findall(r"<figure>.*?</figure>", (tmp_path / "page.html").read_text(), re.DOTALL)
    [eta] = [figure for figure in figures if "eta_overlap" in figure]
    assert all(name in eta for name in names)
    assert "fused_select, NVLink" in eta
    assert "fused_select, through the host" in eta


def test_a_record_of_bench_scale(tmp_path):
    from moe_lightning.bench.__main__ import main as bench

    record, page = tmp_path / "scale.json", tmp_path / "page.html"
    pair = ["--ep", str(RECORDS / "ep_nvlink_h200.json"), "--link", str(RECORDS / "link_nvlink_h200.json")]
    assert bench(["scale", *pair, "--json", str(record)]) == 0
    main(["--bench", str(record), "--out", str(page)])
    assert "Not measured: a cost model" in page.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "must be a readable JSON record, got .* (no JSON in it)"),
        ("[1, 2]", "must be a record of moe_lightning.bench, got .*, which is another file"),
        ('{"name": "router", "results": {}}', "must be a record of moe_lightning.bench, got .*"),
        ('{"name": "ops", "results": {}, "machine": {}, "command": ""}', "must be a record of bench router, .*'ops'"),
        (
            '{"name": "link", "results": {"kind": "x", "rows": [{"bytes": 1}]}, "machine": {}, "command": ""}',
            "must hold what this version writes, got record.json (.*way.*); measure again",
        ),
        ('{"name": "ep", "results": {"cases": []}, "machine": {}, "command": ""}', "must hold settings, link, got .*"),
    ],
)
def test_a_record_that_is_not_ours(tmp_path, capsys, text, says):
    (tmp_path / "record.json").write_text(text)
    line = error_line(capsys, "--bench", tmp_path / "record.json", "--out", tmp_path / "page.html")
    assert re.match(rf"error: report: .*{says.replace('(', '.').replace(')', '.')}$", line), line
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_has_only_begun(tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("train/loss", 0.0, 0)
    main([str(tmp_path / "run"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == ["Loss"]
    assert "machine not recorded" in page


def test_what_cannot_be_read(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert "(No such file or directory)" in error_line(capsys, "--bench", tmp_path / "none.json", "--out", out)
    assert "which is no folder" in error_line(capsys, tmp_path / "none", "--out", out)
    assert "events.out.tfevents" in error_line(capsys, tmp_path, "--out", out)
    assert "nothing" not in error_line(capsys, "--out", out)
    assert "--out" in error_line(capsys, tmp_path)
    assert not out.exists()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    record = RECORDS / "link_nvlink_h200.json"
    assert "--out must be a writable file" in error_line(
        capsys, "--bench", record, "--out", tmp_path / "file/page.html"
    )
    assert "--out must be a writable file" in error_line(capsys, "--bench", record, "--out", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
