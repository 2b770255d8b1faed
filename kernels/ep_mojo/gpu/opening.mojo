"""The opening of a sending launch of RankSlots: one warp opens, while the others load and work out what they will
store.

    last warp      checks what it was given, then `decide`, which awaits the buffer's credits
    other warps    loads and sums into shared memory, `passed` in front of the first store to a peer

Where there are no mbarriers the CTA meets at `settle`, and nothing overlaps. With the word come the peers that are
masked by then, so that all warps of a CTA send to the same ones, each of which has given the buffer back.
"""

from max.gpu import WARP_SIZE, lane_id, thread_idx
from max.gpu.sync import barrier, syncwarp

from ..launch import Endpoint
from ..layout import REC_STATE
from ..peers import MAX_RANKS, View
from ..signal import FAILED, epoch_of, poll, value_of
from ..team import WarpTeam
from .launch import warp_index, warps
from .routing import ballot
from .share import begin_crews
from .shared_rows import order_for_bulk
from .shared_memory import (
    OPENING_BARRIER,
    OPENING_WORD,
    SharedBarrier,
    moves_in_bulk,
    shared_memory,
    shared_place,
)


@always_inline
def _stands_open[has_table: Bool](ep: Endpoint[has_table]) -> Bool:
    """One look at all credits and at the failure record, by one load, a lane for each; a warp calls this.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.

    Returns:
        True where every peer has given the buffer back and no failure is on record, as mostly. False says nothing.
    """
    comptime assert MAX_RANKS < WARP_SIZE, "a lane for each rank, and one more"
    var epoch = ep.last_sent() + 1
    var buffers = UInt64(ep.s.num_buffers)
    # Loaded before, since an acquire ends what the caches hold.
    var in_order = epoch - ep.next_wait() < buffers
    var lane = Int(lane_id())
    var good = True
    if lane <= ep.s.n_ranks:
        var base = ep.head.base
        var offset = 4 * REC_STATE
        if lane < ep.s.n_ranks:
            base = ep.own_count()
            offset = ep.window.credit(lane)
        var w = poll(base, offset)
        if lane == ep.s.n_ranks:
            good = w == 0  # as `Head.failed` looks at it
        elif epoch > buffers:
            good = epoch_of(w) + buffers >= epoch and value_of(w) != FAILED
    return in_order and not ep.s.shrinks and ballot(not good) == 0


struct Opening(Copyable, Movable):
    """Whether a launch may go on, as the opening warp has decided for its CTA."""

    var decided: Bool
    """Whether the calling warp knows."""
    var open: Bool
    """What."""
    var masked: UInt32
    """Peers that get nothing, a bit each; known with `open`."""

    @always_inline
    def __init__(out self):
        """Begin, undecided; all threads of the CTA call this first of all. Crews may be formed afterwards."""
        self.decided = False
        self.open = False
        self.masked = 0
        comptime if moves_in_bulk():
            if thread_idx.x == 0:
                Self._barrier().begin(1)
                begin_crews()
            barrier()

    @always_inline
    @staticmethod
    def _barrier() -> SharedBarrier:
        return SharedBarrier(shared_place(OPENING_BARRIER))

    @always_inline
    @staticmethod
    def _word() -> View[DType.int32]:
        return View[DType.int32](Int(shared_memory(OPENING_WORD)), 1)

    @always_inline
    def opens(self) -> Bool:
        """Whether the calling warp is the one that opens: the last, which has the least to do.

        Returns:
            True in one warp of the CTA.
        """
        return warp_index() == warps() - 1

    @always_inline
    def decide[
        has_table: Bool, //, bulk: Bool = True
    ](mut self, ep: Endpoint[has_table], stage: Int32):
        """Await the buffer's credits, and let the launch go on unless the rank has failed; the opening warp calls this
        once, when its lanes have checked what they were given.

        Parameters:
            has_table: True for dispatch, False for combine.
            bulk: Whether peers get bulk stores: these come behind the credits then.

        Args:
            ep: The rank.
            stage: `STAGE_*`, for the failure record.
        """
        syncwarp()
        var open = Int32(_stands_open(ep))
        if open == 0:
            _ = ep.begin_send[WarpTeam](stage)
            syncwarp()
        var masked: UInt64 = 0
        if ep.s.shrinks:
            var peer = Int(lane_id())
            masked = ballot(peer < ep.s.n_ranks and ep.is_masked(peer))
        if lane_id() == 0 and open == 0:
            open = Int32(not ep.head.failed())
        comptime if bulk:
            order_for_bulk()
        syncwarp()  # lane 0 hands on what any of them has acquired
        if lane_id() == 0:
            Self._word()[0] = open + 2 * masked.cast[DType.int32]()
            comptime if moves_in_bulk():
                Self._barrier().arrive(1)
        syncwarp()

    @always_inline
    def settle(mut self):
        """All threads of the CTA call this, when the opening warp has decided and before the others do anything."""
        comptime if not moves_in_bulk():
            barrier()
            self._learn()

    @always_inline
    def _learn(mut self):
        var word = Self._word()[0]
        self.open = word & 1 != 0
        self.masked = UInt32(word >> 1)
        self.decided = True

    @always_inline
    def passed(mut self) -> Bool:
        """Wait for the decision; any thread may call this.

        Returns:
            Whether the launch may go on. What the opening warp has acquired is then acquired by the calling thread too.
        """
        if not self.decided:
            comptime if moves_in_bulk():
                Self._barrier().wait(0)
            self._learn()
        return self.open

    @always_inline
    def serves(mut self, peer: Int) -> Bool:
        """Whether a peer gets what the launch sends; waits for the decision.

        Args:
            peer: Which one.

        Returns:
            False for one that is masked.
        """
        _ = self.passed()
        return (self.masked >> UInt32(peer)) & 1 == 0
