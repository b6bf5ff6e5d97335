"""The loss of large vocabularies, in chunks of tokens, against the plain one."""

import sys
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "callbacks"))

from tiny_fit import Batches, fit

from moe_lightning.training import cross_entropy as module
from moe_lightning.training import language_module
from moe_lightning.training.cross_entropy import (
    LARGE_VOCABULARY,
    cross_entropy,
    linear_cross_entropy,
    tokens_per_chunk,
)
from moe_lightning.training.modules import DecoderMoEModule, MLPModule, TransformerDecoderModule

B, S, D, V = 3, 7, 16, 40


@pytest.fixture(params=[1, 4, 8, 32], ids=lambda size: f"chunks of {size}")
def chunk(request, monkeypatch):
    """Tokens per chunk, of 21: one leaves no shorter last chunk, one is a single chunk."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", request.param * V)
    assert tokens_per_chunk(V) == request.param


def inputs(dtype=torch.float32, head_dtype=torch.float32):
    hidden = torch.randn(B, S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=head_dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (B, S))


def value_and_gradients(of, hidden, weight, targets, scale=1.0):
    loss = of(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def plain(hidden, weight, targets):
    return cross_entropy(F.linear(hidden, weight), targets, "mean")


def in_chunks(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets, "mean")


def errors(found, exact):
    """Of each tensor the largest error, over the largest value."""
    return [float((f.double() - e).abs().max() / e.abs().max()) for f, e in zip(found, exact, strict=True)]


def exact(hidden, weight, targets, scale=1.0):
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = F.cross_entropy(F.linear(*leaves).flatten(0, 1), targets.flatten())
    return loss.detach(), *torch.autograd.grad(loss * scale, leaves)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1000.0])
def test_value_and_gradients_in_fp32(chunk, scale):
    arguments = inputs()
    found = value_and_gradients(in_chunks, *arguments, scale)
    assert [(f.dtype, f.shape) for f in found] == [(torch.float32, t.shape) for t in (torch.tensor(0), *arguments[:2])]
    assert max(errors(found, exact(*arguments, scale))) < 1e-6


def test_value_and_gradients_in_fp64(chunk):
    arguments = inputs(torch.float64, torch.float64)
    found = value_and_gradients(in_chunks, *arguments)
    assert {f.dtype for f in found} == {torch.float64}
    assert max(errors(found, exact(*arguments))) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "hidden_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_under_autocast_the_error_is_at_most_that_of_the_plain_loss(chunk, dtype, hidden_dtype):
    """The products are rounded as there; the weight's gradient is added up in fp32."""
    arguments = inputs(hidden_dtype)
    with torch.autocast("cpu", dtype):
        found = value_and_gradients(in_chunks, *arguments)
        expected = value_and_gradients(plain, *arguments)
    assert [f.dtype for f in found] == [torch.float32, hidden_dtype, torch.float32]
    of_found, of_plain = errors(found, exact(*arguments)), errors(expected, exact(*arguments))
    for mine, theirs in zip(of_found, of_plain, strict=True):
        assert mine < 1.5 * theirs + 2e-4, (of_found, of_plain)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no such function")
def test_it_is_more_exact_than_torchs_own(monkeypatch):
    """Why that is not used: it takes bf16 weights, and gives loss and gradient in bf16."""
    hidden, weight, targets = torch.randn(1, 512, D), 0.3 * torch.randn(256, D), torch.randint(0, 256, (1, 512))
    arguments = hidden.requires_grad_(), weight.requires_grad_(), targets
    monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * 256)
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=64, acc_policy="accurate")

    def torchs(hidden, weight, targets):
        half = hidden.flatten(0, 1).bfloat16(), weight.bfloat16()
        return F.linear_cross_entropy(*half, targets.flatten(), options=options)

    with torch.autocast("cpu", torch.bfloat16):
        ours, of_torch = (value_and_gradients(of, *arguments) for of in (in_chunks, torchs))
    of_ours, of_torch = errors(ours, exact(*arguments)), errors(of_torch, exact(*arguments))
    assert of_ours[0] < of_torch[0]
    assert of_ours[2] < of_torch[2]


