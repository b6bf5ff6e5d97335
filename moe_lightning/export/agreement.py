"""Does the written file compute what the model computes? It is run in onnxruntime on fresh random input."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from moe_lightning.export.directory import MODEL_FILE
from moe_lightning.export.rounding import NearTieError, compute, largest, same_experts, tolerance

_DRAWS = 8


def largest_difference(folder: Path, model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> float:
    """Of the outputs on a random input of `shape`: (B, S) ids, or (B, hidden) rows for an MLP.

    Expert ids must be equal, but for near ties. An input with too many of those is drawn again.

    Raises:
        ValueError: the file cannot be run, or what it computes is something else.
    """
    session = open_session(folder)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_DRAWS):
        inputs = random_input(model, shape, generator)
        try:
            return compare(session, model, inputs)
        except NearTieError:
            continue
    raise ValueError(
        f"export: expert ids must be equal, got {_DRAWS} inputs of shape {shape} with near ties; "
        "the file is not used, try another shape"
    )


def open_session(folder: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """The pair in `folder`, on the CPU, by default on all its threads; ValueError if onnxruntime refuses it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"export: onnxruntime must open the file, got {reason}; the pair is damaged") from error


def random_input(model: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids below the vocabulary's size for a language model, normal rows for an MLP."""
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is not None:
        return torch.randint(0, int(vocab_size), shape, generator=generator)
    return torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)


def compare(session: onnxruntime.InferenceSession, model: nn.Module, inputs: Tensor) -> float:
    """Largest difference from the model in one run.

    Raises:
        ValueError: it is more than rounding.
        NearTieError: there is too little to compare.
    """
    ours, exact = compute(model, inputs)
    try:
        found, *ids = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"export: onnxruntime must run the file on shape {tuple(inputs.shape)}, got {reason}"
        ) from error
    outputs, dtype = torch.from_numpy(found), ours.outputs.dtype
    if outputs.shape != ours.outputs.shape or outputs.dtype != dtype:
        raise ValueError(
            f"export: outputs must be {dtype} {tuple(ours.outputs.shape)}, got {outputs.dtype} "
            f"{tuple(outputs.shape)}; the file is not used"
        )
    same = same_experts(ours, exact, torch.from_numpy(ids[0])) if ours.routings else slice(None)
    outputs, of_model, of_exact = outputs[same], ours.outputs[same], exact.outputs[same]
    off, allowed = largest(outputs - of_exact), tolerance(dtype, of_model, of_exact)
    if not off <= allowed:  # a NaN is a mismatch too
        raise ValueError(
            f"export: outputs must differ by at most {allowed:.3g} from the model's in {of_exact.dtype}, got "
            f"{off:.3g}; the file is not used"
        )
    return largest(outputs - of_model)
