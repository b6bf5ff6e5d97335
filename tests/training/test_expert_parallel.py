"""`--trainer.strategy ddp_ep` on two processes: the run of one rank; checkpoints between any number of them.

By gloo on the CPU, and by NCCL on two GPUs where there are two.
"""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from event_layout import layout_of, without_a_tag
from scripts import run_forked, run_forked_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import DATA, MODEL, run_cli

from moe_lightning.bench.commands.trace import by_phase, of_trace, read_trace
from moe_lightning.callbacks.trace import BACKWARD, FORWARD
from moe_lightning.training.strategy import ExpertParallelStrategy
from moe_lightning.utils.checkpoint_file import load_checkpoint

SCRIPT = str(Path(__file__).with_name("ep_run.py"))
TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_ep"]
#: The same tokens a step: two ranks with batches of 2, one with batches of 4. The balancing loss is no mean of tokens.
RUN = [
    "--trainer.gradient_clip_val=0.5",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.limit_train_batches=25",  # an odd number: the last micro-batch of an epoch is a gradient by itself
    "--trainer.val_check_interval=14",  # such that the 20th step is the 14th batch of the second epoch
    "--checkpoint.save_last=true",
    "--model.balance_coef=0",
    "--progress_bar.refresh_rate=0",
]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
            ],
        ),
    ]
)
def place(request):
    """Flag for where a run's ranks are."""
    return f"--trainer.accelerator={request.param}"


