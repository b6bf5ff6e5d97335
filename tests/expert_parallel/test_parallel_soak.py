"""A thousand steps of layers spread over two ranks (gloo), with as many tokens as happen to be there, or none."""

import pytest
import soak_processes
import torch
import torch.multiprocessing as mp


@pytest.mark.slow
def test_nothing_grows_and_nobody_waits_for_a_rank_without_tokens(tmp_path):
    mp.start_processes(soak_processes.rank_process, (2, str(tmp_path)), 2, start_method="forkserver")
    for rank in range(2):
        before, after, idle = torch.load(tmp_path / f"rank-{rank}.pt")
        assert min(min(times) for times in idle) > 50  # every dispatcher: no rank, one, and both without tokens
        grown = {what: after[what] - before[what] for what in before}
        steps = soak_processes.STEPS - soak_processes.WARM_UP
        assert grown.pop("allocated") < 256 * steps  # less than a quarter of one token's row in each
        assert grown == {"files": 0, "threads": 0, "tensors": 0, "shared maps": 0}
