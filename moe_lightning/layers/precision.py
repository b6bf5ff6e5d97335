"""The dtype that a layer's products run in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Autocast's, where it is on: it knows neither stacked weights nor grouped products, so they are cast by hand."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
