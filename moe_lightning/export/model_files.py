"""The ONNX model files `__model__` and `__params__`: traced, written, run in onnxruntime, and then put in place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from moe_lightning import __version__
from moe_lightning.data import TextDataModule
from moe_lightning.export.agreement import DTYPES, largest_difference
from moe_lightning.export.directory import MODEL_FILE, PARAMS_FILE, check_directory, model_directory
from moe_lightning.export.graph import build_graph
from moe_lightning.export.moe_forms import MOE_FORMS, Outputs, evaluation_copy, exportable
from moe_lightning.export.trace import attach_initializers
from moe_lightning.layers import MoE
from moe_lightning.models import MLP
from moe_lightning.models.hyperparameters import stored_config
from moe_lightning.routers import router_name
from moe_lightning.utils.checks import check_choice, check_sizes

#: A larger tokenizer is not put into the graph.
LARGEST_TOKENIZER = 1 << 20


def model_metadata(model: nn.Module) -> dict[str, str]:
    """For the graph: the model's name, its sizes, its router and the version of this package."""
    sizes = (
        {"model": "mlp", "hidden": model.first.in_features}
        if isinstance(model, MLP)
        else getattr(model, "architecture", {})
    )
    metadata: dict[str, Any] = {"moe_lightning": __version__, **sizes}
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    if routers:
        metadata["router"] = router_name(routers[0])
    return {name: str(value) for name, value in metadata.items()}


def checkpoint_metadata(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The optimizer step, and, of a run on our data, the context it was trained with and its tokenizer.

    `tokenizer` is bytes or bpe, `tokenizer_json` what `load_tokenizer` reads, left out beyond `LARGEST_TOKENIZER`.
    """
    metadata = {"step": str(checkpoint["global_step"])}
    if "seq_len" in (data := stored_config(checkpoint).get("data") or {}):
        metadata["seq_len"] = str(data["seq_len"])
    tokenizer = (checkpoint.get(TextDataModule.__qualname__) or {}).get("tokenizer")
    if tokenizer is not None:
        metadata["tokenizer"] = str(json.loads(tokenizer)["kind"])
        if len(tokenizer) <= LARGEST_TOKENIZER:
            metadata["tokenizer_json"] = tokenizer
    return metadata


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compared, if it was."""

    nodes: int
    model_bytes: int
    params_bytes: int
    checked_shape: tuple[int, ...]
    largest_difference: float | None


class TracedModel:
    """A model's graph, traced once, to be written with any weights of its form.

    Args:
        model: an MLP or a language model of `moe_lightning.models`; it stays as it is.
        batch: rows of the traced input; any number can be run.
        seq_len: tokens per row of a language model's traced input; any number can be run.
        dtype: of weights and outputs, fp32 or fp16.
        moe_form: a name in `MOE_FORMS`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch: int = 2,
        seq_len: int = 128,
        dtype: torch.dtype = torch.float32,
        moe_form: str = "portable",
    ) -> None:
        check_sizes("export", batch=batch, seq_len=seq_len)
        check_choice("export", "onnx_moe", moe_form, MOE_FORMS)
        if dtype not in DTYPES:
            raise ValueError(f"export: dtype must be fp32 or fp16, got {dtype}; onnxruntime's CPU has no bf16 products")
        self._model, self._moe_form = evaluation_copy(model, dtype), moe_form
        self._traced = Outputs(exportable(self._model, moe_form))  # shares the memory of its weights
        # Axes of size 1 would be traced as constants.
        shape = traced_shape(self._model, max(batch, 2), max(seq_len, 2))
        inputs = torch.zeros(shape, dtype=dtype if isinstance(self._model, MLP) else torch.int64)
        self._graph = build_graph(self._traced, inputs)
        self._checked = traced_shape(self._model, batch + 1, seq_len + 3 if seq_len < 16 else seq_len // 2 + 1)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Weights to write from now on, as in the model's `state_dict`; ValueError if they are another model's."""
        try:
            self._model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"export: the weights must be the traced model's, got {' '.join(str(error).split())[:200]}"
            ) from error
        # A form may keep weights in an order of its own.
        self._traced = Outputs(exportable(self._model, self._moe_form))

    def write(self, directory: Path, *, verify: bool = True, metadata: Mapping[str, str] | None = None) -> Exported:
        """Put the model files into `directory`; older ones there are replaced.

        Args:
            directory: made if it does not exist; its other files stay.
            verify: run the file in onnxruntime on fresh input of another shape, and compare.
            metadata: kept in the graph in addition to the model's.

        Raises:
            ValueError: the directory cannot be written to, or the file differs from the model. Nothing of it is left.
        """
        attach_initializers(self._graph.graph, self._traced)
        self._graph.metadata_props.clear()
        opset = str(self._graph.opset_imports[""])
        self._graph.metadata_props.update({**model_metadata(self._model), "opset": opset, **(metadata or {})})
        with model_directory(directory) as folder:
            onnx_ir.save(self._graph, folder / MODEL_FILE, external_data=PARAMS_FILE)
            (folder / PARAMS_FILE).touch()  # also for a model so small that all its weights are in the graph
            model_bytes, params_bytes = ((folder / name).stat().st_size for name in (MODEL_FILE, PARAMS_FILE))
            difference = largest_difference(folder, self._model, self._checked) if verify else None
        nodes = len(list(self._graph.graph.all_nodes()))
        return Exported(nodes, model_bytes, params_bytes, self._checked, difference)


def export_onnx(
    model: nn.Module,
    directory: Path,
    *,
    batch: int = 2,
    seq_len: int = 128,
    dtype: torch.dtype = torch.float32,
    moe_form: str = "portable",
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write `model` to `directory` as an ONNX graph and its weights; arguments and errors as of `TracedModel`."""
    check_directory(directory)  # before the trace
    traced = TracedModel(model, batch=batch, seq_len=seq_len, dtype=dtype, moe_form=moe_form)
    return traced.write(directory, metadata=metadata)


def traced_shape(model: nn.Module, batch: int, seq_len: int) -> tuple[int, int]:
    """(B, hidden) for an MLP, (B, S) for a language model."""
    return (batch, model.first.in_features) if isinstance(model, MLP) else (batch, seq_len)
