"""The row map on a GPU: one CTA a source, all of them at once.

The contract's order, (group, source rank, source token, k), is a stable counting sort. Within a source each warp takes
a run of consecutive tokens; so with the numbers of rows before each (group, source, warp), every warp gives out its
rows by itself, 32 choices at a time, by ballots. Nothing is given out by arrival.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import barrier, syncwarp
from std.atomic import Atomic, Ordering
from std.bit import pop_count
from std.sys import inlined_assembly, is_amd_gpu, is_nvidia_gpu

from ..peers import MAX_RANKS, View, window_view
from ..routing import NO_ROW, destination, local_group
from ..settings import Settings
from .launch import warp_index, warps
from .shared_memory import SLOTS, shared_memory


comptime AHEAD = 4
"""Batches of choices whose loads are under way at once."""


struct Histogram(Movable):
    """Rows before each (warp, group) of a source, in shared memory: first counts, then starts."""

    var cells: View[DType.int32]
    """[warps, groups]."""
    var firsts: View[DType.int32]
    """[groups]: the first row of (group, source)."""
    var groups: Int
    """Groups of rows; 1 with layout "rank"."""

    def __init__(out self, groups: Int):
        """Take shared memory where the row slots will be.

        Args:
            groups: Groups of rows.
        """
        var n = warps() * groups
        var cells = window_view[DType.int32](shared_memory(SLOTS), 0, n)
        self.cells = cells
        self.firsts = window_view[DType.int32](
            shared_memory(SLOTS), 4 * n, groups
        )
        self.groups = groups

    @staticmethod
    def bytes(groups: Int, n_warps: Int) -> Int:
        """Shared memory that it needs.

        Args:
            groups: Groups of rows.
            n_warps: Warps of a CTA.

        Returns:
            Bytes.
        """
        return 4 * groups * (n_warps + 1)


@always_inline
def group_of[
    layout: StaticString
](s: Settings, ids: View[DType.int16], i: Int, rank: Int) -> Int:
    """The group that a choice adds a row to.

    Parameters:
        layout: Output layout; with "rank" only a token's first local choice has a row, in group 0.

    Args:
        s: The settings.
        ids: The source's table.
        i: Token * K + k.
        rank: The rank whose output it is.

    Returns:
        The group, or -1.
    """
    var group = local_group(s, ids[i], rank)
    comptime if layout == "rank":
        if group < 0:
            return -1
        for j in range(i // s.top_k * s.top_k, i):
            if local_group(s, ids[j], rank) >= 0:
                return -1
        return 0
    else:
        return group


@always_inline
def groups_ahead[
    layout: StaticString
](s: Settings, ids: View[DType.int16], base: Int, end: Int, rank: Int) -> Array[
    Int32, AHEAD
]:
    """`group_of` for the calling lane's choices of the next batches, so that their loads overlap.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        ids: The source's table.
        base: First choice of the first batch; a batch has one for each lane.
        end: The choice behind the warp's last one.
        rank: The rank whose output it is.

    Returns:
        The groups; -1 where there is none.
    """
    var group = Array[Int32, AHEAD](fill=-1)
    comptime for u in range(AHEAD):
        var i = base + u * WARP_SIZE + Int(lane_id())
        if i < end:
            group[u] = Int32(group_of[layout](s, ids, i, rank))
    return group^


@always_inline
def run_of(tokens: Int) -> Tuple[Int, Int]:
    """The calling warp's run of a source's tokens.

    Args:
        tokens: The source's T.

    Returns:
        First token, and the one behind the last.
    """
    var each = (tokens + warps() - 1) // warps()
    var first = min(tokens, warp_index() * each)
    return first, min(tokens, first + each)


def count_source[
    layout: StaticString
](
    s: Settings,
    ids: View[DType.int16],
    tokens: Int,
    source: Int,
    rank: Int,
    hist: Histogram,
    counts: View[DType.int32],
):
    """Count a source's rows; the whole CTA calls this.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        ids: The source's table.
        tokens: The source's T.
        source: The source.
        rank: The rank whose output it is.
        hist: Out: rows of the group before each warp's run, within the source.
        counts: Int32 [groups], out, in global memory: rows of each group.
    """
    comptime scope = "workgroup" if is_amd_gpu() else "block"
    var me = Int(thread_idx.x)
    var threads = Int(block_dim.x)
    for i in range(me, hist.cells.size, threads):
        hist.cells[i] = 0
    barrier()
    var run = run_of(tokens)
    var mine = hist.cells.part(warp_index() * hist.groups, hist.groups)
    var end = run[1] * s.top_k
    for base in range(run[0] * s.top_k, end, AHEAD * WARP_SIZE):
        var group = groups_ahead[layout](s, ids, base, end, rank)
        comptime for u in range(AHEAD):
            if group[u] >= 0:
                _ = Atomic[Int32, scope=scope].fetch_add[
                    ordering=Ordering.RELAXED
                ](mine.ptr.unsafe_offset(Int(group[u])), Int32(1))
    barrier()
    for g in range(me, hist.groups, threads):
        var sum: Int32 = 0
        for w in range(warps()):
            var n = hist.cells[w * hist.groups + g]
            hist.cells[w * hist.groups + g] = sum
            sum += n
        comptime if layout != "rank":
            if s.shared_expert and g == 0:
                sum = Int32(tokens) if source == rank else Int32(0)
        counts[g] = sum
    barrier()


def start_rows[
    layout: StaticString
](
    s: Settings,
    counts: View[DType.int32],
    source: Int,
    hist: Histogram,
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """Where each group of a source begins, from all sources' counts; the first warp calls this.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        counts: Int32 [R, groups], in global memory.
        source: The source.
        hist: `firsts` is written.
        row_offsets: Uint32, out, as in `routing.row_starts`; absent for all sources but one.
        totals: Int32, out, as there.

    Returns:
        Rows that the output must hold; with "expert_padded" the largest group.
    """
    var lane = Int(lane_id())
    comptime if layout == "rank":
        var n = counts[lane] if lane < s.n_ranks else Int32(0)
        var before = warp.prefix_sum[exclusive=True](n)
        if lane == source:
            hist.firsts[0] = before
        if row_offsets.present() and lane <= s.n_ranks:
            row_offsets[lane] = before.cast[DType.uint32]()
            if lane < s.n_ranks:
                totals[lane] = n
        return Int(warp.sum(n))
    else:
        var carry = 0
        var largest: Int32 = 0
        for base in range(0, hist.groups, WARP_SIZE):
            var g = base + lane
            var before: Int32 = 0
            var total: Int32 = 0
            if g < hist.groups:
                var n = Array[Int32, MAX_RANKS](fill=0)
                comptime for r in range(MAX_RANKS):  # all loads first
                    if r < s.n_ranks:
                        n[r] = counts[r * hist.groups + g]
                comptime for r in range(MAX_RANKS):
                    before += n[r] if r < source else Int32(0)
                    total += n[r]
            var size = total
            comptime if layout == "expert":
                var a = Int32(s.alignment)
                size = (total + a - 1) // a * a
            var first = Int32(carry) + warp.prefix_sum[exclusive=True](size)
            carry += Int(warp.sum(size))
            comptime if layout == "expert_padded":
                first = Int32(g * s.n_ranks * s.max_tokens)
                largest = max(largest, total)
            if g < hist.groups:
                hist.firsts[g] = first + before
                if row_offsets.present():
                    row_offsets[g] = first.cast[DType.uint32]()
                    totals[g] = total
        comptime if layout == "expert_padded":
            carry = hist.groups * s.n_ranks * s.max_tokens
        if row_offsets.present() and lane == 0:
            row_offsets[hist.groups] = UInt32(carry)
        comptime if layout == "expert_padded":
            return Int(warp.max(largest))
        return carry


def map_source[
    layout: StaticString
](
    s: Settings,
    ids: View[DType.int16],
    tokens: Int,
    source: Int,
    rank: Int,
    hist: Histogram,
    row_map: View[DType.int32],
    src_info: View[DType.int32],
):
    """Give every choice of a source its row; the whole CTA calls this, after `start_rows`.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        ids: The source's table.
        tokens: The source's T.
        source: The source.
        rank: The rank whose output it is.
        hist: From `count_source` and `start_rows`; used up.
        row_map: Int32 [Tm, K], out; `NO_ROW` where there is none.
        src_info: Int32 [rows, 2], out at the rows given.
    """
    var K = s.top_k
    var lane = Int(lane_id())
    var run = run_of(tokens)
    var next_row = hist.cells.part(warp_index() * hist.groups, hist.groups)
    var below = (UInt64(1) << UInt64(lane)) - 1
    var end = run[1] * K
    for first in range(run[0] * K, end, AHEAD * WARP_SIZE):
        var groups = groups_ahead[layout](s, ids, first, end, rank)
        comptime for u in range(AHEAD):
            var i = first + u * WARP_SIZE + lane
            var group = Int(groups[u])
            var same = same_lanes(groups[u])
            var row = NO_ROW
            if group >= 0:
                row = (
                    hist.firsts[group]
                    + next_row[group]
                    + Int32(pop_count(same & below))
                )
            syncwarp()
            if group >= 0 and same & below == 0:
                next_row[group] += Int32(pop_count(same))
            syncwarp()
            if i < end:
                row_map[i] = row
                if row >= 0:
                    var t = i // K
                    var k = -1 if layout == "rank" else i - t * K
                    src_info[2 * Int(row)] = Int32(source * s.max_tokens + t)
                    src_info[2 * Int(row) + 1] = Int32(k)
    for i in range(
        tokens * K + Int(thread_idx.x), s.max_tokens * K, Int(block_dim.x)
    ):
        row_map[i] = NO_ROW


@always_inline
def same_lanes(value: Int32) -> UInt64:
    """The lanes of the warp that have the calling lane's value.

    Args:
        value: The calling lane's.

    Returns:
        One bit for each lane.
    """
    comptime if is_nvidia_gpu():
        return inlined_assembly[
            "match.any.sync.b32 $0, $1, 0xffffffff;",
            UInt32,
            constraints="=r,r",
        ](value).cast[DType.uint64]()
    else:
        var mine: UInt64 = 0
        for lane in range(WARP_SIZE):
            var theirs = warp.shuffle_idx(value, UInt32(lane))
            mine |= UInt64(1 if theirs == value else 0) << UInt64(lane)
        return mine


@always_inline
def ballot(mine: Bool) -> UInt64:
    """One bit from each lane of the warp.

    Args:
        mine: The calling lane's.

    Returns:
        The bits.
    """
    comptime bits = DType.uint32 if WARP_SIZE == 32 else DType.uint64
    return warp.vote[bits](mine).cast[DType.uint64]()


@always_inline
def destination_of_lanes(s: Settings, id: Int16) -> UInt32:
    """The ranks that own an expert of any lane.

    Args:
        s: The settings.
        id: The calling lane's expert, or `NO_EXPERT`.

    Returns:
        Bit r is set where rank r owns one.
    """
    var mine = destination(id, s.n_local_experts())
    var mask: UInt32 = 0
    for r in range(s.n_ranks):
        if ballot(mine == UInt32(1) << UInt32(r)) != 0:
            mask |= UInt32(1) << UInt32(r)
    return mask