def two_ranks(folder, *arguments, run=run_forked_ranks):
    done = run(folder, SCRIPT, "fit", *MODEL, *DATA, *TWO, *RUN, *arguments, seconds=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def one_rank(*arguments):
    return run_cli("fit", *RUN, "--data.batch_size=4", *arguments)


def tags_of(events):
    return set(EventAccumulator(str(events)).Reload().Tags()["scalars"])


def assert_same_states(a, b, rtol):
    """Weights and the optimizer's moments of two checkpoints."""
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(
            value, b["state_dict"][name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )
    ours, theirs = (c["optimizer_states"][0]["state"] for c in (a, b))
    assert ours.keys() == theirs.keys()
    for i in ours:
        for key in ("exp_avg", "exp_avg_sq"):
            assert ours[i][key].shape == theirs[i][key].shape
            torch.testing.assert_close(ours[i][key], theirs[i][key], rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_twenty_steps_are_those_of_one_rank_and_move_between_ranks(folder, losses, place):
    traced = ["--trace.enabled=true", "--trace.dirpath=traces", "--trace.wait=3", "--trace.warmup=1"]
    saved = ["--checkpoint.dirpath=two", "--trainer.log_every_n_steps=5"]
    ranks = two_ranks(folder, place, "--trainer.max_steps=20", "--trace.active=2", *traced, *saved, run=run_forked)
    for rank in (0, 1):
        [path] = Path("traces").glob(f"rank{rank}.*.pt.trace.json.gz")
        trace = read_trace(path)
        assert trace.on_gpu == place.endswith("gpu")
        assert len(trace.ranges) == 2 * 2 * (len(FORWARD) + len(BACKWARD))  # layers, micro-batches
        assert by_phase(trace)["dispatch"].comm_us > 0
        assert 0 <= of_trace(trace).eta_trace < 1
    [events] = Path("lightning_logs").glob("*/events*")
    tags = tags_of(events)
    assert {"expert_load/rank_max_over_mean", "expert_load/max_over_mean", "router_time/forward/T_route_ms"} <= tags
    ways = [f"exchange/{way}_{d}" for way in ("dispatch", "combine") for d in ("forward", "backward")]
    assert {f"{way}_{what}" for way in ways for what in ("total_ms", "exposed_ms", "gb_per_s")} <= tags
    layout = layout_of(events.parent)
    assert "exchange" in layout
    assert without_a_tag(layout, tags) == []
    assert ranks[0]["dense"] == ranks[1]["dense"]  # bit by bit
    assert ranks[0]["experts"] == ranks[1]["experts"] == [[2, 32, 16], [2, 16, 16]] * 2  # two of four experts
    one_rank(place, "--trainer.max_steps=20", "--checkpoint.dirpath=one")
    directions = {f"{way}/{direction}" for way in ("dispatch", "combine") for direction in ("forward", "backward")}
    assert set(ranks[0]["exchange"]) == directions
    kept = json.loads((events.parent / "summary.json").read_text())["exchange"]
    for name, (total_ms, exposed_ms, megabytes) in ranks[0]["exchange"].items():
        figures = {"total_ms": total_ms, "exposed_ms": exposed_ms, "gb_per_s": megabytes / total_ms}
        assert kept[name] == pytest.approx(figures)
    for total_ms, exposed_ms, megabytes in ranks[0]["exchange"].values():
        assert total_ms >= exposed_ms > 0
        # On a GPU all of a single chunk's transfer may be waited for; gloo's begins before the wait.
        assert total_ms > exposed_ms or place.endswith("gpu")
        assert 0 < megabytes < 2 * 2 * 2 * 16 * 16 * 4 / 1e6  # layers, batch, top_k, seq_len, d_model, fp32
    together = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-4)
    two, one = load_checkpoint("two/last.ckpt"), load_checkpoint("one/last.ckpt")
    assert_same_states(two, one, rtol=1e-4)

    # Two ranks go on where one left off, and one where two did.
    losses.clear()
    on = ["--checkpoint.dirpath=on", "--ckpt_path=one/last.ckpt", "--model.overlap_chunks=2"]
    ranks = two_ranks(folder, place, "--trainer.max_steps=24", *on)
    one_rank(place, "--trainer.max_steps=24", "--checkpoint.dirpath=off", "--ckpt_path=two/last.ckpt")
    together = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert len(losses) == 8
    assert together == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
def test_two_groups_of_two(folder, losses):
    """Experts are held twice: the gradients of both holders' tokens meet."""
    strategy = ["--trainer.strategy=moe_lightning.training.strategy.ExpertParallelStrategy"]
    flags = ["--trainer.devices=4", *strategy, "--trainer.strategy.ep_size=2", "--data.batch_size=1"]
    flags += ["--trainer.strategy.check_counts=true", "--model.overlap_chunks=auto"]
    flags += ["--trainer.max_steps=6", "--checkpoint.dirpath=four", "--trainer.val_check_interval=12"]
    done = run_forked_ranks(folder, SCRIPT, "fit", *MODEL, *DATA, *TWO, *RUN, *flags, ranks=4, seconds=150)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert len({rank["dense"] for rank in ranks}) == 1
    assert all(all(rank["checks_splits"]) for rank in ranks)
    one_rank("--trainer.max_steps=6", "--checkpoint.dirpath=one", "--trainer.val_check_interval=12")
    together = [sum(step) / 4 for step in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert together == pytest.approx(losses, rel=1e-4)
    assert_same_states(load_checkpoint("four/last.ckpt"), load_checkpoint("one/last.ckpt"), rtol=1e-4)


@pytest.mark.slow
def test_rows_written_into_other_ranks_memory(folder, losses, place):
    flags = ["--trainer.strategy=ddp_ep_symmetric", "--trainer.max_steps=6", "--checkpoint.dirpath=two"]
    ranks = two_ranks(folder, place, *flags, "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=12")
    assert ranks[0]["dispatchers"] == ["SymmetricDispatcher"] * 2
    [events] = Path("lightning_logs").glob("*/events*")
    assert {"expert_load/rank_max_over_mean", "exchange/dispatch_forward_gb_per_s"} <= tags_of(events)
    assert ranks[0]["dense"] == ranks[1]["dense"]
    for total_ms, exposed_ms, megabytes in ranks[0]["exchange"].values():
        assert total_ms >= exposed_ms > 0
        assert 0 < megabytes < 2 * 2 * 2 * 16 * 16 * 4 / 1e6  # layers, batch, top_k, seq_len, d_model, fp32
    assert len(ranks[0]["exchange"]) == 4
    one_rank(place, "--trainer.max_steps=6", "--checkpoint.dirpath=one", "--trainer.val_check_interval=12")
    together = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-4)
    assert_same_states(load_checkpoint("two/last.ckpt"), load_checkpoint("one/last.ckpt"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "router", "learnt"),
    [
        ("ddp_ep", "aux_free", "bias_E"),
        ("ddp_ep_symmetric", "quantile", "bias_E"),
        ("ddp_ep", "expert_threshold", "threshold_E"),
    ],
)
def test_shared_experts_zero_experts_a_dense_layer_and_biases(strategy, router, learnt, folder, losses, place):
    """Biases and thresholds are of the global batch: those of one rank."""
    parts = ["--model.n_shared_experts=1", "--model.shared_expert_gate=true", "--model.n_zero_experts=3"]
    parts += ["--model.n_dense_layers=1", "--trainer.max_steps=6", "--trainer.val_check_interval=12"]
    parts += [f"--model.router={router}"]
    ranks = two_ranks(folder, place, f"--trainer.strategy={strategy}", *parts, "--checkpoint.dirpath=two")
    assert ranks[0]["dense"] == ranks[1]["dense"]
    assert ranks[0]["experts"] == [[2, 32, 16], [2, 16, 16]]  # of one layer, two of four experts
    one_rank(place, *parts, "--checkpoint.dirpath=one")
    together = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-4)
    two, one = load_checkpoint("two/last.ckpt"), load_checkpoint("one/last.ckpt")
    [of_step] = [value for name, value in two["state_dict"].items() if name.endswith(learnt)]
    assert of_step.unique().numel() > 1
    assert_same_states(two, one, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["topk", "sinkhorn", "hash", "expert_choice"])
@pytest.mark.filterwarnings("ignore:router. expert_choice")
def test_the_other_routers(router, folder, losses, place):
    flags = [f"--model.router={router}", "--trainer.max_steps=3", "--trainer.limit_val_batches=0"]
    ranks = two_ranks(folder, place, *flags, "--checkpoint.dirpath=two")
    assert ranks[0]["dense"] == ranks[1]["dense"]
    if router in ("sinkhorn", "expert_choice"):  # which choose over a rank's batch
        return
    one_rank(place, *flags, "--checkpoint.dirpath=one")
    together = [(a + b) / 2 for a, b in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert together == pytest.approx(losses, rel=1e-4)
    assert_same_states(load_checkpoint("two/last.ckpt"), load_checkpoint("one/last.ckpt"), rtol=1e-4)


@pytest.mark.slow
def test_batches_that_are_shorter_on_one_rank(folder, monkeypatch, place):
    monkeypatch.setenv("SHORT", "1:3")
    flags = [place, "--trainer.max_steps=6", "--trainer.val_check_interval=12"]
    written = two_ranks(folder, *flags, "--trainer.strategy=ddp_ep_symmetric", "--checkpoint.dirpath=written")
    sent = two_ranks(folder, *flags, "--checkpoint.dirpath=sent")
    assert written[0]["dense"] == written[1]["dense"]
    for rank in (0, 1):
        assert written[rank]["losses"] == pytest.approx(sent[rank]["losses"], rel=1e-4)
    assert_same_states(load_checkpoint("written/last.ckpt"), load_checkpoint("sent/last.ckpt"), rtol=1e-4)


GRAPHED = ["--trainer.strategy=ddp_ep_symmetric", "--model.compile=false", "--trainer.max_steps=40"]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    ("accumulate", "short", "flags"),
    [
        (1, "all:25", []),  # the last batch of an epoch
        (3, "all:25", []),
        (3, "1:7", []),  # eager on one rank, a replay on the other
        (3, "all:25", ["--model.compile=true"]),
        (3, "all:25", ["--data.batch_size=1", "--trainer.val_check_interval=4"]),
    ],
)
def test_graphs_give_the_losses_and_weights_of_eager_steps(accumulate, short, flags, folder, monkeypatch):
    monkeypatch.setenv("SHORT", short)
    flags = [*GRAPHED, "--trainer.accelerator=gpu", f"--trainer.accumulate_grad_batches={accumulate}", *flags]
    eager = two_ranks(folder, *flags, "--model.cuda_graph=off", "--checkpoint.dirpath=eager")
    graphed = two_ranks(folder, *flags, "--checkpoint.dirpath=graphed")
    assert not eager[0]["replays"]
    for rank in (0, 1):
        assert graphed[rank]["losses"] == eager[rank]["losses"]
        assert graphed[rank]["dense"] == eager[0]["dense"]
        assert sum(graphed[rank]["replays"]) > len(graphed[rank]["replays"]) / 2
        assert graphed[rank]["timed"] >= eager[rank]["timed"] > 2
        assert len(graphed[rank]["exchange"]) == 4
        for total_ms, exposed_ms, megabytes in graphed[rank]["exchange"].values():
            assert total_ms >= exposed_ms > 0
            assert 0 < megabytes < 2 * 2 * 2 * 16 * 16 * 4 / 1e6  # layers, batch, top_k, seq_len, d_model, fp32
    assert_same_states(load_checkpoint("graphed/last.ckpt"), load_checkpoint("eager/last.ckpt"), rtol=0)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_that_reduces_over_ranks_runs_eagerly(folder):
    flags = [*GRAPHED, "--trainer.accelerator=gpu", "--trainer.max_steps=6", "--checkpoint.dirpath=two"]
    ranks = two_ranks(folder, *flags, "--model.balance_coef=0.01", "--model.balance_scope=global")
    assert ranks[0]["replays"]
    assert not any(ranks[0]["replays"])


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_resumed_run_with_graphs_is_the_run_that_was_not_interrupted(folder):
    flags = [
        *GRAPHED,
        "--trainer.accelerator=gpu",
        "--model.optimizer.decay_steps=40",
    ]  # in both parts that of the whole
    whole = two_ranks(folder, *flags, "--checkpoint.dirpath=whole")
    first = two_ranks(folder, *flags, "--trainer.max_steps=17", "--checkpoint.dirpath=parts")
    rest = two_ranks(folder, *flags, "--checkpoint.dirpath=parts", "--ckpt_path=parts/last.ckpt")
    for rank in (0, 1):
        assert first[rank]["losses"] + rest[rank]["losses"] == whole[rank]["losses"]
        assert sum(rest[rank]["replays"]) > len(rest[rank]["replays"]) / 2
    assert_same_states(load_checkpoint("parts/last.ckpt"), load_checkpoint("whole/last.ckpt"), rtol=0)


@pytest.mark.slow
def test_bf16_then_validate_and_predict_an_odd_number_of_prompts(folder, place):
    saved = [place, "--checkpoint.dirpath=saved", "--trainer.max_steps=4", "--trainer.precision=bf16-mixed"]
    saved += ["--model.overlap_chunks=2"]
    ranks = two_ranks(folder, *saved, "--trainer.val_check_interval=4")
    assert ranks[0]["dense"] == ranks[1]["dense"]
    one = run_cli("validate", "--ckpt_path=saved/last.ckpt")
    loss = float(one.trainer.callback_metrics["val/loss"])
    flags = [*MODEL, *DATA, *TWO, place, "--progress_bar.refresh_rate=0", "--ckpt_path=saved/last.ckpt"]
    done = run_forked_ranks(folder, SCRIPT, "validate", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"val/loss\D+([\d.]+)", done.stdout)[1]) == pytest.approx(loss, rel=2e-3)  # in bf16
    prompts = [*(f"--data.prompt={text}" for text in ("one", "two", "three")), "--model.max_new_tokens=4"]
    done = run_forked_ranks(folder, SCRIPT, "predict", *flags, *prompts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stdout.count(f"prompt {i}") for i in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_fp16_scales_alike_on_all_ranks(folder):
    """The first scale overflows: a step that one rank skips, all skip."""
    flags = ["--trainer.accelerator=gpu", "--trainer.precision=16-mixed", "--trainer.max_steps=20"]
    ranks = two_ranks(folder, *flags, "--checkpoint.dirpath=two")
    assert ranks[0]["scale"] == ranks[1]["scale"] is not None
    assert ranks[0]["dense"] == ranks[1]["dense"]


def broken_run(folder, monkeypatch, fault, place, *flags, start=run_forked):
    """The result of a run in which `fault` happens, after which all soon end.

    Lightning starts the second rank, or both start as torchrun would start them, which takes less time.
    """
    monkeypatch.setenv("FAULT", fault)
    strategy = [
        "--trainer.strategy=moe_lightning.training.strategy.ExpertParallelStrategy",
        "--trainer.strategy.timeout_seconds=10",
    ]
    saves = ["--trainer.max_steps=40", "--checkpoint.dirpath=saved", "--checkpoint.every_n_train_steps=2"]
    saves += ["--checkpoint.monitor=null", "--checkpoint.save_top_k=-1", "--checkpoint.filename=step={step}"]
    done = start(folder, SCRIPT, "fit", *MODEL, *DATA, *TWO, place, *strategy, *RUN, *saves, *flags, seconds=300)
    happened = min(map(float, re.findall(r"^fault at (\S+)$", done.stdout, re.MULTILINE)))
    assert time.monotonic() - happened < 30
    assert len(re.findall(r"^pid \d+$", done.stdout, re.MULTILINE)) == 2
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "dispatch"),
    [
        ("raise:1:5", None),
        ("raise:1:5", "symmetric"),
        ("raise:0:5", None),
        ("SIGKILL:1:5", None),
        ("SIGKILL:0:5", None),
        ("SIGSTOP:1:5", None),
        ("SIGSTOP:1:5", "symmetric"),
        ("SIGSTOP:1:5,SIGKILL:0:5", None),
    ],
)
def test_a_rank_that_fails_takes_the_others_along(fault, dispatch, folder, monkeypatch, place):
    flags = [f"--trainer.strategy.dispatch={dispatch}"] if dispatch else []
    start = run_forked_ranks if (fault, dispatch) == ("raise:1:5", "symmetric") else run_forked
    done = broken_run(folder, monkeypatch, fault, place, *flags, start=start)
    assert done.returncode not in (0, 143)
    assert not done.left
    if "SIGSTOP" in fault and "SIGKILL" not in fault and "gpu" in place:
        # By a collective of NCCL, or by a kernel of the symmetric dispatch: whichever waits for that rank.
        ours = re.findall(
            r"^error: dispatch: rank 1 of the group did not come within timeout_seconds=10; ", done.stderr, re.M
        )
        assert "Watchdog caught collective operation timeout" in done.stderr or (len(ours), done.returncode) == (1, 2)
    if fault.startswith("raise"):
        errors = re.findall(r"(?:\[rank\d\]: )?(\w*(?:Error|Exception)): (.*)", done.stderr)
        assert errors[0] == ("RuntimeError", f"planted on rank {fault[6]}")
    assert load_checkpoint("saved/step=4.ckpt")["global_step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1", "all"])
