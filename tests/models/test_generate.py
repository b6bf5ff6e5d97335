import pytest
import torch
from tiny_models import VOCAB, make_moe, some_tokens

from moe_lightning.models import LMOutput, generate


class Scripted(torch.nn.Module):
    """Logits of the next token from the last one; keeps what it was shown."""

    def __init__(self, table_VV: torch.Tensor):
        super().__init__()
        self.table_VV, self.shown = table_VV, []

    def forward(self, tokens_BS):
        self.shown.append(tokens_BS.tolist())
        return LMOutput(self.table_VV[tokens_BS])


def counting(vocab: int = 8) -> Scripted:
    """After n comes n + 1, surely."""
    return Scripted(torch.eye(vocab).roll(1, 1) * 50)


def draws(model, temperature, top_k, count=400) -> torch.Tensor:
    prompt = torch.zeros(count, 1, dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    return generate(model, prompt, 1, context_length=4, temperature=temperature, top_k=top_k, generator=generator)[:, 1]


def test_greedy_follows_the_largest_logit():
    out = generate(counting(), torch.tensor([[3], [6]]), 4, context_length=8, temperature=0)
    assert out.tolist() == [[3, 4, 5, 6, 7], [6, 7, 0, 1, 2]]


def test_greedy_is_the_same_every_time_and_agrees_with_the_model():
    model, prompt = make_moe().eval(), some_tokens(2, 5)
    first, second = (generate(model, prompt, 6, context_length=32, temperature=0) for _ in range(2))
    assert first.equal(second)
    assert first[:, :5].equal(prompt)
    with torch.no_grad():
        assert model(first[:, :-1]).logits_BSV[:, 4:].argmax(-1).equal(first[:, 5:])


def test_sampling_repeats_with_the_generator_and_not_without():
    model, prompt = make_moe().eval(), some_tokens(4, 5)
    runs = [
        generate(model, prompt, 8, context_length=32, top_k=None, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])
    assert ((runs[2] >= 0) & (runs[2] < VOCAB)).all()


def test_top_k_keeps_the_k_likeliest():
    model = Scripted(torch.tensor([[0.0, 3.0, 1.0, 2.9, -1.0]]).expand(5, 5))
    assert set(draws(model, 5.0, 2).tolist()) == {1, 3}
    assert set(draws(model, 5.0, 1).tolist()) == {1}
    assert set(draws(model, 5.0, None).tolist()) == {0, 1, 2, 3, 4}
    assert set(draws(model, 5.0, 99).tolist()) == {0, 1, 2, 3, 4}


def test_temperature_sharpens_and_flattens():
    model = Scripted(torch.tensor([[1.0, 0.0]]).expand(2, 2))
    shares = {t: (draws(model, t, None, 4000) == 0).float().mean().item() for t in (0.5, 1.0, 4.0)}
    for temperature, share in shares.items():
        assert share == pytest.approx(torch.tensor(1 / temperature).sigmoid().item(), abs=0.03)
    assert set(draws(model, 1e-3, None).tolist()) == {0}


def test_a_row_ends_at_its_first_end_of_text_whatever_the_others_do():
    out = generate(counting(), torch.tensor([[3], [1]]), 7, context_length=8, temperature=0, eos_id=5)
    assert out.tolist() == [[3, 4, 5, 5, 5], [1, 2, 3, 4, 5]]
    assert generate(counting(), torch.tensor([[3]]), 3, context_length=8, temperature=0, eos_id=2).shape == (1, 4)


def test_an_end_of_text_in_the_prompt_ends_nothing():
    out = generate(counting(), torch.tensor([[5, 3]]), 7, context_length=8, temperature=0, eos_id=5)
    assert out.tolist() == [[5, 3, 4, 5]]


@pytest.mark.parametrize("temperature", [1e-39, 1e-45, 1e-320, 1e-37, 1e-10])
def test_a_tiny_temperature_is_greedy(temperature):
    model = Scripted(torch.tensor([[0.0, 3.0, 1.0, 2.9, -100.0]]).expand(5, 5))
    assert set(draws(model, temperature, None, 50).tolist()) == {1}
    assert set(draws(model, temperature, 3, 50).tolist()) == {1}


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e308])
def test_a_huge_temperature_is_uniform_among_the_top_k(temperature):
    model = Scripted(torch.tensor([[0.0, 3.0, 1.0, 2.9, -1.0]]).expand(5, 5))
    shares = draws(model, temperature, 2, 2000).bincount(minlength=5) / 2000
    assert shares.tolist() == pytest.approx([0, 0.5, 0, 0.5, 0], abs=0.05)
    assert set(draws(model, temperature, 99).tolist()) == {0, 1, 2, 3, 4}


def test_logits_at_both_ends_of_fp32_can_be_drawn_from():
    largest = torch.finfo(torch.float32).max
    model = Scripted(torch.tensor([[-largest, largest]]).expand(2, 2))
    assert set(draws(model, 0.5, None, 50).tolist()) == {1}


def test_the_model_sees_at_most_the_context():
    model = counting()
    generate(model, torch.tensor([[0, 1, 2, 3]]), 3, context_length=3, temperature=0)
    assert model.shown == [[[1, 2, 3]], [[2, 3, 4]], [[3, 4, 5]]]


def test_leaves_no_graph_and_the_prompt_alone():
    model, prompt = make_moe().eval(), some_tokens(1, 3)
    kept = prompt.clone()
    assert not generate(model, prompt, 2, context_length=8).requires_grad
    assert prompt.equal(kept)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer .* got max_new_tokens=0"),
        ({"context_length": 0}, "context_length must be a positive integer .* got context_length=0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got temperature=nan"),
        ({"top_k": 0}, "top_k must be .* got top_k=0"),
        ({"top_k": -3}, "top_k must be .* got top_k=-3"),
    ],
)
def test_bad_options_are_one_line(options, named):
    arguments = {"max_new_tokens": 2, "context_length": 8, **options}
    with pytest.raises(ValueError, match=rf"^generate: {named}[^\n]*$"):
        generate(counting(), torch.tensor([[1]]), **arguments)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"^generate: a prompt needs at least one token, got an empty prompt"):
        generate(counting(), torch.empty(1, 0, dtype=torch.int64), 2, context_length=8)
