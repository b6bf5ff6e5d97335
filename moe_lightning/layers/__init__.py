"""The parts of a decoder: attention, feed-forward networks, and the MoE layer with its dispatcher and experts."""

from moe_lightning.layers.attention import Attention
from moe_lightning.layers.experts import Experts
from moe_lightning.layers.feed_forward import FeedForward
from moe_lightning.layers.moe import MoE
from moe_lightning.layers.phases import Hook, Phase, Step, no_hook, with_hook, without_hook
from moe_lightning.layers.recompute import Recompute
from moe_lightning.layers.shared_experts import SharedExperts

__all__ = [
    "Attention",
    "Experts",
    "FeedForward",
    "Hook",
    "MoE",
    "Phase",
    "Recompute",
    "SharedExperts",
    "Step",
    "no_hook",
    "with_hook",
    "without_hook",
]
