"""The mean of gradients where no DDP takes it: DDP's own to the bit, once per step, under manual optimization too."""

from pathlib import Path
from types import SimpleNamespace

import gradient_ranks
import manual_ranks
import pytest
import torch
import torch.multiprocessing as mp
from scripts import run_forked_ranks

from moe_lightning.training.strategy import ExpertParallelStrategy, expert_parallel
from moe_lightning.training.strategy.average_gradients import average_gradients


@pytest.mark.slow
def test_the_mean_over_two_ranks_is_that_of_ddp_whichever_gradients_are_missing(tmp_path):
    mp.start_processes(gradient_ranks.rank_process, (2, str(tmp_path)), 2, start_method="forkserver")


def test_of_experts_that_no_other_rank_holds_they_are_divided_alone():
    given, missing = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    given.grad = gradient = torch.tensor([2.0, -4.0, 6.0])
    average_gradients([given, missing], 2, None)
    assert given.grad is gradient
    assert gradient.tolist() == [1, -2, 3]
    assert missing.grad is None
    average_gradients([], 2, None)


def test_nothing_is_reduced_before_the_last_micro_batch(monkeypatch):
    reduced = []
    monkeypatch.setattr(expert_parallel, "average_gradients", lambda parameters, *_: reduced.append(len(parameters)))
    monkeypatch.setattr(ExpertParallelStrategy, "world_size", 2)
    module, accumulating = torch.nn.Linear(2, 2), True
    module.automatic_optimization = True
    module.trainer = SimpleNamespace(fit_loop=SimpleNamespace(_should_accumulate=lambda: accumulating))
    module.bias.requires_grad_(False)
    strategies = [ExpertParallelStrategy(dispatch=dispatch) for dispatch in (None, "symmetric")]
    for strategy in strategies:
        strategy._lightning_module = module
        strategy.post_backward(torch.zeros(()))
    assert not reduced
    accumulating = False
    for strategy in strategies:
        strategy.post_backward(torch.zeros(()))
    assert reduced == [0, 1, 0]  # experts; dense ones that are trained, experts


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [None, "symmetric"])
def test_two_backwards_in_a_step_of_manual_optimization_are_those_of_one_rank(dispatch, tmp_path):
    """Experts on two ranks each; some parameters are used on rank zero alone."""
    script = str(Path(manual_ranks.__file__))
    done = run_forked_ranks(tmp_path, script, "2", str(dispatch), ranks=4, seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"manual-{rank}.pt") for rank in range(4)]
    alone = [manual_ranks.TwoBackwards(rank, spare=dispatch == "symmetric") for rank in range(4)]
    for other in alone[1:]:
        other.load_state_dict(alone[0].state_dict())
    for step in range(manual_ranks.STEPS):
        gradients = {name: torch.zeros_like(p) for name, p in alone[0].named_parameters()}
        for rank, module in enumerate(alone):
            module.zero_grad()
            for x_TD in manual_ranks.batches(rank)[step]:
                module.loss(x_TD).backward()
            for name, p in module.named_parameters():
                gradients[name] += 0 if p.grad is None else p.grad / 4
        with torch.no_grad():
            for module in alone:
                for name, p in module.named_parameters():
                    p -= manual_ranks.RATE * gradients[name]
    expected = dict(alone[0].named_parameters())
    start = dict(manual_ranks.TwoBackwards(0, spare=dispatch == "symmetric").named_parameters())
    for rank, saved in enumerate(ranks):
        assert saved["without"] == ([] if dispatch is None else ["never.weight", "never.bias"])
        for name, weight in saved["weights"].items():
            whole = expected[name]
            if "experts" in name:
                share = whole.shape[0] // 2
                whole = whole[rank % 2 * share : (rank % 2 + 1) * share]
            torch.testing.assert_close(weight, whole, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not expected["moe.experts.up"].allclose(start["moe.experts.up"], rtol=1e-3)
    assert not expected["moe.router.weight"].allclose(start["moe.router.weight"], rtol=1e-3)
