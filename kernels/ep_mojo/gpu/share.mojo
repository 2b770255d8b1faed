"""Who of a launch does which pieces of work: a warp, or several warps of a CTA together."""

from max.gpu import block_idx, grid_dim, lane_id
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp

from ..numeric import quotient, remainder
from ..peers import Bytes
from ..settings import Settings
from .launch import memory_of, slot_of, warp_index, warps
from .shared_memory import (
    BARRIER_BYTES,
    CREW_BARRIERS,
    MAX_WARPS,
    SharedBarrier,
    moves_in_bulk,
    shared_place,
)
from .shared_rows import RowSlot, order_shared_for_bulk


@always_inline
def turned(skip: Int) -> Int:
    """The calling CTA's turn, where the first CTAs have something else to do.

    Args:
        skip: How many of them come last.

    Returns:
        0 to CTAs - 1.
    """
    var ctas = Int(grid_dim.x)
    return remainder(Int(block_idx.x) + ctas - remainder(skip, ctas), ctas)


@always_inline
def chunks_of_all(s: Settings, tokens: Int32) -> Int:
    """How many chunks there are, counted over all sources in turn, up to the last one of the longest; a warp calls
    this.

    Args:
        s: The settings.
        tokens: Lane r: T of source r; 0 in the lanes behind.

    Returns:
        Their number: chunk i is the (i div R)-th of a source.
    """
    return s.n_ranks * s.n_signals(Int(warp.max(tokens)))


comptime LATE = -1
"""In place of a first piece: the warp has something else to do first, and takes whatever is left then (`Turns`)."""


struct Share(TrivialRegisterPassable):
    """What part of some pieces of work the calling warp does: `for i in range(share.first, n, share.stride)`.

    Neighbouring pieces go to different CTAs, so that little work spreads over many SMs. Where `first` is `LATE` it is
    no such range: only `Turns` takes it.
    """

    var first: Int
    """Its first piece."""
    var stride: Int
    """Warps that share the work."""
    var ctas: Int
    """CTAs that share the work, if each of them does with as many warps, the first ones; otherwise 0."""

    @always_inline
    def __init__(out self, first: Int, stride: Int, ctas: Int = 0):
        """Name the part.

        Args:
            first: Its first piece.
            stride: Warps that share the work.
            ctas: CTAs that share it evenly: piece `w * ctas + i` is that of warp w of the i-th of them.
        """
        self.first = first
        self.stride = stride
        self.ctas = ctas

    @always_inline
    def __init__(out self, skip: Int = 0):
        """One part for each warp of the launch.

        Args:
            skip: CTAs that have something else to do first, and so come last here.
        """
        var ctas = Int(grid_dim.x)
        self.first = warp_index() * ctas + turned(skip)
        self.stride = ctas * warps()
        self.ctas = ctas


@always_inline
def last_warps_first() -> Share:
    """One part for each warp of the launch; the last warps of the CTAs have the first pieces.

    Returns:
        The calling warp's part.
    """
    var ctas = Int(grid_dim.x)
    return Share(
        (warps() - 1 - warp_index()) * ctas + Int(block_idx.x), warps() * ctas
    )


comptime MAX_CREW = 4
"""Warps of a crew, at most; a power of two."""


@always_inline
def begin_crews():
    """Set up where crews meet; one thread calls this, and meets the CTA afterwards."""
    comptime for i in range(MAX_WARPS // 2):
        _crew_barrier(2 * i).begin(MAX_CREW)


@always_inline
def _crew_barrier(leader: Int) -> SharedBarrier:
    return SharedBarrier(
        shared_place(CREW_BARRIERS + leader // 2 * BARRIER_BYTES)
    )


struct Crew(Movable):
    """Warps of a CTA that work on the same piece: as many as there are for each piece, so that none does two."""

    var size: Int
    """Warps of the crew: 1, 2 or 4."""
    var part: Int
    """The calling warp's number in it."""
    var leader: Int
    """The first one's number in the CTA."""
    var share: Share
    """The crew's pieces."""
    var phase: UInt32
    """Parity of the next meeting."""

    @always_inline
    def __init__(out self, share: Share, pieces: Int, most: Int):
        """Find out the calling warp's. All warps of the CTA that share the work come here with the same arguments, and
        go on to meet equally often.

        Args:
            share: The warp's pieces if it worked alone. Those of a CTA begin at an even warp.
            pieces: How many there are for all.
            most: Warps of a crew, at most `MAX_CREW`; 1 where nothing can be shared.
        """
        self.size = 1
        self.part = 0
        self.leader = warp_index()
        self.share = share
        self.phase = 0
        comptime if moves_in_bulk():
            var sharers = 0  # warps of this CTA
            if share.ctas > 0:
                sharers = quotient(share.stride, share.ctas)
            while (
                pieces > 0
                and 2 * self.size <= most
                and quotient(sharers, 2 * self.size) * share.ctas >= pieces
            ):
                self.size *= 2
            if self.size > 1:
                var mine = quotient(share.first, share.ctas)
                var crews = quotient(sharers, self.size)
                self.part = mine & (self.size - 1)
                self.leader -= self.part
                mine = quotient(mine, self.size)
                self.share = Share(
                    mine * share.ctas
                    + remainder(share.first, share.ctas) if mine
                    < crews else pieces,
                    crews * share.ctas,
                )

    @always_inline
    def leads(self) -> Bool:
        """Whether the calling warp is the first one.

        Returns:
            Always True for a crew of one.
        """
        return self.part == 0

    @always_inline
    def memory(self, warp_bytes: Int, offset: Int = 0) -> Bytes:
        """The first warp's shared memory, which is the crew's.

        Args:
            warp_bytes: What the launch has for each warp.
            offset: Byte offset in it.

        Returns:
            A pointer.
        """
        return memory_of(self.leader, warp_bytes, offset)

    @always_inline
    def slot(self, row: Bytes) -> RowSlot:
        """A row that the first warp loads and all wait for; in the sending half of a launch.

        Args:
            row: From `memory`.

        Returns:
            The slot.
        """
        return slot_of(self.leader, row, sending=True)

    @always_inline
    def meet(mut self):
        """Wait for the others: what each has done is then done for all, and ordinary stores to shared memory come
        before bulk stores of it."""
        comptime if moves_in_bulk():
            if self.size > 1:
                order_shared_for_bulk()
                syncwarp()
                var barrier = _crew_barrier(self.leader)
                if lane_id() == 0:
                    barrier.arrive(quotient(MAX_CREW, self.size))
                barrier.wait(self.phase)
                self.phase ^= 1
