"""Experiment: the gate fused with the selection, beside cuBLAS and the select kernel. Median of CUDA graph replays."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from moe_lightning.bench.record import write_record
from moe_lightning.bench.router.gpu_timing import replay_us, side_stream
from moe_lightning.ops import build_index, native, select

TOKENS, D_MODEL, EXPERTS, TOP_K = 4096, 4096, 64, 2
ROUNDS, COPIES, COLD_SETS = 25, 60, 6


def main(arguments: list[str]) -> None:
    """Check, measure, print, record."""
    parser = argparse.ArgumentParser(prog="python -m moe_lightning.bench gate_select", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    flags = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    weight_ED = (torch.randn(EXPERTS, D_MODEL, device=device) * 0.02).half()
    inputs = [torch.randn(TOKENS, D_MODEL, device=device).half() for _ in range(COLD_SETS)]
    logits_TE = torch.empty(TOKENS, EXPERTS, device=device, dtype=torch.half)
    weights_TK = torch.empty(TOKENS, TOP_K, device=device)
    ids_TK, counts_E, invalid = (
        torch.empty(s, device=device, dtype=torch.int32) for s in ((TOKENS, TOP_K), EXPERTS, ())
    )

    def gate(x_TD: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_TD, weight_ED)

    def fused(x_TD: Tensor) -> Tensor:
        native.module("cuda").gate_select(
            x_TD.data_ptr(), weight_ED.data_ptr(), logits_TE.data_ptr(), D_MODEL, weights_TK.data_ptr(),
            ids_TK.data_ptr(), counts_E.data_ptr(), invalid.data_ptr(), TOKENS, EXPERTS, TOP_K, 2, *native.place(x_TD),
        )  # fmt: skip
        return ids_TK

    calls = {
        "gate (cuBLAS)": gate,
        "gate, select": lambda x_TD: select(gate(x_TD), TOP_K).expert_ids_TK,
        "gate and select fused": fused,
        "gate, select, index": lambda x_TD: build_index(select(gate(x_TD), TOP_K).expert_ids_TK, EXPERTS),
        "gate and select fused, index": lambda x_TD: build_index(fused(x_TD), EXPERTS),
    }
    results = {}
    with torch.no_grad(), side_stream(device):
        fused(inputs[0])
        expected = inputs[0].double() @ weight_ED.double().T
        error = ((logits_TE - expected).norm() / expected.norm()).item()
        assert error < 1e-3, error
        assert torch.equal(select(logits_TE, TOP_K).expert_ids_TK, ids_TK)
        for name, call in calls.items():
            warm = replay_us([lambda call=call: call(inputs[0])] * COPIES, ROUNDS, COPIES)
            cold_calls = [lambda call=call, x_TD=x_TD: call(x_TD) for x_TD in inputs] * (COPIES // COLD_SETS)
            cold = replay_us(cold_calls, ROUNDS, COPIES)
            results[name] = {"graph_us": warm, "cold_us": cold}
            print(f"{name:30s} {warm:7.2f} us warm {cold:7.2f} us cold")
    if flags.json:
        write_record(flags.json, "gate_select", {"relative_error_of_logits": error, "results": results})
