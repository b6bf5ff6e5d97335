"""`--trainer.strategy ddp_ep`: dense parameters on every rank, experts spread over them."""

from moe_lightning.training.strategy.expert_parallel import ExpertParallelStrategy

__all__ = ["ExpertParallelStrategy"]
