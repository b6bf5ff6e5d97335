"""Benchmarks: `python -m moe_lightning.bench`. Every figure can be written as a JSON record."""
