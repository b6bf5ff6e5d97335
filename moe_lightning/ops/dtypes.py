"""The dtype of arithmetic on numbers of another."""

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, weights and probabilities of numbers of `dtype` are computed in: fp32, fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
