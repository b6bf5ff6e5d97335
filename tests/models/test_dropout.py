import pytest
import torch
from tiny_models import make_dense, make_moe, some_tokens


@pytest.mark.parametrize("make", [make_moe, make_dense])
def test_active_in_training_only(make):
    model, tokens_BS = make(dropout=0.3), some_tokens()
    model.train()
    assert not model(tokens_BS).logits_BSV.equal(model(tokens_BS).logits_BSV)
    model.eval()
    plain = make().eval()
    plain.load_state_dict(model.state_dict())
    assert model(tokens_BS).logits_BSV.equal(plain(tokens_BS).logits_BSV)


@pytest.mark.parametrize("make", [make_moe, make_dense])
def test_none_means_none(make):
    model, tokens_BS = make(dropout=0.0).train(), some_tokens()
    assert model(tokens_BS).logits_BSV.equal(model(tokens_BS).logits_BSV)


def test_repeats_with_the_seed():
    model, tokens_BS, runs = make_moe(dropout=0.3).train(), some_tokens(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(model(tokens_BS).logits_BSV)
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])
