"""When the parts of a fused round happen: the last time that each warp came by each mark, where the head has room for
it.

Off, a mark costs a comparison. The host reads the times: `ep_mojo/timeline.py` has these marks by their names in lower
case.
"""

from max.gpu import block_idx, lane_id

from ..launch import Endpoint
from ..patience import clock_ns
from ..peers import store_global
from .launch import warp_index
from .shared_memory import MAX_WARPS

comptime TIMELINE_CTAS = 256
"""CTAs whose times are kept."""
comptime TIMELINE_MARKS = 32
"""Room for marks: those of dispatch, then those of combine."""

comptime MARK_BEGUN = 0
"""The rank's head is known to be good."""
comptime MARK_OPENED = 1
"""Credits are there; the CTA's opening warp has decided."""
comptime MARK_TABLE_SENT = 2
"""A routing table has left."""
comptime MARK_IDS_READ = 3
"""A token's choices have been read."""
comptime MARK_MESSAGE_READY = 4
"""Its message is in shared memory."""
comptime MARK_TABLES_HAVE_LEFT = 5
"""The message may leave too; where tables are no cells."""
comptime MARK_MESSAGES_ARRIVED = 6
"""All messages of a signal are in place."""
comptime MARK_HEADER_SEEN = 7
"""A source's header has come, and its table with it; or the table's cells have."""
comptime MARK_ROWS_COUNTED = 8
"""Its rows are counted."""
comptime MARK_ALL_COUNTED = 9
"""So are those of all sources."""
comptime MARK_ROWS_MAPPED = 10
"""A source's rows are given."""
comptime MARK_MAP_SEEN = 11
"""A warp that copies has seen the map of its last source."""
comptime MARK_SIGNAL_SEEN = 12
"""And the signal of its last messages."""
comptime MARK_MESSAGE_LOADED = 13
"""And has one of them in shared memory."""
comptime MARK_ROWS_WRITTEN = 14
"""All its rows are in place."""
comptime MARK_ENDED = 15
"""The warp has nothing left to do."""
comptime MARK_COMBINE_BEGUN = 16
"""As `MARK_BEGUN`."""
comptime MARK_COMBINE_OPENED = 17
"""As `MARK_OPENED`."""
comptime MARK_COMBINE_SUM_READY = 18
"""A sum for a source, or the calling warp's part of it, is in shared memory."""
comptime MARK_COMBINE_SUMS_ARRIVED = 19
"""All sums of a signal are in place."""
comptime MARK_COMBINE_SIGNALS_SEEN = 20
"""The signals of a token have come."""
comptime MARK_COMBINE_TOKEN_WRITTEN = 21
"""Its sum is written."""
comptime MARK_COMBINE_ENDED = 22
"""As `MARK_ENDED`."""


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
        store_global(
            ep.timeline, warp * TIMELINE_MARKS + what, UInt64(clock_ns())
        )
