"""Rows 6 and 62: one line that names the argument and its value."""

import math
import re

import pytest
from router_reference import every_router, make

from moe_lightning.routers import ROUTERS

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((8, 4, 0), "top_k must be in [1, num_experts], got top_k=0, num_experts=4"),
        ((8, 4, -1), "top_k must be in [1, num_experts], got top_k=-1, num_experts=4"),
        ((8, 4, 5), "top_k must be in [1, num_experts], got top_k=5, num_experts=4"),
        ((8, 0, 1), "num_experts must be a positive integer below 2^31, got num_experts=0"),
        ((8, -3, 1), "num_experts must be a positive integer below 2^31, got num_experts=-3"),
        ((0, 4, 2), "d_model must be a positive integer below 2^31, got d_model=0"),
        ((-8, 4, 2), "d_model must be a positive integer below 2^31, got d_model=-8"),
    ],
)
@every_router
def test_sizes(name, sizes, named):
    with pytest.raises(ValueError, match=rf"^router: {re.escape(named)}[^\n]*$"):
        ROUTERS[name](*sizes)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"skew_experts": 5}, "skew_experts must be in [0, num_experts], got skew_experts=5, num_experts=4"),
        ({"skew_experts": -1}, "skew_experts must be in [0, num_experts], got skew_experts=-1"),
        ({"skew_experts": 1, "skew_bias": NAN}, "skew_bias must be finite in fp32, got skew_bias=nan"),
        ({"skew_experts": 1, "skew_bias": INF}, "skew_bias must be finite in fp32, got skew_bias=inf"),
        ({"skew_experts": 1, "skew_bias": -INF}, "skew_bias must be finite in fp32, got skew_bias=-inf"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive and finite, got capacity_factor=0.0"),
        ({"capacity_factor": -1.0}, "capacity_factor must be positive and finite, got capacity_factor=-1.0"),
        ({"capacity_factor": NAN}, "capacity_factor must be positive and finite, got capacity_factor=nan"),
        ({"capacity_factor": INF}, "capacity_factor must be positive and finite, got capacity_factor=inf"),
    ],
)
@every_router
def test_options(name, options, named):
    with pytest.raises(ValueError, match=rf"^router: {re.escape(named)}[^\n]*$"):
        make(name, 4, 2, **options)


@pytest.mark.parametrize("bias", [1e300, -1e39])
def test_a_bias_beyond_fp32_is_named(bias):
    with pytest.raises(ValueError, match=r"^router: skew_bias must be .* got skew_bias="):
        make("naive_topk", 4, 2, skew_experts=1, skew_bias=bias)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"iterations": 0}, "iterations must be a positive integer below 2^31, got iterations=0"),
        ({"iterations": -2}, "iterations must be a positive integer below 2^31, got iterations=-2"),
        ({"temperature": 0.0}, "temperature must be positive and finite in fp32, got temperature=0.0"),
        ({"temperature": -1.0}, "temperature must be positive and finite in fp32, got temperature=-1.0"),
        ({"temperature": NAN}, "temperature must be positive and finite in fp32, got temperature=nan"),
        ({"temperature": INF}, "temperature must be positive and finite in fp32, got temperature=inf"),
    ],
)
def test_sinkhorn_options(options, named):
    with pytest.raises(ValueError, match=rf"^router\.sinkhorn: {re.escape(named)}[^\n]*$"):
        make("sinkhorn", 4, 2, **options)


def test_logits_of_the_wrong_rank():
    import torch

    with pytest.raises(ValueError, match=r"logits must have shape \(tokens, experts\), got \(2, 3, 4\)"):
        make("fused_select", 4, 2).select(torch.randn(2, 3, 4))
