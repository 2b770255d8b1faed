"""Whose turn a chunk is: a warp has its first one by its number, so that little work waits for nothing, and takes
every further one as it comes free, so that much work ends everywhere at about the same time. Warps that have something
else to do first have none by their number (`LATE`).

A further chunk is a ticket from a counter in the rank's own counters: one atomic add of a lane. The add is relaxed, as
a ticket covers no memory; what a warp reads of a chunk is covered by notes and signals, whoever takes it. The bulk
stores of the chunk before are under way meanwhile. Chunks are given out in ascending order. Where there are no more
chunks than warps that have a first one, nobody takes a ticket. The last CTA sets the counter to 0 (`clear_tickets`).
"""

from max.gpu import lane_id
from max.gpu.primitives import warp

from ..bare import clear_tickets_at, take_ticket
from ..counters import TICKETS
from ..launch import Endpoint
from ..peers import Bytes
from .share import LATE, Share


@always_inline
def _tickets[has_table: Bool]() -> Int:
    """Byte offset of the counter of dispatch or combine."""
    return 4 * (TICKETS + Int(has_table))


struct Turns(Movable):
    """The calling warp's chunks, one after the other: `while turns.next()`, then `turns.chunk`."""

    var chunk: Int
    """The chunk that the warp has, behind a `next` that was True."""
    var first: Int
    """Its first one, or `LATE`; `LATE` when that has been taken."""
    var takers: Int
    """Warps that have a first chunk: 0 to `takers` - 1."""
    var chunks: Int
    """How many there are for all. May be lowered to where only empty ones follow: chunks come in ascending order."""
    var counters: Bytes
    """Where tickets are counted."""
    var offset: Int
    """Byte offset there."""

    @always_inline
    def __init__[
        has_table: Bool
    ](out self, ep: Endpoint[has_table], share: Share, chunks: Int):
        """Begin; nothing is taken yet.

        Parameters:
            has_table: True for dispatch, False for combine.

        Args:
            ep: The rank.
            share: The warp's first chunk, or `LATE`, and how many warps have one, as `stride`.
            chunks: How many there are for all.
        """
        self.chunk = chunks
        self.first = share.first
        self.takers = share.stride
        self.chunks = chunks
        self.counters = ep.head.base
        self.offset = _tickets[has_table]()

    @always_inline
    def next(mut self) -> Bool:
        """Go on to the next chunk; all lanes of a warp call this.

        Returns:
            Whether there is one.
        """
        if self.first != LATE:
            self.chunk = self.first
            self.first = LATE
        elif self.takers < self.chunks:
            var ticket: UInt32 = 0
            if lane_id() == 0:
                ticket = take_ticket(self.counters, self.offset)
            self.chunk = self.takers + Int(warp.shuffle_idx(ticket, 0))
        else:
            self.chunk = self.chunks
        return self.chunk < self.chunks


@always_inline
def clear_tickets[has_table: Bool](ep: Endpoint[has_table]):
    """Set the counter back to 0; a warp of the last CTA calls this, in a failed launch too.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.
    """
    if lane_id() == 0:
        clear_tickets_at(ep.head.base, _tickets[has_table]())
