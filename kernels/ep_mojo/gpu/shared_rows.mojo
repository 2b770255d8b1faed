"""Rows on their way through shared memory: a warp loads one, works on it, stores it to a peer.

On sm_90 and newer, rows that are multiples of 16 bytes move by bulk copies (the async proxy): one lane starts a copy,
the others have their hands free. Everywhere else the lanes of the warp move them 16 bytes at a time. The functions are
the same, and so is what the caller must do:

    load           global -> slot, complete when it returns
    store_row      slot -> global, to as many places as there are bits; `store_slice` a slice to one place
    SlotTeam       copies slot -> global on the way of a format
    finish_stores  all stores of the calling lane have arrived: only now may it publish a signal that covers them
    release_slots  the slots may be written again
    order_for_bulk the fence between ordinary accesses and bulk copies: behind an acquire, before what it covers moves
    order_shared_for_bulk  the same for shared memory alone, which costs next to nothing

Rules of order, held by the PTX test (docs/protocol.md): ordinary stores to a slot come before a proxy fence and a warp
barrier, before any bulk store of it; a full `wait_group 0`, by the lane that started them, comes between bulk stores
and the signal; `order_for_bulk` comes between an acquire and a bulk load of what it covers, and between the acquire of
a credit and the bulk stores that it allows.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp
from std.bit import count_trailing_zeros
from std.sys import inlined_assembly

from ..peers import Bytes
from ..team import Team, WarpTeam, copy_bytes
from .shared_memory import (
    SharedBarrier,
    SharedBytes,
    moves_in_bulk,
    shared_address,
)


@always_inline
def order_for_bulk():
    """Order what this thread has done or seen, in any memory, before bulk copies that come after it: a fence between
    the proxies. It waits for what the thread has stored, as a fence at device scope does: not for each row."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "fence.proxy.async;", NoneType, constraints="~{memory}"
        ]()


