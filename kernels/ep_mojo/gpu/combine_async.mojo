"""The GPU's combine_async: expert rows go back to the ranks that their tokens came from.

Each crew of warps takes chunks of G tokens of a source. For each token with rows here it sums them in float32, k
ascending, into a row in shared memory, and stores that to the source's window, slot (my rank, token); with reduce
"source" it stores every row to slot (token, k), with rows by source the token's one row. When the chunk's rows have
arrived, its signal follows, also where there were none. A crew is one warp, or several where there are few tokens:
then each sums and stores a part of the channels. The last warp of each CTA awaits the buffer's credits, while the
others sum (`Opening`); that of the first CTA then sends the headers. The handle is checked row by row, before a row
is read. Why the order holds: docs/protocol.md. Few tokens go back as cells: `few_combine.mojo`.
"""

from max.gpu import block_idx, lane_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp
from std.bit import count_trailing_zeros

from ..combine_tensors import CombineInput, row_bytes, travels_by_row
from ..launch import Endpoint
from ..layout import (
    FIELD_RECV_NUM_TOKENS,
    FIELD_ROW_MAP,
    HEAD_COMBINE_BEGUN,
    KIND_SHAPE,
    combine_header,
    partial_offset,
    row_offset,
)
from ..numeric import quotient, remainder
from ..routing import NO_ROW, by_source, may_shrink
from ..signal import note, publish, word
from ..team import WarpTeam, copy_bytes, zero_bytes
from .gathered_rows import rows_before
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    warp_index,
    warp_memory,
    warp_slot,
)
from .opening import Opening
from .precedence import precedence, queue
from .routing import ballot
from .send_sums import send_sums
from .share import Share, chunks_of_all
from .shared_rows import finish_stores, release_slots, store_row
from .slices import combine_bytes
from .timeline import (
    MARK_COMBINE_SUM_READY,
    MARK_COMBINE_SUMS_ARRIVED,
    mark,
)


@always_inline
def check_handle[
    dtype: DType, hidden: Int
](ep: Endpoint[False], x: CombineInput, stage: Int32):
    """Record a failure where the handle names tokens that there cannot be; the warp that opens calls this before it
    decides.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        ep: The rank.
        x: The rows.
        stage: `STAGE_*`, for the failure record.
    """
    if Int(lane_id()) < ep.s.n_ranks:
        var rows = x.rows.size // row_bytes[dtype, hidden]()
        _check_tokens(ep, x, Int(lane_id()), rows, stage)


@always_inline
def send_headers[
    layout: StaticString, reduce: StaticString
](ep: Endpoint[False], x: CombineInput, epoch: UInt64, mut opening: Opening):
    """Send the headers, in a launch that may go on; the warp that opens calls this.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
        opening: Says who is left out.
    """
    comptime by_row = travels_by_row[layout, reduce]()
    var peer = Int(lane_id())
    if ep.s.shrinks and block_idx.x == 0:  # see `Endpoint.begin_send`
        if peer == 0:
            note(ep.head.base, 4 * HEAD_COMBINE_BEGUN, epoch)
        syncwarp()
    if block_idx.x == 0 and peer < ep.s.n_ranks and opening.serves(peer):
        publish(
            ep.count[peer],
            ep.window.header(ep.buffer(epoch), ep.me),
            word(epoch, combine_header(Int(x.num_tokens[peer]), by_row)),
        )


@always_inline
def send_back[
    dtype: DType, hidden: Int, layout: StaticString, reduce: StaticString
](
    ep: Endpoint[False],
    x: CombineInput,
    epoch: UInt64,
    stage: Int32,
    share: Share,
    mut opening: Opening,
):
    """Store the rows of every source's tokens, chunk by chunk, and signal.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        share: The calling warp's chunks, of all sources in turn.
        opening: What the first store waits for.
    """
    comptime sums = not travels_by_row[layout, reduce]() and not by_source[
        layout
    ]()
    var s = ep.s
    var tokens: Int32 = 0  # lane r: T of source r
    if Int(lane_id()) < s.n_ranks:
        tokens = x.num_tokens[Int(lane_id())]
        if tokens < 0 or Int(tokens) > s.max_tokens:
            tokens = 0  # the opening will refuse it
    var items = chunks_of_all(s, tokens)
    comptime if sums:
        send_sums[dtype, hidden](
            ep, x, epoch, stage, tokens, items, share, opening
        )
    else:
        _send_rows[dtype, hidden, layout](
            ep, x, epoch, stage, tokens, items, share, opening
        )


