"""A mask of padding through a decoder: what follows a sequence changes nothing of it, nor of loads and losses."""

import pytest
import torch

from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.routers import ROUTERS, load_balancing_loss, sequence_balance_loss, z_loss

SIZES = {
    "vocab_size": 50,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "mlp_hidden_dim": 24,
    "num_experts": 8,
    "top_k": 2,
}


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "sinkhorn"])
def test_padding_is_as_if_it_were_not_there(name, recompute):
    torch.manual_seed(0)
    model = DecoderMoE(DecoderMoEConfig(**SIZES, router=ROUTERS[name], recompute=recompute))
    tokens_BS = torch.randint(50, (1, 12))
    other_BS = tokens_BS.clone()
    other_BS[:, 9:] = 7
    mask_BS = torch.arange(12)[None] < 9
    outputs = [model(tokens, mask_BS=mask_BS) for tokens in (tokens_BS, other_BS)]
    alone = model(tokens_BS[:, :9])
    for output in outputs:
        torch.testing.assert_close(output.logits_BSV[:, :9], alone.logits_BSV)
        for padded, short in zip(output.routings, alone.routings, strict=True):
            assert padded.selection.tokens_per_expert_E.equal(short.selection.tokens_per_expert_E)
            for loss in (load_balancing_loss, sequence_balance_loss, z_loss):
                torch.testing.assert_close(loss(padded), loss(short))
    # What is computed of padding is not looked at, and has no gradient.
    loss = outputs[0].logits_BSV[mask_BS].square().mean() + sum(z_loss(r) for r in outputs[0].routings)
    model.zero_grad()
    loss.backward()
    padded = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (alone.logits_BSV.square().mean() + sum(z_loss(r) for r in alone.routings)).backward()
    for name_, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(padded[name_], parameter.grad, msg=lambda m, n=name_: f"{n}: {m}")
