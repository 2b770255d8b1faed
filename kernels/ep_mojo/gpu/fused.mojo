"""The fused stages on a GPU: both halves in one launch, for ranks that run at the same time.

In dispatch some warps send while others copy what arrives (`DispatchRoles`); each warp has at most one chunk to copy
by its number, and further ones are taken by whoever is free, those that have sent included. In combine every warp
sends its part, then sums; where there are more chunks than two for each warp, some only sum (`CombineRoles`), so that
the links do not rest meanwhile, and the others help them when they have sent. Nothing of the sending half waits for a
peer's receiving half of the same round.
"""

from max.gpu import lane_id
from max.gpu.host import DeviceContext
from max.gpu.sync import barrier

from ..combine_tensors import CombineInput, CombineOutput, row_bytes
from ..dispatch_tensors import DispatchInput, DispatchOutput, Rows
from ..formats import TokenFormat
from ..layout import STAGE_COMBINE, STAGE_DISPATCH
from ..routing import may_shrink
from ..team import WarpTeam
from .combine_async import (
    give_shared,
    check_handle,
    send_back,
    send_headers,
)
from .combine_wait import (
    close_receive_back,
    open_receive_back,
    receive_back,
    zero_output,
)
from .dispatch_async import check_tokens, send_messages
from .dispatch_async import slot_bytes as token_slot_bytes
from .dispatch_wait import (
    close_wait,
    copy_rows,
    give_nothing,
    mark_rest,
)
from .gathered_rows import gather_rows, mark_behind
from .launch import ByValue, Peers, Shape, is_last_cta, warp_index
from .mapping import cta_bytes, map_sources, name_groups
from .opening import Opening
from .precedence import precedence, queue
from .roles import CombineRoles, DispatchRoles
from .share import Share
from .slices import combine_bytes
from .tables import send_tables, send_tables_as_cells
from .tables_received import keep_weights
from .timeline import (
    MARK_BEGUN,
    MARK_COMBINE_BEGUN,
    MARK_COMBINE_ENDED,
    MARK_COMBINE_OPENED,
    MARK_ENDED,
    MARK_OPENED,
    mark,
)


def dispatch_stage[
    F: TokenFormat,
    ids_dtype: DType,
    encoded: Bool,
    layout: StaticString,
    table_cells: Bool,
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    output: ByValue[DispatchOutput],
):
    """The kernel of dispatch.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.
        table_cells: Whether tables travel as cells; then no peer can be masked.

    Args:
        peers: The rank's side.
        input: Its tokens.
        output: The outputs.
    """
    if not peers.value.valid():
        give_nothing(output.value)
        return
    var ep = peers.value.endpoint[
        True,
        may_shrink=may_shrink[layout]() and not table_cells,
        table_cells=table_cells,
    ]()
    var x = input.value
    var out_ = output.value
    var sent = ep.last_sent() + 1
    var epoch = ep.next_wait()
    var waiter = ep.waiter(STAGE_DISPATCH)
    name_groups(ep, out_)
    var opening = Opening()
    mark[MARK_BEGUN](ep)
    if opening.opens():
        check_tokens(ep, x, STAGE_DISPATCH)
        if lane_id() == 0:
            _ = ep.begin_wait(STAGE_DISPATCH, sent)
        opening.decide(ep, STAGE_DISPATCH)
        mark[MARK_OPENED](ep)
    opening.settle()
    var roles = DispatchRoles(ep.s)
    if roles.sends:
        send_messages[F, ids_dtype, encoded, table_cells](
            ep, x, sent, STAGE_DISPATCH, roles.share, opening
        )
    else:
        comptime if table_cells:
            send_tables_as_cells(ep, x, sent, roles.share, opening)
        else:  # in the CTAs that send tables no warp has another role
            send_tables(ep, x, sent, opening)
    if not roles.apart:
        send_messages[F, ids_dtype, encoded, table_cells](
            ep, x, sent, STAGE_DISPATCH, Share(), opening
        )
        barrier()  # the histogram takes the place of the row slots
    var rows = Rows[F, layout](out_)
    if opening.passed():
        comptime if layout == "gathered":
            gather_rows[F, layout, 2 * token_slot_bytes[F]()](
                ep, epoch, waiter, roles.copying, rows, STAGE_DISPATCH
            )
            if roles.sends or not roles.apart:
                mark_behind[F, layout](ep, epoch, waiter, roles.share, rows)
        else:
            if roles.maps:
                map_sources[F, layout, table_cells](
                    ep, epoch, waiter, roles.pieces, out_, STAGE_DISPATCH
                )
            comptime if not table_cells:
                if not roles.sends:
                    keep_weights(ep, epoch, waiter, roles.share, out_)
            copy_rows[F, layout, 2 * token_slot_bytes[F](), table_cells](
                ep, epoch, waiter, roles.pieces, roles.copying, rows
            )
            if roles.sends or not roles.apart:
                mark_rest[F, layout](ep, epoch, waiter, roles.share, rows)
    mark[MARK_ENDED](ep)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        var failed = ep.head.failed()
        ep.end_send[WarpTeam](sent, failed)
        close_wait(ep, epoch, out_, failed)


def dispatch[
    F: TokenFormat,
    ids_dtype: DType,
    encoded: Bool,
    layout: StaticString,
    table_cells: Bool,
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    out_: DispatchOutput,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.
        table_cells: As for the kernel.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        out_: The outputs, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=2 * token_slot_bytes[F](),
        cta_bytes=cta_bytes[layout, table_cells](s),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            dispatch_stage[F, ids_dtype, encoded, layout, table_cells]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        ByValue(out_),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )


def combine_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: ByValue[Peers],
    input: ByValue[CombineInput],
    output: ByValue[CombineOutput[ids_dtype]],
):
    """The kernel of combine.

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
        input: The expert rows.
        output: The rank's tokens.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    if not peers.value.valid():
        zero_output[out_bytes](output.value)
        return
    var ep = peers.value.endpoint[
        False, may_shrink[layout]() and reduce == "source"
    ]()
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
        opening.decide(ep, STAGE_COMBINE)
        mark[MARK_COMBINE_OPENED](ep)
        if opening.passed():
            send_headers[layout, reduce](ep, x, sent, opening)
    opening.settle()
    var roles = CombineRoles(ep.s)
    if roles.sends:
        send_back[dtype, hidden, layout, reduce](
            ep, x, sent, STAGE_COMBINE, roles.sending, opening
        )
    give_shared[dtype, hidden](ep, x, opening)
    if opening.passed():
        if y.shared_rows.present():
            y.shared_rows = x.rows  # the copy may not be there yet
        receive_back[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](ep, y, epoch, STAGE_COMBINE, roles.summing)
    mark[MARK_COMBINE_ENDED](ep)
    if is_last_cta(ep, sending=False):
        var failed = ep.head.failed()
        if warp_index() == 0:
            ep.end_send[WarpTeam](sent, failed)
        close_receive_back[out_bytes](ep, y, epoch, failed)


def combine[
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
    """Launch it.

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
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=combine_bytes[dtype, hidden](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            combine_stage[
                dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
            ]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        ByValue(y),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
