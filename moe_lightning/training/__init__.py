"""Training: LightningModules, data and strategy."""
