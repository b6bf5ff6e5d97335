"""README and docs: links lead somewhere, commands are accepted as written, the README's figures are their records'."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "third_party/README.md", *sorted(ROOT.glob("docs/*.md"))]
RECORDS = ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"^```\n(.*?)^```", re.M | re.S)
OURS = re.compile(r"(?:-m moe_lightning\.(\w+)|(train\.py)) (.*)")


class AcceptedError(Exception):
    """Raised in place of what a command does."""


def commands() -> list[str]:
    """Command lines of the pages' blocks, continued lines joined, comments and prompts off."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [line.removeprefix("$ ").split("    #")[0].strip() for line in lines]
    return sorted({line for line in found if OURS.search(line) and "runs/..." not in line})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert targets
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AcceptedError once a command's arguments are parsed, or what its parser raises."""
    from moe_lightning.bench.__main__ import COMMANDS
    from moe_lightning.export.__main__ import main as export
    from moe_lightning.report.__main__ import main as report
    from moe_lightning.training.cli import MoECLI

    def stop(*_: object) -> None:
        raise AcceptedError

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse_args(self, *arguments)
        raise AcceptedError

    monkeypatch.chdir(ROOT)
    module, _, rest = OURS.search(command).groups()
    braces = re.compile(r"(\S*)\{([\w,]+)\}(\S*)")
    rest = braces.sub(lambda m: " ".join(m[1] + word + m[3] for word in m[2].split(",")), rest)
    arguments = shlex.split(rest)
    if module is None:
        monkeypatch.setattr(MoECLI, "instantiate_classes", stop)
        MoECLI(arguments)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    if module == "bench":
        importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    {"export": export, "report": report}[module](arguments)


@pytest.mark.parametrize("command", commands())
def test_a_command_is_accepted(command, monkeypatch):
    with pytest.raises(AcceptedError):
        parse(command, monkeypatch)


@pytest.mark.parametrize("command", ["bench router", "export --export_onnx_dir x", "report runs --out x"])
def test_an_unknown_flag_is_not_accepted(command, monkeypatch):
    with pytest.raises(ValueError, match="--novel"):
        parse(f"python -m moe_lightning.{command} --novel 1", monkeypatch)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def layer_ms(name: str) -> dict[str, float]:
    """Forward and backward of each variant at the first size of a record of `bench layer`."""
    rows = json.loads((RECORDS / name).read_text())["results"]["cases"][0]["rows"]
    return {row["variant"]: row["forward + backward"]["ms"] for row in rows}


def test_the_readmes_figures_are_their_records():
    readme = (ROOT / "README.md").read_text()
    mixtral, liger = layer_ms("layer_h200.json"), layer_ms("layer_liger_h100.json")
    ours = "fused_select, cutlass"
    for times, theirs in ((mixtral, "transformers: Mixtral, grouped_mm"), (liger, "Liger: fused MoE")):
        row = f"| {times[ours]:.2f} ms | {times[theirs]:.2f} ms | {times[theirs] / times[ours]:.1f}x |"
        assert row in readme

    cases = json.loads((RECORDS / "router_h200.json").read_text())["results"]["cases"]
    route = {case["strategy"]: case["forward"]["parts"]["T_route"]["cold_us"] for case in cases}
    ratio = route["naive_topk"] / route["fused_select"]
    assert f"| {route['fused_select']:.1f} us | {route['naive_topk']:.0f} us | {ratio:.1f}x |" in readme

    step = json.loads((RECORDS / "step_d512_h200.json").read_text())["results"]["rows"]
    ms = {row["form"]: row["ms"] for row in step if row["model"] == "MoE"}
    fastest, eager = ms["compile+graph"], ms["eager"]
    assert f"| {fastest:.1f} ms | {eager:.1f} ms | {eager / fastest:.1f}x |" in readme
    [dense] = [row["ms"] for row in step if (row["model"], row["form"]) == ("dense", "compile+graph")]
    assert f"| {fastest:.1f} ms | {dense:.1f} ms | {fastest / dense:.2f}x as long |" in readme

    training = (RECORDS / "train_graphs_h200.txt").read_text()
    one, two = re.search(r"one GPU ([\d,]+) +two, ddp_ep_symmetric ([\d,]+)", training).groups()
    ratio = int(two.replace(",", "")) / int(one.replace(",", ""))
    assert f"| {two} | {one} | {ratio:.2f}x |" in readme

    for router, run in json.loads((RECORDS / "quickstart_cpu.json").read_text())["results"].items():
        losses = f"{run['loss_before']:.2f} → {run['metrics']['val/loss']:.2f}"
        times = f"{run['times_ms']['T_route']:.1f} ms | {100 * run['route_share']:.1f}% | {run['step_ms']:.0f} ms"
        assert f"| `{router}` | {losses} | {times} | {max(run['max_over_mean_L']):.2f} |" in readme
