"""Choosing an implementation: clear errors, one warning, and a package that works without its kernels."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import moe_lightning
from moe_lightning.ops import build_index, native, permute, select, unpermute


@pytest.mark.parametrize("top_k", [0, -1, 9])
@pytest.mark.parametrize("implementation", ["auto", "native", "torch"])
def test_top_k_out_of_range(top_k, implementation):
    with pytest.raises(ValueError, match=rf"ops\.select: top_k must be .* got top_k={top_k}, num_experts=8"):
        select(torch.randn(4, 8), top_k, implementation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_wrong_logit_dtype(dtype):
    with pytest.raises(ValueError, match=r"logits must be fp64, fp32, fp16 or bf16, got torch\."):
        select(torch.zeros(4, 8).to(dtype), 2)


@pytest.mark.parametrize("shape", [(8,), (2, 4, 8)])
def test_wrong_rank(shape):
    with pytest.raises(ValueError, match="logits must have shape"):
        select(torch.zeros(shape), 2)


def test_wrong_arguments_of_the_others():
    ids_TK = torch.zeros(3, 2, dtype=torch.int32)
    index = build_index(ids_TK, 4)
    with pytest.raises(ValueError, match=r"expert_ids must be int32, got torch\.int64"):
        build_index(ids_TK.long(), 4)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        build_index(ids_TK, 0)
    with pytest.raises(ValueError, match=r"ops\.permute: x must have shape"):
        permute(torch.zeros(4, 5), index, 2)
    with pytest.raises(ValueError, match=r"ops\.unpermute: rows must have shape"):
        unpermute(torch.zeros(5, 5), torch.zeros(3, 2), index)
    with pytest.raises(
        ValueError, match=r"score must be one of softmax, sigmoid, sqrtsoftplus, got 'sigmod'; did you mean sigmoid\?"
    ):
        select(torch.zeros(4, 5), 2, score="sigmod")
    with pytest.raises(ValueError, match=r"bias must be fp32 of shape \(5,\), got torch.float32 \(4,\)"):
        select(torch.zeros(4, 5), 2, bias_E=torch.zeros(4))
    with pytest.raises(ValueError, match=r"scores must be fp32 of shape \(4, 5\), got torch.float64 \(4, 5\)"):
        select(torch.zeros(4, 5), 2, scores_TE=torch.zeros(4, 5).double())
    with pytest.raises(ValueError, match="bias and scores must not both be given"):
        select(torch.zeros(4, 5), 2, bias_E=torch.zeros(5), scores_TE=torch.zeros(4, 5))
    with pytest.raises(ValueError, match="tensors must be on one device, got logits on cpu, bias on meta"):
        select(torch.zeros(4, 5), 2, bias_E=torch.zeros(5, device="meta"))
    with pytest.raises(ValueError, match=r"implementation must be one of auto, native, torch, got 'cuda'"):
        select(torch.zeros(4, 5), 2, "cuda")


@pytest.mark.parametrize(("experts", "top_k"), [(1025, 2), (64, 33)])
def test_beyond_the_kernels_limits(experts, top_k):
    logits_TE = torch.randn(10, experts)
    with pytest.raises(ValueError, match=r"implementation='native' is not possible: the kernels take"):
        select(logits_TE, top_k, "native")
    native._warned.clear()
    with pytest.warns(RuntimeWarning, match=f"num_experts={experts}, top_k={top_k}"):
        chosen = select(logits_TE, top_k)
    with warnings.catch_warnings(action="error"):  # the second call is silent
        again = select(logits_TE, top_k)
    expected = select(logits_TE, top_k, "torch")
    for actual in (chosen, again):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


CPU = -1, 0
"""Device and stream of a call of the CPU module."""
SIZES = {"tokens": 4, "experts": 8, "top_k": 2, "dtype": 1, "renormalize": True, "n_group": 1, "topk_group": 1}


def fields(launcher) -> dict[str, int]:
    """Arguments for every field that the help of a launcher names, null where nothing is read."""
    return {name: SIZES.get(name, 0) for name in re.findall(r"(\w+)=", launcher.__doc__ or "")}


def test_the_kernels_name_the_shapes_they_refuse():
    kernels = native.module("cpu")
    launchers = kernels.select_forward, kernels.select_backward, kernels.build_index
    forward, backward, index = (fields(launcher) for launcher in launchers)
    limits = kernels.MAX_EXPERTS, kernels.MAX_TOP_K, kernels.MAX_GROUPS
    assert limits == (native.MAX_EXPERTS, native.MAX_TOP_K, native.MAX_GROUPS)
    with pytest.raises(ValueError, match=r"num_experts must be in \[1, 1024\], got tokens=4, experts=2000"):
        kernels.select_forward(CPU, **forward | {"experts": 2000})
    with pytest.raises(ValueError, match=r"top_k must be in .*, top_k=9"):
        kernels.select_backward(CPU, **backward | {"top_k": 9})
    with pytest.raises(ValueError, match=r"dtype must be one of .*, dtype=7"):
        kernels.select_backward(CPU, **backward | {"dtype": 7})
    with pytest.raises(ValueError, match=r"score must be softmax, sigmoid or sqrtsoftplus, got .*, score=3"):
        kernels.select_backward(CPU, **backward | {"score": 3})
    with pytest.raises(ValueError, match=r"slots must be below 2\*\*31, got slots=2147483648"):
        kernels.build_index(CPU, **index | {"slots": 2**31})


def test_every_field_is_given_by_its_name():
    build_index = native.module("cpu").build_index
    arguments = fields(build_index)
    offsets = torch.full((9,), -1, dtype=torch.int32)
    build_index(CPU, **arguments | {"expert_offsets": offsets.data_ptr()})
    assert not offsets.any()
    build_index(CPU, {"slots": 0, "experts": 2, "expert_offsets": offsets[4:].data_ptr()}, perm=0, inverse_perm=0,
                workspace=0, expert_ids=0)  # fmt: skip
    with pytest.raises(TypeError, match=r"^kernels\.build_index: slots must be given once: "):
        build_index(CPU, arguments, slots=0)
    with pytest.raises(TypeError, match=r"^kernels\.build_index: no field 1, fields are "):
        build_index(CPU, {1: 0})
    with pytest.raises(TypeError, match=r"^kernels\.build_index: every field must be given: .*slots="):
        build_index(CPU, slots=0)
    with pytest.raises(TypeError, match=r"^kernels\.build_index: no field tokens, fields are .*slots="):
        build_index(CPU, **arguments, tokens=4)
    with pytest.raises(TypeError, match=r"experts must fit in 32 bits"):
        build_index(CPU, **arguments | {"experts": 2**31})
    with pytest.raises(TypeError, match=r"integer"):
        build_index(CPU, **arguments | {"slots": "many"})
    with pytest.raises(TypeError, match=r"arguments are \(device, stream\), then fields by name"):
        build_index(*arguments.values())


LAYOUT = {"rank", "ranks", "chunks", "local_experts", "groups"}
SIGNALS = {"flags", "state", "error", "timeout_ns", "rank", "ranks"}
ROUTE = {"expert_ids", "inverse_perm", "dst_offset", "experts", "local_experts"}
FFN_SHAPE = {"num_rows", "d_model", "hidden_dim", "experts", "activation", "dtype", "sm_margin"}
SHARED = {
    "layout._asdict()": LAYOUT,
    "signals.native": SIGNALS,
    "_route(route)": ROUTE,
    "shape": FFN_SHAPE,
    "of_weights": FFN_SHAPE & {"num_rows", "experts", "dtype", "sm_margin"} | {"fp32", "accumulate"},
}
"""Fields of the dictionaries that call sites share, by the expression that stands for them."""


def call_sites() -> list[tuple[str, ast.Call]]:
    """Calls of launchers in the package, most of which only a GPU makes."""
    launchers = {name for name in dir(native.module("cuda")) if fields(getattr(native.module("cuda"), name))}
    sites = []
    for path in sorted(Path(moe_lightning.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in launchers:
                module = ast.unparse(node.func.value)
                if module == "kernels" or module.startswith("native.module("):
                    sites.append((f"{path.name}:{node.lineno}", node))
    return sites


@pytest.mark.skipif(native.missing("cuda") is not None, reason="the CUDA kernels are not built")
def test_call_sites_give_the_fields_of_their_launchers():
    sites, called = call_sites(), set()
    for place, call in sites:
        name = call.func.attr
        given = [keyword.arg for keyword in call.keywords]
        for shared in call.args[1:]:
            given += SHARED[ast.unparse(shared)]
        assert sorted(given) == sorted(fields(getattr(native.module("cuda"), name))), f"{place}: {name}"
        called.add(name)
    assert len(called) > 20
    assert not native.module("cuda").CUTLASS or "ffn_up" in called


def test_cuda_module_imports_and_explains_itself():
    if native.missing("cuda"):
        pytest.skip("the CUDA kernels are not built")
    count, reason = native.module("cuda").device_count()
    assert (count > 0) == (reason == "")


WITHOUT_KERNELS = """
import sys, warnings
sys.modules["moe_lightning._cpu"] = sys.modules["moe_lightning._cuda"] = None  # as if not built
import torch
from moe_lightning.ops import build_index, native, select
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        selection = select(torch.eye(4, requires_grad=True), 2)
        index = build_index(selection.expert_ids_TK, 4)
    selection.weights_TK.sum().backward()
print(len(seen), seen[0].message)
print(selection.expert_ids_TK.tolist(), index.expert_offsets.tolist())
try:
    select(torch.eye(4), 2, "native")
except ValueError as error:
    print(error)
"""


def test_without_kernels_everything_works_with_one_warning():
    run = subprocess.run([sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    warning, result, error = run.stdout.splitlines()
    assert warning.startswith("1 moe_lightning: using the slower torch reference: the CPU kernels are not built")
    assert "pip install -e ." in warning
    assert result == "[[0, 1], [1, 0], [2, 0], [3, 0]] [0, 4, 6, 7, 8]"
    assert "implementation='native' is not possible: the CPU kernels are not built" in error
