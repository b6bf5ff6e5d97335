"""The command: a page or an error in one line, and never half a file."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from moe_lightning.report.__main__ import main
from moe_lightning.utils.errors import plain_errors

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


def test_records_of_other_sizes_or_of_one_link_are_not_one_line(tmp_path):
    names = ["ep_nvlink_h200.json", "ep_nvlink_slow_host_h200.json", "ep_16k_h200.json"]
    main(["--bench", *(str(RECORDS / name) for name in names), "--out", str(tmp_path / "page.html")])
    figures = re.findall(r"<figure>.*?</figure>", (tmp_path / "page.html").read_text(), re.DOTALL)
    small, large = [figure for figure in figures if "eta_overlap" in figure]
    assert "4,096 tokens on each of 2 ranks" in small
    assert "16,384 tokens on each of 2 ranks" in large
    assert "fused_select, NVLink (ep_nvlink_h200.json)" in small
    assert "fused_select, NVLink (ep_nvlink_slow_host_h200.json)" in small
    assert "fused_select, NVLink<" in large


def test_eta_far_below_zero_is_written_and_not_drawn(tmp_path):
    main(["--bench", str(RECORDS / "ep_nvlink_h200.json"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    [eta] = re.findall(r"<h4>eta_overlap</h4>.*?</script>", page, re.DOTALL)
    assert re.findall(r'<div class="ys">.*?</div>', eta)[0].count("\N{MINUS SIGN}1</span>") == 1
    for value in ("1.28", "2.56", "6.20", "4.75", "6.05"):
        assert f"\N{DOWNWARDS ARROW}\N{MINUS SIGN}{value}</span>" in eta


def test_an_eta_that_was_not_measured_is_no_point(tmp_path):
    record = json.loads((RECORDS / "ep_16k_h200.json").read_text())
    for case in record["results"]["cases"]:
        if case["chunks"] == 1:
            case["eta_overlap"] = None
    (tmp_path / "record.json").write_text(json.dumps(record))
    main(["--bench", str(tmp_path / "record.json"), "--out", str(tmp_path / "page.html")])
    [eta] = re.findall(r"<h4>eta_overlap</h4>.*?</script>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert len(re.findall(r'class="dot', eta)) == 3  # of 2, 4 and 8 chunks


def test_a_bar_longer_than_the_scale_has_a_break_and_its_figure(tmp_path):
    main(["--bench", str(RECORDS / "router_h200.json"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    bars = re.findall(r'<div class="bar">.*?</div>', page, re.DOTALL)
    [cut] = [bar for bar in bars if "break" in bar]
    assert "masked_matmul" in cut
    cases = json.loads((RECORDS / "router_h200.json").read_text())["results"]["cases"]
    [row] = [case["backward"]["parts"]["T_route"] for case in cases if case["strategy"] == "masked_matmul"]
    assert f"{row['cold_us']:,.0f}, roofline {row['floor_us']:,.0f}" in cut
    assert "longer than the scale, its figure on the right" in page


def test_times_measured_in_unlike_ways_say_so(tmp_path):
    record = json.loads((RECORDS / "router_h200.json").read_text())
    for case in record["results"]["cases"]:
        if case["strategy"] != "masked_matmul":  # as where a layer cannot be captured
            case["forward"]["parts"]["layer"] |= {"cold_us": None, "graph_us": None}
    (tmp_path / "router.json").write_text(json.dumps(record))
    main(["--bench", str(tmp_path / "router.json"), "--out", str(tmp_path / "page.html")])
    table = re.search(r"<table>.*?</table>", (tmp_path / "page.html").read_text(), re.DOTALL)[0]
    rows = re.findall(r"<tr>(<td.*?)</tr>", table)
    layers = [re.findall(r">([^<]*)</td>", row)[-1] for row in rows]
    assert [text.split()[-1] for text in layers] == ["eager", "cold", "eager", "eager"]


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


def listed(page):
    return re.findall(r"<li>(report: .*)</li>", page)


def write_all(arguments, tmp_path, capsys):
    """The page, and the warnings on the console, which are those on the page."""
    main([*map(str, arguments), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    warnings = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [html.unescape(line) for line in listed(page)] == warnings
    return page, warnings


def test_whatever_cannot_be_read_costs_itself_and_never_the_page(runs, tmp_path, capsys):
    def copy(name):
        return shutil.copytree(runs / "sinkhorn/version_0", tmp_path / name)

    (copy("no_summary") / "summary.json").write_text("")
    (copy("cut_run_json") / "run.json").write_text('{"command": "python')
    next(copy("empty_events").glob("events*")).write_bytes(b"")
    next(copy("damaged_events").glob("events*")).write_bytes(b"these are no events")
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "notes.txt").write_text("a file beside the runs")
    (tmp_path / "record.json").write_text("{")
    good = json.loads((RECORDS / "router_h200.json").read_text())
    good["results"]["cases"][0]["forward"]["parts"]["T_select"]["cold_us"] = "slow"
    (tmp_path / "foreign.json").write_text(json.dumps(good))
    (tmp_path / "nan.json").write_text(json.dumps(good).replace('"slow"', "NaN"))
    (tmp_path / "link.json").write_text('{"name": "link", "results": [], "machine": 3, "command": ""}')
    names = ["no_summary", "cut_run_json", "empty_events", "damaged_events", "empty_folder", "notes.txt"]
    records = [tmp_path / name for name in ("record.json", "foreign.json", "nan.json", "link.json")]
    arguments = [runs / "naive_topk", *(tmp_path / name for name in names)]
    page, warnings = write_all([*arguments, "--bench", *records, RECORDS / "router_h200.json"], tmp_path, capsys)
    for name in [*names, *(path.name for path in records)]:
        assert sum(name in line for line in warnings) == 1, name
    assert len(warnings) == len(names) + len(records)
    assert page.count('<tr class="files">') == 3  # naive_topk, and those of which the events are whole
    assert page.count("summary.json cannot be read; figures are of what is logged") == 1
    assert "router_h200.json" in page
    assert "nan%" not in page


def test_names_that_are_no_utf8_and_names_of_any_kind(runs, tmp_path, capsys):
    names = [b"caf\xe9", "\N{SNOWMAN}\N{ROCKET}".encode(), b"a\"b'<i>c&d", b"x" * 250, b"new\nline"]
    folders = [
        shutil.copytree(
            runs / "sinkhorn/version_0", Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "version_0"
        )
        for name in names
    ]
    record = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9cord.json"))
    shutil.copy(RECORDS / "router_h200.json", record)
    page, warnings = write_all([*folders, "--bench", record], tmp_path, capsys)
    assert warnings == []
    for name in (
        "caf\\xe9",
        "\N{SNOWMAN}\N{ROCKET}",
        "a&#34;b&#39;&lt;i&gt;c&amp;d",
        "x" * 250,
        "new\nline",
        "r\\xe9cord.json",
    ):
        assert name in page, name
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.html"))
    main([str(folders[0]), "--out", str(out)])
    assert "\\xe9.html" in capsys.readouterr().out
    assert out.exists()
    (folders[0] / "summary.json").write_text("{")
    _, [warning] = write_all(folders, tmp_path, capsys)
    assert "caf\\xe9/version_0/summary.json" in warning


def test_a_path_that_is_not_there_is_a_slip_of_the_command(runs, tmp_path, capsys):
    line = error_line(capsys, runs, tmp_path / "none", "--out", tmp_path / "page.html")
    assert "none, which is not there" in line
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_is_still_writing(runs, tmp_path, capsys):
    folder = runs / "naive_topk/version_0"
    (folder / "summary.json").unlink()
    path = next(folder.glob("events*"))
    path.write_bytes(path.read_bytes()[:-10])
    page, warnings = write_all([runs], tmp_path, capsys)
    assert warnings == []
    assert page.count("no summary.json: still training") == 1


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
    assert "which is not there" in error_line(capsys, tmp_path / "none", "--out", out)
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
