"""`mlp` as a language model, the form that a checkpoint holds."""

import torch
from tiny_export import difference, export

from moe_lightning.models import MLPDecoder


def test_mlp_decoder(tmp_path):
    model = MLPDecoder(31, 16)
    assert export(model, tmp_path).largest_difference <= 1e-5
    assert difference(tmp_path, model, torch.randint(0, 31, (1, 1))) <= 1e-5
