"""The package's own interface for tensors: `dispatch` and `combine`, with the words of `ep_mojo.dispatch` and
`.combine`.

    comm = ep.Communicator.process_group(cfg, group)
    h = ept.dispatch(comm, x, topk_ids, weights)
    y = experts(h.tokens, h.row_offsets)              # rows by expert, ready for a grouped GEMM
    out = ept.combine(comm, y, h)

The communicator is the caller's, and so are its config, `check`, `reset` and `destroy`. Both are torch ops
(`library.py`), so that torch.compile takes them. They are for inference: no gradient goes through them; `autograd` has
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..comm import Communicator
from ..errors import DTypeError, OrderError
from . import library
from .library import number_of
from .normal import biases_of


class Handle(NamedTuple):
    """What `dispatch` gives a rank. R ranks, G groups (local experts), K = top_k, N = cfg.rows_capacity rows, S scales
    a row.

    Rows are sorted by (expert, source rank, source token, k); those past the last are unspecified.

    Attributes:
        tokens: "expert" and "rank" [N, H], "expert_padded" [G, R*Tmax, H]: bfloat16 or float8_e4m3fn.
        scales: float32 or int32 [N, S], column-major [S, N] or ("expert_padded") [G*S, N/G]; [0, 0] without scales.
        row_offsets: int32 [G + 1], the first row of each expert ("rank": [R + 1], of each source rank).
        counts: int32 [G] (or [R]), rows of each.
        expert_ids: int32 [G], the global expert of each group; "rank" [0].
        src_info: int32 [N, 2] = (source rank * Tmax + token, k), -1 where there is no row.
        local_ids, local_weights: int32 and float32 [N, K] in layout "rank", else [0, 0].
        recv_weights: float32 [R, Tmax, K].
        row_map: int32 [R, Tmax, K].
        recv_num_tokens: int32 [R].
        memory: int32, flat: what all of them but tokens and scales are views of.
        topk_ids, weights: This rank's own, as given to dispatch; they must stay what they are until the last combine.
        comm: The number of the communicator.
    """

    tokens: torch.Tensor
    scales: torch.Tensor
    row_offsets: torch.Tensor
    counts: torch.Tensor
    expert_ids: torch.Tensor
    src_info: torch.Tensor
    local_ids: torch.Tensor
    local_weights: torch.Tensor
    recv_weights: torch.Tensor
    row_map: torch.Tensor
    recv_num_tokens: torch.Tensor
    memory: torch.Tensor
    topk_ids: torch.Tensor
    weights: torch.Tensor | None
    comm: int


def dispatch(
    comm: Communicator,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    x_scales: torch.Tensor | None = None,
) -> Handle:
    """Send every token to the ranks of its experts, and receive. All ranks call this.

    The first call with a communicator, and the first with another dtype of topk_ids, with or without weights or scales,
    needs some seconds to compile, and all ranks for it.

    Args:
        comm: From `Communicator.process_group`.
        x: bfloat16 [T, H]; with x_scales float8_e4m3fn.
        topk_ids: int32 or int64 [T, K]; an id outside [0, E) is no expert.
        weights: float32 [T, K], or None: 1.
        x_scales: [T, S], of tokens that are quantised already: float32, or int32 with scale="ue8m0".

    Returns:
        The handle.

    Raises:
        DTypeError, ShapeError, DeviceError, UnsupportedError: An argument does not fit the config. Nothing was sent.
        OrderError: A first call inside the capture of a CUDA graph.
        CapacityError, PeerTimeoutError, PeerLostError: What this rank recorded; `comm.reset()` on all ranks to go on.
    """
    number = number_of(comm)
    tokens, scales, memory = library.dispatch(library.ORDER, x, x_scales, topk_ids, weights, number)
    parts = {name: memory[a:b].view(dtype).view(shape) for name, a, b, dtype, shape in library.parts_of(number)}
    own = {"tokens": tokens, "scales": scales, "memory": memory, "topk_ids": topk_ids, "weights": weights}
    return Handle(**own, comm=number, **parts)


def combine(
    comm: Communicator,
    y: torch.Tensor,
    handle: Handle,
    *,
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Send expert rows back, and add them up with the weights of the dispatch. All ranks call this.

    Args:
        comm: The same as for the dispatch.
        y: Expert rows in `cfg.combine_dtype`, of the shape of `handle.tokens` with H channels.
        handle: From `dispatch`; may be used again.
        bias: None, one bfloat16 [T, H], or two: added first.

    Returns:
        [T, H] in `cfg.output_dtype`.

    Raises:
        DTypeError, ShapeError, DeviceError: An argument does not fit. Nothing was sent.
        OrderError: The handle comes from another communicator.
        PeerTimeoutError, PeerLostError: What this rank recorded.
    """
    first, second = [*biases_of(bias), None, None][:2]
    if not isinstance(handle, Handle):
        raise DTypeError.wrong_kind(
            "handle", handle, allowed="a Handle of ep_mojo.torch.dispatch", remedy="pass it as it is"
        )
    h, number = handle, number_of(comm)
    if h.comm != number:
        raise OrderError(
            "the handle comes from another communicator",
            field="handle",
            value="of another communicator",
            allowed="handles of dispatches with this one",
            remedy="combine with the communicator that dispatched",
        )
    sent = y, h.memory, h.topk_ids, h.weights
    return library.combine(library.ORDER, *sent, first, second, number)
