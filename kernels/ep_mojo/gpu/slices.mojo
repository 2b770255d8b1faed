"""How rows are divided to be summed in registers, and what shared memory that takes.

A row, or a warp's part of one, is cut into slices of at most `slice_units` units of channels, all of one size but the
last. Each lane sums the channels from 8 * lane on of every unit.
"""

from std.sys import size_of

from ..combine_tensors import row_bytes
from ..layout import align_up
from ..team import WarpTeam
from .shared_memory import RING_ROWS, SLOT_ALIGNMENT

comptime UNIT = WarpTeam.lanes * WarpTeam.sum_width
"""Channels that a warp sums at a time."""


comptime SLICE_UNITS = 14
"""Units of bfloat16 that are summed in registers: fewer slices are fewer loads to start and to await, and more units
do not fit into registers."""
comptime BLOCK = 7
"""Units that are summed without a look at how many there are, so that their loads overlap; where a slice is shorter,
the rest of its room holds anything, and is summed for nothing."""


@always_inline
def slice_units[dtype: DType, hidden: Int]() -> Int:
    """Units of a slice.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        `SLICE_UNITS` of bfloat16, fewer of float32, or those of a row.
    """
    comptime most = SLICE_UNITS * 2 // size_of[Scalar[dtype]]()
    return max(1, min(most, (hidden + UNIT - 1) // UNIT))


@always_inline
def blocks(units: Int) -> Int:
    """How many blocks there are in a slice.

    Args:
        units: Units of the slice.

    Returns:
        Their number; the last one may be shorter.
    """
    return (units + BLOCK - 1) // BLOCK


@always_inline
def slice_bytes[dtype: DType, hidden: Int]() -> Int:
    """Shared memory for a slice of a row.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        Bytes.
    """
    return slice_units[dtype, hidden]() * UNIT * size_of[Scalar[dtype]]()


@always_inline
def combine_bytes[dtype: DType, hidden: Int]() -> Int:
    """Shared memory of a warp in every launch of combine: a ring, and a slice that leaves; or a whole row.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        Bytes, a multiple of `SLOT_ALIGNMENT`.
    """
    comptime row = align_up(row_bytes[dtype, hidden](), SLOT_ALIGNMENT)
    return max(row, (RING_ROWS + 1) * slice_bytes[dtype, hidden]())


struct Span(TrivialRegisterPassable):
    """A slice of a row's channels."""

    var begin: Int32
    """Its first channel."""
    var size: Int32
    """How many."""

    @always_inline
    def __init__(out self, begin: Int32, size: Int32):
        """Name it.

        Args:
            begin: Its first channel, a multiple of 8.
            size: How many, a multiple of 8.
        """
        self.begin = begin
        self.size = size


struct Slices(TrivialRegisterPassable):
    """How a range of channels is divided."""

    var first: Int32
    """First channel."""
    var end: Int32
    """The one behind the last."""
    var size: Int32
    """Channels of a slice; the last one may have fewer."""
    var n: Int32
    """How many."""

    @always_inline
    def __init__(out self, first: Int, end: Int, units: Int):
        """Divide it evenly.

        Args:
            first: First channel, a multiple of 8.
            end: The one behind the last.
            units: The most units of a slice.
        """
        var all = (end - first + UNIT - 1) // UNIT
        var n = (all + units - 1) // units
        self.first = Int32(first)
        self.end = Int32(end)
        self.n = Int32(n)
        self.size = Int32(UNIT * ((all + n - 1) // max(1, n)))

    @always_inline
    def span(self, slice: Int32) -> Span:
        """A slice's channels.

        Args:
            slice: 0 to n - 1.

        Returns:
            Where it is.
        """
        var begin = self.first + slice * self.size
        return Span(begin, min(self.end, begin + self.size) - begin)
