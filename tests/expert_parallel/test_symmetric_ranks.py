"""Ranks that write to each other's memory: as by exchanges and on one rank; graphs; a rank that is gone."""

from types import SimpleNamespace

import pytest
import symmetric_processes
import torch
import torch.multiprocessing as mp

from moe_lightning.expert_parallel.symmetric import MAX_WAITING_PASSES, BufferPool, SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import Experts, MoE
from moe_lightning.ops import native
from moe_lightning.routers import ROUTERS

CHECKS = [name for name in vars(symmetric_processes) if name.startswith("check_")]
#: What the CPU can show: it has no graphs, nothing runs beside anything, and the group's own timeout ends a wait.
ON_CPU = ("check_one_rank", "check_halves", "check_passes_alive", "check_frozen_tokens", "check_more_tokens")


def run(check, world, folder, device, folded=False):
    arguments = (world, str(folder), check, device, folded)
    start_method = "forkserver" if device == "cpu" else "spawn"
    mp.start_processes(symmetric_processes.rank_process, arguments, world, start_method=start_method)


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("check", ON_CPU)
def test_on_the_cpu(check, folded, tmp_path):
    run(check, 2, tmp_path, "cpu", folded)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(native.missing("cuda") is not None, reason=f"{native.missing('cuda')}")
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("check", CHECKS)
def test_on_gpus(check, world, tmp_path):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, torch sees {torch.cuda.device_count()}")
    run(check, world, tmp_path, "cuda")


def test_a_buffer_is_free_once_its_pass_is_released_and_a_captured_one_never():
    capturing = False
    pool = BufferPool(SimpleNamespace(is_capturing=lambda: capturing))

    def acquire():
        number = pool.acquire()
        return number, pool.buffer(number)

    (first, _), (second, _), (third, _) = passes = [acquire() for _ in range(3)]
    assert [buffer for _, buffer in passes] == [0, 1, 2]
    pool.release(second)
    pool.release(second)  # once is enough
    assert acquire()[1] == 1
    pool.release(first)
    capturing = True
    captured, buffer = acquire()
    assert buffer == 0
    capturing = False
    pool.release(captured)
    assert pool.buffer(captured) == 0
    assert acquire()[1] == 3
    pool.release(third)
    assert acquire()[1] == 2


def test_passes_without_a_backward_and_a_second_backward_are_errors(memory_of_one):
    moe = MoE(ROUTERS["naive_topk"](8, 4, 2), Experts(8, 8, 4), SymmetricDispatcher(4, 2, memory_of_one))
    x_TD = torch.randn(5, 8)
    with torch.no_grad():
        for _ in range(2 * MAX_WAITING_PASSES):
            moe(x_TD)
    outputs = [moe(x_TD)[0] for _ in range(MAX_WAITING_PASSES)]
    with pytest.raises(ValueError, match=r"^dispatch: symmetric has buffers for 8 passes .* run backward first, or"):
        moe(x_TD)
    outputs[0].sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match=r"^dispatch: a pass by dispatch=symmetric has one backward, .* again$"):
        outputs[0].sum().backward()
    moe(x_TD)  # takes the buffers of the first
    for wanted in (moe.experts.up, moe.experts.down, moe.router.weight):  # whichever gradient is asked for
        torch.autograd.grad(outputs.pop().sum(), wanted)
        moe(x_TD)


@pytest.fixture
def memory_of_one(group_of_one):
    return SymmetricMemory.create(group_of_one, torch.device("cpu"), 5)


def test_bad_arguments(memory_of_one):
    with pytest.raises(
        ValueError, match=r"^dispatch: symmetric moves all rows in one kernel, got overlap_chunks=2; set"
    ):
        SymmetricDispatcher(4, 2, memory_of_one, chunks=2)
    memory_of_one.world = 3
    with pytest.raises(
        ValueError, match=r"^dispatch: num_experts must be a multiple .* num_experts=4, ranks=3; choose"
    ):
        SymmetricDispatcher(4, 2, memory_of_one)


def test_scratch_is_shared_and_grows(memory_of_one):
    small = memory_of_one.scratch("combine", (4, 3), torch.float32)
    assert memory_of_one.scratch("combine", (2, 3), torch.float32).own.data_ptr() == small.own.data_ptr()
    large = memory_of_one.scratch("combine", (5, 3), torch.float32)
    assert large.own.shape == (5, 3)
    assert memory_of_one.scratch("combine", (4, 3), torch.float32).own.data_ptr() == large.own.data_ptr()
    assert memory_of_one.scratch("grad", (4, 3), torch.float32).own.data_ptr() != large.own.data_ptr()
