"""Dispatch of few tokens on a GPU: tables and messages travel as cells (`cells.mojo`), so that nothing waits for
signals, and each message has CTAs of its own.

    every warp       (fused: of the receivers) sends some cells of the routing table, a lane each: those of Tmax tokens
                     for each rank, which say T; one warp the headers
    senders          take a token for one rank each: encode it, and all threads store a part of its cells
    receivers        await all tables and give out all rows, each by itself (`few_tokens.mojo`); then take messages: all
                     threads await a part of the cells each, and the rows are copied from shared memory

Fused, the first half of the CTAs, R at least, receives, and the others send, then mark what no row fills. With R CTAs
or fewer each does all in turn. What opens and closes a launch is as for many tokens (`dispatch_async.mojo`,
`dispatch_wait.mojo`).
"""

from max.gpu import block_idx, grid_dim, lane_id, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.sync import barrier

from ..dispatch_tensors import DispatchInput, DispatchOutput, Rows
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import STAGE_DISPATCH
from ..signal import Waiter
from ..team import WarpTeam
from .dispatch_async import check_tokens, slot_bytes
from .dispatch_wait import close_wait, give_nothing, mark_rest
from .few_messages import Part, receive_messages, send_messages_as_cells
from .few_tokens import FewTokens
from .gathered_rows import mark_behind
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_index,
)
from .mapping import name_groups
from .opening import Opening
from .precedence import precedence, queue
from .share import last_warps_first
from .shared_memory import NO_SLOT
from .tables import send_tables_as_cells
from .timeline import MARK_BEGUN, MARK_ENDED, MARK_OPENED, mark


@always_inline
def _mark[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    part: Part,
    rows: Rows[F, layout],
):
    """Say of all rows that hold nothing that they do."""
    comptime if layout == "gathered":
        mark_behind[F, layout](ep, epoch, waiter, part.share(), rows)
    else:
        mark_rest[F, layout](ep, epoch, waiter, part.share(), rows)


def few_dispatch_async_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    stage: Int32,
):
    """The kernel of the sending half.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.

    Args:
        peers: The rank's side.
        input: Its tokens.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        return
    var ep = peers.value.endpoint[True, cells=True]()
    var epoch = ep.last_sent() + 1
    var opening = Opening()
    if opening.opens():
        check_tokens(ep, input.value, stage)
        opening.decide[bulk=False](ep, stage)
    opening.settle()
    send_tables_as_cells(ep, input.value, epoch, last_warps_first(), opening)
    var part = Part(Int(block_idx.x), Int(grid_dim.x))
    send_messages_as_cells[F, ids_dtype, encoded](
        ep, input.value, epoch, part, opening
    )
    if is_last_cta(ep, sending=True) and warp_index() == 0:
        ep.end_send[WarpTeam](epoch, ep.head.failed())


def few_dispatch_wait_stage[
    F: TokenFormat, layout: StaticString
](peers: ByValue[Peers], output: ByValue[DispatchOutput], stage: Int32):
    """The kernel of the receiving half.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        peers: The rank's side.
        output: The outputs.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        give_nothing(output.value)
        return
    var ep = peers.value.endpoint[True, cells=True]()
    var epoch = ep.next_wait()
    var waiter = ep.waiter(stage)
    var rows = Rows[F, layout](output.value)
    name_groups(ep, output.value)
    if thread_idx.x == 0:
        _ = ep.begin_wait(stage, ep.last_sent())
    if may_go_on(ep.head):
        var part = Part(Int(block_idx.x), Int(grid_dim.x))
        receive_messages[F, layout](ep, epoch, waiter, part, rows, stage)
        _mark[F, layout](ep, epoch, waiter, part, rows)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        close_wait(ep, epoch, output.value, ep.head.failed())


def few_dispatch_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    output: ByValue[DispatchOutput],
):
    """The kernel of both halves.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        input: Its tokens.
        output: The outputs.
    """
    if not peers.value.valid():
        give_nothing(output.value)
        return
    var ep = peers.value.endpoint[True, cells=True]()
    var x = input.value
    var sent = ep.last_sent() + 1
    var epoch = ep.next_wait()
    var waiter = ep.waiter(STAGE_DISPATCH)
    var rows = Rows[F, layout](output.value)
    name_groups(ep, output.value)
    var opening = Opening()
    mark[MARK_BEGUN](ep)
    if opening.opens():
        check_tokens(ep, x, STAGE_DISPATCH)
        if lane_id() == 0:
            _ = ep.begin_wait(STAGE_DISPATCH, sent)
        opening.decide[bulk=False](ep, STAGE_DISPATCH)
        mark[MARK_OPENED](ep)
    opening.settle()
    var cta = Int(block_idx.x)
    var ctas = Int(grid_dim.x)
    var receivers = max(ep.s.n_ranks, ctas // 2)
    var apart = ctas > receivers
    var receiving = Part(cta, receivers if apart else ctas)
    var sending = Part(cta - receivers, ctas - receivers) if apart else Part(
        cta, ctas
    )
    var receives = not apart or cta < receivers
    var sends = not apart or cta >= receivers
    if receives:
        send_tables_as_cells(ep, x, sent, receiving.share(), opening)
    if sends:
        send_messages_as_cells[F, ids_dtype, encoded](
            ep, x, sent, sending, opening
        )
    if opening.passed():
        if not apart:
            barrier()  # what is being sent lies where the tables will
        if receives:
            receive_messages[F, layout](
                ep, epoch, waiter, receiving, rows, STAGE_DISPATCH
            )
        if sends:
            _mark[F, layout](ep, epoch, waiter, sending, rows)
    mark[MARK_ENDED](ep)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        var failed = ep.head.failed()
        ep.end_send[WarpTeam](sent, failed)
        close_wait(ep, epoch, output.value, failed)


def few_dispatch_async[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch the sending half.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=peers.s.n_ranks * (1 + x.rows),
        warp_bytes=NO_SLOT,
        cta_bytes=slot_bytes[F](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[few_dispatch_async_stage[F, ids_dtype, encoded]](
            func_attribute=shape.memory()
        ),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )


def few_dispatch_wait[
    F: TokenFormat, layout: StaticString
](
    peers: Peers, output: DispatchOutput, stage: Int32, ctx: DeviceContext
) raises:
    """Launch the receiving half.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        peers: The rank's side.
        output: The outputs, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=peers.s.n_ranks * peers.s.max_tokens,
        warp_bytes=NO_SLOT,
        cta_bytes=FewTokens[layout].bytes(peers.s) + F.message_bytes,
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[few_dispatch_wait_stage[F, layout]](
            func_attribute=shape.memory()
        ),
        ByValue(peers),
        ByValue(output),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )


def few_dispatch[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    out_: DispatchOutput,
    ctx: DeviceContext,
) raises:
    """Launch both halves.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        out_: The outputs, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=2 * peers.s.n_ranks * peers.s.max_tokens,
        warp_bytes=NO_SLOT,
        cta_bytes=FewTokens[layout].bytes(peers.s) + slot_bytes[F](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[few_dispatch_stage[F, ids_dtype, encoded, layout]](
            func_attribute=shape.memory()
        ),
        ByValue(peers),
        ByValue(x),
        ByValue(out_),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
