"""The page in a real browser: on a phone and a desk, in both colour schemes, with hostile names; alone in its file."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from browser import opened

from moe_lightning.report.__main__ import main

RECORDS = Path(__file__).parents[2] / "docs/benchmarks"
NAMES = ("ep_nvlink_h200", "ep_through_host_h200", "router_h200", "kernels_h200", "layer_h200")
BENCH = [str(RECORDS / f"{name}.json") for name in NAMES]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'{{7*7}}"


@pytest.fixture(scope="session")
def written(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    main([str(trained / "runs"), "--bench", *BENCH, "--out", str(path)])
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_charts_are_there_and_nothing_sticks_out(written, width):
    with opened(written.as_uri(), width=width) as page:
        page.wait_for("document.querySelectorAll('.plot').length > 0")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 200))") == []
        for kind, least in {".plot": 7, ".bars": 14, ".heat": 2, ".strips": 1, ".runs tbody": 2}.items():
            assert page.evaluate(f"document.querySelectorAll('{kind}').length") >= least, kind
        flat = "[...document.querySelectorAll('.area > svg, .segments, .cells')].filter(e => e.clientHeight < 8)"
        assert page.evaluate(f"{flat}.length") == 0
        sizes = "[...document.querySelectorAll('.frame span')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(page.evaluate(sizes)) >= 12  # text does not shrink with a chart
        assert page.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_names_as_long_as_can_be_stick_out_nowhere(runs, tmp_path, width):
    long = [shutil.copytree(runs / "sinkhorn/version_0", tmp_path / (letter * 250)) for letter in "ab"]
    record = Path(shutil.copy(RECORDS / "link_nvlink_h200.json", tmp_path / f"{'r' * 245}.json"))
    main([*map(str, long), "--bench", str(record), "--out", str(tmp_path / "page.html")])
    with opened((tmp_path / "page.html").as_uri(), width=width) as page:
        page.wait_for("document.querySelectorAll('.plot').length > 0")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        narrow = "[...document.querySelectorAll('.track, .area')].filter(e => e.clientWidth < 60)"
        assert page.evaluate(f"{narrow}.length") == 0


def test_both_colour_schemes_can_be_read(written):
    contrast = """(() => {
        const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const paper = light(getComputedStyle(document.documentElement).backgroundColor);
        const texts = 'h1, p, th, td, .ys span, .ends span, .name, summary, .highlights dd';
        return [...document.querySelectorAll(texts)].map(e => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
        }).reduce((a, b) => Math.min(a, b));
    })()"""
    papers = set()
    with opened(written.as_uri()) as page:
        for scheme in ("light", "dark"):
            page._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            papers.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
            assert page.evaluate(contrast) >= 3
    assert len(papers) == 2


def test_the_pointer_and_the_slider(written, trained):
    with opened(written.as_uri()) as page:
        move = (
            "new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 9, bubbles: true})"
        )
        at = (
            "{ const e = document.querySelector('%s'), box = e.getBoundingClientRect(); e.dispatchEvent(" + move + ") }"
        )
        page.evaluate(at % ".plot .area")
        assert page.evaluate("document.querySelector('#tip').hidden") is False
        assert re.match(r"step \d.*naive_topk.*", page.evaluate("document.querySelector('#tip').textContent"))
        page.evaluate(at % ".segments i")
        assert re.match(r"T_logit: [\d.]+ ms", page.evaluate("document.querySelector('#tip').textContent"))

        cells = "[...document.querySelector('.cells').children].map(e => e.className + e.style.opacity).join()"
        last = page.evaluate(cells)
        page.evaluate("document.querySelector('.slider').hidden || document.querySelector('.slider input').stepDown(5)")
        page.evaluate("document.querySelector('.slider input').dispatchEvent(new Event('input'))")
        assert page.evaluate("document.querySelector('.heat output').textContent") == "1"
        assert page.evaluate(cells) != last
        assert page.errors == []


def test_nothing_of_a_run_is_run(runs, tmp_path):
    folder = runs / "naive_topk/version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["class_path"] = f"x.{HOSTILE}"
    config["model"]["init_args"]["n_layers"] = HOSTILE
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, fields in {
        "run.json": {"command": HOSTILE, "date": HOSTILE},
        "summary.json": {"router": HOSTILE},
    }.items():
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))
    best = next((folder / "checkpoints").glob("step*.ckpt"))
    best.rename(best.with_name("<img src=x onerror=window.hacked=1>.ckpt"))
    hostile = folder.parent.rename(runs / "<script>window.hacked=1<") / "version_0"
    main([str(hostile), "--out", str(tmp_path / "page.html")])
    with opened((tmp_path / "page.html").as_uri()) as page:
        page.wait_for("document.querySelectorAll('.plot').length > 0")
        page.evaluate("document.querySelectorAll('.plot .area, [data-tip]').forEach(e => e.dispatchEvent("
                      "new PointerEvent('pointermove', {clientX: 300, clientY: 300})))")  # fmt: skip
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.scripts.length - document.querySelectorAll('script[type]').length") == 1
        assert HOSTILE in page.evaluate("document.querySelector('.runs').textContent")
        assert page.errors == []


def test_the_file_is_alone(written):
    page = written.read_text()
    assert re.findall(r"""(?:src|href)=|url\(|@import|https?://""", page) == []
    assert "default-src 'none'" in page
