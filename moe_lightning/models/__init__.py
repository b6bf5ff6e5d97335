"""Language models as plain `nn.Module`s: token ids in, `LMOutput` out."""

from moe_lightning.models.config import DecoderConfig, DecoderMoEConfig, RouterFactory
from moe_lightning.models.decoder import Decoder, DecoderMoE, LMHidden, LMOutput, TransformerDecoder
from moe_lightning.models.generate import generate
from moe_lightning.models.mlp import MLP, MLPDecoder

__all__ = [
    "MLP",
    "Decoder",
    "DecoderConfig",
    "DecoderMoE",
    "DecoderMoEConfig",
    "LMHidden",
    "LMOutput",
    "MLPDecoder",
    "RouterFactory",
    "TransformerDecoder",
    "generate",
]
