"""Every op on a device that is not the current one, and with tensors of two devices. Catalogue row 28."""

import pytest
import torch
from ops_checks import NEEDS_GPU

from moe_lightning.ops import RowWeights, build_index, expert_ffn, permute, select, sinkhorn, sum_rows, unpermute

T, E, K, D, F = 40, 4, 2, 64, 64


def tensors(device, dtype=torch.float32):
    """Of a layer's pass, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) / 4).to(device, dtype).requires_grad_()

    logits_TE = torch.randn(T, E, generator=generator).to(device)
    index = build_index(select(logits_TE.detach(), K).expert_ids_TK, E)
    return logits_TE, index, draw(T, D), draw(T, K), draw(E, 2 * F, D), draw(E, D, F)


def whole_layer(device, dtype):
    """What all ops make of them, and the gradients."""
    logits_TE, index, x_TD, weights_TK, up, down = tensors(device, dtype)
    balanced_TE = sinkhorn(logits_TE)
    rows_ND = permute(x_TD, index, K)
    plain_ND = expert_ffn(rows_ND, up, down, index.expert_offsets)
    weighted_ND = expert_ffn(rows_ND, up, down, index.expert_offsets, row_weights=RowWeights(weights_TK, index.perm_N))
    y_TD = unpermute(plain_ND, weights_TK, index)
    also_TD = sum_rows(weighted_ND, index, K)
    gradients = torch.autograd.grad((y_TD + also_TD).square().sum(), (x_TD, weights_TK, up, down))
    return [balanced_TE, *index, rows_ND, plain_ND, y_TD, also_TD, *gradients]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_second_device_while_the_first_is_current(dtype):
    with torch.cuda.device(0):
        first, second = whole_layer("cuda:0", dtype), whole_layer("cuda:1", dtype)
        assert torch.cuda.current_device() == 0
    assert {value.device for value in second} == {torch.device("cuda:1")}
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def calls(there, elsewhere):
    """Of every op that takes several tensors, one of which is elsewhere."""
    logits_TE, index, x_TD, weights_TK, up, down = there
    other_logits_TE, other_index, other_x_TD, other_weights_TK, other_up, other_down = elsewhere
    rows_ND, other_rows_ND = (x.detach().repeat(K, 1) for x in (x_TD, other_x_TD))
    offsets, bias_E = index.expert_offsets, other_logits_TE[0].contiguous()
    row_weights = RowWeights(weights_TK, index.perm_N)
    return {
        "select bias": lambda: select(logits_TE, K, bias_E=bias_E),
        "select scores": lambda: select(logits_TE, K, scores_TE=other_logits_TE),
        "permute": lambda: permute(other_x_TD, index, K),
        "unpermute rows": lambda: unpermute(other_rows_ND, weights_TK, index),
        "unpermute weights": lambda: unpermute(rows_ND, other_weights_TK, index),
        "unpermute index": lambda: unpermute(rows_ND, weights_TK, other_index),
        "sum_rows": lambda: sum_rows(other_rows_ND, index, K),
        "expert_ffn rows": lambda: expert_ffn(other_rows_ND, up, down, offsets),
        "expert_ffn up": lambda: expert_ffn(rows_ND, other_up, down, offsets),
        "expert_ffn down": lambda: expert_ffn(rows_ND, up, other_down, offsets),
        "expert_ffn expert_offsets": lambda: expert_ffn(rows_ND, up, down, other_index.expert_offsets),
        "expert_ffn row_weights": lambda: expert_ffn(
            rows_ND, up, down, offsets, row_weights=row_weights._replace(weights_TK=other_weights_TK)
        ),
        "expert_ffn perm": lambda: expert_ffn(
            rows_ND, up, down, offsets, row_weights=row_weights._replace(perm_N=other_index.perm_N)
        ),
        "expert_ffn out": lambda: expert_ffn(rows_ND, up, down, offsets, out=other_rows_ND),
    }


@pytest.mark.parametrize("devices", [("cpu", "meta"), pytest.param(("cuda", "cpu"), marks=NEEDS_GPU)])
def test_tensors_of_two_devices_are_refused_in_one_line(devices):
    there = tensors(devices[0])
    elsewhere = [value.to(devices[1]) for value in (there[0], *there[1], *there[2:])]
    logits_TE, offsets, perm_N, inverse_N, *others = elsewhere
    for name, call in calls(there, (logits_TE, type(there[1])(offsets, perm_N, inverse_N), *others)).items():
        with pytest.raises(ValueError, match=r"tensors must be on one device") as raised:
            call()
        said = str(raised.value)
        assert said.startswith(f"ops.{name.split()[0]}: "), name
        assert f" on {devices[1]}" in said, name
        assert "\n" not in said, name
