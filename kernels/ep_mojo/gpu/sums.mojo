"""Sums of rows, by a warp, with the rows of the next sums under way meanwhile.

What is summed comes in batches: some tokens of one chunk, with as many lanes for each token as it can have rows, in the
order of the sum. Rows are brought into shared memory (`Ring`) slice by slice (`slices.mojo`): the first slice of
all tokens of a batch, then the next one. While one batch is summed, the rows of the next one are started already.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from std.bit import count_trailing_zeros
from std.sys import size_of

from ..numeric import accumulate
from ..peers import Bytes
from ..team import WarpTeam
from .ring import Ring
from .slices import BLOCK, UNIT, Slices, Span, blocks, slice_units


comptime LaneMask = Scalar[
    DType.uint32 if WarpTeam.lanes == 32 else DType.uint64
]
"""A bit for each lane of a warp: what is masked, counted and shifted for every row is no wider than it must be."""


struct Batch(Copyable, Movable):
    """Some tokens of a chunk: what the calling warp sums next.

    Each token has `width` lanes, in the order of its sum; those of a token that has fewer rows have none.
    """

    var chunk: Int32
    """The chunk."""
    var source: Int32
    """The rank whose tokens they are, where it is not the rank itself."""
    var to: Bytes
    """Its window."""
    var token: Int32
    """The first token."""
    var tokens: Int32
    """How many."""
    var ends: Bool
    """Whether these are the chunk's last ones."""
    var row: Bytes
    """The lane's row, if it has one."""
    var weight: Float32
    """Its weight."""
    var mask: LaneMask
    """Which lanes have one."""
    var peers: UInt32
    """Bit r is set in a lane whose row comes from rank r, where it comes from a peer."""

    @always_inline
    def __init__(out self):
        """Begin with nothing."""
        self.chunk = 0
        self.source = 0
        self.to = Bytes(unsafe_from_address=16)
        self.token = 0
        self.tokens = 0
        self.ends = True
        self.row = Bytes(unsafe_from_address=16)
        self.weight = 1
        self.mask = 0
        self.peers = 0

    @always_inline
    def lanes_of(self, index: Int, width: Int) -> LaneMask:
        """The lanes of a token that have a row.

        Args:
            index: Which token of the batch.
            width: Lanes of a token.

        Returns:
            One bit for each.
        """
        var first = self.mask >> LaneMask(index * width)
        if width == WarpTeam.lanes:
            return first
        return (first & ((LaneMask(1) << LaneMask(width)) - 1)) << LaneMask(
            index * width
        )


trait Sums:
    """What is summed, and where it goes."""

    comptime dtype: DType
    """Type of the rows."""
    comptime channels: Int
    """Channels of a row."""

    def fetch(mut self, mut batch: Batch) -> Bool:
        """Find out what the next batch is made of.

        Args:
            batch: Filled in.

        Returns:
            False where there is no more.
        """
        ...

    def admit(mut self, mut batch: Batch) -> Bool:
        """Wait until the batch's rows may be read.

        Args:
            batch: From `fetch`; rows that will not come are taken out.

        Returns:
            False where the launch gives up.
        """
        ...

    def begin[
        units: Int
    ](
        self,
        mut sum: Array[SIMD[DType.float32, WarpTeam.sum_width], units],
        token: Int,
        span: Span,
    ):
        """Add what comes before the rows; the lane's channels are those from lane * 8 on in every unit of the span.

        Parameters:
            units: Units of a slice.

        Args:
            sum: Zeros.
            token: Which token.
            span: The slice.
        """
        ...

    def wants(self, lanes: LaneMask) -> Bool:
        """Whether a token has a sum.

        Args:
            lanes: Its lanes that have a row.

        Returns:
            False where there is nothing to do.
        """
        ...

    def put[
        units: Int
    ](
        mut self,
        sum: Array[SIMD[DType.float32, WarpTeam.sum_width], units],
        batch: Batch,
        token: Int,
        span: Span,
    ):
        """Round and store a sum.

        Parameters:
            units: Units of a slice.

        Args:
            sum: The lane's channels, as in `begin`.
            batch: The token's batch.
            token: Which token.
            span: The slice.
        """
        ...

    def finish(mut self, batch: Batch) -> Bool:
        """Close a batch whose sums have all been put.

        Args:
            batch: The batch.

        Returns:
            False where the launch gives up.
        """
        ...


struct Feeder(TrivialRegisterPassable):
    """Which slice of which row is to be started next."""

    var row: UInt64
    """Address of the slice in the lane's row."""
    var bytes: Int32
    """Bytes of it."""
    var left: LaneMask
    """Lanes whose rows are still to be started in this slice."""
    var slice: Int32
    """Which slice of the rows."""
    var ahead: Bool
    """Whether the rows are those of the next batch."""

    @always_inline
    def __init__(out self):
        """Begin with nothing."""
        self.row = 0
        self.bytes = 0
        self.left = 0
        self.slice = 0
        self.ahead = False

    @always_inline
    def turn_to[
        item: Int
    ](mut self, batch: Batch, slices: Slices, slice: Int32):
        """Go on to a slice of a batch.

        Parameters:
            item: Bytes of a channel.

        Args:
            batch: The batch.
            slices: How its rows are divided.
            slice: Which slice.
        """
        var span = slices.span(slice)
        self.slice = slice
        self.row = UInt64(Int(batch.row) + Int(span.begin) * item)
        self.bytes = span.size * Int32(item)
        self.left = batch.mask


