"""Who of a launch does which pieces of work: a warp, or several warps of a CTA together."""

from max.gpu import WARP_SIZE, block_idx, grid_dim

from ..peers import Bytes
from .launch import MAX_WARPS, memory_of, slot_of, warp_index, warps
from .shared_rows import RowSlot, crew_barrier


struct Share(TrivialRegisterPassable):
    """What part of some pieces of work the calling warp does: `for i in range(share.first, n, share.stride)`.

    Neighbouring pieces go to different CTAs, so that little work spreads over many SMs.
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
        var turned = (Int(block_idx.x) + ctas - skip % ctas) % ctas
        self.first = warp_index() * ctas + turned
        self.stride = ctas * warps()
        self.ctas = ctas


struct Crew[most: Int](TrivialRegisterPassable):
    """Warps of a CTA that work on the same piece: `most` of them where each such crew has at most one piece, else one.

    Parameters:
        most: 1, or how many.
    """

    var size: Int
    """Warps of the crew."""
    var part: Int
    """The calling warp's number in it."""
    var leader: Int
    """The first one's number in the CTA."""
    var share: Share
    """The crew's pieces."""

    @always_inline
    def __init__(out self, share: Share, pieces: Int):
        """Find out the calling warp's.

        Args:
            share: The warp's pieces if it worked alone.
            pieces: How many there are for all.
        """
        self.size = 1
        self.part = 0
        self.leader = warp_index()
        self.share = share
        comptime if Self.most > 1:
            var crews = 0
            if share.ctas > 0:
                crews = share.stride // share.ctas // Self.most
            if crews > 0 and pieces <= crews * share.ctas:
                var mine = self.leader // Self.most
                self.size = Self.most
                self.part = self.leader % Self.most
                self.leader -= self.part
                self.share = Share(
                    mine * share.ctas + share.first % share.ctas if mine
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
    def meet(self):
        """Wait for the others; what each has written to shared memory is then there for all, bulk stores included."""
        comptime if Self.most > 1:
            if self.size > 1:
                crew_barrier[Self.most * WARP_SIZE, MAX_WARPS // Self.most](
                    self.leader // Self.most
                )
