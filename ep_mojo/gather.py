"""All-gather-v and reduce-scatter-v in MAX graphs: dispatch and combine of configs with the layout "gathered".

Every token goes to every rank, whatever it has chosen; rows come by rank, then token, without gaps. What the ranks make
of them is added up where the tokens came from. T may differ by rank and by step, and may be on the device. For few
tokens and few ranks that can be quicker than to route: see `Communicator.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import ConfigError
from .graph import combine, combine_async, combine_wait, dispatch, dispatch_async, dispatch_wait
from .graph_checks import check_length, check_lists, check_ranks
from .graph_ops import PendingCombine, PendingDispatch, Values, or_absent
from .handle import Handle

if TYPE_CHECKING:
    from max.graph import TensorValue

    from .comm.base import Rank

__all__ = [
    "all_gather_v",
    "all_gather_v_async",
    "all_gather_v_wait",
    "reduce_scatter_v",
    "reduce_scatter_v_async",
    "reduce_scatter_v_wait",
]


def all_gather_v_async(
    ranks: Sequence[Rank],
    xs: Values,
    topk_ids: Values | None = None,
    weights: Values | None = None,
    *,
    num_tokens: Values | None = None,
    x_scales: Values | None = None,
    input_scale: Values | None = None,
    n_sms: int | None = None,
) -> list[PendingDispatch]:
    """Send every rank's tokens to all ranks. Returns in the graph as soon as all are sent.

    Args:
        ranks: From `comm.bind`, of a config with output_layout="gathered".
        xs: Tokens [T, H], bfloat16, or encoded already (with x_scales). T may differ.
        topk_ids: int32 or int64 [T, K], which travel with the tokens; None with top_k=0.
        weights: float32 [T, K], which travel too, or None: 1.
        num_tokens, x_scales, input_scale, n_sms: See `dispatch_async`.

    Returns:
        One `PendingDispatch` a rank.

    Raises:
        ConfigError: Another layout, or n_sms is out of range.
        ShapeError, DTypeError, UnsupportedError, DeviceError: See `dispatch_async`.
    """
    given = _choices(ranks, xs, topk_ids)
    more = {"num_tokens": num_tokens, "x_scales": x_scales, "input_scale": input_scale}
    return dispatch_async(ranks, xs, given, weights, **more, n_sms=n_sms)


def all_gather_v_wait(
    ranks: Sequence[Rank], pending: Sequence[PendingDispatch], *, n_sms: int | None = None
) -> list[Handle]:
    """Receive what `all_gather_v_async` sent: see `all_gather_v`."""
    _check_layout(ranks)
    return dispatch_wait(ranks, pending, n_sms=n_sms)


def all_gather_v(
    ranks: Sequence[Rank],
    xs: Values,
    topk_ids: Values | None = None,
    weights: Values | None = None,
    *,
    num_tokens: Values | None = None,
    x_scales: Values | None = None,
    input_scale: Values | None = None,
    n_sms: int | None = None,
) -> list[Handle]:
    """Send and receive: one launch where ranks run by themselves, else all sends and then all waits.

    Args:
        ranks, xs, topk_ids, weights, num_tokens, x_scales, input_scale, n_sms: See `all_gather_v_async`.

    Returns:
        One `Handle` a rank: `tokens` [N, H] with N = cfg.rows_capacity (R * Tmax, or max_rows), of which the first
        `row_offsets[R]` hold one, `local_ids` and `local_weights` [N, K], the choices and weights as they came, -1 and
        0 behind the last token. More tokens than N are a `CapacityError` when it runs.

    Raises:
        ConfigError, ShapeError, DTypeError, UnsupportedError, DeviceError: See `all_gather_v_async`.
    """
    given = _choices(ranks, xs, topk_ids)
    more = {"num_tokens": num_tokens, "x_scales": x_scales, "input_scale": input_scale}
    return dispatch(ranks, xs, given, weights, **more, n_sms=n_sms)


def reduce_scatter_v_async(
    ranks: Sequence[Rank], ys: Values, handles: Sequence[Handle], *, n_sms: int | None = None
) -> list[PendingCombine]:
    """Send rows back to the ranks that their tokens came from.

    Args:
        ranks: The same ranks.
        ys: [N, H] in `cfg.combine_dtype`, which is what travels: a row for each row of `handle.tokens`; those
            behind the last token are not read.
        handles: From `all_gather_v` or `all_gather_v_wait`.
        n_sms: See `dispatch_async`.

    Returns:
        One `PendingCombine` a rank.

    Raises:
        ConfigError: Another layout, or n_sms is out of range.
        ShapeError, DTypeError, OrderError, DeviceError: See `combine_async`.
    """
    _check_layout(ranks)
    return combine_async(ranks, ys, handles, n_sms=n_sms)


def reduce_scatter_v_wait(
    ranks: Sequence[Rank],
    pending: Sequence[PendingCombine],
    *,
    bias0: Values | None = None,
    bias1: Values | None = None,
    n_sms: int | None = None,
) -> list[TensorValue]:
    """Receive and sum what `reduce_scatter_v_async` sent: see `reduce_scatter_v`."""
    _check_layout(ranks)
    return combine_wait(ranks, pending, bias0=bias0, bias1=bias1, n_sms=n_sms)


def reduce_scatter_v(
    ranks: Sequence[Rank],
    ys: Values,
    handles: Sequence[Handle],
    *,
    bias0: Values | None = None,
    bias1: Values | None = None,
    n_sms: int | None = None,
) -> list[TensorValue]:
    """Send rows back, receive and sum them: float32, biases first, then ranks ascending, rounded once.

    Args:
        ranks, ys, handles, n_sms: See `reduce_scatter_v_async`.
        bias0, bias1: bfloat16 or float32 [T, H] (both of one dtype), added first, or None.

    Returns:
        One tensor [T, H] in `cfg.output_dtype` a rank; rows from num_tokens on are zero.

    Raises:
        ConfigError, ShapeError, DTypeError, OrderError, DeviceError: See `reduce_scatter_v_async`.
    """
    _check_layout(ranks)
    return combine(ranks, ys, handles, bias0=bias0, bias1=bias1, n_sms=n_sms)


def _check_layout(ranks: Sequence[Rank]) -> None:
    check_ranks(ranks)
    for rank in ranks:
        if rank.cfg.output_layout != "gathered":
            raise ConfigError(
                field="output_layout",
                value=rank.cfg.output_layout,
                allowed='"gathered"',
                remedy='make the config with output_layout="gathered", or call dispatch and combine',
            )


def _choices(ranks: Sequence[Rank], xs: Values, topk_ids: Values | None) -> Values:
    """What tokens have chosen; without choices [T, 0]."""
    from max.graph import ops

    _check_layout(ranks)
    if topk_ids is not None or any(rank.cfg.top_k for rank in ranks):
        check_length(ranks, ("topk_ids",), topk_ids=topk_ids)
        return topk_ids
    check_lists(ranks, ("xs",), xs=xs)
    none = [or_absent(None, "int32", 2, rank.device) for rank in ranks]
    return [ops.broadcast_to(ops.reshape(v, [1, 0]), [x.shape[0], 0]) for v, x in zip(none, xs, strict=True)]
