"""What the optimizer's configuration comes to: learning rates, decays and moments as literals, also after a resume."""

import pytest
import torch
from torch import nn

from moe_lightning.training import optimizer as optimizer_module
from moe_lightning.training.optimizer import OptimizerConfig, build_optimizer, build_schedule

PEAK = 0.5


def module() -> nn.Module:
    """A matrix and two vectors, all 2."""
    network = nn.Sequential(nn.Linear(3, 2), nn.RMSNorm(2))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 2.0)
    return network


def rates(steps: int, trainer_steps: float = 10, **config) -> list[float]:
    """The learning rate of each step, of the first group; the others have the same."""
    settings = OptimizerConfig(**{"learning_rate": PEAK, "warmup_steps": 2, **config})
    optimizer = build_optimizer(module(), settings)
    schedule = build_schedule(optimizer, settings, trainer_steps)
    taken = []
    for _ in range(steps):
        [rate] = {group["lr"] for group in optimizer.param_groups}
        taken.append(rate)
        optimizer.step()
        schedule.step()
    return taken


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(optimizer_module, "rank_zero_info", lines.append)
    return lines


def test_matrices_decay_and_vectors_do_not():
    network = module()
    optimizer = build_optimizer(network, OptimizerConfig(learning_rate=PEAK, weight_decay=0.2))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrix, bias, norm = network.parameters()
    assert matrix.flatten().tolist() == pytest.approx([2 * (1 - 0.5 * 0.2)] * 6)  # 1.8
    assert bias.tolist() == norm.tolist() == [2.0, 2.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]


def test_a_frozen_parameter_is_not_optimised():
    network = module()
    network[0].requires_grad_(False)
    assert [len(group["params"]) for group in build_optimizer(network, OptimizerConfig()).param_groups] == [0, 1]


@pytest.mark.parametrize(
    ("config", "first", "second"), [({}, 0.1, 0.05), ({"beta1": 0.75, "beta2": 0.5}, 0.25, 0.5)], ids=["usual", "own"]
)
def test_betas_weigh_the_moments(config, first, second):
    network = module()
    optimizer = build_optimizer(network, OptimizerConfig(**config))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        assert state["exp_avg"].flatten().tolist() == pytest.approx([first] * state["exp_avg"].numel())
        assert state["exp_avg_sq"].flatten().tolist() == pytest.approx([second] * state["exp_avg"].numel())


def test_warm_up_is_a_line_to_the_peak():
    assert rates(5, warmup_steps=4, trainer_steps=float("inf")) == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert rates(1, warmup_steps=0) == [0.5]


def test_cosine_values():
    #         warm-up    1.0, then 0.1 + 0.45 (1 + cos(pi i / 8)) of the peak
    shares = [0.5, 1.0, 1.0, 0.9657458, 0.8681981, 0.7222075, 0.55, 0.3777925, 0.2318019, 0.1342542, 0.1, 0.1]
    assert rates(12) == pytest.approx([PEAK * share for share in shares], rel=1e-6)


def test_wsd_values():
    shares = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1, 0.1]
    assert rates(12, schedule="wsd", decay_ratio=0.4) == pytest.approx([PEAK * share for share in shares])


def test_decay_steps_and_min_lr_ratio_set_the_end():
    assert rates(8, decay_steps=6, min_lr_ratio=0.0, trainer_steps=100)[6:] == [0.0, 0.0]
    assert rates(8, decay_steps=6, min_lr_ratio=0.5, schedule="wsd")[6:] == [0.25, 0.25]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_a_total_the_rate_stays_at_the_peak(schedule):
    assert rates(50, schedule=schedule, trainer_steps=float("inf"))[2:] == [PEAK] * 48


def run_until(step: int, total: float, **config):
    """Optimizer and schedule as they are saved after some steps."""
    settings = OptimizerConfig(**{"learning_rate": PEAK, "warmup_steps": 2, **config})
    network = module()
    optimizer = build_optimizer(network, settings)
    schedule = build_schedule(optimizer, settings, total)
    for _ in range(step):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def resume(saved, total: float, **config):
    optimizer, schedule = run_until(0, total, **config)
    optimizer.load_state_dict(saved[0].state_dict())
    schedule.load_state_dict(saved[1].state_dict())
    return optimizer, schedule


def test_a_resume_with_the_same_settings_is_silent_and_exact(said):
    optimizer, schedule = resume(run_until(4, 10), 10)
    whole, _ = run_until(4, 10)
    assert optimizer.param_groups[0]["lr"] == whole.param_groups[0]["lr"]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * 0.7222075)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], whole.state_dict()["state"][0]["exp_avg"])
    assert said == []


def test_a_resume_with_more_steps_says_how_the_learning_rate_jumps(said):
    optimizer, _ = resume(run_until(10, 10), 18)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.55 * PEAK)  # half of the longer cosine
    [line] = said
    assert "step 10 goes from 0.05 to 0.275" in line
    assert "ends at step 18, it ended at step 10" in line


def test_wsd_with_more_steps_goes_on_at_the_peak_before_its_decay(said):
    optimizer, _ = resume(run_until(6, 10, schedule="wsd", decay_ratio=0.4), 100, schedule="wsd", decay_ratio=0.4)
    assert optimizer.param_groups[0]["lr"] == PEAK
    assert said == []
    resume(run_until(9, 10, schedule="wsd", decay_ratio=0.4), 100, schedule="wsd", decay_ratio=0.4)
    assert "step 9 goes from 0.162 to 0.5" in said[0]


def test_settings_given_to_a_resume_take_effect_at_once(said):
    optimizer, _ = resume(run_until(4, 10), 10, learning_rate=0.25, weight_decay=0.3, beta1=0.7)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25 * 0.86819805] * 2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.95)}
    assert len(said) == 1


def test_the_schedule_of_a_checkpoint_of_before_is_read(said):
    """torch's LambdaLR, whose state had no total."""
    optimizer, schedule = run_until(0, 10)
    state = {"base_lrs": [PEAK, PEAK], "last_epoch": 6, "_step_count": 7, "_last_lr": [0.1, 0.1], "lr_lambdas": [None]}
    schedule.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.55 * PEAK)
    assert "it ended at step unknown" in said[0]


@pytest.mark.parametrize("max_norm", [None, 0.3, 1e6])
def test_our_adamw_is_torchs_and_each_takes_the_others_state(max_norm):
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizers = [
        optimizer_module.AdamW(ours.parameters(), **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    ]
    for step in range(6):
        gradients = [torch.randn_like(p) for p in ours.parameters()]
        for module_, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(module_.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            if max_norm is not None:
                optimizer_module.clip_by_norm(optimizer, max_norm)
            optimizer.step()
        assert all(p.grad.equal(g) for p, g in zip(ours.parameters(), gradients, strict=True))  # not clipped in place
        for mine, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)
        if step == 2:  # from now on with the state of the other
            states = [optimizer.state_dict() for optimizer in optimizers]
            assert states[0]["state"][0].keys() == states[1]["state"][0].keys()
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)


def test_our_adamw_runs_the_closure_and_clips_what_it_gives_once():
    weight = nn.Parameter(torch.ones(4))
    optimizer = optimizer_module.AdamW([weight], lr=0.1, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        if weight[0] == 1:
            optimizer_module.clip_by_norm(optimizer, 2.0)
        return loss

    assert optimizer.step(closure).item() == 12.0
    assert weight.tolist() == pytest.approx([0.95] * 4)  # gradients of 1: 1 - 0.1 * 1 / (1 + 1)
    optimizer.step(closure)
    assert weight.tolist() == pytest.approx([0.95 - 0.1 * 3 / 4] * 4)
