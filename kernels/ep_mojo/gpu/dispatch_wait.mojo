"""The GPU's dispatch_wait: messages become output rows.

    CTA v < R * P  maps piece v, one of P of a source: awaits the table, counts its rows, notes that in the own
                   counters; when all pieces are counted, works out where each group begins and gives every choice its
                   row; notes that
    every warp     takes chunks of a source, the first by its number and further ones as it comes free (`turns.mojo`):
                   awaits map and signal, brings each message into shared memory once, and copies it to its rows from
                   there, or zeroes these where the peer is lost meanwhile; then it marks its part of what no row fills

The last CTA gives the buffer back and counts the epoch. Rows are in the contract's order, because each piece knows how
many come before it (see `routing.mojo` and `starts.mojo`). Messages of few tokens come as cells: `few_dispatch.mojo`.
"""

from max.gpu import block_idx, grid_dim, lane_id, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from std.bit import count_trailing_zeros

from ..dispatch_tensors import DispatchOutput, Rows, localise
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import WORK_COUNTED, align_up, message_offset
from ..numeric import quotient, remainder
from ..routing import NO_ROW, may_shrink
from ..signal import MASKED, NO_SIGNAL, Waiter
from ..team import WarpTeam, fill
from .launch import (
    ByValue,
    Peers,
    Shape,
    is_last_cta,
    may_go_on,
    warp_index,
    warp_memory,
    warp_slot,
)
from .gathered_rows import gather_rows, mark_behind
from .mapping import cta_bytes, map_sources, name_groups
from .notes import await_mapped, await_note
from .pieces import Pieces
from .precedence import precedence, queue
from .routing import ballot
from .share import Share, chunks_of_all
from .shared_memory import SLOT_ALIGNMENT
from .shared_rows import (
    SlotTeam,
    finish_stores,
    order_for_bulk,
    release_slots,
)
from .tables_received import keep_weights, localise_cells
from .timeline import (
    MARK_MAP_SEEN,
    MARK_MESSAGE_LOADED,
    MARK_ROWS_WRITTEN,
    MARK_SIGNAL_SEEN,
    mark,
)
from .turns import Turns, clear_tickets


@always_inline
def _chunks_sent(
    ep: Endpoint[True], waiter: Waiter, epoch: UInt64, pieces: Pieces
) -> Int:
    """`chunks_of_all`. A warp that has seen a piece mapped calls this: before, all sources were counted."""
    var T = 0
    var r = Int(lane_id())
    if r < ep.s.n_ranks:
        var first = r * pieces.of_source
        T = await_note(ep, waiter, epoch, WORK_COUNTED, first, peer=r)
    return chunks_of_all(ep.s, Int32(max(T, 0)))


@always_inline
def _row_of_lane(
    ep: Endpoint[True], out_: DispatchOutput, source: Int, token: Int
) -> Int32:
    """The row of the token's choice that the calling lane has the number of."""
    var k = Int(lane_id())
    var K = ep.s.top_k
    if k >= K:
        return NO_ROW
    return out_.row_map[(source * ep.s.max_tokens + token) * K + k]


