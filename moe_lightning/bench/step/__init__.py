"""The training step of a model: time, memory and parts, in every form."""
