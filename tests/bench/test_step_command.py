"""bench step: forms that share weights, a forced balance, parts that are the step, whole records, one-line errors."""

import itertools
import json
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from moe_lightning.bench.__main__ import main
from moe_lightning.bench.spread import Spread
from moe_lightning.bench.step import command, measure, models
from moe_lightning.bench.step.measure import Alone, Batches, PartTimes, fit_together, measure_parts, measure_rounds
from moe_lightning.bench.step.models import BALANCED, DENSE, ROUTER, StepModel, StepSizes, Variant, balanced_router
from moe_lightning.callbacks import clocks
from moe_lightning.callbacks.base import moe_layers
from moe_lightning.models import decoder
from moe_lightning.routers import ROUTERS, router_class
from moe_lightning.training import language_module
from moe_lightning.training.language_module import why_not_compile

SIZES = StepSizes(
    d_model=16,
    n_heads=2,
    n_layers=3,
    mlp_hidden_dim=8,
    num_experts=8,
    top_k=2,
    vocab_size=257,
    seq_len=8,
    batch_size=4,
    accumulate=1,
    router="fused_select",
    precision="32-true",
)
CPU = torch.device("cpu")
FLAGS = [
    *("step", "--device", "cpu", "--d_model", "16", "--heads", "2", "--layers", "2", "--hidden_dim", "8"),
    *("--experts", "8", "--seq_len", "8", "--batch_size", "4", "--warmup", "3", "--path", "text.txt"),
]


