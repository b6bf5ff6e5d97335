"""The peak of a device that no datasheet knows: measured, in bounded time."""

import pytest
import torch

from moe_lightning.callbacks import throughput


@pytest.mark.parametrize(
    ("flops", "sizes"), [(1e9, [64] * 5 + [128] * 5 + [256] * 5 + [512]), (4e8, [64] * 5 + [128] * 5 + [256])]
)
def test_probe_of_a_slow_type_ends_soon_with_its_rate(monkeypatch, flops, sizes):
    """fp16 on a processor without it: five products of 1024^3 take 26 s there."""
    asked = []

    def seconds(device, dtype, size):
        asked.append(size)
        return 2 * size**3 / flops

    monkeypatch.setattr(throughput, "_product_seconds", seconds)
    assert throughput.peak_flops(torch.device("cpu"), torch.float16) == pytest.approx(flops)
    assert asked == sizes
    assert sum(seconds(None, None, size) for size in sizes) < 1


def test_probe_of_a_fast_type_is_the_best_of_all_sizes(monkeypatch):
    rates = {64: 1e9, 128: 2e9, 256: 9e10, 512: 8e10, 1024: 8.5e10}
    monkeypatch.setattr(throughput, "_product_seconds", lambda device, dtype, size: 2 * size**3 / rates[size])
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(9e10)
