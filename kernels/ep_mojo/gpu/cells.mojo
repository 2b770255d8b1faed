"""What travels as cells (`cell.mojo`): no signal, and nobody waits for what else the GPU has under way.

Routing tables are marked cells, a choice each (`tables.mojo`); of few tokens messages too: cell i holds the bytes from
8 * i on. `send_bytes` sends one, and `receive_bytes`
brings one into shared memory, with all threads of a CTA. Rows of combine are full cells, and a warp takes a piece of a
row at a time (`Cut`). `Cells` are those that a lane has named, and awaits all at once.
"""

from max.gpu import WARP_SIZE, block_dim, lane_id, thread_idx
from std.math import fma
from std.sys import size_of

from ..cell import Cell, empty_cell, is_full, load_cell, store_cell
from ..launch import Endpoint
from ..layout import CELL_BYTES, CELL_PAYLOAD
from ..numeric import of_payload, to_payload
from ..peers import Bytes, typed
from ..signal import (
    NOT_YET,
    SPINS_BETWEEN_CHECKS,
    Waiter,
    epoch_of,
    word,
)
from .opening import Opening

comptime CELLS_AHEAD = 8
"""Cells of a thread that are sent or awaited at once, where a row is."""


struct Cut[dtype: DType, hidden: Int, cells: Int]:
    """How a row is cut into pieces, one for a warp at a time.

    Parameters:
        dtype: Type on the wire.
        hidden: H.
        cells: Cells of a lane in a piece.
    """

    comptime values = CELL_BYTES // size_of[Scalar[Self.dtype]]()
    """Values of a cell."""
    comptime unit = WARP_SIZE * Self.values
    """Channels of a warp's cells, one for each lane."""
    comptime pieces = (Self.hidden + Self.unit * Self.cells - 1) // (
        Self.unit * Self.cells
    )
    """Pieces of a row; the last one may be shorter."""

    @staticmethod
    @always_inline
    def channel(piece: Int, cell: Int) -> Int:
        """The first channel of one of the calling lane's cells.

        Args:
            piece: Which piece.
            cell: Which of its cells.

        Returns:
            The channel; H or more behind the end of the row.
        """
        return (piece * Self.cells + cell) * Self.unit + Int(
            lane_id()
        ) * Self.values


@always_inline
def add_row[
    dtype: DType, V: Int
](
    sum: SIMD[DType.float32, V], row: SIMD[DType.uint64, 2], weight: Float32
) -> SIMD[DType.float32, V]:
    """Add 16 bytes of a row, weighted: fma(w, x, sum), rounded once.

    Parameters:
        dtype: Type of the row.
        V: Values that they hold.

    Args:
        sum: The sum so far.
        row: The bytes.
        weight: Its weight.

    Returns:
        The new sum.
    """
    comptime half = V // 2
    var x = of_payload[dtype, half](row[0]).join(
        of_payload[dtype, half](row[1])
    )
    return fma(
        SIMD[DType.float32, V](weight), rebind[SIMD[DType.float32, V]](x), sum
    )


@always_inline
def to_row[
    dtype: DType, V: Int
](sum: SIMD[DType.float32, V]) -> SIMD[DType.uint64, 2]:
    """Round values once into 16 bytes of a row.

    Parameters:
        dtype: Type of the row.
        V: Values that they hold.

    Args:
        sum: The values.

    Returns:
        The bytes.
    """
    comptime half = V // 2
    return SIMD[DType.uint64, 2](
        to_payload[dtype, half](sum.slice[half]()),
        to_payload[dtype, half](sum.slice[half, offset=half]()),
    )


@always_inline
def send_bytes[
    n: Int
](row: Bytes, target: Bytes, epoch: UInt64, mut opening: Opening) -> Bool:
    """Store a row as cells, each thread a part of them; the whole CTA calls this.

    Parameters:
        n: Bytes of the row, a multiple of 8.

    Args:
        row: Where it lies, aligned to 8: in shared memory after a meeting with those who wrote it, or in global memory.
        target: Place of its first cell.
        epoch: The launch's epoch.
        opening: What the first store waits for.

    Returns:
        The same to all threads: False in a launch that may not go on.
    """
    comptime cells = n // CELL_PAYLOAD
    comptime A = CELLS_AHEAD
    var payload = typed[DType.uint64](row, 0)
    var w = word(epoch, 0)
    var threads = Int(block_dim.x)
    for base in range(0, cells, A * threads):
        var some = Array[UInt64, A](fill=0)
        comptime for a in range(A):
            var i = base + a * threads + Int(thread_idx.x)
            if i < cells:
                some[a] = payload.unsafe_load[invariant=False](i)
        if not opening.passed():
            return False
        comptime for a in range(A):
            var i = base + a * threads + Int(thread_idx.x)
            if i < cells:
                store_cell(
                    target.unsafe_offset(CELL_BYTES * i), Cell(some[a], w)
                )
    return True


