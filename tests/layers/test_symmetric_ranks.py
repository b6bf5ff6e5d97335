"""Ranks that write to each other's memory: as by exchanges and on one rank; graphs; a rank that is gone."""

from types import SimpleNamespace

import pytest
import symmetric_processes
import torch
import torch.multiprocessing as mp

from moe_lightning.expert_parallel.symmetric_buffers import Buffers
from moe_lightning.expert_parallel.symmetric_dispatch import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.ops import native

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


def test_a_buffer_is_free_when_nobody_holds_its_lease_and_a_captured_one_never():
    capturing = False
    buffers = Buffers(SimpleNamespace(is_capturing=lambda: capturing))
    first, second, third = (buffers.lease() for _ in range(3))
    assert [lease.number for lease in (first, second, third)] == [0, 1, 2]
    holder = first
    del first, second
    assert buffers.lease().number == 1
    del holder
    assert buffers.lease().number == 0
    capturing = True
    assert buffers.lease().number == 0
    capturing = False
    assert buffers.lease().number == 1


@pytest.fixture
def memory_of_one(group_of_one):
    return SymmetricMemory(group_of_one, torch.device("cpu"), 5)


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


def test_what_is_used_in_passing_is_shared_and_grows(memory_of_one):
    small = memory_of_one.in_passing("pulled", (4, 3), torch.float32)
    assert memory_of_one.in_passing("pulled", (2, 3), torch.float32).own.data_ptr() == small.own.data_ptr()
    large = memory_of_one.in_passing("pulled", (5, 3), torch.float32)
    assert large.own.shape == (5, 3)
    assert memory_of_one.in_passing("pulled", (4, 3), torch.float32).own.data_ptr() == large.own.data_ptr()
    assert memory_of_one.in_passing("pushed", (4, 3), torch.float32).own.data_ptr() != large.own.data_ptr()
