"""What `expert_ffn` and its backward return, not computed: new tensors, or the buffer that was given.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.
"""

from typing import Any

from torch import Tensor

Memory = tuple[Tensor | None, Tensor | None, Tensor | None]
"""For the gradients of rows, up and down; None for new tensors."""


def forward(
    rows_ND: Tensor,
    up_EGD: Tensor,
    _down: Tensor,
    _offsets: Tensor,
    _weights: Any,
    _perm: Any,
    _activation: str,
    keep_hidden: bool,
    _sm_margin: int,
    buffer_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs, in the buffer where there is one, and hidden rows."""
    kept = rows_ND.shape[0] if keep_hidden else 0
    out_ND = rows_ND.new_empty(rows_ND.shape) if buffer_ND is None else buffer_ND
    return out_ND, rows_ND.new_empty((kept, up_EGD.shape[1]))


def backward(
    _grad: Tensor,
    rows_ND: Tensor,
    up_EGD: Tensor,
    down_EDF: Tensor,
    _hidden: Tensor,
    _offsets: Tensor,
    weights_TK: Tensor | None,
    _perm: Any,
    _activation: str,
    needs_rows: bool,
    needs_up: bool,
    needs_down: bool,
    _sm_margin: int,
    memory: Memory = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, up and down, each in the memory where there is some, and of weights."""
    like, needs = (rows_ND, up_EGD, down_EDF), (needs_rows, needs_up, needs_down)
    made = (
        given if need and given is not None else tensor.new_empty(tensor.shape if need else 0)
        for given, tensor, need in zip(memory, like, needs, strict=True)
    )
    return (
        *made,  # type: ignore[return-value]
        rows_ND.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape),
    )
