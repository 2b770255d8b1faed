"""Combine of few tokens on a GPU: what comes back travels as cells (`cells.mojo`), so that nothing waits for signals.

    every warp       takes pieces of the tokens of all ranks, some channels of one each, sums their rows here and stores
                     them (`few_sums_sent.mojo`); then pieces of the own tokens (`few_sums_received.mojo`)

Fused, the last warps sum most, since the first ones send most. What opens and closes a launch, headers among it, is as
for many tokens (`combine_async.mojo`, `combine_wait.mojo`); the headers cover nothing.
"""

from max.gpu import block_idx, lane_id, thread_idx
from max.gpu.host import DeviceContext

from ..combine_tensors import (
    CombineInput,
    CombineOutput,
    row_bytes,
)
from ..launch import Endpoint
from ..layout import STAGE_COMBINE
from ..team import WarpTeam
from .cells import Cut
from .combine_async import give_shared, check_handle
from .combine_wait import close_receive_back, open_receive_back, zero_output
from .few_counts import tell_headers, tell_rows
from .few_sums_received import receive_back_as_cells, received_cells
from .few_sums_sent import send_sums_as_cells, sent_cells
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_index,
)
from .opening import Opening
from .precedence import precedence, queue
from .share import Share, last_warps_first
from .shared_memory import MAX_WARPS, NO_SLOT
from .timeline import (
    MARK_COMBINE_BEGUN,
    MARK_COMBINE_ENDED,
    MARK_COMBINE_OPENED,
    mark,
)


def few_combine_async_stage[
    dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    narrow: Bool,
](peers: ByValue[Peers], input: ByValue[CombineInput], stage: Int32):
    """The kernel of the sending half.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".
        narrow: Whether there are so few tokens that pieces are small.

    Args:
        peers: The rank's side.
        input: The rows.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        return
    var ep = peers.value.endpoint[False]()
    var epoch = ep.last_sent() + 1
    var x = input.value
    var opening = Opening()
    if opening.opens():
        check_handle[dtype, hidden](ep, x, stage)
        opening.decide[bulk=False](ep, stage)
        if opening.passed():
            tell_headers[layout, reduce](ep, x, epoch)
    opening.settle()
    send_sums_as_cells[dtype, hidden, layout, reduce, narrow](
        ep, x, epoch, stage, Share(), opening
    )
    tell_rows[layout, reduce](ep, x, epoch, opening)
    give_shared[dtype, hidden](ep, x, opening)
    if is_last_cta(ep, sending=True) and warp_index() == 0:
        ep.end_send[WarpTeam](epoch, ep.head.failed())


def few_combine_wait_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    narrow: Bool,
](
    peers: ByValue[Peers],
    output: ByValue[CombineOutput[ids_dtype]],
    stage: Int32,
):
    """The kernel of the receiving half.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".
        narrow: Whether there are so few tokens that pieces are small.

    Args:
        peers: The rank's side.
        output: Its tokens.
        stage: `STAGE_*`.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    if not peers.value.valid():
        zero_output[out_bytes](output.value)
        return
    var ep = peers.value.endpoint[False]()
    var epoch = ep.next_wait()
    if thread_idx.x == 0:
        open_receive_back(ep, output.value, ep.last_sent(), stage)
    if may_go_on(ep.head):
        receive_back_as_cells[
            dtype,
            out_dtype,
            bias_dtype,
            ids_dtype,
            hidden,
            layout,
            reduce,
            narrow,
        ](ep, output.value, epoch, stage, Share())
    if is_last_cta(ep, sending=False):
        close_receive_back[out_bytes](ep, output.value, epoch, ep.head.failed())