def tokens(count, sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    shape = sizes.batch_size, sizes.seq_len + 1
    return [torch.randint(0, 256, shape, generator=generator) for _ in range(count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with text to train on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} {i * i}\n" for i in range(2000)))
    return tmp_path


@pytest.mark.alone
def test_a_whole_run(folder, capsys):
    path, picture = folder / "step.json", folder / "step.png"
    variants = ["--variants", "eager", "graph", "--rounds", "3", "--accumulate", "2"]
    assert main([*FLAGS, *variants, "--json", str(path), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "left out: graph: CUDA graphs need a GPU, the device is cpu" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = json.loads(path.read_text())["results"]
    assert (results["settings"]["d_model"], results["settings"]["top_k"]) == (16, 2)
    rows = {row["model"]: row for row in results["rows"]}
    assert list(rows) == [ROUTER, BALANCED, DENSE]
    for name, row in rows.items():
        assert row["tokens_per_s"] == pytest.approx(2 * 4 * 8 / (1e-3 * row["ms"]))
        assert row["spread"]["ms"]["q1"] <= row["ms"] <= row["spread"]["ms"]["q3"]
        assert row["mfu"] > 0
        assert row["x_dense"] > 0
        assert min(row["parts_ms"].values()) > 0, row
        assert f"{name}, eager: " in printed
        assert row["check"]["parts_us"] == pytest.approx(1e3 * sum(row["parts_ms"].values()))
        assert row["check"]["whole_us"] == pytest.approx(1e3 * row["whole_ms"])
        assert row["host_gaps_ms"] is row["peak_mb"] is row["kept_mb"] is None
    assert rows[DENSE]["x_dense"] == 1
    assert rows[DENSE]["load"] is None
    assert rows[BALANCED]["load"]["max_over_mean_of_worst_layer"] == 1
    assert rows[ROUTER]["load"]["max_over_mean"] > 1
    assert {"T_select", "T_experts"} <= set(rows[ROUTER]["parts_ms"]) == set(rows[BALANCED]["parts_ms"])
    assert set(rows[DENSE]["parts_ms"]) == {"feed-forward", "rest", "head and loss", "optimizer"}


@pytest.mark.parametrize("name", list(ROUTERS))
@pytest.mark.parametrize(("experts", "top_k", "count"), [(8, 2, 64), (8, 3, 50), (4, 4, 7)])
@pytest.mark.filterwarnings("ignore:router.masked_matmul")
def test_a_forced_balance(name, experts, top_k, count):
    """Loads differ by a slot at most, and the logits of the chosen are the router's own."""
    router = balanced_router(router_class(name), count, experts, top_k, CPU)(16, experts, top_k)
    x_TD = 10 * torch.randn(count, 16)
    logits_TE, selection, _ = router(x_TD)
    load_E = selection.tokens_per_expert_E
    assert 0 <= load_E.sum() - count * top_k < (experts if router.looks_ahead else 1)  # whose share is rounded up
    assert load_E.max() - load_E.min() <= 1
    own_TE = torch.nn.functional.linear(x_TD, router.weight)
    ids_TK = selection.expert_ids_TK.long().clamp(min=0)
    used_TK = selection.weights_TK > 0
    assert used_TK.sum() == count * top_k
    assert torch.equal(logits_TE.gather(1, ids_TK)[used_TK], own_TE.gather(1, ids_TK)[used_TK])
    assert router.dispatch_mode == router_class(name).dispatch_mode


def test_forms_share_weights_that_stay_once_trained():
    model = StepModel(False, SIZES, CPU)
    untrained = {name: value.clone() for name, value in model.module(Variant(ROUTER, "eager")).state_dict().items()}
    model.train(itertools.cycle(tokens(4)), 3, "eager")
    variants = [Variant(name, form) for name in (ROUTER, BALANCED) for form in ("eager", "compile")]
    modules = [model.module(variant) for variant in variants]
    assert len(set(map(id, modules))) == 4
    for weights in zip(*(module.parameters() for module in modules), strict=True):
        assert len(set(map(id, weights))) == 1
        assert not weights[0].is_meta
    trained = {name: value.clone() for name, value in modules[0].state_dict().items()}
    assert not any(torch.equal(value, untrained[name]) for name, value in trained.items())
    for module, variant in zip(modules, variants, strict=True):
        assert all(block.compiled == variant.compiled for block in module.network.blocks)
    model.step(variants[0])(tokens(1))
    model.step(variants[2])(tokens(1))
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_the_dense_model_has_the_same_active_flops():
    moe, dense = (StepModel(dense, SIZES, CPU) for dense in (False, True))
    gates = 3 * 2 * SIZES.n_layers * SIZES.num_experts * SIZES.d_model
    assert moe.flops_per_token - gates == pytest.approx(dense.flops_per_token)
    assert dense.load(DENSE, tokens(1)) is None


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock is a millisecond after the last."""
    looks = itertools.count()
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: 1e-3 * next(looks)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_parts_are_the_step(ticking, accumulate):
    """From one event to the next it is a millisecond, so a part has as many as it has events to end it."""
    sizes = replace(SIZES, accumulate=accumulate)
    layers, times = sizes.n_layers, sizes.accumulate
    batches = Batches(tokens(2), accumulate)
    moe = measure_parts(StepModel(False, sizes, CPU), Variant(ROUTER, "eager"), batches, 3, CPU, 0.0)
    phases = {"T_logit": 2, "T_select": 2, "T_pack": 3, "T_experts": 2, "T_unpack": 2}  # T_pack: 2 forward, 1 backward
    assert {name: spread.median for name, spread in moe.parts.items()} == pytest.approx(
        {name: times * layers * count for name, count in phases.items()}
        | {"head and loss": times, "rest": times * (2 * layers + 1) + 1, "optimizer": 1}
    )
    dense = StepModel(True, sizes, CPU)
    of_dense = measure_parts(dense, Variant(DENSE, "eager"), batches, 3, CPU, 0.0)
    assert {name: spread.median for name, spread in of_dense.parts.items()} == pytest.approx(
        {"feed-forward": times * 2 * layers, "head and loss": times}
        | {"rest": times * (2 * layers + 1) + 1, "optimizer": 1}
    )
    assert all(spread.rounds == 3 for spread in of_dense.parts.values())
    assert (moe.whole.median, of_dense.whole.median) == (pytest.approx(2), pytest.approx(2))  # no events but its own
    assert not moe.without_gaps
    # Nothing is left on the modules.
    network = dense.module(Variant(DENSE, "eager")).network
    assert type(network.blocks[0].feed_forward).__name__ == "FeedForward"
    assert not network.norm._forward_hooks


@pytest.mark.parametrize(("recompute", "vocab_size"), [("moe", 257), ("block", 257), ("none", 20_000)])
def test_parts_of_other_steps(ticking, recompute, vocab_size):
    """What is computed again, and a loss in chunks, have no events of their own: the parts have as many."""
    layers, sizes = SIZES.n_layers, replace(SIZES, recompute=recompute, vocab_size=vocab_size)
    for dense, names in ((False, ("T_logit", "T_experts")), (True, ("feed-forward",))):
        model = StepModel(dense, sizes, CPU)
        parts = measure_parts(model, Variant(model.names[0], "eager"), Batches(tokens(1), 1), 1, CPU, 0.0).parts
        assert {name: parts[name].median for name in (*names, "rest", "head and loss")} == pytest.approx(
            dict.fromkeys(names, 2 * layers) | {"rest": 2 * layers + 2, "head and loss": 1}
        )


def test_parts_of_compiled_steps(monkeypatch):
    """Compiled by a backend that leaves kernels alone."""
    compiled, torch_compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **options: torch_compile(*args, **options, backend=backend))
    for module, made in ((decoder, "_compiled_attend"), (language_module, "compiled")):
        monkeypatch.setattr(module, made, cache(getattr(module, made).__wrapped__))
    torch._dynamo.reset()
    for dense, names in ((False, ("T_logit", "T_experts")), (True, ("feed-forward",))):
        model = StepModel(dense, SIZES, CPU)
        variants = [Variant(model.names[0], form) for form in ("eager", "compile")]
        model.train(iter(()), 0, "eager")
        losses = [model.step(variant)(tokens(1))[0]["loss"].item() for variant in variants]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        times = [measure_parts(model, variant, Batches(tokens(1), 1), 1, CPU, 0.0).parts for variant in variants]
        assert set(times[0]) == set(times[1]) >= {*names, "rest", "head and loss", "optimizer"}
    assert compiled
    torch._dynamo.reset()


def test_hooks_are_taken_off():
    model = StepModel(False, SIZES, CPU)
    measure_parts(model, Variant(ROUTER, "eager"), Batches(tokens(1), 1), 1, CPU, 0.0)
    from moe_lightning.layers.phases import no_hook

    assert all(layer.hook is no_hook for layer in moe_layers(model.module(Variant(ROUTER, "eager"))))


@pytest.mark.parametrize("together", [True, False])
def test_variants_take_turns(together, monkeypatch):
    model, variants = StepModel(False, SIZES, CPU), [Variant(ROUTER, "eager"), Variant(BALANCED, "eager")]
    order, made = [], []
    monkeypatch.setattr(measure, "_seconds_per_step", lambda step, *_: order.append(step) or float(len(order)))
    make = model.step
    monkeypatch.setattr(model, "step", lambda variant: made.append((variant, make(variant))) or made[-1][1])
    alone = dict.fromkeys(variants, Alone(1.0))
    seconds = measure_rounds(
        dict.fromkeys(variants, model), alone, Batches(tokens(1), 1), 4, CPU, together, lambda: None
    )
    assert len(made) == (2 if together else 8)
    by_step = {id(step): variant for variant, step in made}
    turns = [by_step[id(step)] for step in order]
    assert all(set(turns[i : i + 2]) == set(variants) for i in range(0, 8, 2))
    assert turns[0::2] != [variants[0]] * 4 or turns[1::2] != [variants[1]] * 4
    assert {v: [i + 1 for i, turn in enumerate(turns) if turn == v] for v in variants} == seconds


def test_what_fits_together(monkeypatch):
    """90 of 100 bytes: 10 of the models, what each holds, and the most that one needs in passing."""
    monkeypatch.setattr(measure, "_settle", lambda _: (8, 10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 100))
    gpu = torch.device("cuda")
    alone = {Variant(ROUTER, "graph"): Alone(1.0, held=40, passing=5), Variant(ROUTER, "eager"): Alone(1.0, held=10)}
    assert fit_together(alone, gpu)
    assert not fit_together(alone | {Variant(DENSE, "eager"): Alone(1.0, passing=31)}, gpu)
    assert not fit_together(alone | {Variant(DENSE, "graph"): Alone(1.0, held=26)}, gpu)
    assert fit_together(alone, CPU)


def test_figures_of_a_row_by_hand():
    model = SimpleNamespace(flops_per_token=1e6)
    variant, dense = Variant(ROUTER, "graph"), Variant(DENSE, "graph")
    seconds = {variant: [0.03, 0.02, 0.04], dense: [0.02, 0.02, 0.02], Variant(DENSE, "eager"): [1.0, 1.0, 1.0]}
    parts = PartTimes(
        {"rest": Spread.of([10.0, 10.0, 10.0]), "optimizer": Spread.of([12.0, 12.0, 12.0])},
        Spread.of([25.0, 25.0, 25.0]),
        without_gaps=True,
    )
    row = command.row(variant, SIZES, model, seconds, Alone(0.03, peak=3 * 10**9, kept=10**6), parts, peak=1e9)
    assert row["ms"] == pytest.approx(30)
    assert row["tokens_per_s"] == pytest.approx(32 / 0.03)
    assert row["mfu"] == pytest.approx(32 / 0.03 * 1e6 / 1e9)
    assert row["x_dense"] == pytest.approx(1.5)
    assert (row["peak_mb"], row["kept_mb"]) == (3000, 1)
    assert row["host_gaps_ms"] == pytest.approx(5)
    assert row["check"]["gap"] == pytest.approx(22 / 25 - 1)
    assert row["check"]["verdict"] == "over 10%"


def test_a_form_that_cannot_run_is_left_out(folder, capsys, monkeypatch):
    monkeypatch.setattr(models.shutil, "which", lambda _: None)
    monkeypatch.delenv("CXX", raising=False)
    assert main([*FLAGS, "--loads", "balanced", "--rounds", "1", "--json", "step.json"]) == 0
    printed = capsys.readouterr().out
    for form in ("graph", "compile+graph"):
        assert f"left out: {form}: CUDA graphs need a GPU" in printed
    assert "left out: compile: torch.compile needs a C++ compiler on PATH" in printed
    rows = json.loads((folder / "step.json").read_text())["results"]["rows"]
    assert [(row["model"], row["form"]) for row in rows] == [(BALANCED, "eager"), (DENSE, "eager")]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variants", "graphs"], "variants must be one of eager, compile, graph, .* did you mean graph"),
        (["--variants", "graph"], "one of --variants must be possible here, got graph: CUDA graphs need a GPU"),
        (["--loads", "real"], "loads must be one of router, balanced"),
        (["--router", "naive"], "router must be one of"),
        (["--top_k", "9"], "top_k must be in"),
        (["--heads", "3"], "n_heads"),
        (["--vocab_size", "256"], r"vocab_size must be in \[257, "),
        (["--precision", "16-mixed"], "precision must be one of bf16-mixed, 32-true"),
        (["--recompute", "all"], "recompute must be one of none, moe, block"),
        (["--rounds", "0"], "rounds must be a positive integer"),
        (["--warmup", "-1"], "warmup must be in"),
        (["--batch_size", "100000"], "the train split is too short"),
        (["--path", "missing"], "path must be a file, a folder or a glob"),
        (["--plot", "x.txt"], "--plot must end in"),
    ],
)
def test_bad_input_is_one_line(folder, flags, said, capsys):
    assert main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(said, error), error


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("accumulate", ["1", "2"])
@pytest.mark.parametrize("together", [True, False])
def test_on_a_gpu(folder, accumulate, together, monkeypatch):
    monkeypatch.setattr(measure, "MOST_MEMORY", 0.9 if together else 0.0)
    sizes = ["--d_model", "128", "--hidden_dim", "64", "--seq_len", "64", "--batch_size", "8"]
    flags = [*FLAGS, "--device", "cuda", *sizes, "--accumulate", accumulate, "--rounds", "3", "--json", "step.json"]
    assert main(flags) == 0
    results = json.loads((folder / "step.json").read_text())["results"]
    assert results["together"] == together
    rows = {(row["model"], row["form"]): row for row in results["rows"]}
    assert len(rows) == (12 if why_not_compile() is None else 6)
    for (model, form), row in rows.items():
        assert 0 < row["kept_mb"] < row["peak_mb"]
        assert row["check"]["parts_us"] == pytest.approx(1e3 * sum(row["parts_ms"].values()))
        assert min(row["parts_ms"].values()) > 0, row
        assert row["parts_ms"] == rows[model, form.replace("+graph", "").replace("graph", "eager")]["parts_ms"]
    assert rows[ROUTER, "graph"]["host_gaps_ms"] < rows[ROUTER, "eager"]["host_gaps_ms"]


@pytest.mark.gpu
def test_a_step_that_reads_the_host_has_no_graph(folder, monkeypatch, capsys):
    route = models.router_class("fused_select").select_experts

    def reading(self, logits_TE):
        logits_TE.sum().item()
        return route(self, logits_TE)

    monkeypatch.setattr(models.router_class("fused_select"), "select_experts", reading)
    flags = [*FLAGS, "--device", "cuda", "--variants", "eager", "graph", "--rounds", "1", "--json", "step.json"]
    assert main(flags) == 0
    assert "left out: MoE, graph: the step reads the host" in capsys.readouterr().out
    rows = {
        (row["model"], row["form"]): row for row in json.loads((folder / "step.json").read_text())["results"]["rows"]
    }
    assert (ROUTER, "graph") not in rows
    assert rows[ROUTER, "eager"]["host_gaps_ms"] is None
    assert rows[DENSE, "graph"]["host_gaps_ms"] is not None