def test_sigterm_stops_all_ranks_after_the_same_step(rank, folder, monkeypatch, place):
    start = run_forked if rank == "all" else run_forked_ranks
    done = broken_run(folder, monkeypatch, f"SIGTERM:{rank}:5", place, start=start)
    assert done.returncode == 143, done.stderr[-2000:]
    assert not done.left
    stopped = load_checkpoint("saved/last.ckpt")
    assert stopped["global_step"] in (6, 7)
    assert stopped["state_dict"]["network.blocks.0.feed_forward.experts.up"].shape[0] == 4
    assert done.stderr.count("SIGTERM: stopped after step") == 1


def test_a_router_that_moves_no_rows_is_refused_in_one_line(folder):
    flags = ["--trainer.max_steps=2", "--model.router=masked_matmul"]
    done = run_forked_ranks(folder, SCRIPT, "fit", *MODEL, *DATA, *TWO, *RUN, *flags)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    reasons = [line for line in said if not line.startswith("error: ranks: ")]  # of a rank that lost the other
    assert reasons
    assert all("ddp_ep needs a router that moves rows, got masked_matmul" in line for line in reasons)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dispatch": "nvlink"}, "strategy: dispatch must be one of nccl, gloo, symmetric, got 'nvlink'"),
        ({"dispatch": "symmetric", "max_tokens": 0}, "strategy: max_tokens must be a positive integer"),
        ({"max_tokens": 8}, "strategy: max_tokens is of dispatch=symmetric, got dispatch=None; leave it out"),
        ({"dispatch": "symmetric", "check_counts": True}, "strategy: check_counts is of exchanges, got dispatch=symm"),
        (
            {"dispatch": "symmetric", "find_unused_parameters": True, "static_graph": False},
            "strategy: dispatch=symmetric does without DistributedDataParallel, .* got find_unused_parameters=True; ",
        ),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        ExpertParallelStrategy(**arguments)


def test_a_dispatch_that_does_not_join_the_ranks_is_refused_in_one_line(folder):
    strategy = ["--trainer.strategy=moe_lightning.training.strategy.ExpertParallelStrategy"]
    flags = [*strategy, "--trainer.strategy.dispatch=nccl", "--trainer.max_steps=2"]
    done = run_forked_ranks(folder, SCRIPT, "fit", *MODEL, *DATA, *TWO, *RUN, *flags)
    assert done.returncode == 2
    assert "dispatch must be symmetric or gloo, as the ranks are joined by it, got dispatch=nccl" in done.stderr