@always_inline
def sum_all[
    S: Sums, slice_size: Int
](mut sums: S, mut ring: Ring[slice_size], width: Int, first: Int, end: Int,):
    """Sum everything that the calling warp has to, over a range of channels.

    Parameters:
        S: What is summed.
        slice_size: `slice_bytes`.

    Args:
        sums: Batches, and what becomes of the sums.
        ring: Shared memory for rows; empty, and empty again afterwards.
        width: Lanes of a token: the most rows that it can have.
        first: First channel.
        end: The one behind the last.
    """
    comptime units = slice_units[S.dtype, S.channels]()
    comptime V = WarpTeam.sum_width
    comptime item = size_of[Scalar[S.dtype]]()
    var slices = Slices(first, end, units)
    var next = Batch()
    var feeder = Feeder()
    var good = True
    var more = sums.fetch(next)
    while good and more:
        if not feeder.ahead:
            good = sums.admit(next)
            feeder.turn_to[item](next, slices, 0)
        var now = next.copy()
        feeder.ahead = False
        more = sums.fetch(next)
        for slice in range(Int(slices.n)):
            var span = slices.span(Int32(slice))
            for index in range(Int(now.tokens)):
                var lanes = now.lanes_of(index, width)
                if not good or not sums.wants(lanes):
                    continue
                var sum = Array[SIMD[DType.float32, V], units](fill=0)
                var token = Int(now.token) + index
                sums.begin[units](sum, token, span)
                while lanes != 0:
                    while ring.has_room():
                        if not _feed(
                            sums, ring, feeder, slices, now, next, more, good
                        ):
                            break
                    if not good:
                        break
                    var weight = warp.shuffle_idx(now.weight, _take(lanes))
                    var row = ring.take()
                    comptime for block in range(blocks(units)):
                        if (
                            block == 0
                            or Int32(block * BLOCK * UNIT) < span.size
                        ):
                            comptime for u in range(
                                block * BLOCK, min(units, (block + 1) * BLOCK)
                            ):
                                sum[u] = accumulate[S.dtype, V](
                                    sum[u],
                                    row,
                                    u * UNIT + Int(lane_id()) * V,
                                    weight,
                                )
                    ring.release()
                if good:
                    sums.put[units](sum, now, token, span)
        good = good and sums.finish(now)
    ring.drain()


@always_inline
def _take(mut lanes: LaneMask) -> UInt32:
    """Take the first lane out of some."""
    var lane = UInt32(count_trailing_zeros(lanes))
    lanes &= lanes - 1
    return lane


@always_inline
def _feed[
    S: Sums, slice_size: Int
](
    mut sums: S,
    mut ring: Ring[slice_size],
    mut feeder: Feeder,
    slices: Slices,
    now: Batch,
    mut next: Batch,
    more: Bool,
    mut good: Bool,
) -> Bool:
    """Start one row, of `now` or, where there is `more`, of `next`; there must be room for it.

    Returns:
        Whether there was one. `good` is then as before; it becomes False where the launch gives up.
    """
    comptime item = size_of[Scalar[S.dtype]]()
    while feeder.left == 0:
        if feeder.slice + 1 < slices.n:
            if feeder.ahead:
                feeder.turn_to[item](next, slices, feeder.slice + 1)
            else:
                feeder.turn_to[item](now, slices, feeder.slice + 1)
        elif more and not feeder.ahead:
            if not sums.admit(next):
                good = False
                return False
            feeder.ahead = True
            feeder.turn_to[item](next, slices, 0)
        else:
            return False
    var lane = _take(feeder.left)
    ring.start(
        Bytes(unsafe_from_address=Int(warp.shuffle_idx(feeder.row, lane))),
        Int(feeder.bytes),
    )
    return True


@always_inline
def add_row[
    dtype: DType, units: Int
](
    mut sum: Array[SIMD[DType.float32, WarpTeam.sum_width], units],
    row: Bytes,
    span: Span,
):
    """Add a slice of a row that lies in global memory.

    Parameters:
        dtype: Type of the row.
        units: Units of a slice.

    Args:
        sum: The lane's channels.
        row: The row.
        span: The slice.
    """
    comptime for u in range(units):
        var c = u * UNIT + Int(lane_id()) * WarpTeam.sum_width
        if c < Int(span.size):
            sum[u] = accumulate[dtype, WarpTeam.sum_width](
                sum[u], row, Int(span.begin) + c, 1
            )
