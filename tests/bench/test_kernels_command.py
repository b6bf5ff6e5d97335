"""The benchmark of the kernels: a whole record on a GPU, one line without one."""

import json
import re

import pytest
import torch

from moe_lightning.bench import baselines as torch_routing
from moe_lightning.bench.__main__ import main
from moe_lightning.ops import build_index, native, permute, select, sinkhorn, unpermute


def test_without_a_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels"]) == 2
    assert re.fullmatch(r"bench.kernels: needs a CUDA device, .*bench ops`\n", capsys.readouterr().err)


def test_what_is_compared_is_the_same_work():
    torch.manual_seed(0)
    logits_TE, x_TD, k = torch.randn(50, 8), torch.randn(50, 6), 2
    selection = select(logits_TE, k)
    index = build_index(selection.expert_ids_TK, 8)
    for way in (torch_routing.topk_softmax, torch_routing.softmax_topk_renorm):
        weights_TK, ids_TK = way(logits_TE, k)
        assert torch.equal(ids_TK.int(), selection.expert_ids_TK)
        torch.testing.assert_close(weights_TK, selection.weights_TK)
    bias_E = torch.randn(8) / 4
    for groups in ({}, {"n_group": 4, "topk_group": 2}):
        biased = select(logits_TE, k, score="sigmoid", bias_E=bias_E, **groups)
        their_weights_TK, their_ids_TK = torch_routing.biased_topk(logits_TE, bias_E, k, **groups)
        assert torch.equal(their_ids_TK.int(), biased.expert_ids_TK)
        torch.testing.assert_close(their_weights_TK, biased.weights_TK)
    ends_E, perm_N, inverse_N = torch_routing.sort_scatter(ids_TK, 8)
    assert torch.equal(ends_E.int(), index.expert_offsets[1:])
    assert torch.equal(perm_N.int(), index.perm_N)
    assert torch.equal(inverse_N.int(), index.inverse_perm_N)
    rows_ND = torch_routing.gather_rows(x_TD, perm_N, k)
    assert torch.equal(rows_ND, permute(x_TD, index, k))
    y_TD = torch_routing.weighted_sum(rows_ND, weights_TK, inverse_N)
    torch.testing.assert_close(y_TD, unpermute(rows_ND, selection.weights_TK, index))
    plan_TE = torch_routing.sinkhorn_loop(logits_TE, 100)
    torch.testing.assert_close(
        plan_TE / plan_TE.sum(1, keepdim=True), sinkhorn(logits_TE, 100).exp(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.skipif(native.missing("cuda") is not None, reason=f"{native.missing('cuda')}")
def test_record(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert main(["kernels", "--rounds", "1", "--json", str(path)]) == 0
    assert "route with rows" in capsys.readouterr().out
    rows = json.loads(path.read_text())["results"]["rows"]
    for row in rows:
        assert row["graph_us"] > 0, row
        assert row["launches"] >= 1
        assert row["host_us"] > 0
    ours = {row["case"]: row for row in reversed(rows) if not row["variant"].startswith("torch")}
    launches = {case: row["launches"] for case, row in ours.items()}
    assert launches["select"] == launches["sinkhorn"] == launches["select backward"] == 1
    assert launches["select + index"] == 2
    assert launches["route with rows"] == 4