def few_combine_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
    narrow: Bool,
](
    peers: ByValue[Peers],
    input: ByValue[CombineInput],
    output: ByValue[CombineOutput[ids_dtype]],
):
    """The kernel of both halves.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".
        narrow: Whether there are so few tokens that pieces are small.

    Args:
        peers: The rank's side.
        input: The expert rows.
        output: The rank's tokens.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    if not peers.value.valid():
        zero_output[out_bytes](output.value)
        return
    var ep = peers.value.endpoint[False]()
    var x = input.value
    var y = output.value
    var sent = ep.last_sent() + 1
    var epoch = ep.next_wait()
    var opening = Opening()
    mark[MARK_COMBINE_BEGUN](ep)
    if opening.opens():
        if lane_id() == 0:
            open_receive_back(ep, y, sent, STAGE_COMBINE)
        check_handle[dtype, hidden](ep, x, STAGE_COMBINE)
        opening.decide[bulk=False](ep, STAGE_COMBINE)
        mark[MARK_COMBINE_OPENED](ep)
        if opening.passed():
            tell_headers[layout, reduce](ep, x, sent)
    opening.settle()
    send_sums_as_cells[dtype, hidden, layout, reduce, narrow](
        ep, x, sent, STAGE_COMBINE, Share(), opening
    )
    tell_rows[layout, reduce](ep, x, sent, opening)
    give_shared[dtype, hidden](ep, x, opening)
    if opening.passed():
        if y.shared_rows.present():
            y.shared_rows = x.rows  # the copy may not be there yet
        receive_back_as_cells[
            dtype,
            out_dtype,
            bias_dtype,
            ids_dtype,
            hidden,
            layout,
            reduce,
            narrow,
        ](ep, y, epoch, STAGE_COMBINE, last_warps_first())
    mark[MARK_COMBINE_ENDED](ep)
    if is_last_cta(ep, sending=False):
        var failed = ep.head.failed()
        if warp_index() == 0:
            ep.end_send[WarpTeam](sent, failed)
        close_receive_back[out_bytes](ep, y, epoch, failed)


def _shape[
    dtype: DType, hidden: Int, cells: Int
](ctx: DeviceContext, peers: Peers, tokens: Int) raises -> Shape:
    """As many CTAs as have a piece for each warp."""
    comptime pieces = Cut[dtype, hidden, cells].pieces
    return Shape(
        ctx,
        peers.s,
        items=(tokens * pieces + MAX_WARPS - 1) // MAX_WARPS,
        warp_bytes=NO_SLOT,
    )


def few_combine_async[
    dtype: DType, hidden: Int, layout: StaticString, reduce: StaticString
](peers: Peers, x: CombineInput, stage: Int32, ctx: DeviceContext) raises:
    """Launch the sending half.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: The rows, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    var tokens = peers.s.n_ranks * peers.s.max_tokens
    comptime for narrow in [True, False]:
        if narrow == peers.s.narrow():
            comptime stage_of = few_combine_async_stage[
                dtype, hidden, layout, reduce, narrow
            ]
            var shape = _shape[dtype, hidden, sent_cells[narrow]()](
                ctx, peers, tokens
            )
            queue(ctx, peers.s).enqueue_function(
                ctx.compile_function[stage_of](func_attribute=shape.memory()),
                ByValue(peers),
                ByValue(x),
                stage,
                grid_dim=shape.ctas,
                block_dim=shape.threads,
                shared_mem_bytes=shape.shared_bytes,
                attributes=precedence(ctx, peers.s),
            )


def few_combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: Peers,
    x: CombineOutput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch the receiving half.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    comptime for narrow in [True, False]:
        if narrow == peers.s.narrow():
            comptime stage_of = few_combine_wait_stage[
                dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                layout,
                reduce,
                narrow,
            ]
            var shape = _shape[dtype, hidden, received_cells[narrow]()](
                ctx, peers, max(1, x.rows)
            )
            queue(ctx, peers.s).enqueue_function(
                ctx.compile_function[stage_of](func_attribute=shape.memory()),
                ByValue(peers),
                ByValue(x),
                stage,
                grid_dim=shape.ctas,
                block_dim=shape.threads,
                shared_mem_bytes=shape.shared_bytes,
                attributes=precedence(ctx, peers.s),
            )


def few_combine[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: Peers,
    x: CombineInput,
    y: CombineOutput[ids_dtype],
    ctx: DeviceContext,
) raises:
    """Launch both halves.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: The expert rows, in device memory.
        y: The rank's tokens, in device memory.
        ctx: The device.

    Raises:
        What the driver raises.
    """
    var tokens = peers.s.n_ranks * peers.s.max_tokens
    comptime for narrow in [True, False]:
        if narrow == peers.s.narrow():
            comptime stage_of = few_combine_stage[
                dtype,
                out_dtype,
                bias_dtype,
                ids_dtype,
                hidden,
                layout,
                reduce,
                narrow,
            ]
            var shape = _shape[dtype, hidden, sent_cells[narrow]()](
                ctx, peers, tokens
            )
            queue(ctx, peers.s).enqueue_function(
                ctx.compile_function[stage_of](func_attribute=shape.memory()),
                ByValue(peers),
                ByValue(x),
                ByValue(y),
                grid_dim=shape.ctas,
                block_dim=shape.threads,
                shared_mem_bytes=shape.shared_bytes,
                attributes=precedence(ctx, peers.s),
            )
