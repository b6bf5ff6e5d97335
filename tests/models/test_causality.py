import pytest
import torch
from tiny_models import MAKERS, VOCAB, make_moe, some_tokens

from moe_lightning.routers import ROUTERS

MODELS = {**MAKERS, **{f"decoder_moe {name}": lambda name=name: make_moe(name) for name in ROUTERS}}
LOOKING_AHEAD = [f"decoder_moe {name}" for name, router in ROUTERS.items() if router.looks_ahead]
causal_model = pytest.mark.parametrize("model", [name for name in MODELS if name not in LOOKING_AHEAD])


@causal_model
def test_a_token_changes_no_logits_before_it(model):
    model = MODELS[model]().eval()
    tokens_BS = some_tokens()
    before = model(tokens_BS).logits_BSV
    for t in (0, 5, 11):
        changed_BS = tokens_BS.clone()
        changed_BS[0, t] = (changed_BS[0, t] + 1) % VOCAB
        after = model(changed_BS).logits_BSV
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)
        assert (after[0, t] - before[0, t]).abs().max() > 1e-3


@pytest.mark.parametrize("model", LOOKING_AHEAD)
def test_what_looks_ahead_is_no_language_model(model):
    model = MODELS[model]().eval()
    tokens_BS = some_tokens()
    before = model(tokens_BS).logits_BSV
    tokens_BS[0, 11] = (tokens_BS[0, 11] + 1) % VOCAB
    assert (model(tokens_BS).logits_BSV[:, :11] - before[:, :11]).abs().max() > 1e-6


@pytest.mark.parametrize("model", ["transformer_decoder", "decoder_moe"])
def test_the_past_is_seen(model):
    model = MODELS[model]().eval()
    tokens_BS = some_tokens(1)
    changed_BS = tokens_BS.clone()
    changed_BS[0, 3] = (changed_BS[0, 3] + 1) % VOCAB
    difference = model(tokens_BS).logits_BSV - model(changed_BS).logits_BSV
    assert (difference[0, 3:].abs().amax(1) > 1e-6).all()


def test_the_mlp_sees_the_current_token_only():
    model = MAKERS["mlp"]()
    left, right = model(torch.tensor([[1, 2, 3]])).logits_BSV, model(torch.tensor([[9, 2, 9]])).logits_BSV
    torch.testing.assert_close(left[:, 1], right[:, 1])


@causal_model
def test_sequences_of_a_batch_do_not_meet(model):
    model = MODELS[model]().eval()
    tokens_BS = some_tokens(3)
    alone = torch.cat([model(row[None]).logits_BSV for row in tokens_BS])
    torch.testing.assert_close(model(tokens_BS).logits_BSV, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["transformer_decoder", "decoder_moe"])
def test_order_matters(model):
    model = MODELS[model]().eval()
    last = [model(torch.tensor([prompt])).logits_BSV[0, -1] for prompt in ([1, 2, 3], [2, 1, 3])]
    assert (last[0] - last[1]).abs().max() > 1e-6
