"""Where the rows of a piece begin on a GPU: from the counts of all pieces, in the order of their rows.

Every CTA that maps a piece awaits them and works this out for itself; that of the first one writes it to the outputs.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import barrier

from ..launch import Endpoint
from ..numeric import quotient
from ..peers import View
from ..settings import Settings
from ..signal import NO_SIGNAL, Waiter
from .launch import told, warp_index, warps
from .notes import await_counts
from .pieces import Pieces
from .routing import Histogram, ballot
from .shared_memory import MAX_WARPS
from .timeline import MARK_ALL_COUNTED, mark

comptime COUNTS_AHEAD = 8
"""Pieces whose counts a thread awaits at once."""


@always_inline
def start_rows[
    layout: StaticString
](
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    pieces: Pieces,
    piece: Int,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """Where each group of a piece begins, from all pieces' counts, which are awaited; the whole CTA calls this.

    Parameters:
        layout: Output layout.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        pieces: All pieces.
        piece: The piece.
        hist: `firsts` is written, for all threads.
        row_offsets: Uint32, out, as in `routing.row_starts`; absent for all pieces but one.
        totals: Int32, out, as there.

    Returns:
        The same to all threads: rows that the output must hold; with "expert_padded" the largest group. `NO_SIGNAL`
        when the rank has failed.
    """
    comptime if layout == "rank":
        var needed = 0
        if warp_index() == 0:
            needed = _start_sources(
                ep, waiter, epoch, pieces, piece, hist, row_offsets, totals
            )
        return told(needed)
    else:
        for g in range(Int(thread_idx.x), hist.groups, Int(block_dim.x)):
            _add_pieces(ep, waiter, epoch, pieces, piece, hist, g)
        mark[MARK_ALL_COUNTED](ep)
        return start_groups[layout](ep.s, hist, row_offsets, totals)


@always_inline
def _add_pieces(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    pieces: Pieces,
    piece: Int,
    hist: Histogram,
    g: Int,
):
    """Add up a group's rows, those before a piece and all; a thread calls this. All is `NO_SIGNAL` after a failure."""
    var before: Int32 = 0
    var total: Int32 = 0
    for base in range(0, pieces.n, COUNTS_AHEAD):
        var n = Array[Int32, COUNTS_AHEAD](fill=0)
        if not await_counts(ep, waiter, epoch, pieces, hist.groups, base, g, n):
            total = Int32(NO_SIGNAL)
            break
        comptime for i in range(COUNTS_AHEAD):
            before += n[i] if base + i < piece else Int32(0)
            total += n[i]
    hist.firsts[g] = before
    hist.totals[g] = total


@always_inline
def start_groups[
    layout: StaticString
](
    s: Settings,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """From rows before the choices to first rows, thread g those of group g; the whole CTA calls this.

    Parameters:
        layout: Output layout; with "rank" the groups are the sources.

    Args:
        s: The settings.
        hist: Thread g has written `firsts` and `totals` of group g. `firsts` is written again, for all threads.
        row_offsets: As for `start_rows`.
        totals: As there.

    Returns:
        As there.
    """
    comptime padded = layout == "expert_padded"
    comptime last = WARP_SIZE - 1
    var room = s.n_ranks * s.max_tokens  # of a group, where it is padded
    var me = warp_index()
    var needed: Int32 = 0
    var failed = False
    for base in range(0, hist.groups, Int(block_dim.x)):
        var g = base + Int(thread_idx.x)
        var total: Int32 = 0
        if g < hist.groups:
            total = hist.totals[g]
        var said: Int32
        var first: Int32
        comptime if padded:
            first = Int32(g * room)
            said = warp.max(total)
        else:
            var rows = _rows_of_group[layout](s, total)
            first = needed + warp.prefix_sum[exclusive=True](rows)
            said = first + rows - needed
        if ballot(total < 0) != 0:
            said = Int32(NO_SIGNAL)
        if Int(lane_id()) == last:
            hist.said[me] = said
        barrier()
        comptime for w in range(MAX_WARPS):
            if w < warps():
                var theirs = hist.said[w]
                failed = failed or theirs < 0
                comptime if padded:
                    needed = max(needed, theirs)
                else:
                    first += theirs if w < me else Int32(0)
                    needed += theirs
        if g < hist.groups:
            hist.firsts[g] += first
            if row_offsets.present():
                row_offsets[g] = first.cast[DType.uint32]()
                totals[g] = total
        barrier()
    if row_offsets.present() and thread_idx.x == 0:
        var all = hist.groups * room if padded else Int(needed)
        row_offsets[hist.groups] = UInt32(all)
    return NO_SIGNAL if failed else Int(needed)


@always_inline
def _rows_of_group[layout: StaticString](s: Settings, total: Int32) -> Int32:
    """Rows of a group, those that only fill up included."""
    comptime if layout == "expert":
        if s.alignment > 1:
            var a = s.alignment
            return Int32(quotient(Int(total) + a - 1, a) * a)
    return total


@always_inline
def _start_sources(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    pieces: Pieces,
    piece: Int,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """`start_rows` for layout "rank", whose groups are the sources; a lane a piece, then a lane a source."""
    var lane = Int(lane_id())
    var rows = Array[Int32, 1](fill=0)
    var come = True
    if lane < pieces.n:
        come = await_counts(ep, waiter, epoch, pieces, 1, lane, 0, rows)
    if ballot(not come) != 0:
        return NO_SIGNAL
    mark[MARK_ALL_COUNTED](ep)
    var n = rows[0]
    var before = warp.prefix_sum[exclusive=True](n)
    var total = warp.sum(n)
    if lane == piece:
        hist.firsts[0] = before
    var begin = min(lane * pieces.of_source, WARP_SIZE - 1)
    var start = warp.shuffle_idx(before, UInt32(begin))
    if lane >= ep.s.n_ranks:
        start = total
    var next = warp.shuffle_down(start, 1)
    if row_offsets.present() and lane <= ep.s.n_ranks:
        row_offsets[lane] = start.cast[DType.uint32]()
        if lane < ep.s.n_ranks:
            totals[lane] = next - start
    return Int(total)
