"""Language models as plain `nn.Module`s: token ids in, `LMOutput` out."""

from moe_lightning.models.decoder import Decoder
from moe_lightning.models.decoder_moe import DecoderMoE, RouterFactory
from moe_lightning.models.generate import generate
from moe_lightning.models.mlp import MLP, MLPDecoder
from moe_lightning.models.output import LMOutput
from moe_lightning.models.transformer_decoder import TransformerDecoder

__all__ = [
    "MLP",
    "Decoder",
    "DecoderMoE",
    "LMOutput",
    "MLPDecoder",
    "RouterFactory",
    "TransformerDecoder",
    "generate",
]
