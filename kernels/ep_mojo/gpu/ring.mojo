"""Rows on their way into shared memory, several at a time: a warp starts the next ones before it uses the first.

    start      begin to bring the next row, where there is room
    take       wait for the oldest one that was started; all lanes may read it
    release    done with it: its room can be filled again
    drain      wait for all that is under way, in a launch that gives up

Rows are only read here, never stored from: what leaves again is written somewhere else. So a row may be brought in
while bulk stores of other shared memory are under way (the PTX test knows these loads by their comment).
"""

from max.gpu import lane_id
from max.gpu.sync import syncwarp
from std.sys import inlined_assembly

from ..peers import Bytes
from ..team import WarpTeam, copy_bytes
from .shared_memory import (
    BARRIER_BYTES,
    RING_BARRIERS,
    RING_ROWS,
    MAX_WARPS,
    SharedBarrier,
    SharedBytes,
    in_shared,
    moves_in_bulk,
    shared_address,
    shared_place,
)
from .launch import warp_index
from .shared_rows import order_for_bulk, order_shared_for_bulk


struct Ring[row_bytes: Int](Movable):
    """Room for `RING_ROWS` rows of the calling warp.

    Parameters:
        row_bytes: Bytes from one to the next, a multiple of `SLOT_ALIGNMENT`.
    """

    var at: SharedBytes
    """The first one's."""
    var barriers: Int32
    """Byte offset in shared memory of an mbarrier for each."""
    var next: Int32
    """Where the next row will be."""
    var oldest: Int32
    """Where the oldest is that has not been released."""
    var under_way: Int32
    """Rows started and not released."""
    var phase: UInt32
    """Parity of the oldest one's load."""

    def __init__(out self, memory: Bytes, sending: Bool):
        """Set it up; all lanes of a warp call this at once.

        Args:
            memory: `RING_ROWS * row_bytes` of the warp's shared memory.
            sending: Whether this is the sending or the receiving half of the launch; each has mbarriers of its own.
        """
        var i = warp_index() + MAX_WARPS * Int(sending)
        self.at = in_shared(memory)
        self.barriers = Int32(RING_BARRIERS + i * RING_ROWS * BARRIER_BYTES)
        self.next = 0
        self.oldest = 0
        self.under_way = 0
        self.phase = 0
        comptime if moves_in_bulk():
            if lane_id() == 0:
                comptime for row in range(RING_ROWS):
                    self._barrier(Int32(row)).begin(1)
            order_for_bulk()
            syncwarp()

    @always_inline
    def _barrier(self, row: Int32) -> SharedBarrier:
        return SharedBarrier(
            shared_place(Int(self.barriers + row * Int32(BARRIER_BYTES)))
        )

    @always_inline
    def _row(self, row: Int32) -> SharedBytes:
        return self.at.unsafe_offset(Int(row * Int32(Self.row_bytes)))

    @always_inline
    def has_room(self) -> Bool:
        """Whether another row can be started.

        Returns:
            False where all are under way.
        """
        return self.under_way < Int32(RING_ROWS)

    @always_inline
    def start(mut self, source: Bytes, n: Int):
        """Begin to bring a row; there must be room for it.

        Args:
            source: Global memory, aligned to 16. Between an acquire that covers it and this, the warp has called
                `order_for_bulk` and met.
            n: Bytes, a multiple of 16, at most `row_bytes`.
        """
        comptime if moves_in_bulk():
            if lane_id() == 0:
                var barrier = self._barrier(self.next)
                barrier.expect(n)
                order_shared_for_bulk()
                inlined_assembly[
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3]; // ring",
                    NoneType,
                    constraints="r,l,r,r,~{memory}",
                ](
                    shared_address(self._row(self.next)),
                    UInt64(Int(source)),
                    Int32(n),
                    shared_address(barrier.at),
                )
        else:
            var row = self._row(self.next)
            copy_bytes[WarpTeam](
                source,
                row.unsafe_address_space_cast[AddressSpace.GENERIC](),
                n,
            )
            syncwarp()
        self.under_way += 1
        self.next += 1
        if self.next == Int32(RING_ROWS):
            self.next = 0

    @always_inline
    def take(self) -> SharedBytes:
        """Wait for the oldest row.

        Returns:
            Its first byte; to be read until `release`.
        """
        comptime if moves_in_bulk():
            self._barrier(self.oldest).wait(self.phase)
        return self._row(self.oldest)

    @always_inline
    def release(mut self):
        """Give up the oldest row; all lanes of the warp call this when they have read it."""
        syncwarp()
        self.under_way -= 1
        self.oldest += 1
        if self.oldest == Int32(RING_ROWS):
            self.oldest = 0
            self.phase ^= 1

    @always_inline
    def drain(mut self):
        """Wait for all rows that are under way, and drop them."""
        while self.under_way > 0:
            _ = self.take()
            self.release()
