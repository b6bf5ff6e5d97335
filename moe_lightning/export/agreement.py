"""Whether the written file computes what the model computes: it is run in onnxruntime on random input.

Rounding may change outputs by a little, and experts where two have almost the same score. The model itself is off by
its rounding, so model and file are both compared with the same weights in the next wider type: the file may be off by
twice what the model is, and one rounding step. In fp32 it may always be off by 1e-5.

Legend: B batch, S sequence, L MoE layers, T = B * S tokens, K top_k, E experts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch
from torch import Tensor, nn

from moe_lightning.export.directory import MODEL_FILE
from moe_lightning.layers import MoE
from moe_lightning.models import LMOutput
from moe_lightning.routers import Router, Routing

#: Dtypes of weights that can be compared, and the wider type that shows their rounding.
WIDER = {torch.float32: torch.float64, torch.float16: torch.float32}
DTYPES = tuple(WIDER)
#: Two fp32 numbers near 1 that were summed in another order.
_FP32_TOLERANCE = 1e-5


class NearTieError(Exception):
    """Rounding decides about so many experts that the input is no test of the file."""


class Computed(NamedTuple):
    """A model's outputs, and what its MoE layers decided."""

    outputs: Tensor
    routings: tuple[Routing, ...]
    scores: tuple[Tensor, ...] = ()
    """What ordered the experts of each layer (T, E)."""
    routers: tuple[Router, ...] = ()


def compute(model: nn.Module, inputs: Tensor) -> tuple[Computed, Computed]:
    """By the model, and by the same weights in the next wider type."""

    def run(model: nn.Module, inputs: Tensor) -> Computed:
        with torch.no_grad():
            output = model(inputs)
        if not isinstance(output, LMOutput):
            return Computed(output, ())
        layers = [part for part in model.modules() if isinstance(part, MoE)]
        scores = [moe.router.ranking_scores(r.logits_TE) for moe, r in zip(layers, output.routings, strict=True)]
        return Computed(output.logits_BSV, output.routings, tuple(scores), tuple(moe.router for moe in layers))

    ours = run(model, inputs)
    wider = WIDER[ours.outputs.dtype]
    return ours, run(copy.deepcopy(model).to(wider), inputs.to(wider) if inputs.is_floating_point() else inputs)


def tolerance(dtype: torch.dtype, ours: Tensor, exact: Tensor) -> float:
    """How far from `exact` a file with weights of `dtype` may be where the model is at `ours`."""
    rounding = 2 * largest(ours - exact) + torch.finfo(dtype).eps * largest(exact)
    return max(rounding, _FP32_TOLERANCE) if dtype == torch.float32 else rounding


def largest(values: Tensor) -> float:
    """Magnitude; NaN if one is."""
    return float(values.float().abs().max())


def same_experts(ours: Computed, exact: Computed, ids_LTK: Tensor) -> Tensor:
    """Positions (B, S) up to which file, model and wider type chose the same experts of all layers in their row.

    Later positions depend on an earlier choice. A file may choose otherwise where two scores are nearer
    than rounding resolves, and not at a true tie: there the lower id goes first.

    Raises:
        ValueError: the file chose otherwise where it may not.
        NearTieError: these positions are less than a quarter.
    """
    same_BS = torch.ones(exact.outputs.shape[:2], dtype=torch.bool)
    layers = zip(ours.routings, exact.routings, ours.scores, exact.scores, exact.routers, ids_LTK, strict=True)
    for layer, (our, true, our_scores_TE, true_scores_TE, router, ids_TK) in enumerate(layers):
        same_T = same_BS.flatten()
        true_TK = true.selection.expert_ids_TK
        other_TK = (ids_TK != true_TK) & same_T[:, None]
        if router.looks_ahead and bool((other_TK | (our.selection.expert_ids_TK != true_TK)).any()):
            raise NearTieError  # every token may have other experts from here on
        if bool(other_TK.any()):
            allowed = tolerance(ours.outputs.dtype, our_scores_TE[same_T], true_scores_TE[same_T])
            rows_T = other_TK.any(1)
            cutoff_E = router.cutoffs()
            if cutoff_E is None:
                explained = _near_ties(true_scores_TE, true_TK, ids_TK, other_TK, allowed)
            else:
                scores_TE, true, file = (each[rows_T] for each in (true_scores_TE, true_TK, ids_TK))
                explained = _near_cutoffs(scores_TE, true, file, cutoff_E, allowed)
            if not explained:
                raise ValueError(
                    f"export: expert ids must be equal, got {int(rows_T.sum())} tokens with other experts in "
                    f"layer {layer}; the file is not used"
                )
        other_T = other_TK.any(1) | (our.selection.expert_ids_TK != true_TK).any(1)
        same_BS = same_BS & (other_T.view_as(same_BS).cumsum(1) == 0)
    if same_BS.float().mean() < 0.25:
        raise NearTieError
    return same_BS