@pytest.mark.gpu
@pytest.mark.parametrize("use_compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
def test_on_a_gpu_it_is_captured_and_reads_nothing(dtype, use_compiled):
    tokens, width, vocab = 1000, 64, 1 << 18  # a chunk of 512, and a shorter one
    hidden = torch.randn(1, tokens, width, device="cuda").requires_grad_()
    weight = (0.1 * torch.randn(vocab, width, device="cuda")).requires_grad_()
    targets = torch.randint(0, vocab, (1, tokens), device="cuda")

    def run():
        hidden.grad = weight.grad = None
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = linear_cross_entropy(hidden, weight, targets, "mean", use_compiled)
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager = [value.clone() for value in run()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    graph.replay()
    assert [value.dtype for value in captured] == [torch.float32] * 3
    for replayed, value in zip(captured, eager, strict=True):
        assert torch.equal(replayed, value)
    log_probabilities = F.linear(hidden[0].detach(), weight.detach()).log_softmax(1)
    expected = -log_probabilities.gather(1, targets[0][:, None]).mean()
    torch.testing.assert_close(eager[0], expected, rtol=1e-5 if dtype is None else 1e-3, atol=0)
    grad_logits = log_probabilities.exp_().scatter_add_(1, targets[0][:, None], torch.full((tokens, 1), -1.0).cuda())
    of_weight = grad_logits.mT @ hidden[0].detach() / tokens
    assert float((eager[2] - of_weight).norm() / of_weight.norm()) < (1e-4 if dtype is None else 0.01)


def test_half_precision_throughout(chunk):
    arguments = inputs(torch.bfloat16, torch.bfloat16)
    found = value_and_gradients(in_chunks, *arguments)
    assert [f.dtype for f in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert max(errors(found, exact(*arguments))) < 0.02


def test_small_gradients_survive_fp16():
    """A probability over 2,048 tokens is below fp16's smallest number, and what the loss is scaled by comes last."""
    hidden = torch.randn(1, 2048, D, requires_grad=True)
    weight = (0.02 * torch.randn(512, D)).requires_grad_()
    targets = torch.zeros(1, 2048, dtype=torch.long)
    with torch.autocast("cpu", torch.float16):
        found = value_and_gradients(in_chunks, hidden, weight, targets, 2.0**16)
    assert max(errors(found, exact(hidden, weight, targets, 2.0**16))) < 0.01


def test_one_gradient_alone(chunk):
    hidden, weight, targets = inputs()
    both = value_and_gradients(in_chunks, hidden, weight, targets)[1:]
    for i, expected in enumerate(both):
        leaves = [hidden.detach(), weight.detach()]
        leaves[i].requires_grad_()
        in_chunks(*leaves, targets).backward()
        assert torch.equal(leaves[i].grad, expected)
        assert leaves[1 - i].grad is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_loss_of_each_token_is_the_plain_one(chunk, dtype):
    hidden, weight, targets = inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = linear_cross_entropy(hidden, weight, targets, "none")
        expected = cross_entropy(F.linear(hidden, weight), targets, "none")
    assert found.shape == (B * S,)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_no_token_at_all():
    hidden, weight, targets = torch.zeros(0, S, D), torch.zeros(V, D), torch.zeros(0, S, dtype=torch.long)
    assert linear_cross_entropy(hidden, weight, targets, "none").shape == (0,)
    assert linear_cross_entropy(hidden, weight, targets, "mean").isnan()  # as F.cross_entropy


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(chunk, bad):
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[1, 2, 3] = bad
    assert not in_chunks(hidden, weight, targets).isfinite()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, "none").isfinite().sum() == B * S - 1


@pytest.mark.parametrize("target", [-100, -1, V])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_target_is_ignored(target, reduction):
    hidden, weight, targets = inputs()
    targets[1, 2] = target
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match=r"(?i)out of (bounds|range)"):
        linear_cross_entropy(hidden, weight, targets, reduction)


def test_what_it_does_not_do_is_refused():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"^cross_entropy: reduction must be mean or none, got 'sum'$"):
        linear_cross_entropy(hidden, weight, targets, "sum")
    with pytest.raises(ValueError, match=r"^cross_entropy: reduction=none has no gradient here, got one to take; use "):
        linear_cross_entropy(hidden, weight, targets, "none")
    loss = in_chunks(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch):
    hidden, weight, targets = (
        torch.randn(1, 256, D, requires_grad=True),
        torch.randn(1024, D),
        torch.zeros(1, 256).long(),
    )
    weight.requires_grad_()
    monkeypatch.setattr(module, "CHUNK_LOGITS", 32 * 1024)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = in_chunks(hidden, weight, targets)
    assert sorted(kept) == [256 * D, 1024 * D]  # the gradients
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plain(hidden, weight, targets)
    assert max(kept) == 256 * 1024
    largest = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: largest.append(linear(*a).numel()) or linear(*a))
    loss = in_chunks(hidden, weight, targets)
    assert loss.isfinite()
    assert largest == [32 * 1024] * 8


