"""Dispatch and combine of a `Buffer` with gradients: the backward of one is the other.

Ranks run their backward passes in the same order, as they run everything. Gradients travel as bfloat16, and have no
gradients themselves: a second backward is an error of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..errors import DTypeError
from .buffer import Buffer
from .normal import NormalHandle


@torch.compiler.disable
def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_alignment: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], NormalHandle]:
    """`Buffer.dispatch`, differentiable in x and topk_weights.

    The gradient of x is the unweighted sum of its rows' gradients, in float32, ranks ascending, rounded once: a
    combine. Whether x and topk_weights need gradients must be the same on all ranks.

    Args:
        buffer: The Buffer.
        x: bfloat16 [T, H].
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K].
        num_experts: E.
        expert_alignment: See `Buffer.dispatch`.

    Returns:
        recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, as `Buffer.dispatch` does.

    Raises:
        EPError: See `Buffer.dispatch`.
    """
    return _Dispatch.apply(x, topk_weights, buffer, topk_idx, num_experts, expert_alignment)


@torch.compiler.disable
def combine(buffer: Buffer, x: torch.Tensor, handle: NormalHandle, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`Buffer.combine` without weights, differentiable in x and bias.

    The gradient of x is that of the sums, sent to where the rows were: a dispatch along the handle. Whether x needs one
    must be the same on all ranks.

    Args:
        buffer: The Buffer.
        x: bfloat16 [N, H].
        handle: Of the dispatch.
        bias: bfloat16 [T, H], or None.

    Returns:
        bfloat16 [T, H].

    Raises:
        DTypeError: bias is something else: two have no gradients here.
        EPError: See `Buffer.combine`.
    """
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise DTypeError.wrong_kind("bias", bias, allowed="one tensor, or None", remedy="add two up first")
    return _Combine.apply(x, bias, buffer, handle)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, topk_weights, buffer, topk_idx, num_experts, expert_alignment):
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=expert_alignment,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.save_for_backward(recv_idx)
        ctx.mark_non_differentiable(recv_idx)
        return recv_x, recv_idx, recv_weights, counts, handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x, _, grad_weights, *others):
        weights = None
        if ctx.needs_input_grad[1]:
            (recv_idx,) = ctx.saved_tensors
            weights = torch.where(recv_idx >= 0, grad_weights, 0)  # where no expert is, the weight is 0 and stays so
        grad, summed, _ = ctx.buffer.combine(grad_x, ctx.handle, topk_weights=weights)
        return grad, summed, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(x, handle, bias=bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        rows = ctx.buffer.dispatch(grad, handle=ctx.handle)[0] if ctx.needs_input_grad[0] else None
        return rows, grad if ctx.needs_input_grad[1] else None, None, None
