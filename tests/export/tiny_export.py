"""Models small enough to trace in a few seconds, and the command line in this process."""

import os
from pathlib import Path

import onnx
import pytest
import torch

from moe_lightning.export import Exported, export_onnx
from moe_lightning.export.__main__ import main
from moe_lightning.export.agreement import compare, open_session
from moe_lightning.models import DecoderMoE, DecoderMoEConfig
from moe_lightning.routers import ROUTERS
from moe_lightning.utils.errors import plain_errors

VOCAB = 29
FILES = ["__model__", "__params__"]


def tiny_moe(router="fused_select", **kwargs) -> DecoderMoE:
    sizes = {"vocab_size": VOCAB, "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_dim": 24}
    arguments = {**sizes, "num_experts": 3, "top_k": 2, "router": ROUTERS.get(router, router), **kwargs}
    return DecoderMoE(DecoderMoEConfig(**arguments)).eval()


def export(model: torch.nn.Module, folder: Path, **kwargs) -> Exported:
    return export_onnx(model, folder, **{"seq_len": 5, **kwargs})


def difference(folder: Path, model: torch.nn.Module, inputs: torch.Tensor) -> float:
    return compare(open_session(folder), model, inputs)


def graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "__model__")


def error_line(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Run the command, which must exit with 2 and print exactly one line, which begins with "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, plain_errors():
        main(list(arguments))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("error: "), printed
    assert printed.count("\n") == 1, printed
    return printed.removeprefix("error: ").rstrip("\n")


def contents(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
