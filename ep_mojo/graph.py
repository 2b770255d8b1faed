"""Dispatch and combine in MAX graphs: thin wrappers that put the custom ops `ep_mojo_*` into a graph.

Every function takes the ranks of the graph (`comm.bind(...)`) and lists with one value for each of them. With virtual
ranks all sends come before all waits; where each rank runs by itself the fused ops do both halves in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import DeviceError
from .formats import check_int
from .graph_checks import (
    check_budget,
    check_combine,
    check_graph_values,
    check_list,
    check_lists,
    check_pending,
    check_ranks,
    check_results,
)
from .graph_ops import (
    PendingCombine,
    PendingDispatch,
    Values,
    add_combine,
    add_dispatch,
    add_op,
    at,
    dispatch_calls,
    format_of,
    handle_from,
    reduce_parameters,
    rows_to_send,
    shared_type,
    sums_type,
    wait_values,
)
from .handle import Handle, handle_types

if TYPE_CHECKING:
    from max.graph import TensorType, TensorValue

    from .comm.base import Rank

__all__ = [
    "Handle",
    "PendingCombine",
    "PendingDispatch",
    "beside",
    "combine",
    "combine_async",
    "combine_wait",
    "dispatch",
    "dispatch_async",
    "dispatch_wait",
]


def dispatch_async(
    ranks: Sequence[Rank],
    xs: Values,
    topk_ids: Values,
    weights: Values | None = None,
    *,
    num_tokens: Values | None = None,
    x_scales: Values | None = None,
    input_scale: Values | None = None,
    n_sms: int | None = None,
) -> list[PendingDispatch]:
    """Send every rank's tokens to the ranks that own their experts. Returns in the graph as soon as all are sent.

    Args:
        ranks: From `comm.bind`.
        xs: Tokens [T, H], bfloat16; or tokens that are encoded already, in the format's own dtype (float8 as
            uint8 bit patterns). T may differ.
        topk_ids: int32 or int64 [T, K]. An id outside [0, E) means "no expert".
        weights: float32 [T, K], or None: 1.
        num_tokens: int32 [1], or None: only the first num_tokens rows count.
        x_scales: Scales of encoded tokens [T, S].
        input_scale: float32 [1], or None: multiplies the tokens before they are quantised.
        n_sms: The most SMs (or CPU workers) of this op, 1 to 1024; None: cfg.n_sms. With a budget the op leaves the
            other SMs to work on the device's other queues, as `max.graph.ops.side_stream` puts there, and goes first.

    Returns:
        One `PendingDispatch` a rank.

    Raises:
        ShapeError, DTypeError, UnsupportedError: An argument does not fit the config, or is no list of graph values;
            nothing is added to the graph.
        DeviceError: An argument is not on its rank's device; nothing is added to the graph.
        ConfigError: n_sms is out of range.
    """
    calls = dispatch_calls(ranks, xs, topk_ids, weights, num_tokens, x_scales, input_scale)
    budget = check_budget(n_sms)
    for rank, (values, _) in zip(ranks, calls, strict=True):
        add_op("dispatch_async", rank, "dispatch", values, [], format_of(rank.cfg), budget)
    return [pending for _, pending in calls]


def dispatch_wait(
    ranks: Sequence[Rank], pending: Sequence[PendingDispatch], *, n_sms: int | None = None
) -> list[Handle]:
    """Receive what `dispatch_async` sent.

    Args:
        ranks: The same ranks.
        pending: From `dispatch_async`.
        n_sms: See `dispatch_async`.

    Returns:
        One `Handle` a rank.

    Raises:
        ShapeError, ConfigError: An argument does not fit.
    """
    check_pending(ranks, pending, PendingDispatch)
    budget = check_budget(n_sms)
    handles = []
    for rank, p in zip(ranks, pending, strict=True):
        parameters = format_of(rank.cfg) | {"layout": rank.cfg.output_layout}
        outputs = add_op("dispatch_wait", rank, "dispatch", [], handle_types(rank.cfg, rank.device), parameters, budget)
        handles.append(handle_from(rank.cfg, outputs, p))
    return handles


def dispatch(
    ranks: Sequence[Rank],
    xs: Values,
    topk_ids: Values,
    weights: Values | None = None,
    *,
    num_tokens: Values | None = None,
    x_scales: Values | None = None,
    input_scale: Values | None = None,
    n_sms: int | None = None,
) -> list[Handle]:
    """Send and receive: the fused op where ranks run by themselves, else all sends and then all waits.

    Args:
        ranks, xs, topk_ids, weights, num_tokens, x_scales, input_scale, n_sms: See `dispatch_async`.

    Returns:
        One `Handle` a rank.

    Raises:
        ShapeError, DTypeError, UnsupportedError, DeviceError, ConfigError: See `dispatch_async`.
    """
    check_ranks(ranks)
    if not all(rank.fused_allowed for rank in ranks) or any(rank.cfg.slots == "expert" for rank in ranks):
        pending = dispatch_async(
            ranks,
            xs,
            topk_ids,
            weights,
            num_tokens=num_tokens,
            x_scales=x_scales,
            input_scale=input_scale,
            n_sms=n_sms,
        )
        return dispatch_wait(ranks, pending, n_sms=n_sms)
    budget = check_budget(n_sms)
    calls = dispatch_calls(ranks, xs, topk_ids, weights, num_tokens, x_scales, input_scale)
    return [add_dispatch(rank, values, pending, budget) for rank, (values, pending) in zip(ranks, calls, strict=True)]


def combine_async(
    ranks: Sequence[Rank],
    ys: Values,
    handles: Sequence[Handle],
    *,
    reduce: str | None = None,
    n_sms: int | None = None,
) -> list[PendingCombine]:
    """Send expert rows back to the ranks that their tokens came from.

    Args:
        ranks: From `comm.bind`.
        ys: Expert rows, of the shape of `handle.tokens` with H channels, in `cfg.combine_dtype`; quantised rows of a
            handle multiplied by their scales first.
        handles: From `dispatch` or `dispatch_wait`; any earlier handle of these ranks will do.
        reduce: "expert" or "source"; None: the config's, or "expert".
        n_sms: See `dispatch_async`.

    Returns:
        One `PendingCombine` a rank.

    Raises:
        ShapeError, DTypeError, ConfigError: An argument does not fit the config or the handle.
        DeviceError: An argument is not on its rank's device.
    """
    modes = check_combine(ranks, ys, handles, reduce)
    pending, budget = [], check_budget(n_sms)
    for rank, y, h, mode in zip(ranks, ys, handles, modes, strict=True):
        parameters = reduce_parameters(rank.cfg, mode)
        (shared,) = add_op("combine_async", rank, "combine", rows_to_send(y, h), [shared_type(h)], parameters, budget)
        pending.append(PendingCombine(h, mode, shared))
    return pending


def combine_wait(
    ranks: Sequence[Rank],
    pending: Sequence[PendingCombine],
    *,
    weights: Values | None = None,
    bias0: Values | None = None,
    bias1: Values | None = None,
    n_sms: int | None = None,
) -> list[TensorValue]:
    """Receive and sum what `combine_async` sent.

    Args:
        ranks: The same ranks.
        pending: From `combine_async`.
        weights: float32 [T, K] for reduce "source"; None: those of the dispatch, or 1.
        bias0, bias1: bfloat16 or float32 [T, H] (both of one dtype), added first, or None.
        n_sms: See `dispatch_async`.

    Returns:
        One tensor [T, H] in `cfg.output_dtype` a rank; rows from num_tokens on are zero.

    Raises:
        ShapeError, DTypeError, UnsupportedError, DeviceError, ConfigError: An argument does not fit.
    """
    check_pending(ranks, pending, PendingCombine)
    check_lists(ranks, weights=weights, bias0=bias0, bias1=bias1)
    ys, budget = [], check_budget(n_sms)
    for i, (rank, p) in enumerate(zip(ranks, pending, strict=True)):
        values = wait_values(rank.cfg, p.handle, p.reduce, at(weights, i), at(bias0, i), at(bias1, i))
        types = [sums_type(p.handle)]
        (y,) = add_op(
            "combine_wait", rank, "combine", [*values, p.shared], types, reduce_parameters(rank.cfg, p.reduce), budget
        )
        ys.append(y)
    return ys


def combine(
    ranks: Sequence[Rank],
    ys: Values,
    handles: Sequence[Handle],
    *,
    weights: Values | None = None,
    reduce: str | None = None,
    bias0: Values | None = None,
    bias1: Values | None = None,
    n_sms: int | None = None,
) -> list[TensorValue]:
    """Send expert rows back, receive and sum them.

    Args:
        ranks, ys, handles, reduce, n_sms: See `combine_async`.
        weights, bias0, bias1: See `combine_wait`.

    Returns:
        One tensor [T, H] in `cfg.output_dtype` a rank.

    Raises:
        ShapeError, DTypeError, ConfigError, UnsupportedError, DeviceError: See the two halves.
    """
    check_ranks(ranks)
    if not all(rank.fused_allowed for rank in ranks) or any(rank.cfg.slots == "expert" for rank in ranks):
        pending = combine_async(ranks, ys, handles, reduce=reduce, n_sms=n_sms)
        return combine_wait(ranks, pending, weights=weights, bias0=bias0, bias1=bias1, n_sms=n_sms)
    modes = check_combine(ranks, ys, handles, reduce)
    check_lists(ranks, weights=weights, bias0=bias0, bias1=bias1)
    outputs, budget = [], check_budget(n_sms)
    for i, (rank, y, h, mode) in enumerate(zip(ranks, ys, handles, modes, strict=True)):
        values = wait_values(rank.cfg, h, mode, at(weights, i), at(bias0, i), at(bias1, i))
        outputs.append(add_combine(rank, y, h, mode, values, budget))
    return outputs


def beside(
    ranks: Sequence[Rank],
    inputs: Values,
    body: Callable[..., Sequence[TensorValue]],
    *,
    result_types: Sequence[TensorType],
    head_start_us: int = 20,
) -> list[TensorValue]:
    """Put other work, a shared expert say, on the devices' second queues, where it runs beside the ranks' ops.

    `max.graph.ops.side_stream` with a head start for the ranks' ops: the second queue begins when its inputs are there
    and the head start is over, and MAX lets the first one wait before the first op that takes a result. Ops that are to
    run beside it need a budget (`n_sms`), since a launch without one takes all SMs. The work must not wait for other
    ranks. Ranks on the host have one queue: there `body` is part of the graph as it is.

    Args:
        ranks: From `comm.bind`.
        inputs: What the work takes, all ranks' in any order, some on each rank's device. Where the ops beside it wait
            for something that comes later (`topk_ids`), pass that too; else the work begins long before them.
        body: Called with the same number of values; returns the results.
        result_types: Their types, a list.
        head_start_us: Microseconds, 0 to 10,000. A replayed device graph starts both queues at once, and a kernel that
            comes first may take all SMs; 0 = none.

    Returns:
        The results.

    Raises:
        ShapeError, DTypeError, DeviceError: No ranks, no input on a rank's device, an input that is no graph value, or
            results that are not as many as result_types, or not of these types.
        ConfigError: head_start_us is out of range.
    """
    from max.dtype import DType
    from max.graph import BufferType, ops

    check_ranks(ranks)
    check_list("inputs", inputs, "a list of graph values", "pass what the work of every rank takes, as a list")
    check_graph_values("inputs", inputs, optional=False)
    check_list("result_types", result_types, "a list of TensorType", "pass [v.type for v in ...]")
    us = check_int("head_start_us", head_start_us, 0, 10_000)
    places = list(dict.fromkeys(rank.device for rank in ranks))
    missing = [str(place) for place in places if place not in [v.device for v in inputs]]
    if missing:
        raise DeviceError(
            field="inputs",
            value=f"none on {', '.join(missing)}",
            allowed="at least one on each rank's device",
            remedy="pass what the work of every rank takes",
        )
    if all(place.is_cpu() for place in places):
        return check_results(body(*inputs), result_types)

    def with_head_start(*values: TensorValue) -> Sequence[TensorValue]:
        for place in places if us else []:
            after = next(v for v in values if v.device == place)
            scratch = ops.buffer_create(BufferType(DType.int32, [1], place))
            ops.inplace_custom("ep_mojo_head_start", place, [scratch, after], parameters={"microseconds": us})
        return check_results(body(*values), result_types)

    return ops.side_stream(inputs, with_head_start, result_types=result_types)