def test_chunks_of_the_usual_vocabularies():
    sizes = {vocab: tokens_per_chunk(vocab) for vocab in (LARGE_VOCABULARY, 32_000, 50_304, 131_072, 2**28)}
    assert sizes == {LARGE_VOCABULARY: 8192, 32_000: 4096, 50_304: 2048, 131_072: 1024, 2**28: 1}


@pytest.mark.parametrize("use_compiled", [False, True])
def test_compiled_it_is_the_same(use_compiled, chunk, monkeypatch):
    made = []

    def compile(function):
        made.append(function.__name__)
        return torch_compile(function, backend="aot_eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(module, "compiled", cache(module.compiled.__wrapped__))
    torch.compiler.reset()
    arguments = inputs()
    found = value_and_gradients(lambda *a: linear_cross_entropy(*a, "mean", use_compiled), *arguments)
    assert max(errors(found, exact(*arguments))) < 1e-6
    with torch.no_grad():
        of_tokens = linear_cross_entropy(*arguments, "none", use_compiled)
    torch.testing.assert_close(of_tokens.mean(), found[0], rtol=1e-6, atol=1e-6)
    assert made == (["chunk_gradient", "chunk_losses"] if use_compiled else [])
    torch.compiler.reset()


# ---- in training -------------------------------------------------------------------------------------------
MAKERS = {
    "decoder_moe": lambda **options: DecoderMoEModule(64, 16, 2, 2, 16, 4, 2, **options),
    "transformer_decoder": lambda **options: TransformerDecoderModule(64, 16, 2, 2, 16, **options),
    "mlp": lambda **options: MLPModule(64, 16, **options),
}


class Gradients(L.Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("decoder_moe", {}), ("decoder_moe", {"tie_embeddings": True}), ("transformer_decoder", {}), ("mlp", {})],
    ids=["decoder_moe", "tied", "transformer_decoder", "mlp"],
)
def test_a_run_with_chunks_is_the_run_without(name, options, precision, monkeypatch):
    """Losses of training and validation, gradients and all; no logits are made."""
    metrics, gradients = [], []
    for large in (False, True):
        monkeypatch.setattr(language_module, "LARGE_VOCABULARY", 64 if large else 65)
        monkeypatch.setattr(module, "CHUNK_LOGITS", 64 * 16)
        torch.manual_seed(0)
        model = MAKERS[name](**options)
        seen = Gradients()
        if large:
            monkeypatch.setattr(type(model.network.head), "forward", _no_logits)
        steps, _, _ = fit([seen], model, batches=4, accumulate_grad_batches=2, precision=precision)
        metrics.append({tag: value for step in steps.values() for tag, value in step.items() if "loss" in tag})
        gradients.append(seen.steps)
        [evaluated] = L.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False
        ).validate(model, Batches(2, seed=1), verbose=False)
        metrics[-1] |= evaluated
    close = {"rel": 1e-5} if precision == "32-true" else {"rel": 0.01}
    assert metrics[1] == pytest.approx(metrics[0], **close)
    assert "val/loss" in metrics[1]
    of_largest = 1e-5 if precision == "32-true" else 0.03
    for with_chunks, without in zip(gradients[1], gradients[0], strict=True):
        assert with_chunks.keys() == without.keys()
        for parameter, expected in without.items():
            error = (with_chunks[parameter] - expected).abs().max() / expected.abs().max()
            assert error < of_largest, parameter


_linear = torch.nn.Linear.forward


def _no_logits(self, x):
    assert self.out_features != 64 or self.in_features != 16, "logits are made"
    return _linear(self, x)


def test_a_head_with_a_hook_is_called(monkeypatch):
    monkeypatch.setattr(language_module, "LARGE_VOCABULARY", 64)
    model, seen = MAKERS["decoder_moe"](), []
    [tokens] = Batches(1)
    without = model.losses(tokens)["loss"]
    assert not seen
    model.network.head.register_forward_hook(lambda head, inputs, logits: seen.append(logits.shape))
    assert float(model.losses(tokens)["loss"].detach()) == pytest.approx(float(without.detach()), rel=1e-6)
    assert seen == [(tokens.shape[0], tokens.shape[1] - 1, 64)]


def test_a_small_vocabulary_takes_the_plain_loss_to_the_bit():
    model = MAKERS["decoder_moe"]()
    [tokens] = Batches(1)
    expected = cross_entropy(model.network(tokens[:, :-1]).logits_BSV, tokens[:, 1:], "mean")
    assert torch.equal(model.losses(tokens)["loss"], expected)
    assert LARGE_VOCABULARY > 320  # of bytes
