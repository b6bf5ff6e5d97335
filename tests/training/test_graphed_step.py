"""Training steps as CUDA graphs: the results are those of eager steps, whatever lies between two of them."""

import logging
import math
import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_run import DATA, MODEL, error_line, run_cli

from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS, FusedSelect
from moe_lightning.training import graphed_step
from moe_lightning.training.graphed_step import GraphedStep, why_never
from moe_lightning.training.strategy import ExpertParallelStrategy, WatchedDDPStrategy
from moe_lightning.utils.checkpoint_file import load_checkpoint
from moe_lightning.utils.errors import plain_errors

GPU = [*MODEL, *DATA, "--trainer.accelerator=gpu", "--trainer.devices=1", "--progress_bar.refresh_rate=0"]
#: The last batch of an epoch is short, a gradient ends with the epoch, and a validation lies in the middle of one.
RUN = [
    "--trainer.gradient_clip_val=0.5",
    "--trainer.accumulate_grad_batches=3",
    "--trainer.val_check_interval=8",
    "--model.optimizer.warmup_steps=5",
    "--model.compile=false",
    "--data.batch_size=5",
]


@pytest.fixture
def replays(monkeypatch):
    """Whether each micro-batch was done by a graph."""
    done = []
    run = GraphedStep.run

    def counting(self, *arguments):
        losses = run(self, *arguments)
        done.append(losses is not None and self._memory is not None)
        return losses

    monkeypatch.setattr(GraphedStep, "run", counting)
    return done


def fit(folder, *arguments):
    cli = run_cli("fit", f"--checkpoint.dirpath={folder}", *RUN, *arguments, tiny=GPU)
    return load_checkpoint(f"{folder}/last.ckpt"), cli


def assert_equal(a, b):
    assert a["global_step"] == b["global_step"]
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    moments, others = (c["optimizer_states"][0]["state"] for c in (a, b))
    for i, state in moments.items():
        for name, value in state.items():
            assert torch.equal(value.cpu(), others[i][name].cpu()), (i, name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("accumulate", "flags"),
    [
        (1, ["--trainer.max_steps=200"]),
        (3, []),
        (3, ["--model.compile=true"]),
        (3, ["--model.recompute=moe"]),
        (3, ["--model.recompute=block"]),
        (1, ["--model.recompute=block", "--model.compile=true"]),
        (3, ["--trainer.precision=32-true", "--model.router=masked_matmul"]),  # experts in fp32 by torch's products
        (3, ["--model.router=aux_free"]),
        (3, ["--model.router=quantile"]),
        (1, ["--model.router=sinkhorn"]),
    ],
)
def test_losses_and_weights_are_those_of_eager_steps(accumulate, flags, folder, losses, replays):
    flags = ["--trainer.max_steps=30", f"--trainer.accumulate_grad_batches={accumulate}", *flags]
    eager, _ = fit("eager", *flags, "--model.cuda_graph=off")
    of_eager, losses[:] = list(losses), []
    assert not replays
    graphed, _ = fit("graphed", *flags)
    assert losses == of_eager
    assert_equal(graphed, eager)
    assert sum(replays) > len(replays) / 2


@pytest.mark.gpu
def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder, losses):
    schedule = "--model.optimizer.decay_steps=20"  # of a run in two parts that of the whole
    whole, _ = fit("whole", "--trainer.max_steps=20", schedule)
    of_whole, losses[:] = list(losses), []
    fit("first", "--trainer.max_steps=11", schedule)
    again, _ = fit("first", "--trainer.max_steps=20", schedule, "--ckpt_path=first/last.ckpt")
    assert losses == of_whole
    assert_equal(again, whole)


@pytest.mark.gpu
def test_a_step_that_reads_the_host_runs_eagerly_and_says_so(folder, losses, replays, caplog):
    caplog.set_level(logging.INFO)
    fit("loop", "--trainer.max_steps=6", "--model.experts=loop")
    assert caplog.text.count("cuda_graph: eager, the step reads the host: ") == 1
    assert not any(replays[2:])
    of_loop, losses[:] = list(losses), []
    fit("off", "--trainer.max_steps=6", "--model.experts=loop", "--model.cuda_graph=off")
    assert losses == of_loop


class WaitingRouter(FusedSelect):
    """Waits for the device in a way that only a capture notices."""

    def select_experts(self, logits_TE, tokens):
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        return super().select_experts(logits_TE, tokens)


