"""Where memory ends: one line with what was asked for, what there is and what to turn down."""

import errno

import numpy as np
import pytest
import torch
from tiny_run import SIZES, error_line

from moe_lightning.training.language_module import LanguageModule
from moe_lightning.utils import errors, memory
from moe_lightning.utils.errors import explain
from moe_lightning.utils.memory import HostMemory

ADVICE = (
    "turn down data.batch_size (trainer.accumulate_grad_batches keeps the tokens per step), data.seq_len or the model"
)
HOST = "memory: a run must fit in memory, got a request for {} with 6 GB of 8 GB in use (the limit of this cgroup); "
GPU = "memory: a run must fit in a GPU's memory, got a request for {} with {}; "


@pytest.fixture
def limited(monkeypatch):
    monkeypatch.setattr(errors, "host_memory", lambda: HostMemory(8 * 10**9, 6 * 10**9, "the limit of this cgroup"))


def raised(call) -> Exception:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("call", "asked"),
    [
        (lambda: torch.empty(10**13), "4e+04 GB"),
        (lambda: np.empty(10**13), "72.8 TiB"),
        (lambda: bytearray(10**15), "more"),
        (lambda: [0] * 10**15, "more"),
    ],
    ids=["torch", "numpy", "bytearray", "list"],
)
def test_host_memory_that_torch_numpy_or_python_asked_for(limited, call, asked):
    assert explain(raised(call)) == HOST.format(asked) + ADVICE


def test_a_process_or_mapping_that_found_no_memory(limited):
    assert explain(OSError(errno.ENOMEM, "Cannot allocate memory")) == HOST.format("more") + ADVICE
    assert explain(OSError(errno.ENOENT, "No such file")) is None


@pytest.mark.parametrize(
    ("error", "asked", "there_is"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 139.80 GiB of which "
                "3.06 GiB is free. Including non-PyTorch memory, this process has 136.73 GiB memory in use."
            ),
            "20.00 GiB",
            "3.06 GiB of 139.80 GiB free on GPU 1",
        ),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), "more", "too little free"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "more",
            "too little free",
        ),
    ],
    ids=["allocator", "runtime", "cublas"],
)
def test_device_memory(error, asked, there_is):
    assert explain(error) == GPU.format(asked, there_is) + ADVICE


def test_other_errors_are_not_taken_for_it():
    assert explain(RuntimeError("shape '[2, 3]' is invalid for input of size 5")) is None


def test_memory_that_ends_in_a_step_is_one_line(folder, capsys, limited, monkeypatch):
    monkeypatch.setattr(LanguageModule, "training_step", lambda *args: torch.empty(10**13))
    line = error_line(capsys, "fit", "--trainer.max_steps=1", "--trainer.logger=false")
    assert line == HOST.format("4e+04 GB") + ADVICE


def test_a_step_that_cannot_fit_is_refused_before_it_is_tried(folder, capsys, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: HostMemory(400_000, 0, "the limit of this cgroup"))
    monkeypatch.setattr(LanguageModule, "training_step", lambda *args: pytest.fail("tried"))
    expert = 3 * SIZES["d_model"] * SIZES["mlp_hidden_dim"]
    layer = 4 * 16**2 + 4 * expert + 4 * 16 + 2 * 16  # attention, experts, gate, norms
    weights = 2 * 320 * 16 + 2 * layer + 16
    line = error_line(capsys, "fit", "--trainer.max_steps=1", "--trainer.logger=false", "--data.batch_size=4")
    assert line == (
        "memory: a training step must fit in 0.0004 GB (the limit of this cgroup), got at least "
        f"{16 * weights / 1e9:.3g} GB of weights, gradients and moments and {8 * 4 * 16 * 320 / 1e9:.3g} GB of logits "
        f"with gradients from data.batch_size=4, data.seq_len=16, vocab_size=320; {ADVICE}"
    )
