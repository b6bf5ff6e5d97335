"""Ranks that write to each other's memory: as by exchanges and on one rank; graphs; a rank that is gone."""

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


class Memory:
    """What a pool asks of its memory."""

    micro_batches, in_micro_batch, capturing = 0, False, False
    micro_batch = SymmetricMemory.micro_batch

    def is_capturing(self):
        return self.capturing


class Passes:
    """A pool on a rank of its own."""

    def __init__(self):
        self.memory = Memory()
        self.pool = BufferPool(self.memory)

    def take(self, capturing=False):
        """Number and buffer of a new pass."""
        self.memory.capturing = capturing
        number = self.pool.acquire()
        return number, self.pool.buffer(number)

    def whole(self, capturing=False):
        """Buffer of a pass that is released at once."""
        number, buffer = self.take(capturing)
        self.pool.release(number)
        self.memory.capturing = False
        return buffer


def test_a_buffer_is_free_once_its_pass_is_released_and_a_captured_one_for_captured_passes_alone():
    passes = Passes()
    (first, _), (second, _), (third, _) = taken = [passes.take() for _ in range(3)]
    assert [buffer for _, buffer in taken] == [0, 1, 2]
    passes.pool.release(second)
    passes.pool.release(second)  # once is enough
    assert passes.take()[1] == 1
    passes.pool.release(first)
    captured, buffer = passes.take(capturing=True)
    assert buffer == 0
    assert passes.take(capturing=True)[1] == 3  # while the first is held
    passes.pool.release(captured)
    assert passes.whole() == 4  # an eager one, which may run between any two replays
    assert passes.whole(capturing=True) == 0
    assert passes.whole(capturing=True) == 0
    passes.pool.release(third)
    assert passes.take()[1] == 2


def test_passes_of_a_step_have_the_same_buffers_whether_they_are_eager_or_replayed():
    """So that one rank may replay what another runs eagerly; a pass with a gradient that is of no step has others."""
    eager, captured = Passes(), Passes()

    def step(passes, capturing=False):
        with passes.memory.micro_batch():
            taken = [passes.take(capturing) for _ in range(2)]  # one layer used twice
            passes.pool.release(taken[0][0])
            taken.append(passes.take(capturing))
            for number, _ in taken[1:]:
                passes.pool.release(number)
        passes.memory.capturing = False
        return [buffer for _, buffer in taken]

    for passes in (eager, captured):
        with torch.no_grad():
            assert passes.whole() == 0  # the sanity check of validation
    of_step = step(eager)
    assert of_step == step(captured) == [0, 1, 0]
    assert step(captured, capturing=True) == of_step
    assert step(captured, capturing=True) == of_step  # another graph: those of the first are not in its way
    for passes in (eager, captured):
        with torch.no_grad():
            assert passes.whole() == 0  # validation
        assert passes.whole() == 2
    assert step(eager) == of_step


def test_a_pass_of_a_step_ends_with_its_micro_batch():
    passes = Passes()
    with passes.memory.micro_batch():
        kept, buffer = passes.take()
    assert passes.pool.buffer(kept) == buffer  # its backward comes after the forward pass of the module
    later, other = passes.take()
    assert other != buffer
    with passes.memory.micro_batch():  # in which a graph may be replayed: nobody asks the pool
        with pytest.raises(
            ValueError, match=r"^dispatch: a pass .* before the next micro-batch, .* run the forward pass"
        ):
            passes.pool.buffer(kept)
        assert passes.take()[1] == buffer
    assert passes.pool.buffer(later) == other  # of no micro-batch


def test_what_a_failed_capture_has_taken_is_free_for_the_eager_pass_in_its_place():
    passes = Passes()
    with passes.memory.micro_batch():
        assert [passes.take(capturing=True)[1] for _ in range(3)] == [0, 1, 2]
        assert passes.whole() == 0


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


def test_a_pass_of_more_tokens_is_not_captured_before_it_was_run(memory_of_one, monkeypatch):
    moe = MoE(ROUTERS["naive_topk"](8, 4, 2), Experts(8, 8, 4), SymmetricDispatcher(4, 2, memory_of_one))
    moe(torch.randn(5, 8))
    monkeypatch.setattr(memory_of_one, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^dispatch: ranks must agree .* got tokens=6, max_tokens=5; run the same"):
        moe(torch.randn(6, 8))


def test_scratch_is_shared_and_grows(memory_of_one):
    small = memory_of_one.scratch("combine", (4, 3), torch.float32)
    assert memory_of_one.scratch("combine", (2, 3), torch.float32).own.data_ptr() == small.own.data_ptr()
    large = memory_of_one.scratch("combine", (5, 3), torch.float32)
    assert large.own.shape == (5, 3)
    assert memory_of_one.scratch("combine", (4, 3), torch.float32).own.data_ptr() == large.own.data_ptr()
    assert memory_of_one.scratch("grad", (4, 3), torch.float32).own.data_ptr() != large.own.data_ptr()
