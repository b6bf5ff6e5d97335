"""What a rank checks, on a GPU of its own or on the CPU, imported there."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moe_lightning.expert_parallel.all_to_all import AllToAllDispatcher
from moe_lightning.expert_parallel.symmetric import SymmetricDispatcher
from moe_lightning.expert_parallel.symmetric_memory import SymmetricMemory
from moe_lightning.layers import Experts, MoE
from moe_lightning.routers import ROUTERS

EXPERTS, TOP_K, WIDTH, HIDDEN = 16, 3, 64, 128
TIMEOUT_SECONDS = 20
DROPPING = {"skew_experts": 3, "skew_bias": 1e3, "capacity_factor": 1.0}
ONE_RANK = {"skew_experts": 2, "skew_bias": 1e3}  # two of a token's three experts are the first two
#: Tokens of each rank, as multiples by rank parity, and options of the router.
CASES = (((300, 171), {}), ((0, 97), {}), ((1, 1), {}), ((64, 64), ONE_RANK), ((64, 64), DROPPING))


class Rank:
    """This process: its rank, its device, its memory."""

    def __init__(self, rank: int, world: int, device: str, timeout_seconds: float):
        self.rank, self.world = rank, world
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)
        self.memory = SymmetricMemory.create(dist.group.WORLD, self.device, timeout_seconds)

    def layer(self, dtype, implementation="auto", seed=0, **options) -> MoE:
        """All experts, the same on every rank."""
        torch.manual_seed(seed)
        router = ROUTERS["naive_topk"](WIDTH, EXPERTS, TOP_K, **options)
        moe = MoE(router, Experts(WIDTH, HIDDEN, EXPERTS, implementation=implementation))
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.mul_(8)
        return moe.to(self.device, dtype).train()

    def spread(self, kind: str, dtype, implementation="auto", seed=0, **options) -> MoE:
        """This rank's experts, by a dispatcher of this kind."""
        moe = self.layer(dtype, implementation, seed, **options)
        share = slice(self.rank * EXPERTS // self.world, (self.rank + 1) * EXPERTS // self.world)
        for name in ("up", "down"):
            setattr(moe.experts, name, torch.nn.Parameter(getattr(moe.experts, name)[share].detach().clone()))
        if kind == "symmetric":
            moe.dispatcher = SymmetricDispatcher(EXPERTS, TOP_K, self.memory)
        else:
            moe.dispatcher = AllToAllDispatcher(EXPERTS, TOP_K, "capacity_factor" in options, dist.group.WORLD)
        return moe

    def tokens(self, counts, dtype, seed=0, rank=None):
        """Tokens and the gradient of the output."""
        rank = self.rank if rank is None else rank
        generator = torch.Generator().manual_seed(100 * seed + rank)
        count = counts[rank % len(counts)]
        return [torch.randn(count, WIDTH, generator=generator).to(self.device, dtype) for _ in range(2)]


def results(moe, x_TD, grad_TD):
    """Output and gradients, by name."""
    x_TD = x_TD.detach().requires_grad_()
    y_TD, _ = moe(x_TD)
    gradients = torch.autograd.grad(y_TD, (x_TD, *moe.parameters()), grad_TD)
    names = "x", *(name for name, _ in moe.named_parameters())
    return {"y": y_TD.detach(), **dict(zip(names, gradients, strict=True))}


def check_one_rank(me: Rank):
    """In fp32 the layer of one rank, by exchanges and by symmetric memory alike."""
    for counts, options in CASES:
        alone = me.layer(torch.float32, **options)
        passes = [
            results(alone, *me.tokens(counts, torch.float32, rank=rank)) for rank in range(me.world)
        ]  # capacity is of a rank's tokens
        expected = dict(passes[me.rank])
        share = slice(me.rank * EXPERTS // me.world, (me.rank + 1) * EXPERTS // me.world)
        for name in ("experts.up", "experts.down"):
            expected[name] = sum(each[name] for each in passes)[share]
        for kind in ("symmetric", "exchanges"):
            moe = me.spread(kind, torch.float32, **options)
            for name, value in results(moe, *me.tokens(counts, torch.float32)).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=f"{kind} {counts} {name}")


def check_halves(me: Rank):
    """In half precision, where combine weights are folded in, as near as exchanges come to fp32 on the same choices."""
    for dtype in (torch.bfloat16, torch.float16):
        for counts, options in CASES:
            found = {
                kind: results(me.spread(kind, dtype, **options), *me.tokens(counts, dtype))
                for kind in ("symmetric", "exchanges")
            }
            for name, value in found["symmetric"].items():
                other = found["exchanges"][name]
                assert value.isfinite().all(), f"{dtype} {counts} {name}"
                # Each is within two roundings of the exact sums.
                bound = 4 * torch.finfo(dtype).eps * (1 + float(other.float().norm()))
                assert float((value.float() - other.float()).norm()) <= bound, f"{dtype} {counts} {name}"


def check_same_bits(me: Rank):
    """Two hundred times the same, forward and backward."""
    for dtype in (torch.bfloat16, torch.float32):
        moe, inputs = me.spread("symmetric", dtype), me.tokens((300, 171), dtype)
        first = results(moe, *inputs)
        for _ in range(200):
            for name, value in results(moe, *inputs).items():
                assert value.equal(first[name]), f"{dtype} {name}"


def check_graph(me: Rank):
    """A captured forward pass, launched again on other tokens; eager passes in between."""
    moe = me.spread("symmetric", torch.bfloat16)
    counts = (128, 128)
    x_TD, _ = me.tokens(counts, torch.bfloat16)
    with torch.no_grad():
        moe(x_TD)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y_TD, _ = moe(x_TD)
        for seed in range(50):
            other_TD, _ = me.tokens(counts, torch.bfloat16, seed)
            expected_TD, _ = moe(other_TD)
            x_TD.copy_(other_TD)
            graph.replay()
            assert y_TD.equal(expected_TD), seed
            graph.replay()  # without anything in between
            graph.replay()
            assert y_TD.equal(expected_TD), seed


def check_training_graph(me: Rank):
    """Forward and backward in one graph, launched again on other tokens, also twice with nothing in between."""
    moe, counts = me.spread("symmetric", torch.bfloat16), (128, 96)
    x_TD, grad_TD = me.tokens(counts, torch.bfloat16)
    results(moe, x_TD, grad_TD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = results(moe, x_TD, grad_TD)
    for seed in range(50):
        others = me.tokens(counts, torch.bfloat16, seed)
        expected = results(moe, *others)
        for own, other in zip((x_TD, grad_TD), others, strict=True):
            own.copy_(other)
        for _ in range(3):
            graph.replay()
        for name, value in expected.items():
            assert captured[name].equal(value), f"{seed} {name}"


def check_ranks_out_of_step(me: Rank):
    """Ranks that come late, each at other times, to a stack of layers: the same bits; no host waits for its device."""
    layers = [me.spread("symmetric", torch.bfloat16, seed=seed) for seed in range(3)]
    parameters = [p for moe in layers for p in moe.parameters()]
    late = torch.Generator().manual_seed(me.rank)

    def step(seed, most_cycles):
        def be_late():
            if most_cycles:
                torch.cuda._sleep(int(torch.randint(most_cycles, (1,), generator=late)))

        x_TD, grad_TD = inputs[seed]
        y_TD = leaf_TD = x_TD.detach().requires_grad_()
        for moe in layers:
            be_late()
            y_TD = y_TD + moe(y_TD)[0] / 64
        be_late()
        y_TD.register_hook(lambda _: be_late())
        return [y_TD.detach(), *torch.autograd.grad(y_TD, (leaf_TD, *parameters), grad_TD)]

    inputs = [me.tokens((300, 171), torch.bfloat16, seed) for seed in range(4)]
    expected = [step(seed, 0) for seed in range(4)]
    found = []
    torch.cuda.set_sync_debug_mode("error")
    for turn in range(100):
        found = [*found[-3:], (turn % 4, step(turn % 4, 1_000_000))]
        if turn % 10 == 9:
            torch.cuda.set_sync_debug_mode("default")
            for seed, values in found:
                assert all(a.equal(b) for a, b in zip(values, expected[seed], strict=True)), turn
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def check_passes_alive(me: Rank):
    """Several passes before the first backward, and layers on top of each other."""
    counts = (200, 150)
    for kind in ("symmetric", "exchanges"):
        layers = [me.spread(kind, torch.float32, seed=seed) for seed in range(3)]
        inputs = [me.tokens(counts, torch.float32, seed) for seed in range(3)]
        leaves = [x_TD.requires_grad_() for x_TD, _ in inputs]
        outputs = []
        for leaf_TD in leaves:
            y_TD = leaf_TD
            for moe in layers:
                y_TD = y_TD + moe(y_TD)[0] / 64  # or they would blow rounding up from layer to layer
            outputs.append(y_TD)
        for y_TD, (_, grad_TD) in zip(outputs, inputs, strict=True):
            y_TD.backward(grad_TD)
        outputs = [y_TD.detach() for y_TD in outputs]
        found = [leaf.grad for leaf in leaves] + [p.grad for moe in layers for p in moe.parameters()] + outputs
        if kind == "symmetric":
            ours = found
    for i, (a, b) in enumerate(zip(ours, found, strict=True)):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()), i


def check_frozen_tokens(me: Rank):
    """Tokens that need no gradient, so that nothing is fetched in backward; twice in a row."""
    moe = {kind: me.spread(kind, torch.float32) for kind in ("symmetric", "exchanges")}
    for seed in range(20):
        x_TD, grad_TD = me.tokens((90, 120), torch.float32, seed)
        grads = {}
        for kind, layer in moe.items():
            first, second = layer(x_TD)[0], layer(2 * x_TD)[0]
            grads[kind] = [
                g for y in (first, second) for g in torch.autograd.grad(y, layer.experts.parameters(), grad_TD)
            ]
        for a, b in zip(*grads.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_more_tokens(me: Rank):
    """Passes with more tokens than before, while an earlier one still waits for its backward."""
    moe = {kind: me.spread(kind, torch.float32) for kind in ("symmetric", "exchanges")}
    gradients = {}
    for kind, layer in moe.items():
        inputs = [me.tokens((tokens, tokens), torch.float32, tokens) for tokens in (10, 40, 41, 7)]
        leaves = [x_TD.requires_grad_() for x_TD, _ in inputs]
        outputs = [layer(leaf)[0] for leaf in leaves]
        for y_TD, (_, grad_TD) in zip(outputs, inputs, strict=True):
            y_TD.backward(grad_TD)
        gradients[kind] = [leaf.grad for leaf in leaves]
    for a, b in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert moe["symmetric"].dispatcher.capacity == me.world * (40 * 5 // 4) * min(TOP_K, EXPERTS // me.world)
    unequal = me.spread("symmetric", torch.float32)
    unequal(me.tokens((8, 5), torch.float32)[0])
    with pytest.raises(ValueError, match=r"^dispatch: tokens of a rank must be .* got tokens=9, max_tokens=8; raise"):
        unequal(me.tokens((9, 9), torch.float32)[0])


def check_buffers_that_differ(me: Rank):
    """A rank that keeps another pass alive would write to a buffer that others do not mean: all end, and say so."""
    moe = me.spread("symmetric", torch.float32)
    x_TD, _ = me.tokens((8, 8), torch.float32)
    moe(x_TD)
    torch.cuda.synchronize()
    if me.rank == 0:
        moe.dispatcher._pool.acquire()
    said = fault_of(me, lambda: moe.dispatcher.index(moe.router(x_TD).selection))
    assert said is not None
    assert "ranks must use their buffers in the same order" in said
    os._exit(0)  # the CUDA context is gone, nothing can be taken down


def fault_of(me: Rank, call) -> str | None:
    """What the kernels have found wrong with a call."""
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError:
        return me.memory.signals.error()
    return None


def check_timeout(me: Rank):
    """A rank that does not come ends the others, which say so."""
    store = dist.distributed_c10d._get_default_store()
    moe = me.spread("symmetric", torch.float32)
    x_TD, _ = me.tokens((8, 8), torch.float32)
    moe(x_TD)
    torch.cuda.synchronize()
    if me.rank > 0:
        store.wait(["said"], timedelta(seconds=60))
        os._exit(0)
    said = fault_of(me, lambda: moe(x_TD))
    assert said is not None
    assert "rank 1 of the group did not come within timeout_seconds=5; look at that rank's log" in said
    store.set("said", "yes")
    os._exit(0)


def rank_process(rank: int, world: int, folder: str, check: str, device: str, folded: bool = False) -> None:
    """One check on this rank; `folded`: experts fold combine weights in where they would not by themselves."""
    if folded:
        Experts.implementation_for = lambda *_: "cutlass"  # type: ignore[method-assign]  # the op's reference, on the CPU
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    torch.set_num_threads(1)
    dist.init_process_group(backend, f"file://{folder}/store", timedelta(seconds=60), world_size=world, rank=rank)
    globals()[check](Rank(rank, world, device, 5 if check == "check_timeout" else TIMEOUT_SECONDS))
    dist.barrier()
    dist.destroy_process_group()
