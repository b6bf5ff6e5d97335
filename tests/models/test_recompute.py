"""Activation checkpointing: losses and gradients to the bit, less kept for backward, routing decided once."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from tiny_models import SIZES, make_dense, make_moe, some_tokens
from torch.nn import functional as F

from moe_lightning.layers import Phase
from moe_lightning.models import decoder
from moe_lightning.models.decoder import Block
from moe_lightning.routers import ROUTERS, FusedSelect, Routing, load_balancing_loss, z_loss

KINDS = ("none", "moe", "block")
TOKENS = 2 * 11


def results(model, tokens_BS, dtype=None):
    """The losses of a pass, auxiliary ones included, and the gradient of each parameter."""
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(tokens_BS[:, :-1])
        losses = [F.cross_entropy(output.logits_BSV.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())]
        losses += [f(routing) for routing in output.routings for f in (load_balancing_loss, z_loss)]
    sum(losses).backward()
    return {
        **{f"loss {i}": loss.detach() for i, loss in enumerate(losses)},
        **{name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad},
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def of_each_kind(make, kinds=KINDS, **options):
    """Models of the same weights."""
    models = []
    for kind in kinds:
        torch.manual_seed(0)
        models.append(make(recompute=kind, **options).train())
    return models


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", list(ROUTERS))
def test_losses_and_gradients_are_the_same_to_the_bit(router, dtype):
    plain, *recomputed = of_each_kind(make_moe, router=router)
    tokens_BS = some_tokens()
    expected = results(plain, tokens_BS, dtype)
    for model in recomputed:
        assert_same(results(model, tokens_BS, dtype), expected)


def limited(*sizes, **options):
    return FusedSelect(*sizes, capacity_factor=0.5, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"router": limited},
        {"dropout": 0.3},
        {"experts": "loop", "activation": "gelu"},
        {"tie_embeddings": True, "n_layers": 3},
    ],
    ids=["capacity", "dropout", "loop", "tied"],
)
def test_with_options_of_a_model_they_are_the_same_too(options):
    plain, *recomputed = of_each_kind(make_moe, **options)
    tokens_BS = some_tokens()
    expected = results(plain, tokens_BS)
    for model in recomputed:
        assert_same(results(model, tokens_BS), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_dense_model_repeats_its_blocks(dropout):
    plain, recomputed = of_each_kind(make_dense, ("none", "block"), dropout=dropout)
    tokens_BS = some_tokens()
    assert_same(results(recomputed, tokens_BS), results(plain, tokens_BS))


def test_a_dense_model_has_no_moe_layers_to_repeat():
    with pytest.raises(ValueError, match=r"^transformer_decoder: recompute must be one of none, block, got 'moe'"):
        make_dense(recompute="moe")
    with pytest.raises(ValueError, match=r"^decoder_moe: recompute must be one of none, moe, block, got 'all'$"):
        make_moe(recompute="all")


# ---- memory ----------------------------------------------------------------------------------------------
def kept(model, tokens_BS):
    """Bytes and shapes of the tensors, weights left out, that autograd keeps from a forward pass; no memory twice."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens_BS)
    del output
    tensors = list(storages.values())
    return sum(t.untyped_storage().nbytes() for t in tensors), [tuple(t.shape) for t in tensors]


@pytest.mark.parametrize("router", list(ROUTERS))
def test_each_kind_keeps_less_than_the_one_before(router):
    models, tokens_BS = of_each_kind(make_moe, router=router, n_layers=4), some_tokens(seq_len=64)
    sizes = [kept(model, tokens_BS)[0] for model in models]
    assert all(more > 1.5 * less for more, less in pairwise(sizes)), sizes


def test_an_moe_layer_keeps_no_row_of_an_expert():
    """Neither N x D nor N x F; T x D are its tokens."""
    plain, of_layers, of_blocks = of_each_kind(make_moe, n_layers=1, num_experts=8, top_k=4)
    tokens_BS = some_tokens(2, 11)
    of_rows = [kept(model, tokens_BS)[1] for model in (plain, of_layers, of_blocks)]
    rows = [[shape for shape in shapes if shape[:1] == (4 * TOKENS,) and shape[1:]] for shapes in of_rows]
    assert rows[0]
    assert rows[1:] == [[], []]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_each_kind_has_a_lower_peak_and_the_same_gradients(compiled):
    sizes = {"vocab_size": 64, "d_model": 256, "n_heads": 4, "n_layers": 6, "mlp_hidden_dim": 512, "num_experts": 8}
    models = [model.cuda() for model in of_each_kind(make_moe, **sizes)]
    tokens_BS = torch.randint(
        0, 64, (64, 65), device="cuda"
    )  # short: attention adds up gradients of long ones in any order
    peaks, found = [], []
    for model in models:
        if compiled:
            model.compile_blocks()
        for _ in range(2):  # the first pass compiles
            model.zero_grad()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                logits_BSV = model(tokens_BS[:, :-1]).logits_BSV
            torch.cuda.set_sync_debug_mode("error")
            try:
                F.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS[:, 1:].flatten()).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert peaks[5] < peaks[3] < peaks[1], peaks[1::2]
    for gradients in found:
        del gradients["embedding.weight"]  # torch adds its rows up in any order where there are many tokens
    for gradients in found[1:]:
        assert_same(gradients, found[0])


