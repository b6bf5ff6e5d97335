"""Benchmarks: ``python -m moe_lightning.bench ops``. Every figure can be written as a JSON record."""
