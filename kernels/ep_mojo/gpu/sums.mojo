"""Sums of rows, by a warp, with the rows of the next sums under way meanwhile.

What is summed comes in batches: some tokens of one chunk, with as many lanes for each token as it can have rows, in the
order of the sum. Rows are brought into shared memory (`Ring`) in pieces of at most `pass_units` units of channels, so
that a piece's sums stay in registers: all tokens of a batch piece by piece. While one batch is summed, the rows of
the next one are started already.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from max.gpu.sync import syncwarp
from std.bit import count_trailing_zeros
from std.sys import size_of

from ..combine_tensors import row_bytes
from ..layout import align_up
from ..numeric import accumulate
from ..peers import Bytes
from ..team import WarpTeam
from .ring import Ring
from .shared_memory import RING_ROWS, SLOT_ALIGNMENT

comptime UNIT = WarpTeam.lanes * WarpTeam.sum_width
"""Channels that a warp sums at a time."""


@always_inline
def pass_units[dtype: DType, hidden: Int]() -> Int:
    """Units of a piece.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        As many as `WarpTeam.sum_steps` of bfloat16, by their bytes, or those of a row.
    """
    comptime most = WarpTeam.sum_steps * 2 // size_of[Scalar[dtype]]()
    return max(1, min(most, (hidden + UNIT - 1) // UNIT))


comptime BLOCK = 7
"""Units that are summed without a look at how many there are, so that their loads overlap; where a piece is shorter,
the rest of its room holds anything, and is summed for nothing."""


@always_inline
def blocks(units: Int) -> Int:
    """How many blocks there are in a piece.

    Args:
        units: Units of the piece.

    Returns:
        Their number; the last one may be shorter.
    """
    return (units + BLOCK - 1) // BLOCK


@always_inline
def piece_bytes[dtype: DType, hidden: Int]() -> Int:
    """Shared memory for a piece of a row.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        Bytes.
    """
    return pass_units[dtype, hidden]() * UNIT * size_of[Scalar[dtype]]()


@always_inline
def combine_bytes[dtype: DType, hidden: Int]() -> Int:
    """Shared memory of a warp in every launch of combine: a ring, and a piece that leaves; or a whole row.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Returns:
        Bytes, a multiple of `SLOT_ALIGNMENT`.
    """
    comptime row = align_up(row_bytes[dtype, hidden](), SLOT_ALIGNMENT)
    return max(row, (RING_ROWS + 1) * piece_bytes[dtype, hidden]())


struct Batch(Copyable, Movable):
    """Some tokens of a chunk: what the calling warp sums next.

    Each token has `width` lanes, in the order of its sum; those of a token that has fewer rows have none.
    """

    var chunk: Int32
    """The chunk."""
    var source: Int32
    """The rank whose tokens they are, where it is not the rank itself."""
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
    var mask: UInt64
    """Which lanes have one."""
    var peers: UInt32
    """Bit r is set in a lane whose row comes from rank r, where it comes from a peer."""

    @always_inline
    def __init__(out self):
        """Begin with nothing."""
        self.chunk = 0
        self.source = 0
        self.token = 0
        self.tokens = 0
        self.ends = True
        self.row = Bytes(unsafe_from_address=16)
        self.weight = 1
        self.mask = 0
        self.peers = 0

    @always_inline
    def lanes_of(self, index: Int, width: Int) -> UInt64:
        """The lanes of a token that have a row.

        Args:
            index: Which token of the batch.
            width: Lanes of a token.

        Returns:
            One bit for each.
        """
        var all = (UInt64(1) << UInt64(width)) - 1
        return self.mask & (all << UInt64(index * width))


struct Span(TrivialRegisterPassable):
    """A piece of a row's channels."""

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

    def admit(mut self, batch: Batch) -> Bool:
        """Wait until the batch's rows may be read.

        Args:
            batch: From `fetch`.

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
            units: Units of a piece.

        Args:
            sum: Zeros.
            token: Which token.
            span: The piece.
        """
        ...

    def wants(self, lanes: UInt64) -> Bool:
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
    ) -> Bool:
        """Round and store a sum.

        Parameters:
            units: Units of a piece.

        Args:
            sum: The lane's channels, as in `begin`.
            batch: The token's batch.
            token: Which token.
            span: The piece.

        Returns:
            False where the launch gives up.
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
    """Which piece of which row is to be started next."""

    var ahead: Bool
    """Whether it belongs to the next batch."""
    var piece: Int32
    """Which piece of the rows."""
    var mask: UInt64
    """Lanes whose rows are still to be started in this piece."""

    @always_inline
    def __init__(out self):
        """Begin with nothing."""
        self.ahead = False
        self.piece = 0
        self.mask = 0


struct Pieces(TrivialRegisterPassable):
    """How a range of channels is divided."""

    var first: Int32
    """First channel."""
    var end: Int32
    """The one behind the last."""
    var size: Int32
    """Channels of a piece; the last one may have fewer."""
    var n: Int32
    """How many."""

    @always_inline
    def __init__(out self, first: Int, end: Int, units: Int):
        """Divide it evenly.

        Args:
            first: First channel, a multiple of 8.
            end: The one behind the last.
            units: The most units of a piece.
        """
        var all = (end - first + UNIT - 1) // UNIT
        var n = (all + units - 1) // units
        self.first = Int32(first)
        self.end = Int32(end)
        self.n = Int32(n)
        self.size = Int32(UNIT * ((all + n - 1) // max(1, n)))

    @always_inline
    def span(self, piece: Int32) -> Span:
        """A piece's channels.

        Args:
            piece: 0 to n - 1.

        Returns:
            Where it is.
        """
        var begin = self.first + piece * self.size
        return Span(begin, min(self.end, begin + self.size) - begin)


@always_inline
def sum_all[
    S: Sums, piece_size: Int
](
    mut sums: S,
    mut ring: Ring[piece_size],
    width: Int,
    first: Int,
    end: Int,
):
    """Sum everything that the calling warp has to, over a range of channels.

    Parameters:
        S: What is summed.
        piece_size: `piece_bytes`.

    Args:
        sums: Batches, and what becomes of the sums.
        ring: Shared memory for rows; empty, and empty again afterwards.
        width: Lanes of a token: the most rows that it can have.
        first: First channel.
        end: The one behind the last.
    """
    comptime units = pass_units[S.dtype, S.channels]()
    comptime V = WarpTeam.sum_width
    var pieces = Pieces(first, end, units)
    var next = Batch()
    var feeder = Feeder()
    var good = True
    var more = sums.fetch(next)
    while good and more:
        if not feeder.ahead:
            good = sums.admit(next)
            feeder.piece = 0
            feeder.mask = next.mask
        var now = next.copy()
        feeder.ahead = False
        more = sums.fetch(next)
        for piece in range(Int(pieces.n)):
            var span = pieces.span(Int32(piece))
            for index in range(Int(now.tokens)):
                var lanes = now.lanes_of(index, width)
                if not good or not sums.wants(lanes):
                    continue
                var sum = Array[SIMD[DType.float32, V], units](fill=0)
                var token = Int(now.token) + index
                sums.begin[units](sum, token, span)
                while lanes != 0:
                    good = good and _feed[S, piece_size](
                        sums, ring, feeder, pieces, now, next, more
                    )
                    if not good:
                        break
                    var lane = UInt32(count_trailing_zeros(lanes))
                    lanes &= lanes - 1
                    var weight = warp.shuffle_idx(now.weight, lane)
                    var row = ring.take()
                    comptime for block in range(blocks(units)):
                        if block == 0 or Int32(block * BLOCK * UNIT) < span.size:
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
                good = good and sums.put[units](sum, now, token, span)
        good = good and sums.finish(now)
    ring.drain()


@always_inline
def _feed[
    S: Sums, piece_size: Int
](
    mut sums: S,
    mut ring: Ring[piece_size],
    mut feeder: Feeder,
    pieces: Pieces,
    now: Batch,
    next: Batch,
    more: Bool,
) -> Bool:
    """Start rows while there is room, of `now` and, where there is `more`, then of `next`; False to give up."""
    comptime item = size_of[Scalar[S.dtype]]()
    while ring.has_room():
        if feeder.mask != 0:
            var lane = UInt32(count_trailing_zeros(feeder.mask))
            feeder.mask &= feeder.mask - 1
            var row = UInt64(Int(next.row if feeder.ahead else now.row))
            var span = pieces.span(feeder.piece)
            ring.start(
                Bytes(
                    unsafe_from_address=Int(warp.shuffle_idx(row, lane))
                    + Int(span.begin) * item
                ),
                Int(span.size) * item,
            )
        elif feeder.piece + 1 < pieces.n:
            feeder.piece += 1
            feeder.mask = next.mask if feeder.ahead else now.mask
        elif more and not feeder.ahead:
            if not sums.admit(next):
                return False
            feeder.ahead = True
            feeder.piece = 0
            feeder.mask = next.mask
        else:
            break
    return True
