"""Expert parallelism: `torchrun --nproc_per_node 2 -m moe_lightning.bench ep`."""