@always_inline
def _send_rows[
    dtype: DType, hidden: Int, layout: StaticString
](
    ep: Endpoint[False],
    x: CombineInput,
    epoch: UInt64,
    stage: Int32,
    tokens: Int32,
    items: Int,
    share: Share,
    mut opening: Opening,
):
    """Store rows as they are, each to slot (token, k); a token's only one, with rows by source, to (my rank, token)."""
    comptime size = row_bytes[dtype, hidden]()
    comptime gathered = layout == "gathered"
    var s = ep.s
    var buffer = ep.buffer(epoch)
    var lane = Int(lane_id())
    var rows = x.rows.size // size
    var slot = warp_slot(
        warp_memory(combine_bytes[dtype, hidden]()), sending=True
    )
    for i in range(share.first, items, share.stride):
        var source = remainder(ep.me + i, s.n_ranks)
        var chunk = quotient(i, s.n_ranks)
        var begin = chunk * s.tokens_per_signal
        var T = Int(warp.shuffle_idx(tokens, UInt32(source)))
        if begin >= T:
            continue
        var recv = ep.recv[source]
        var fits = True
        var first = 0
        comptime if gathered:
            first = rows_before(tokens, source)
        for t in range(begin, min(begin + s.tokens_per_signal, T)):
            var row = NO_ROW
            comptime if gathered:
                row = Int32(first + t)
            else:
                if lane < s.top_k:
                    row = x.row_map[
                        (source * s.max_tokens + t) * s.top_k + lane
                    ]
            var left = ballot(row >= 0)
            if ballot(Int(row) >= rows) != 0:
                if Int(row) >= rows:
                    ep.head.fail(
                        KIND_SHAPE,
                        stage,
                        chunk=FIELD_ROW_MAP,
                        value=Int(row),
                        limit=rows - 1,
                    )
                fits = False
                break
            comptime if by_source[layout]():
                left &= ~left + 1  # there is one row
            while left != 0:
                var k = Int(count_trailing_zeros(left))
                left &= left - 1
                var which = Int(warp.shuffle_idx(row, UInt32(k)))
                release_slots()
                slot.load[size](x.rows.bytes(which * size))
                if not opening.passed():
                    break
                mark[MARK_COMBINE_SUM_READY](ep)
                var at: Int
                comptime if by_source[layout]():
                    at = partial_offset(s, buffer, ep.me, t)
                else:
                    at = row_offset(s, buffer, t, k)
                var targets = UInt32(Int(opening.serves(source)))
                store_row[size](slot.row, targets, recv.unsafe_offset(at))
        finish_stores()
        mark[MARK_COMBINE_SUMS_ARRIVED](ep)
        if not fits or not opening.passed():
            break  # the source waits, and reads FAILED in the header
        if lane == 0 and opening.serves(source):
            publish(
                ep.count[source],
                ep.window.signal(buffer, ep.me, chunk),
                word(epoch, 0),
            )


@always_inline
def _check_tokens(
    ep: Endpoint[False], x: CombineInput, source: Int, rows: Int, stage: Int32
):
    """Record a failure where the handle names more tokens of a source than there can be, or shared rows that are not
    there."""
    var T = Int(x.num_tokens[source])
    if T < 0 or T > ep.s.max_tokens:
        ep.head.fail(
            KIND_SHAPE,
            stage,
            chunk=FIELD_RECV_NUM_TOKENS,
            value=T,
            limit=ep.s.max_tokens,
        )
    elif source == ep.me and x.shared_out.present() and T > rows:
        ep.head.fail(
            KIND_SHAPE,
            stage,
            chunk=FIELD_ROW_MAP,
            value=T - 1,
            limit=rows - 1,
        )


@always_inline
def give_shared[
    dtype: DType, hidden: Int
](ep: Endpoint[False], x: CombineInput, mut opening: Opening):
    """Copy the shared expert's rows, the first ones, to their output, where there is one; zero the rest of it.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Args:
        ep: The rank.
        x: The rows.
        opening: In a launch that may not go on there are none.
    """
    comptime size = row_bytes[dtype, hidden]()
    if not x.shared_out.present():
        return
    var tokens = Int(x.num_tokens[ep.me]) if opening.passed() else 0
    var share = Share()
    for t in range(share.first, x.shared_out.size // size, share.stride):
        var to = x.shared_out.bytes(t * size)
        if t < tokens:
            copy_bytes[WarpTeam](x.rows.bytes(t * size), to, size)
        else:
            zero_bytes[WarpTeam](to, size)


def combine_async_stage[
    dtype: DType, hidden: Int, layout: StaticString, reduce: StaticString
](peers: ByValue[Peers], input: ByValue[CombineInput], stage: Int32):
    """The kernel.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        input: The rows.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        return
    var ep = peers.value.endpoint[
        False, may_shrink[layout]() and reduce == "source"
    ]()
    var epoch = ep.last_sent() + 1
    var x = input.value
    var opening = Opening()
    if opening.opens():
        check_handle[dtype, hidden](ep, x, stage)
        opening.decide(ep, stage)
        if opening.passed():
            send_headers[layout, reduce](ep, x, epoch, opening)
    opening.settle()
    send_back[dtype, hidden, layout, reduce](
        ep, x, epoch, stage, Share(), opening
    )
    give_shared[dtype, hidden](ep, x, opening)
    if is_last_cta(ep, sending=True) and warp_index() == 0:
        ep.end_send[WarpTeam](epoch, ep.head.failed())


def combine_async[
    dtype: DType, hidden: Int, layout: StaticString, reduce: StaticString
](peers: Peers, x: CombineInput, stage: Int32, ctx: DeviceContext) raises:
    """Launch it.

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
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=peers.s.n_ranks * peers.s.n_signals(peers.s.max_tokens),
        warp_bytes=combine_bytes[dtype, hidden](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            combine_async_stage[dtype, hidden, layout, reduce]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
