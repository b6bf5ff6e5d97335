"""The whole MoE layer, by experts implementation and router, beside peers: `python -m moe_lightning.bench layer`."""