class HungryRouter(FusedSelect):
    """Asks for more memory than there is, in a capture alone."""

    def select_experts(self, logits_TE, tokens):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, device="cuda")
        return super().select_experts(logits_TE, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(("router", "why"), [("WaitingRouter", ""), ("HungryRouter", "CUDA out of memory")])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so(router, why, folder, losses, replays, caplog):
    caplog.set_level(logging.INFO)
    refused, _ = fit("refused", "--trainer.max_steps=6", f"--model.router={__name__}.{router}")
    assert caplog.text.count(f"cuda_graph: eager, the step cannot be captured: {why}") == 1
    assert not any(replays)
    of_refused, losses[:] = list(losses), []
    off, _ = fit("off", "--trainer.max_steps=6", "--model.cuda_graph=off")
    assert losses == of_refused
    assert_equal(refused, off)


class Terminate(L.Callback):
    """Sends SIGTERM in the middle of a gradient."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 9 and batch_idx % 3 == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_a_run_that_is_told_to_stop_goes_on_as_if_it_had_not(device, folder, losses, replays):
    flags = [f"--trainer.accelerator={device}", "--trainer.max_steps=20", "--model.optimizer.decay_steps=20"]
    whole, _ = fit("whole", *flags)
    of_whole, losses[:] = list(losses), []
    with pytest.raises(SystemExit) as stop, plain_errors():
        fit("parts", *flags, f"--trainer.callbacks={__name__}.Terminate")
    assert stop.value.code == 143
    assert 20 < len(losses) < len(of_whole)
    assert device == "cpu" or replays[-1]
    again, _ = fit("parts", *flags, "--ckpt_path=parts/last.ckpt")
    assert losses == of_whole
    assert_equal(again, whole)


class Changing(L.Callback):
    """Changes what a graph holds: a coefficient, and what is trained."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            pl_module.balance_coef = 0.5
        pl_module.network.head.weight.requires_grad_(trainer.global_step < 14)


@pytest.mark.gpu
def test_what_a_callback_changes_takes_effect(folder, losses, replays):
    flags = ["--trainer.max_steps=20", f"--trainer.callbacks={__name__}.Changing"]
    eager, _ = fit("eager", *flags, "--model.cuda_graph=off")
    of_eager, losses[:] = list(losses), []
    graphed, _ = fit("graphed", *flags)
    assert losses == of_eager
    assert_equal(graphed, eager)
    assert sum(replays) > len(replays) / 2


class Poison(L.Callback):
    """A weight becomes NaN with the first micro-batch of a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 9:
            pl_module.network.embedding.weight.data.fill_(torch.nan)


@pytest.mark.gpu
def test_the_guard_sees_the_invalid_rows_of_a_replay(folder, losses, replays, capsys):
    flags = [f"--checkpoint.dirpath={folder}/poisoned", *RUN, "--trainer.max_steps=20"]
    line = error_line(capsys, "fit", *flags, f"--trainer.callbacks={__name__}.Poison", tiny=GPU)
    assert line.startswith("router: logits must be finite")
    assert [math.isnan(loss) for loss in losses] == [False] * (len(losses) - 2) + [True] * 2  # seen after the next one
    assert all(replays[-2:])


def test_on_a_cpu_there_are_none(folder, losses, replays):
    run_cli("fit", "--trainer.max_steps=4")
    assert len(losses) == 4
    assert not replays
    assert graphed_step.WARM_UP >= 2


def test_a_change_within_a_gradient_keeps_what_has_been_added_to_it(monkeypatch):
    for name in ("graph_pool_handle", "Stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    module = torch.nn.Linear(2, 2, bias=False)
    module.coefficient = 1.0
    step, batch = GraphedStep(module, lambda batch: {}), torch.zeros(1, 2)
    assert step._memory_for(batch, 2) is None  # no batch of this shape has been run eagerly yet
    step._prepared.add((batch.shape, batch.dtype))
    memory = step._memory_for(batch, 2)
    assert step._memory_for(batch, 2) is memory
    memory.gradients = {module.weight: torch.ones(2, 2)}
    memory.bind()
    module.coefficient = 0.5
    assert step._memory_for(batch, 2) is None
    assert step._memory_for(batch, 2) is None  # and no eager one came since the change
    step._prepared.add((batch.shape, batch.dtype))
    changed = step._memory_for(batch, 2)
    assert changed is not memory
    assert changed.gradients == {}
    assert module.weight.grad.equal(torch.ones(2, 2))  # what the micro-batches before have given
    changed.gradients = {module.weight: module.weight.grad}
    changed.bind(zero=True)
    assert not module.weight.grad.any()
    step.close()
    assert module.weight.grad is None


@pytest.mark.parametrize("reduces", [False, True])
def test_a_step_with_a_collective_is_not_captured(reduces, monkeypatch):
    """NCCL waits for graphs that hold its work, also when it is to abort."""
    for name in ("graph_pool_handle", "Stream", "get_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    module, batch = torch.nn.Linear(2, 2), torch.ones(1, 2)

    def compute(batch):
        loss = module(batch).sum()
        if reduces:
            dist.all_reduce(loss.detach())
        return {"loss": loss}

    step = GraphedStep(module, compute)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert step.run(batch, True, 1) is None
        assert step.run(batch, True, 1)["loss"].item() == module(batch).sum().item()
    finally:
        dist.destroy_process_group()
    assert step.backward_done
    assert (step.never or "").startswith("the step has a collective" if reduces else "")
    assert bool(step.never) == reduces


def test_graphs_are_of_one_device_or_of_symmetric_dispatch():
    strategies = {
        None: SingleDeviceStrategy(torch.device("cuda", 0)),
        "SingleDeviceStrategy runs on cpu": SingleDeviceStrategy("cpu"),
        "WatchedDDPStrategy reduces gradients in backward": WatchedDDPStrategy(),
        "ExpertParallelStrategy reduces gradients in backward": ExpertParallelStrategy(),
        "none": ExpertParallelStrategy(dispatch="symmetric"),
    }
    for expected, strategy in strategies.items():
        if not isinstance(strategy, SingleDeviceStrategy):
            strategy.parallel_devices = [torch.device("cuda", 0)]
            strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
        reason = why_never(SimpleNamespace(strategy=strategy, _detect_anomaly=False), torch.nn.Linear(2, 2))
        if expected in (None, "none"):
            assert reason is None
        else:
            assert reason.startswith("the device is cpu" if "cpu" in expected else expected)


def test_graphs_are_captured_again_where_the_buffers_of_a_dispatcher_have_grown():
    layer = MoE(ROUTERS["naive_topk"](8, 4, 2), Experts(8, 8, 4))
    layer.dispatcher.max_tokens = 16  # as of dispatch=symmetric
    changed = [name for part, name, value in graphed_step._settings(layer) if part is layer.dispatcher]
    assert "max_tokens" in changed
