"""`--trainer.strategy ddp`, whose ranks end together, and `ddp_ep`, which also spreads the experts over them."""

from moe_lightning.training.strategy.expert_parallel import ExpertParallelStrategy
from moe_lightning.training.strategy.watched_ddp import WatchedDDPStrategy

__all__ = ["ExpertParallelStrategy", "WatchedDDPStrategy"]
