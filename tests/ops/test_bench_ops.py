"""The benchmark of the ops runs, writes a whole record, and answers a wrong command in one line."""

import json
import re

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.commands import host


def test_record(tmp_path, capsys):
    path = tmp_path / "new" / "ops.json"
    assert main(["ops", "--tokens", "16", "--experts", "8", "--rounds", "1", "--json", str(path)]) == 0
    assert "argsort" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert {"name", "date", "command", "commit", "machine", "versions", "results"} == set(record)
    assert record["machine"]["cores"] >= 1
    cases = record["results"]["cases"]
    assert {(case["case"], case["tokens"]) for case in cases} >= {("select", 16), ("select", 1), ("index", 16)}
    for case in cases:
        assert all(us > 0 for us in case["median_us"].values())
        assert case["times_native"]["native"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["ops.json"]


def test_host_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 1)
    path = tmp_path / "host.json"
    assert main(["host", "--device", "cpu", "--json", str(path)]) == 0
    assert "allocation" in capsys.readouterr().out
    us = json.loads(path.read_text())["results"]["us"]
    assert {"select", "an allocation (of four)", "the native call: bindings and launch"} < set(us)
    assert all(value > 0 for value in us.values())


def test_unknown_command(capsys):
    assert main(["timming"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"bench: command must be one of .*ops.*, got 'timming'; did you mean timing\?\n", error)


def test_bad_size_is_one_line(capsys):
    assert main(["ops", "--experts", "2", "--top_k", "3"]) == 2
    assert "top_k must be in [1, num_experts], got top_k=3, num_experts=2" in capsys.readouterr().err
