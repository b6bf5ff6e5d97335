"""One file per command of `python -m moe_lightning.bench`."""