@always_inline
def order_shared_for_bulk():
    """Order what this thread has done to shared memory, or read there, before bulk copies that come after it."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "fence.proxy.async.shared::cta;", NoneType, constraints="~{memory}"
        ]()


struct RowSlot(Movable):
    """Room for one row in shared memory, loaded by one warp and read by its crew."""

    var row: Bytes
    """Its first byte."""
    var barrier: SharedBarrier
    """Counts the bytes of bulk loads."""
    var phase: UInt32
    """Parity of the next load."""
    var mine: Bool
    """Whether the calling warp loads; one of another warp of its crew waits for that, and meets it before each load."""

    def __init__(out self, row: Bytes, barrier: SharedBytes, mine: Bool):
        """Take the slot; all lanes of a warp call this at once.

        Args:
            row: `SLOT_ALIGNMENT`-aligned shared memory.
            barrier: `BARRIER_BYTES` of shared memory.
            mine: Whether it is the calling warp's.
        """
        self.row = row
        self.barrier = SharedBarrier(barrier)
        self.phase = 0
        self.mine = mine
        comptime if moves_in_bulk():
            if lane_id() == 0 and mine:
                self.barrier.begin(1)
            syncwarp()

    @always_inline
    def load[n: Int](mut self, source: Bytes):
        """Bring a row into the slot; all lanes may read it afterwards.

        Parameters:
            n: Bytes.

        Args:
            source: Global memory, aligned to 16. What an acquire covers may be loaded when who acquired it has called
                `order_for_bulk` and met the warp.
        """
        syncwarp()  # nobody reads the slot any more
        comptime if moves_in_bulk() and n % 16 == 0:
            if lane_id() == 0 and self.mine:
                order_shared_for_bulk()
                self.barrier.expect(n)
                inlined_assembly[
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
                    NoneType,
                    constraints="r,l,r,r,~{memory}",
                ](
                    shared_address(self.row),
                    UInt64(Int(source)),
                    Int32(n),
                    shared_address(self.barrier.at),
                )
            self.barrier.wait(self.phase)
            self.phase ^= 1
        else:
            copy_bytes[WarpTeam](source, self.row, n)
        syncwarp()


@always_inline
def store_row[n: Int](row: Bytes, targets: UInt32, target: Bytes):
    """Store a row to as many places as there are bits; all lanes of the warp call this.

    Lane i stores to its own `target` where bit i is set. `finish_stores` comes before any signal. What the warp has
    written to the slot with ordinary stores comes first; and so does what the credit covers, the peer's reads: whoever
    acquired it has called `order_for_bulk` before the others met it.

    Parameters:
        n: Bytes.

    Args:
        row: Shared memory.
        targets: Which lanes store.
        target: The calling lane's place, aligned to 16.
    """
    comptime if moves_in_bulk() and n % 16 == 0:
        order_shared_for_bulk()
        syncwarp()
        if (targets >> UInt32(lane_id())) & 1 == 1:
            _store_in_bulk(row, target, n)
    else:
        syncwarp()
        var left = targets
        while left != 0:
            var lane = count_trailing_zeros(left)
            left &= left - 1
            var to = warp.shuffle_idx(UInt64(Int(target)), lane)
            copy_bytes[WarpTeam](row, Bytes(unsafe_from_address=Int(to)), n)


@always_inline
def store_slice(slice: Bytes, target: Bytes, n: Int):
    """Store a slice of a row, as `store_row` does; all lanes of the warp call this.

    Args:
        slice: Shared memory that the warp has written with ordinary stores.
        target: Where to, aligned to 16.
        n: Bytes, a multiple of 16.
    """
    comptime if moves_in_bulk():
        order_shared_for_bulk()
        syncwarp()
        if lane_id() == 0:
            _store_in_bulk(slice, target, n)
    else:
        syncwarp()
        copy_bytes[WarpTeam](slice, target, n)


struct SlotTeam(Team):
    """A warp that copies out of its slot: in bulk where it can. `finish_stores` comes before others may rely on that,
    and `release_slots` before the slot is written again."""

    comptime lanes = WarpTeam.lanes
    """As `WarpTeam`."""
    comptime vector_bytes = WarpTeam.vector_bytes
    """As `WarpTeam`."""
    comptime sum_width = WarpTeam.sum_width
    """As `WarpTeam`."""
    comptime sum_steps = WarpTeam.sum_steps
    """As `WarpTeam`."""
    comptime blocks_ahead = WarpTeam.blocks_ahead
    """As `WarpTeam`."""
    comptime streams = False
    """As `WarpTeam`."""

    @staticmethod
    @always_inline
    def lane() -> Int:
        """The calling lane.

        Returns:
            Lane index.
        """
        return WarpTeam.lane()

    @staticmethod
    @always_inline
    def max(value: Float32) -> Float32:
        """The largest value of the warp.

        Args:
            value: The lane's own, neither negative nor NaN.

        Returns:
            The same on every lane.
        """
        return WarpTeam.max(value)

    @staticmethod
    @always_inline
    def from_lane(value: Float32, lane: Int) -> Float32:
        """The value of one lane of the warp.

        Args:
            value: The calling lane's own.
            lane: Which lane.

        Returns:
            The same on every lane.
        """
        return WarpTeam.from_lane(value, lane)

    @staticmethod
    @always_inline
    def copy_whole(source: Bytes, target: Bytes, n: Int) -> Bool:
        """Start a bulk copy.

        Args:
            source: Shared memory, aligned to 16: brought there by `RowSlot.load`, or by threads that have fenced the
                proxies before they met the warp.
            target: Global memory.
            n: Bytes.

        Returns:
            Whether there are bulk copies that can do it.
        """
        comptime if moves_in_bulk():
            if n % 16 == 0 and Int(target) % 16 == 0:
                if lane_id() == 0:
                    order_shared_for_bulk()
                    _store_in_bulk(source, target, n)
                return True
        return False


@always_inline
def _store_in_bulk(row: Bytes, target: Bytes, n: Int):
    """Start a bulk store of the calling lane, a group by itself."""
    inlined_assembly[
        "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;",
        NoneType,
        constraints="l,r,r,~{memory}",
    ](UInt64(Int(target)), shared_address(row), Int32(n))
    inlined_assembly[
        "cp.async.bulk.commit_group;", NoneType, constraints="~{memory}"
    ]()


@always_inline
def finish_stores():
    """Wait until all that the calling lane has stored in bulk is in place, then let the warp meet."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "cp.async.bulk.wait_group 0;", NoneType, constraints="~{memory}"
        ]()
    syncwarp()


@always_inline
def release_slots():
    """Wait until bulk stores have read their slots, so that these may be written again."""
    comptime if moves_in_bulk():
        inlined_assembly[
            "cp.async.bulk.wait_group.read 0;",
            NoneType,
            constraints="~{memory}",
        ]()
    syncwarp()
