"""What DecoderMoEModule adds to the cross-entropy: coefficient x mean over layers, by hand."""

import math

import pytest
import torch

from moe_lightning.models import LMOutput
from moe_lightning.ops import Selection
from moe_lightning.routers import Routing
from moe_lightning.training.modules import DecoderMoEModule


def routing(logits: list[list[float]], load: list[int]) -> Routing:
    nothing = torch.empty(0)
    return Routing(torch.tensor(logits), Selection(nothing, nothing, torch.tensor(load, dtype=torch.int32), nothing))


#: Two tokens each: balance 2 (3/4 x 1/4 + 1/4 x 3/4) = 0.75 and 2 (1/2 x 3/4 + 1/2 x 1/4) = 1;
#: z (log 4)^2 and (log 8)^2.
LAYERS = [
    routing([[math.log(3.0), 0.0]] * 2, [1, 3]),
    routing([[math.log(6.0), math.log(2.0)]] * 2, [2, 2]),
]
BALANCE, Z = (0.75 + 1.0) / 2, (math.log(4) ** 2 + math.log(8) ** 2) / 2


def losses(**coefficients) -> dict[str, float]:
    module = DecoderMoEModule(32, 16, 2, 2, 16, 2, 1, **coefficients)
    found = module.auxiliary_losses(LMOutput(torch.empty(0), tuple(LAYERS)))
    return {name: value.item() for name, value in found.items()}


def test_losses_are_the_coefficient_times_the_mean_over_layers():
    expected = {"balance_loss": 0.5 * BALANCE, "z_loss": 0.25 * Z}
    assert losses(balance_coef=0.5, z_coef=0.25) == pytest.approx(expected, rel=1e-6)


def test_the_usual_coefficients_are_those_of_the_papers():
    assert losses() == pytest.approx({"balance_loss": 0.01 * BALANCE, "z_loss": 0.001 * Z}, rel=1e-6)


def test_a_coefficient_of_zero_leaves_its_loss_out():
    assert set(losses(balance_coef=0.0)) == {"z_loss"}
    assert set(losses(z_coef=0.0)) == {"balance_loss"}
