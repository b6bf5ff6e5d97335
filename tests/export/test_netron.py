"""The pair as Netron shows it: a box for the MoE layer, with its weights, that opens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from browser import Page, browser, opened
from tiny_export import VOCAB, difference, export, graph, tiny_moe


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, folder) of two MoE layers in the function form."""
    torch.manual_seed(0)
    model = tiny_moe(n_layers=2, num_experts=2, top_k=1)
    folder = tmp_path_factory.mktemp("function")
    assert export(model, folder, moe_form="function").largest_difference <= 1e-5
    return model, folder


def test_layers_that_are_alike_share_one_function(exported):
    model, folder = exported
    assert difference(folder, model, torch.randint(0, VOCAB, (4, 1))) <= 1e-5
    written = graph(folder)
    assert [function.name for function in written.functions] == ["MoELayer"]
    boxes = [node for node in written.graph.node if node.op_type == "MoELayer"]
    assert [box.name for box in boxes] == [f"network.blocks.{n}.feed_forward/MoELayer" for n in (0, 1)]
    for number, box in enumerate(boxes):
        names = ["router.weight", *(f"experts.{e}.{which}" for e in (0, 1) for which in ("up", "down"))]
        assert list(box.input)[1:] == [f"network.blocks.{number}.feed_forward.{name}" for name in names]
    assert {i.name for i in written.graph.initializer} >= {name for box in boxes for name in box.input[1:]}


@contextmanager
def in_netron(path: Path) -> Iterator[Page]:
    """The page that Netron serves for the file, its question about cookies answered, with the graph drawn."""
    netron = pytest.importorskip("netron", reason="needs netron: pip install netron")
    browser()
    address = netron.start(str(path), address=("localhost", 0), browse=False)
    try:
        with opened(f"http://{address[0]}:{address[1]}") as page:
            page.wait_for("document.querySelector('#message-button').offsetParent")
            page.evaluate("document.querySelector('#message-button').click()")
            page.wait_for("document.body.className == 'default'")
            yield page
    finally:
        netron.stop(address)


def boxes(page: Page, kind: str) -> list[str]:
    """Texts of the nodes of one type."""
    nodes = "[...document.querySelectorAll('.graph-node')].map(node => [...node.querySelectorAll('text')])"
    shown = page.evaluate(f"{nodes}.map(texts => texts.map(text => text.textContent))")
    return [" ".join(texts) for texts in shown if texts[0] == kind]


def test_netron_shows_each_moe_layer_as_a_box_that_opens(exported):
    with in_netron(exported[1] / "__model__") as page:
        layers = boxes(page, "MoELayer")
        assert len(layers) == 2
        assert all(f"experts.{expert}.down" in layer for expert in (0, 1) for layer in layers)
        assert boxes(page, "Gemm") == []
        items = "[...document.querySelectorAll('.node-item-type')]"
        opens = f"{items}.find(item => item.textContent.startsWith('ƒ'))"
        page.evaluate(f"{opens}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
        page.wait_for(f"{items}.some(item => item.textContent.startsWith('Gemm'))")
        assert len(boxes(page, "Gemm")) == 5  # the gate, and two products an expert
        assert boxes(page, "MoELayer") == []
