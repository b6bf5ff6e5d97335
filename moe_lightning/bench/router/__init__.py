"""What routing costs, phase by phase: `python -m moe_lightning.bench router`."""
