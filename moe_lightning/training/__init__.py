"""Training: LightningModules, data, checkpoints and the command line."""
