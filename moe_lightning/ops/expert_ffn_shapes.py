"""What `expert_ffn` and its backward return, not computed: new tensors, or the buffer that was given.

Legend: N rows, E experts, D d_model, F hidden size, G = 2F for SwiGLU (gate, then up) or F for GELU, T tokens, K top_k.
"""

from typing import Any

from torch import Tensor


def forward(
    rows_ND: Tensor,
    up_EGD: Tensor,
    _down: Tensor,
    _offsets: Tensor,
    _weights: Any,
    _perm: Any,
    _activation: str,
    keep_hidden: bool,
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
    buffer_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, in the buffer where there is one, of up, down and weights."""
    in_buffer = needs_rows and buffer_ND is not None
    return (
        buffer_ND if in_buffer else rows_ND.new_empty(rows_ND.shape if needs_rows else 0),  # type: ignore[return-value]
        up_EGD.new_empty(up_EGD.shape if needs_up else 0),
        down_EDF.new_empty(down_EDF.shape if needs_down else 0),
        rows_ND.new_empty(0) if weights_TK is None else weights_TK.new_empty(weights_TK.shape),
    )
