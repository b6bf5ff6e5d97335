"""Train Mixture-of-Experts language models with a router you choose, and see what that choice costs.

The names below are imported at their first use: `import moe_lightning` alone imports neither torch nor lightning.
"""

# ruff: noqa: F401  the imports below are what type checkers and editors read; `_EXPORTS` is what runs
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_lightning.callbacks import (
        ExactResume,
        ExchangeTiming,
        ExpertLoadMonitor,
        GenerationPrinter,
        GracefulStop,
        LogGuard,
        ModelSummary,
        OnnxExport,
        ProgressBar,
        RouterGuard,
        RouterTiming,
        RunCheckpoint,
        RunSummary,
        TensorBoardLayout,
        Throughput,
        Trace,
    )
    from moe_lightning.data import TextDataModule
    from moe_lightning.export import export_onnx
    from moe_lightning.layers import Attention, Experts, FeedForward, MoE
    from moe_lightning.metrics import ExpertLoad
    from moe_lightning.models import (
        MLP,
        DecoderConfig,
        DecoderMoE,
        DecoderMoEConfig,
        LMHidden,
        LMOutput,
        MLPDecoder,
        TransformerDecoder,
        generate,
    )
    from moe_lightning.ops import (
        RoutingIndex,
        RowWeights,
        Selection,
        build_index,
        expert_ffn,
        permute,
        select,
        sinkhorn,
        sum_rows,
        unpermute,
    )
    from moe_lightning.routers import (
        AuxFree,
        ExpertChoice,
        ExpertThreshold,
        FrozenRandom,
        FusedSelect,
        Hash,
        MaskedMatmul,
        NaiveTopK,
        Quantile,
        Router,
        Routing,
        Sinkhorn,
        Tokens,
        TopK,
        load_balancing_loss,
        update_biases,
        z_loss,
    )
    from moe_lightning.training.modules import DecoderMoEModule, MLPModule, TransformerDecoderModule
    from moe_lightning.training.strategy import ExpertParallelStrategy, WatchedDDPStrategy

__version__ = "0.1.0"

_EXPORTS = {
    "callbacks": "ExactResume ExchangeTiming ExpertLoadMonitor GenerationPrinter GracefulStop LogGuard ModelSummary "
    "OnnxExport ProgressBar RouterGuard RouterTiming RunCheckpoint RunSummary TensorBoardLayout Throughput Trace",
    "data": "TextDataModule",
    "export": "export_onnx",
    "layers": "Attention Experts FeedForward MoE",
    "metrics": "ExpertLoad",
    "models": "MLP DecoderConfig DecoderMoE DecoderMoEConfig LMHidden LMOutput MLPDecoder TransformerDecoder generate",
    "ops": "RoutingIndex RowWeights Selection build_index expert_ffn permute select sinkhorn sum_rows unpermute",
    "routers": "AuxFree ExpertChoice ExpertThreshold FrozenRandom FusedSelect Hash MaskedMatmul NaiveTopK Quantile "
    "Router Routing Sinkhorn Tokens TopK load_balancing_loss update_biases z_loss",
    "training.modules": "DecoderMoEModule MLPModule TransformerDecoderModule",
    "training.strategy": "ExpertParallelStrategy WatchedDDPStrategy",
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _EXPORTS.items() for name in names.split()}

__all__ = ["__version__", *_MODULE_OF]


if not TYPE_CHECKING:  # a checker that saw it would accept any name

    def __getattr__(name: str) -> object:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(module), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
