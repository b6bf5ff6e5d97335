"""The parts of a decoder: attention, feed-forward networks, and the MoE layer with its dispatcher and experts."""

from moe_lightning.layers.attention import Attention
from moe_lightning.layers.experts import Experts
from moe_lightning.layers.feed_forward import FeedForward
from moe_lightning.layers.moe import MoE
from moe_lightning.layers.phases import Mark, Phase, no_mark, with_mark, without_mark

__all__ = ["Attention", "Experts", "FeedForward", "Mark", "MoE", "Phase", "no_mark", "with_mark", "without_mark"]