@always_inline
def copy_rows[
    F: TokenFormat, layout: StaticString, warp_bytes: Int, table_cells: Bool
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    pieces: Pieces,
    share: Share,
    rows: Rows[F, layout],
):
    """Copy messages to their rows as they arrive.

    Parameters:
        F: The format.
        layout: Output layout.
        warp_bytes: Shared memory that the launch has for each warp.
        table_cells: Whether tables travel as cells.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        pieces: What CTAs map.
        share: The calling warp's first chunk, of all sources in turn, or `LATE`; and how many warps have one.
        rows: The outputs.
    """
    comptime assert F.message_bytes % 16 == 0, "message_bytes: a multiple of 16"
    var s = ep.s
    var out_ = rows.out
    var buffer = ep.buffer(epoch)
    var slot = warp_slot(warp_memory(warp_bytes), sending=False)
    var lane = Int(lane_id())
    var turns = Turns(ep, share, s.n_ranks * s.n_signals(s.max_tokens))
    var window = ep.recv[ep.me]
    var mapped: Int32 = -1  # lane v: T of piece v's source, once it is mapped
    while turns.next():
        var r = remainder(ep.me + turns.chunk, s.n_ranks)
        var chunk = quotient(turns.chunk, s.n_ranks)
        var v = pieces.of(r, chunk)
        var T = Int(warp.shuffle_idx(mapped, UInt32(v)))
        if T < 0:
            T = await_mapped(ep, waiter, epoch, v, peer=r)
            if ballot(T == NO_SIGNAL) != 0:
                break
            if lane == v:
                mapped = Int32(T)
            mark[MARK_MAP_SEEN](ep)
        var begin = chunk * s.tokens_per_signal
        if begin >= T:
            if not s.shrinks:  # else pieces of a source may differ in T
                turns.chunks = _chunks_sent(ep, waiter, epoch, pieces)
            continue
        var row = _row_of_lane(ep, out_, r, begin)  # on its way meanwhile
        var signal = ep.chunk_of(waiter, epoch, r, chunk)
        order_for_bulk()  # the messages may be brought in then
        if ballot(signal == NO_SIGNAL) != 0:
            break
        var came = ballot(signal == MASKED) == 0
        mark[MARK_SIGNAL_SEEN](ep)
        var end = min(begin + s.tokens_per_signal, T)
        for t in range(begin, end):
            if t > begin:
                row = _row_of_lane(ep, out_, r, t)
            var left = ballot(row >= 0)
            if row >= 0:
                var k = -1 if layout == "rank" else lane
                out_.src_info[2 * Int(row)] = Int32(r * s.max_tokens + t)
                out_.src_info[2 * Int(row) + 1] = Int32(k)
            var shared = s.shared_expert and r == ep.me
            if left == 0 and not shared:
                continue
            release_slots()
            if not came:  # the peer was lost meanwhile
                while left != 0:
                    var lane_of = UInt32(count_trailing_zeros(left))
                    left &= left - 1
                    rows.zero[WarpTeam](Int(warp.shuffle_idx(row, lane_of)))
                continue
            slot.load[F.message_bytes](
                window.unsafe_offset(message_offset(s, buffer, r, t))
            )
            mark[MARK_MESSAGE_LOADED](ep)
            while left != 0:
                var from_ = UInt32(count_trailing_zeros(left))
                var to = Int(warp.shuffle_idx(row, from_))
                left &= left - 1
                rows.put[SlotTeam](slot.row, to)
                comptime if layout == "rank" and table_cells:
                    localise_cells[layout, True](
                        ep, waiter, epoch, r, t, to, out_
                    )
                elif layout == "rank":
                    localise[WarpTeam, layout](ep, buffer, r, t, to, out_)
            if shared:
                rows.put[SlotTeam](slot.row, t)
                if lane == 0:
                    out_.src_info[2 * t] = Int32(r * s.max_tokens + t)
                    out_.src_info[2 * t + 1] = -1
    finish_stores()
    mark[MARK_ROWS_WRITTEN](ep)


@always_inline
def mark_rest[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    share: Share,
    rows: Rows[F, layout],
):
    """Say of all rows that hold nothing that they do: padding between groups, and what is behind the last group.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        share: The calling warp's part.
        rows: The outputs.
    """
    # The first piece comes with all row starts.
    var T = await_mapped(ep, waiter, epoch, 0, peer=0)
    if ballot(T == NO_SIGNAL) != 0:
        return
    var out_ = rows.out
    var groups = out_.row_offsets.size - 1
    comptime if layout != "rank":
        for g in range(share.first, groups, share.stride):
            var begin = Int(out_.row_offsets[g]) + Int(out_.counts[g])
            var end = Int(out_.row_offsets[g + 1])
            for row in range(begin + Int(lane_id()), end, WarpTeam.lanes):
                out_.src_info[2 * row] = -1
                out_.src_info[2 * row + 1] = -1
            comptime if layout == "expert":
                rows.zero_padding[WarpTeam](g)
    var used = Int(out_.row_offsets[groups])
    var thread = share.first * WarpTeam.lanes + Int(lane_id())
    var threads = share.stride * WarpTeam.lanes
    for i in range(2 * used + thread, out_.src_info.size, threads):
        out_.src_info[i] = -1
    comptime if layout == "rank":
        var K = out_.local_ids.size // max(1, rows.capacity)
        for i in range(used * K + thread, out_.local_ids.size, threads):
            out_.local_ids[i] = -1
            out_.local_weights[i] = 0