def test_a_pass_without_backward_leaves_nothing_behind():
    """What the second pass is given must not hold the graph that holds it."""

    class Sentinel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.held = held = torch.nn.Identity()
            alive.append(weakref.ref(held))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    for model in of_each_kind(make_moe):
        alive = []
        model.embedding.register_forward_hook(lambda module, inputs, output: Sentinel.apply(output))
        output = model(some_tokens())
        assert alive[0]() is not None
        del output
        gc.collect()
        assert alive[0]() is None


# ---- routing -----------------------------------------------------------------------------------------------
class Fickle(FusedSelect):
    """Each call prefers other experts than the one before."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0

    def select_experts(self, logits_TE, tokens):
        self.calls += 1
        sign = 1.0 if self.calls % 2 else -1.0
        return super().select_experts(sign * logits_TE, tokens)


@pytest.mark.parametrize("kind", ["moe", "block"])
def test_a_router_is_asked_once_even_if_it_would_choose_otherwise(kind):
    plain, recomputed = of_each_kind(make_moe, ("none", kind), router=Fickle)
    tokens_BS = some_tokens()
    expected = results(plain, tokens_BS)
    assert_same(results(recomputed, tokens_BS), expected)
    assert [layer.router.calls for layer in recomputed.moe_layers] == [1, 1]
    # Asked again it would have chosen otherwise, and the gradient would have been another.
    with torch.no_grad():
        first, second = (plain(tokens_BS).routings[0].selection.expert_ids_TK for _ in range(2))
    assert not torch.equal(first, second)


def test_two_passes_may_be_open_at_once():
    """Each gets its own selections in backward, whatever the order."""
    plain, _, recomputed = of_each_kind(make_moe, router=Fickle)
    gradients = []
    for model in (plain, recomputed):
        outputs = [model(tokens_BS).logits_BSV.square().mean() for tokens_BS in FIXED]
        outputs[0].backward()
        outputs[1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(gradients[1], gradients[0])


FIXED = torch.arange(48).view(2, 2, 12)


def test_backward_may_be_taken_twice():
    plain, _, recomputed = of_each_kind(make_moe)
    gradients = []
    for model in (plain, recomputed):
        loss = model(FIXED[0]).logits_BSV.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(gradients[1], gradients[0])


def test_outputs_without_gradient_are_the_same_and_make_no_second_pass():
    plain, *recomputed = of_each_kind(make_moe)
    with torch.no_grad():
        expected = plain.eval()(FIXED[0])
        for model in recomputed:
            found = model.eval()(FIXED[0])
            assert torch.equal(found.logits_BSV, expected.logits_BSV)
            assert isinstance(found.routings[0], Routing)
            assert found.logits_BSV.grad_fn is None


# ---- hooks and compilation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_is_called_once_per_phase_and_pass(kind):
    [model] = of_each_kind(make_moe, (kind,))
    seen, gradients = [], []

    def hook(phase, tensor=None, step=None):
        seen.append(phase)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradients.append(phase))

    for layer in model.moe_layers:
        layer.hook = hook
    results(model, some_tokens())
    assert seen == 2 * list(Phase)
    assert gradients == 2 * [phase for phase in reversed(Phase) if phase is not Phase.PERMUTE]


@pytest.fixture
def eager_backend(monkeypatch):
    """What torch.compile makes, by a backend that generates no code; the traced regions."""
    regions = []

    def backend(graph, inputs):
        regions.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    attend = torch.compile(Block.attend, backend=backend)
    monkeypatch.setattr(decoder, "_compiled_attend", lambda: attend)
    torch.compiler.reset()
    yield regions
    torch.compiler.reset()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["moe", "block"])
def test_compiled_blocks_are_repeated_as_they_are(kind, dropout, eager_backend):
    plain, recomputed = of_each_kind(make_moe, ("none", kind), n_layers=3, dropout=dropout)
    tokens_BS = some_tokens()
    for model in (plain, recomputed):
        model.compile_blocks()
    expected = results(plain, tokens_BS)
    traced = len(eager_backend)
    assert traced == 2  # with and without a y that is still to be added
    assert_same(results(recomputed, tokens_BS), expected)
    assert_same(results(recomputed, tokens_BS), expected)


def test_a_compiled_dense_model_is_repeated_as_it_is(eager_backend):
    plain, recomputed = of_each_kind(make_dense, ("none", "block"))
    for model in (plain, recomputed):
        for block in model.blocks:
            block.compiled = True
            block.feed_forward.compile(backend="aot_eager")
    tokens_BS = some_tokens()
    assert_same(results(recomputed, tokens_BS), results(plain, tokens_BS))


@pytest.mark.parametrize("kind", ["moe", "block"])
def test_a_model_that_is_compiled_whole_asks_its_router_once_too(kind):
    torch.compiler.reset()
    plain, recomputed = of_each_kind(make_moe, ("none", kind), router=Fickle)
    gradients = []
    for model, runner in ((plain, plain), (recomputed, torch.compile(recomputed, backend="aot_eager"))):
        runner(FIXED[0]).logits_BSV.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert [layer.router.calls for layer in recomputed.moe_layers] == [1, 1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
    torch.compiler.reset()


def test_it_is_no_part_of_the_architecture():
    plain, *recomputed = of_each_kind(make_moe)
    for model in recomputed:
        assert model.architecture == plain.architecture
        assert model.state_dict().keys() == plain.state_dict().keys()
    assert SIZES["d_model"] == plain.architecture["d_model"]
