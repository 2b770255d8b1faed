"""When the parts of a launch happened: the last time that each warp came by each mark, where the head names a place for it.

Off, a mark costs a comparison. The host reads the times (`ep_mojo/timeline.py`, which has these numbers by name).
"""

from max.gpu import block_idx, lane_id
from std.sys import inlined_assembly, is_nvidia_gpu

from ..launch import Endpoint
from ..patience import clock_ns
from ..peers import View
from .launch import warp_index
from .shared_memory import MAX_WARPS

comptime TIMELINE_CTAS = 256
"""CTAs whose times are kept."""
comptime TIMELINE_MARKS = 32
"""Room for marks, of which each half of a round has its own."""

comptime MARK_BEGUN = 0
"""Dispatch: the rank's head is known to be good."""
comptime MARK_OPENED = 1
"""Credits are there; the CTA's opening warp has decided."""
comptime MARK_TABLE_SENT = 2
"""A routing table has left."""
comptime MARK_IDS = 3
"""A token's choices have been read."""
comptime MARK_ENCODED = 4
"""Its message is ready."""
comptime MARK_STORES_BEGIN = 5
"""The tables have left: the message may."""
comptime MARK_ARRIVED = 6
"""All messages of a signal are in place."""
comptime MARK_HEADER = 7
"""A source's header has come, and its table with it."""
comptime MARK_COUNTED = 8
"""Its rows are counted."""
comptime MARK_ALL_COUNTED = 9
"""So are those of all sources."""
comptime MARK_MAPPED = 10
"""A source's rows are given."""
comptime MARK_MAP_SEEN = 11
"""A warp that copies has seen the map of its last source."""
comptime MARK_SIGNAL = 12
"""And the signal of its last messages."""
comptime MARK_LOADED = 13
"""And has one of them in shared memory."""
comptime MARK_ROWS = 14
"""All its rows are in place."""
comptime MARK_ENDED = 15
"""The warp has nothing left to do."""
comptime COMBINE_MARKS = 16
"""What is added to a mark of the same name in combine."""
comptime MARK_SUMMED = 20
"""Combine: a sum for a source is in shared memory."""
comptime MARK_SUMS = 30
"""The signals of a token have come, and its sum is written."""


@always_inline
def mark[what: Int](ep: Endpoint):
    """Note the time; a warp calls this.

    Parameters:
        what: `MARK_*`.

    Args:
        ep: The rank.
    """
    if ep.timeline != 0 and lane_id() == 0 and block_idx.x < TIMELINE_CTAS:
        var warp = Int(block_idx.x) * MAX_WARPS + warp_index()
        var i = warp * TIMELINE_MARKS + what
        comptime if is_nvidia_gpu():  # global, not generic: the PTX test must see that no slot is written
            inlined_assembly[
                "st.global.u64 [$0], $1;", NoneType, constraints="l,l,~{memory}"
            ](ep.timeline + UInt64(8 * i), UInt64(clock_ns()))
        else:
            var times = View[DType.int64](
                Int(ep.timeline), TIMELINE_CTAS * MAX_WARPS * TIMELINE_MARKS
            )
            times[i] = Int64(clock_ns())
