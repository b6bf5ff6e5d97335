"""The update of AdamW: the reference beside torch's, the kernel beside the reference."""

import pytest
import torch

from moe_lightning.ops import adamw
from moe_lightning.ops.adamw import adamw_

SETTINGS = {"learning_rate": 0.02, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


def tensors(sizes, device="cpu", seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(device) for size in sizes]


def state(sizes, device="cpu") -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Moments and steps, as none had been taken."""
    zeros = [torch.zeros(size, device=device) for size in sizes]
    return zeros, [torch.zeros_like(z) for z in zeros], [torch.zeros((), device=device) for _ in sizes]


def test_reference_is_torchs_adamw_also_of_clipped_gradients():
    sizes = [(3, 5), (7,), (), (0, 4)]
    weights, (means, squares, steps) = tensors(sizes), state(sizes)
    theirs = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for seed in range(1, 6):
        gradients = tensors(sizes, seed=seed)
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        for step in steps:
            step += 1
        before = [gradient.clone() for gradient in gradients]
        adamw_(weights, gradients, means, squares, steps, **SETTINGS, gradient_scale=0.5 / (norm + 1e-6))
        assert all(map(torch.equal, gradients, before))
    for ours, right in zip(weights, theirs, strict=True):
        torch.testing.assert_close(ours, right.detach(), rtol=1e-5, atol=1e-6)
    assert means[0].equal(torch.zeros(3, 5)) is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": torch.ones(4).double()}, "must be fp32"),
        ({"weights": torch.ones(8)[::2]}, "contiguous"),
        ({"means": torch.ones(5)}, r"shape=\(5,\) beside \(4,\)"),
        ({"gradients": torch.ones(4).half()}, "a gradient must be fp32"),
        ({"gradients": torch.ones(1)}, r"shape=\(1,\) beside \(4,\)"),
        ({"steps": torch.tensor(1)}, "a step must be one fp32 number"),
        ({"steps": torch.ones(2)}, "2 numbers"),
    ],
)
def test_bad_tensors_are_refused(change, said):
    given = {name: torch.ones(4) for name in ("weights", "gradients", "means", "squares")} | {"steps": torch.ones(())}
    with pytest.raises(ValueError, match=f"ops.adamw: .*{said}"):
        adamw_(**{name: [tensor] for name, tensor in (given | change).items()}, **SETTINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_kernel_is_the_reference(scaled, offset):
    """More tensors than a launch takes; none, single elements, whole and broken chunks; not aligned to vectors."""
    sizes = [0, 1, 2, 3, 4, 5, 8191, 8192, 8193, 100_003, 3_000_000, *range(30, 100)]
    scale = torch.tensor(0.37, device="cuda") if scaled else None
    weights, gradients = ([t[offset:] for t in tensors([s + offset for s in sizes], "cuda", seed)] for seed in (0, 1))
    means, squares, steps = state(sizes, "cuda")
    for step in steps:
        step += 7
    if offset:
        means = [torch.zeros(s + 1, device="cuda")[1:] for s in sizes]
    for square in squares:
        square += 0.3
    wide = [[t.double() for t in each] for each in (weights, gradients, means, squares)]
    adamw._reference(*wide, steps, *SETTINGS.values(), gradient_scale=None if scale is None else scale.double())
    first = [[t.clone() for t in each] for each in (weights, means, squares)]
    for of_run in (first, (weights, means, squares)):
        adamw_(of_run[0], gradients, of_run[1], of_run[2], steps, **SETTINGS, gradient_scale=scale)
    for kind, right in enumerate((wide[0], wide[2], wide[3])):
        for ours, again, exact in zip((weights, means, squares)[kind], first[kind], right, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-7)
            assert ours.equal(again)
    assert weights[5]._version > 0