struct Cells[n: Int, full: Bool = False](Movable):
    """Cells that the calling lane awaits.

    Parameters:
        n: How many, at most 32.
        full: Whether they are full cells, which are emptied when they have come, and not marked ones.
    """

    var at: Array[Bytes, Self.n]
    """Their places in the rank's own windows."""
    var peer: Array[Int32, Self.n]
    """Who stores them."""
    var payload: Array[UInt64, Self.n]
    """What they hold, when they have come."""
    var word: Array[UInt64, Self.n]
    """Their words."""
    var missing: UInt32
    """Those that are still awaited, a bit each."""

    @always_inline
    def __init__(out self):
        """Begin with none."""
        self.at = Array[Bytes, Self.n](fill=Bytes(unsafe_from_address=16))
        self.peer = Array[Int32, Self.n](fill=0)
        self.payload = Array[UInt64, Self.n](fill=0)
        self.word = Array[UInt64, Self.n](fill=0)
        self.missing = 0

    @always_inline
    def want[i: Int](mut self, at: Bytes, peer: Int):
        """Name a cell to await.

        Parameters:
            i: Which one, below n.

        Args:
            at: Its place.
            peer: Who stores it.
        """
        self.at[i] = at
        self.peer[i] = Int32(peer)
        self.missing |= UInt32(1 << i)

    @always_inline
    def _is_there(self, i: Int, epoch: UInt64) -> Bool:
        comptime if Self.full:
            return is_full(Cell(self.payload[i], self.word[i]))
        else:
            return epoch_of(self.word[i]) == epoch

    @always_inline
    def come[
        has_table: Bool
    ](
        mut self,
        ep: Endpoint[has_table],
        waiter: Waiter,
        epoch: UInt64,
        chunk: Int,
    ) -> Bool:
        """Wait until all have come that were named; each lane by itself.

        Parameters:
            has_table: True for dispatch, False for combine.

        Args:
            ep: The rank.
            waiter: The launch's waiter.
            epoch: The launch's epoch.
            chunk: For the failure record.

        Returns:
            False when the rank has failed.
        """
        var spins = 0
        # Of one that is missing. What was in an empty place is of the buffer's last round.
        var seen = word(
            epoch - min(epoch, UInt64(ep.s.num_buffers)), 0
        ) if Self.full else UInt64(0)
        var peer: Int32 = 0
        while self.missing != 0:
            comptime for i in range(Self.n):
                if self.missing & UInt32(1 << i) != 0:
                    var cell = load_cell(self.at[i])
                    self.payload[i] = cell.payload
                    self.word[i] = cell.word
            comptime for i in range(Self.n):
                if self.missing & UInt32(1 << i) != 0:
                    if self._is_there(i, epoch):
                        self.missing &= ~UInt32(1 << i)
                        comptime if Self.full:
                            empty_cell(self.at[i])
                    else:
                        comptime if not Self.full:
                            seen = self.word[i]
                        peer = self.peer[i]
            if self.missing == 0:
                break
            spins += 1
            if waiter.virtual or spins % SPINS_BETWEEN_CHECKS == 0:
                var verdict = waiter.look(
                    ep.own_count(),
                    seen,
                    epoch,
                    Int(peer),
                    Int32(chunk),
                    ep.window.header(ep.buffer(epoch), Int(peer)),
                )
                if verdict != NOT_YET:
                    return False
        return True


@always_inline
def receive_bytes[
    n: Int
](
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    peer: Int,
    chunk: Int,
    at: Bytes,
    row: Bytes,
) -> Bool:
    """Await a row, and bring it into shared memory, each thread a part of it; the whole CTA calls this, and meets
    before anybody reads the row; before anybody stores from it in bulk each thread has fenced the proxies, too.

    Parameters:
        n: Bytes of the row, a multiple of 8.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        peer: Who sends it.
        chunk: For the failure record.
        at: Place of its first cell.
        row: Shared memory that nobody reads any more.

    Returns:
        Of the calling thread alone: False when the rank has failed.
    """
    comptime cells = n // CELL_PAYLOAD
    comptime A = CELLS_AHEAD
    var threads = Int(block_dim.x)
    for base in range(Int(thread_idx.x), cells, A * threads):
        var some = Cells[A]()
        comptime for a in range(A):
            var i = base + a * threads
            if i < cells:
                some.want[a](at.unsafe_offset(CELL_BYTES * i), peer)
        if not some.come(ep, waiter, epoch, chunk):
            return False
        comptime for a in range(A):
            var i = base + a * threads
            if i < cells:
                typed[DType.uint64](row, 0).unsafe_store(i, some.payload[a])
    return True
