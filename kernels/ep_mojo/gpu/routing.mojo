"""The row map on a GPU: a CTA for each piece of a source, all of them at once.

The contract's order, (group, source rank, source token, k), is a stable counting sort. Within a piece each warp takes
a run of consecutive tokens; so with the numbers of rows before each (group, piece, warp), every warp gives out its
rows by itself, 32 choices at a time, by ballots. Nothing is given out by arrival.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from max.gpu.primitives import warp
from max.gpu.sync import barrier, syncwarp
from std.atomic import Atomic, Ordering
from std.bit import pop_count
from std.sys import inlined_assembly, is_amd_gpu, is_nvidia_gpu

from ..numeric import quotient
from ..peers import View, window_view
from ..routing import NO_ROW, destination
from ..settings import Settings
from .choices import Choices
from .launch import warp_index, warps
from .shared_memory import MAX_WARPS, SLOTS, shared_memory


comptime AHEAD = 4
"""Batches of choices whose loads are under way at once, where they are in global memory."""
comptime AHEAD_SHARED = 1
"""The same where they are in shared memory. A launch begins without its code in the caches: less of it is faster then.
"""


struct Histogram(Movable):
    """Rows before each (warp, group) of some choices, in shared memory: first counts, then starts."""

    var cells: View[DType.int32]
    """[warps, groups]."""
    var firsts: View[DType.int32]
    """[groups]: rows of the group before the choices, then its first row."""
    var totals: View[DType.int32]
    """[groups]: all rows of the group."""
    var said: View[DType.int32]
    """[warps]: what each warp has to say (`starts.mojo`)."""
    var groups: Int
    """Groups of rows; with layout "rank" 1, or R for `Choices` of all sources."""

    @always_inline
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
        self.totals = window_view[DType.int32](
            shared_memory(SLOTS), 4 * (n + groups), groups
        )
        self.said = window_view[DType.int32](
            shared_memory(SLOTS), 4 * (n + 2 * groups), MAX_WARPS
        )
        self.groups = groups

    @always_inline
    def clear(self):
        """Count from 0; the whole CTA calls this, and meets before `count_rows`."""
        for i in range(Int(thread_idx.x), self.cells.size, Int(block_dim.x)):
            self.cells[i] = 0

    @staticmethod
    def bytes(groups: Int, n_warps: Int) -> Int:
        """Shared memory that it needs.

        Args:
            groups: Groups of rows.
            n_warps: Warps of a CTA.

        Returns:
            Bytes.
        """
        return 4 * (groups * (n_warps + 2) + MAX_WARPS)


@always_inline
def groups_ahead[
    layout: StaticString, ahead: Int
](choices: Choices, base: Int, end: Int) -> Array[Int32, ahead]:
    """The groups of the calling lane's choices of the next batches, so that their loads overlap.

    Parameters:
        layout: Output layout.
        ahead: How many batches.

    Args:
        choices: The choices.
        base: First choice of the first batch; a batch has one for each lane.
        end: The choice behind the warp's last one.

    Returns:
        The groups; -1 where there is none.
    """
    var group = Array[Int32, ahead](fill=-1)
    comptime for u in range(ahead):
        var i = base + u * WARP_SIZE + Int(lane_id())
        if i < end:
            group[u] = Int32(choices.group[layout](i))
    return group^


@always_inline
def run_of(tokens: Int, begin: Int = 0) -> Tuple[Int, Int]:
    """The calling warp's run of some consecutive tokens.

    Args:
        tokens: Their number.
        begin: The first one.

    Returns:
        First token, and the one behind the last.
    """
    var each = quotient(tokens + warps() - 1, warps())
    var first = min(tokens, warp_index() * each)
    return begin + first, begin + min(tokens, first + each)


def count_rows[
    layout: StaticString, ahead: Int
](choices: Choices, hist: Histogram):
    """Count the rows of some choices; the whole CTA calls this.

    Parameters:
        layout: Output layout.
        ahead: `AHEAD` or `AHEAD_SHARED`.

    Args:
        choices: The choices.
        hist: Cleared. Out: rows of the group before each warp's run, within the choices; and in `totals` all of them,
            thread g those of group g.
    """
    comptime scope = "workgroup" if is_amd_gpu() else "block"
    var s = choices.s
    var me = Int(thread_idx.x)
    var threads = Int(block_dim.x)
    var run = run_of(choices.end - choices.begin, choices.begin)
    var mine = hist.cells.part(warp_index() * hist.groups, hist.groups)
    var end = run[1] * s.top_k
    for base in range(run[0] * s.top_k, end, ahead * WARP_SIZE):
        var group = groups_ahead[layout, ahead](choices, base, end)
        comptime for u in range(ahead):
            if group[u] >= 0:
                _ = Atomic[Int32, scope=scope].fetch_add[
                    ordering=Ordering.RELAXED
                ](mine.ptr.unsafe_offset(Int(group[u])), Int32(1))
    barrier()
    for g in range(me, hist.groups, threads):
        var n = Array[Int32, MAX_WARPS](fill=0)
        comptime for w in range(MAX_WARPS):  # all loads first
            if w < warps():
                n[w] = hist.cells[w * hist.groups + g]
        var sum: Int32 = 0
        comptime for w in range(MAX_WARPS):
            if w < warps():
                hist.cells[w * hist.groups + g] = sum
                sum += n[w]
        comptime if layout != "rank":
            if s.shared_expert and g == 0:
                sum = Int32(choices.own)
        hist.totals[g] = sum
    barrier()


def map_rows[
    layout: StaticString, ahead: Int
](choices: Choices, hist: Histogram, row_map: View[DType.int32]):
    """Give every choice its row; the whole CTA calls this, after `start_rows`.

    Parameters:
        layout: Output layout.
        ahead: `AHEAD` or `AHEAD_SHARED`.

    Args:
        choices: The choices.
        hist: From `count_rows` and `start_rows`; used up.
        row_map: Int32 [tokens, K], out at the choices; `NO_ROW` where there is none.
    """
    var K = choices.s.top_k
    var lane = Int(lane_id())
    var run = run_of(choices.end - choices.begin, choices.begin)
    var next_row = hist.cells.part(warp_index() * hist.groups, hist.groups)
    var below = (UInt64(1) << UInt64(lane)) - 1
    var end = run[1] * K
    for first in range(run[0] * K, end, ahead * WARP_SIZE):
        var groups = groups_ahead[layout, ahead](choices, first, end)
        var same = Array[UInt64, ahead](fill=0)
        var begin = Array[Int32, ahead](fill=0)
        comptime for u in range(ahead):
            same[u] = same_lanes(groups[u])
            if groups[u] >= 0:
                begin[u] = hist.firsts[Int(groups[u])]
        comptime for u in range(ahead):
            var i = first + u * WARP_SIZE + lane
            var group = Int(groups[u])
            var next: Int32 = 0
            var row = NO_ROW
            if group >= 0:
                next = next_row[group]
                row = begin[u] + next + Int32(pop_count(same[u] & below))
            syncwarp()
            if group >= 0 and same[u] & below == 0:
                next_row[group] = next + Int32(pop_count(same[u]))
            syncwarp()
            if i < end:
                row_map[i] = row
    for i in range(
        choices.end * K + Int(thread_idx.x),
        choices.limit * K,
        Int(block_dim.x),
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