def _near_ties(scores_TE: Tensor, true_TK: Tensor, ids_TK: Tensor, other_TK: Tensor, allowed: float) -> bool:
    """Whether each of the other experts stands in the place of one with nearly its score."""
    last = scores_TE.shape[1] - 1
    if bool(((ids_TK < 0) | (ids_TK > last)).any()):
        return False
    true_scores_TK, scores_TK = (scores_TE.gather(1, ids.clamp(0, last).long()) for ids in (true_TK, ids_TK))
    gaps_TK = (true_scores_TK - scores_TK).abs()
    if _breaks_ties(other_TK, true_TK, ids_TK, gaps_TK == 0, scores_TK):
        return False
    return float(gaps_TK[other_TK].max()) <= allowed


def _near_cutoffs(scores_TE: Tensor, true_TM: Tensor, ids_TM: Tensor, cutoff_E: Tensor, allowed: float) -> bool:
    """Whether rows differ by experts alone whose score is nearly their cutoff, or nearly that of one in their place.

    Of experts with the same score the lower id goes first.
    """
    if bool(((ids_TM < -1) | (ids_TM >= scores_TE.shape[1])).any()):
        return False
    true_TE, file_TE = _members(true_TM, scores_TE), _members(ids_TM, scores_TE)
    gaps_TEE = (scores_TE[:, :, None] - scores_TE[:, None, :]).abs()
    for_another_TEE = (file_TE & ~true_TE)[:, :, None] & (true_TE & ~file_TE)[:, None, :]
    near_TEE = for_another_TEE & (gaps_TEE <= allowed)
    near_TE = ((scores_TE - cutoff_E).abs() <= allowed) | near_TEE.any(1) | near_TEE.any(2)
    higher_TEE = (for_another_TEE & (gaps_TEE == 0)).tril(-1)
    return bool((near_TE | (true_TE == file_TE)).all()) and not bool(higher_TEE.any())


def _members(ids_TM: Tensor, scores_TE: Tensor) -> Tensor:
    """Whether an expert (T, E) is one of a token's."""
    tokens, experts = scores_TE.shape
    members = torch.zeros(tokens, experts + 1, dtype=torch.bool)
    return members.scatter(1, ids_TM.long().where(ids_TM >= 0, experts), True)[:, :experts]


def _breaks_ties(other_TK: Tensor, true_TK: Tensor, ids_TK: Tensor, ties_TK: Tensor, scores_TK: Tensor) -> bool:
    """Whether a higher id stands in the place of a lower one of the same score, or before it."""
    elsewhere_TK = (true_TK[:, :, None] == ids_TK[:, None, :]).any(2)
    swapped = (scores_TK[:, 1:] == scores_TK[:, :-1]) & (ids_TK[:, 1:] < ids_TK[:, :-1]) & other_TK[:, 1:]
    higher_TK = other_TK & ties_TK & (ids_TK > true_TK) & ~elsewhere_TK
    return bool(higher_TK.any() | swapped.any())


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
    """The model in `folder`, on the CPU, by default on all its threads; ValueError if onnxruntime refuses it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no common base
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"export: onnxruntime must open the model files, got {reason}; they are damaged") from error


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
        outputs_array, *ids = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"export: onnxruntime must run the file on shape {tuple(inputs.shape)}, got {reason}"
        ) from error
    outputs, dtype = torch.from_numpy(outputs_array), ours.outputs.dtype
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
