"""Each example runs on a CPU in seconds and learns; the pages that show one quote its file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import own_module, own_router, plain_loop

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: A block of Python below a paragraph that links to an example is quoted from it.
QUOTE = re.compile(r"\(((?:\.\./)?examples/\w+\.py)\)(?:(?!\n\n|\]\().)*\n\n```python\n(.*?)^```", re.M | re.S)


def test_own_module(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert own_module.main() < 0.9  # of four classes: ln 4 = 1.39 knows nothing
    shown = capfd.readouterr().out
    assert "T_route" in shown
    assert "max/mean" in shown


def test_plain_loop():
    losses = plain_loop.main(device="cpu")
    assert losses[-1] < 0.1 * losses[0]


def test_plain_loop_is_the_layer():
    from moe_lightning import Experts, FusedSelect, MoE

    layer = MoE(
        FusedSelect(plain_loop.D, plain_loop.E, plain_loop.K), Experts(plain_loop.D, plain_loop.F, plain_loop.E)
    )
    x_TD = torch.randn(plain_loop.T, plain_loop.D)
    y_TD = plain_loop.moe_layer(x_TD, layer.router.weight, layer.experts.up, layer.experts.down)
    torch.testing.assert_close(y_TD, layer(x_TD)[0])


def test_own_router():
    losses = own_router.main()
    assert losses[-1] < 0.6 * losses[0]
    with pytest.raises(ValueError, match=r"own_router: scale must be positive, got 0.0"):
        own_router.SigmoidTopK(8, 4, 2, scale=0.0)


def test_own_router_keeps_the_contract():
    router = own_router.SigmoidTopK(16, 8, 3, scale=2.0)
    selection = router(torch.randn(64, 16)).selection
    torch.testing.assert_close(selection.weights_TK.sum(1), torch.full((64,), 2.0))
    assert all(len(set(row)) == 3 for row in selection.expert_ids_TK.tolist())
    assert int(selection.tokens_per_expert_E.sum()) == 64 * 3


def test_the_examples_are_programs(tmp_path):
    """Their own commands, as their first lines give them."""
    paths = sorted((ROOT / "examples").glob("*.py"))
    for path in paths:
        assert f"\npython examples/{path.name}\n" in path.read_text()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Without `main`, which the tests above call; one after the other, for one start of Python.
    code = f"import runpy; [runpy.run_path(path) for path in {[str(path) for path in paths]!r}]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_quoted_text_is_the_files():
    quotes = [(page, *match.groups()) for page in PAGES for match in QUOTE.finditer(page.read_text())]
    for page, name, text in quotes:
        example = (page.parent / name).resolve()
        assert text in example.read_text(), f"{page.name} quotes what {name} does not hold:\n{text}"
    blocks = sum(page.read_text().count("```python") for page in PAGES)
    assert len(quotes) == blocks, "a block of Python needs a link to its example in the paragraph above"
    assert {Path(name).name for _, name, _ in quotes} == {path.name for path in (ROOT / "examples").glob("*.py")}
