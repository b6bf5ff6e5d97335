"""Does the written file compute what the model computes? It is run in onnxruntime on fresh random input.

Legend: L MoE layers, T tokens, K top_k, E experts.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from moe_lightning.export.directory import MODEL_FILE
from moe_lightning.models import LMOutput

#: Largest difference between the outputs, by the dtype of the weights. In fp16 an output near 1 has steps of 1e-3, and
#: the two round at different places.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
#: How far apart two logits must be to rank the same whatever the order of a sum.
_NEAR = {torch.float32: 1e-5, torch.float16: 1e-2}
_DRAWS = 8


class NearTieError(Exception):
    """A row whose experts rounding alone decides; the input says nothing about the file."""


def largest_difference(folder: Path, model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> float:
    """Of the outputs on a random input of `shape`: (B, S) ids, or (B, hidden) rows for an MLP.

    Expert ids must be equal. An input on which rounding decides about an expert is drawn again.

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


def open_session(folder: Path) -> onnxruntime.InferenceSession:
    """The pair in `folder`, on the CPU; ValueError if onnxruntime refuses it."""
    options = onnxruntime.SessionOptions()
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
    """Largest difference of one run; ValueError for a mismatch, NearTieError where rounding chose other experts."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        expected = model(inputs)
    try:
        found, *ids = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"export: onnxruntime must run the file on shape {tuple(inputs.shape)}, got {reason}"
        ) from error
    if isinstance(expected, LMOutput):
        if expected.routings:
            _check_ids(expected, torch.from_numpy(ids[0]), _NEAR[dtype])
        expected = expected.logits_BSV
    outputs = torch.from_numpy(found)
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        raise ValueError(
            f"export: outputs must be {expected.dtype} {tuple(expected.shape)}, got {outputs.dtype} "
            f"{tuple(outputs.shape)}; the file is not used"
        )
    difference = float((outputs.float() - expected.float()).abs().max())
    if not difference <= TOLERANCE[dtype]:  # a NaN is a mismatch too
        raise ValueError(
            f"export: outputs must differ by at most {TOLERANCE[dtype]:g} from the model's, got {difference:g}; "
            "the file is not used"
        )
    return difference


def _check_ids(expected: LMOutput, ids_LTK: Tensor, near: float) -> None:
    """The first layer to choose otherwise must have had a near tie; those behind it only saw what came of that."""
    for number, (routing, ids_TK) in enumerate(zip(expected.routings, ids_LTK, strict=True)):
        expected_TK = routing.selection.expert_ids_TK
        differs_T = (ids_TK != expected_TK).any(1)
        if not bool(differs_T.any()):
            continue
        ours_TK = routing.logits_TE.gather(1, expected_TK.clamp(min=0).long())
        theirs_TK = routing.logits_TE.gather(1, ids_TK.clamp(min=0).long())
        gap_TK = (ours_TK - theirs_TK).abs()
        # A true tie is not a near one: there the order rule decides, lower id first.
        tied = bool(((gap_TK == 0) & (ids_TK != expected_TK)).any())
        if tied or float(gap_TK.max()) > near:
            raise ValueError(
                f"export: expert ids must be equal, got {int(differs_T.sum())} tokens with other experts in layer "
                f"{number}; the file is not used"
            )
        raise NearTieError