@always_inline
def slot_bytes[F: TokenFormat]() -> Int:
    """Shared memory for a message.

    Parameters:
        F: The format.

    Returns:
        Bytes of one row slot.
    """
    return align_up(F.message_bytes, SLOT_ALIGNMENT)


def dispatch_wait_stage[
    F: TokenFormat, layout: StaticString, table_cells: Bool
](peers: ByValue[Peers], output: ByValue[DispatchOutput], stage: Int32):
    """The kernel.

    Parameters:
        F: The format.
        layout: Output layout.
        table_cells: Whether tables travel as cells; then no peer can be masked.

    Args:
        peers: The rank's side.
        output: The outputs.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        give_nothing(output.value)
        return
    var ep = peers.value.endpoint[
        True,
        may_shrink=may_shrink[layout]() and not table_cells,
        table_cells=table_cells,
    ]()
    var epoch = ep.next_wait()
    var waiter = ep.waiter(stage)
    var rows = Rows[F, layout](output.value)
    name_groups(ep, output.value)
    if thread_idx.x == 0:
        _ = ep.begin_wait(stage, ep.last_sent())
    if may_go_on(ep.head):
        comptime if layout == "gathered":
            gather_rows[F, layout, slot_bytes[F]()](
                ep, epoch, waiter, Share(), rows, stage
            )
            mark_behind[F, layout](ep, epoch, waiter, Share(), rows)
        else:
            var pieces = Pieces(ep.s, Int(grid_dim.x))
            var share = Share(skip=pieces.n)
            if Int(block_idx.x) < pieces.n:
                map_sources[F, layout, table_cells](
                    ep, epoch, waiter, pieces, output.value, stage
                )
            comptime if not table_cells:
                keep_weights(ep, epoch, waiter, share, output.value)
            copy_rows[F, layout, slot_bytes[F](), table_cells](
                ep, epoch, waiter, pieces, share, rows
            )
            mark_rest[F, layout](ep, epoch, waiter, share, rows)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        close_wait(ep, epoch, output.value, ep.head.failed())


@always_inline
def give_nothing(out_: DispatchOutput):
    """Clear the outputs of a launch whose counters must not be touched; all CTAs call this.

    Args:
        out_: The outputs.
    """
    if block_idx.x == 0 and warp_index() == 0:
        out_.clear[WarpTeam]()
        fill[WarpTeam](out_.expert_ids, 0)


@always_inline
def close_wait(
    ep: Endpoint[True], epoch: UInt64, out_: DispatchOutput, failed: Bool
):
    """Close the receiving half, and set its tickets to 0, which launches of few tokens take none of; the first warp of
    the last CTA calls this.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        out_: The outputs, cleared after a failure.
        failed: `head.failed()`.
    """
    clear_tickets(ep)
    if failed:
        out_.clear[WarpTeam]()
    ep.end_wait[WarpTeam](epoch, failed)


def dispatch_wait[
    F: TokenFormat, layout: StaticString, table_cells: Bool
](
    peers: Peers, output: DispatchOutput, stage: Int32, ctx: DeviceContext
) raises:
    """Launch it.

    Parameters:
        F: The format.
        layout: Output layout.
        table_cells: As for the kernel.

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
        items=peers.s.n_ranks * peers.s.n_signals(peers.s.max_tokens),
        warp_bytes=slot_bytes[F](),
        cta_bytes=cta_bytes[layout, table_cells](peers.s),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[dispatch_wait_stage[F, layout, table_cells]](
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
