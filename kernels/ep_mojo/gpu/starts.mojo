"""Where the rows of a piece begin on a GPU: from the counts of all pieces, which lie in the order of their rows.

Every CTA that maps a piece works this out for itself; that of the first one writes it to the outputs.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import barrier

from ..numeric import quotient
from ..peers import View
from ..settings import Settings
from .launch import warp_index
from .pieces import Pieces
from .routing import Histogram

comptime COUNTS_AHEAD = 8
"""Pieces' counts whose loads are under way at once."""


def start_rows[
    layout: StaticString
](
    s: Settings,
    counts: View[DType.int32],
    pieces: Pieces,
    piece: Int,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """Where each group of a piece begins, from all pieces' counts; the whole CTA calls this.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        counts: Int32 [pieces, groups], in global memory.
        pieces: All pieces.
        piece: The piece.
        hist: `firsts` is written, by the first warp at last.
        row_offsets: Uint32, out, as in `routing.row_starts`; absent for all pieces but one.
        totals: Int32, out, as there.

    Returns:
        To the first warp, rows that the output must hold; with "expert_padded" the largest group.
    """
    comptime if layout == "rank":
        if warp_index() != 0:
            return 0
        return _start_sources(
            s, counts, pieces, piece, hist, row_offsets, totals
        )
    else:
        for g in range(Int(thread_idx.x), hist.groups, Int(block_dim.x)):
            _add_pieces(counts, pieces.n, piece, hist, g)
        barrier()
        if warp_index() != 0:
            return 0
        return _start_groups[layout](s, hist, row_offsets, totals)


@always_inline
def start_all[
    layout: StaticString
](
    s: Settings,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """Where each group begins, from the counts of all sources' choices; the whole CTA calls this.

    Parameters:
        layout: Output layout; with "rank" the groups are the sources.

    Args:
        s: The settings.
        hist: All rows of each group in `totals`; `firsts` is written, by the first warp at last.
        row_offsets: As for `start_rows`.
        totals: As there.

    Returns:
        As there.
    """
    for g in range(Int(thread_idx.x), hist.groups, Int(block_dim.x)):
        hist.firsts[g] = 0
    barrier()
    if warp_index() != 0:
        return 0
    return _start_groups[layout](s, hist, row_offsets, totals)


@always_inline
def _add_pieces(
    counts: View[DType.int32], pieces: Int, piece: Int, hist: Histogram, g: Int
):
    """Add up a group's rows, those before a piece and all; a thread calls this."""
    var before: Int32 = 0
    var total: Int32 = 0
    for base in range(0, pieces, COUNTS_AHEAD):
        var n = Array[Int32, COUNTS_AHEAD](fill=0)
        comptime for i in range(COUNTS_AHEAD):  # all loads first
            if base + i < pieces:
                n[i] = counts[(base + i) * hist.groups + g]
        comptime for i in range(COUNTS_AHEAD):
            before += n[i] if base + i < piece else Int32(0)
            total += n[i]
    hist.firsts[g] = before
    hist.totals[g] = total


@always_inline
def _start_groups[
    layout: StaticString
](
    s: Settings,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """From rows before the piece to first rows, a lane some consecutive groups; returns what `start_rows` does."""
    var lane = Int(lane_id())
    var each = quotient(hist.groups + WARP_SIZE - 1, WARP_SIZE)
    var begin = min(lane * each, hist.groups)
    var end = min(begin + each, hist.groups)
    var rows: Int32 = 0
    var largest: Int32 = 0
    for g in range(begin, end):
        rows += _rows_of_group[layout](s, hist.totals[g])
        largest = max(largest, hist.totals[g])
    var before = warp.prefix_sum[exclusive=True](rows)
    var all = Int(warp.shuffle_idx(before + rows, UInt32(WARP_SIZE - 1)))
    for g in range(begin, end):
        var first = before
        comptime if layout == "expert_padded":
            first = Int32(g * s.n_ranks * s.max_tokens)
        before += _rows_of_group[layout](s, hist.totals[g])
        hist.firsts[g] += first
        if row_offsets.present():
            row_offsets[g] = first.cast[DType.uint32]()
            totals[g] = hist.totals[g]
    comptime if layout == "expert_padded":
        all = hist.groups * s.n_ranks * s.max_tokens
    if row_offsets.present() and lane == 0:
        row_offsets[hist.groups] = UInt32(all)
    comptime if layout == "expert_padded":
        return Int(warp.max(largest))
    return all


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
    s: Settings,
    counts: View[DType.int32],
    pieces: Pieces,
    piece: Int,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """`start_rows` for layout "rank", whose groups are the sources; a lane a piece, then a lane a source."""
    var lane = Int(lane_id())
    var n = counts[lane] if lane < pieces.n else Int32(0)
    var before = warp.prefix_sum[exclusive=True](n)
    var total = warp.sum(n)
    if lane == piece:
        hist.firsts[0] = before
    var begin = min(lane * pieces.of_source, WARP_SIZE - 1)
    var start = warp.shuffle_idx(before, UInt32(begin))
    if lane >= s.n_ranks:
        start = total
    var next = warp.shuffle_down(start, 1)
    if row_offsets.present() and lane <= s.n_ranks:
        row_offsets[lane] = start.cast[DType.uint32]()
        if lane < s.n_ranks:
            totals[lane] = next - start
    return Int(total)
