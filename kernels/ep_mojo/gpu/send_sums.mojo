"""The sums that combine sends back: for each token of a source, its rows on this rank, weighted.

A warp sums in shared memory's rows (`sums.mojo`), rounds a slice of the sum once into shared memory, and stores that to
the source's window, slot (my rank, token). When a chunk's sums have arrived, its signal follows.
"""

from max.gpu import lane_id
from max.gpu.primitives import warp
from std.sys import size_of

from ..combine_tensors import CombineInput, part_begin, row_bytes
from ..launch import Endpoint
from ..layout import FIELD_ROW_MAP, KIND_SHAPE, partial_offset
from ..numeric import quotient, remainder, store_f32
from ..peers import Bytes
from ..routing import NO_ROW
from ..signal import publish, word
from ..team import WarpTeam
from .opening import Opening
from .ring import Ring
from .routing import ballot
from .share import MAX_CREW, Crew, Share
from .launch import warp_memory
from .shared_memory import RING_ROWS, in_shared
from .shared_rows import finish_stores, release_slots, store_slice
from .slices import BLOCK, UNIT, Span, blocks, combine_bytes, slice_bytes
from .sums import Batch, LaneMask, Sums, sum_all
from .timeline import (
    MARK_COMBINE_SUM_READY,
    MARK_COMBINE_SUMS_ARRIVED,
    mark,
)


struct SourceSums[wire: DType, hidden: Int](Movable, Sums):
    """The sums of the calling warp's chunks.

    Parameters:
        wire: Type of the rows, and of the sums.
        hidden: H.
    """

    comptime dtype = Self.wire
    """As given."""
    comptime channels = Self.hidden
    """As given."""
    var ep: Endpoint[False]
    """The rank."""
    var x: CombineInput
    """The rows."""
    var epoch: UInt64
    """The launch's epoch."""
    var buffer: Int
    """Its buffer."""
    var stage: Int32
    """`STAGE_*`, for the failure record."""
    var tokens: Int32
    """Lane r: tokens of source r."""
    var items: Int
    """Chunks of all sources."""
    var crew: Crew
    """Warps that sum a part of the channels each."""
    var item: Int
    """The chunk that is fetched from next."""
    var done: Int
    """Tokens of it that have been fetched."""
    var slice: Bytes
    """Shared memory for a sum that leaves."""
    var opening: Opening
    """What the first store waits for."""

    def __init__(
        out self,
        ep: Endpoint[False],
        x: CombineInput,
        epoch: UInt64,
        stage: Int32,
        tokens: Int32,
        items: Int,
        share: Share,
        slice: Bytes,
        opening: Opening,
    ):
        """Begin.

        Args:
            ep: The rank.
            x: The rows.
            epoch: The launch's epoch.
            stage: `STAGE_*`.
            tokens: Lane r: tokens of source r.
            items: Chunks of all sources.
            share: The calling warp's, of all sources in turn.
            slice: `slice_bytes` of shared memory.
            opening: What the first store waits for.
        """
        self.ep = ep
        self.x = x
        self.epoch = epoch
        self.buffer = ep.buffer(epoch)
        self.stage = stage
        self.tokens = tokens
        self.items = items
        self.crew = Crew(share, items, MAX_CREW)
        self.item = self.crew.share.first
        self.done = 0
        self.slice = slice
        self.opening = opening.copy()

    @always_inline
    def fetch(mut self, mut batch: Batch) -> Bool:
        """The next tokens' rows and weights; a row that is not there ends it all, and is recorded.

        Args:
            batch: Filled in.

        Returns:
            False where there is no more.
        """
        comptime size = row_bytes[Self.wire, Self.hidden]()
        var s = self.ep.s
        while self.item < self.items:
            var source = remainder(self.ep.me + self.item, s.n_ranks)
            var chunk = quotient(self.item, s.n_ranks)
            var T = Int(warp.shuffle_idx(self.tokens, UInt32(source)))
            var begin = chunk * s.tokens_per_signal + self.done
            var end = min((chunk + 1) * s.tokens_per_signal, T)
            if begin >= end:
                self.item += self.crew.share.stride
                continue
            var n = min(quotient(WarpTeam.lanes, s.top_k), end - begin)
            batch.chunk = Int32(chunk)
            batch.source = Int32(source)
            batch.to = self.ep.recv[source]
            batch.token = Int32(begin)
            batch.tokens = Int32(n)
            batch.ends = begin + n == end
            var at = (source * s.max_tokens + begin) * s.top_k + Int(lane_id())
            var row = NO_ROW
            if Int(lane_id()) < n * s.top_k:
                row = self.x.row_map[at]
                batch.weight = self.x.weights[at]
            var rows = self.x.rows.size // size
            if ballot(Int(row) >= rows) != 0:
                if Int(row) >= rows:
                    self.ep.head.fail(
                        KIND_SHAPE,
                        self.stage,
                        chunk=FIELD_ROW_MAP,
                        value=Int(row),
                        limit=rows - 1,
                    )
                self.item = self.items
                return False
            batch.mask = LaneMask(ballot(row >= 0))
            batch.row = self.x.rows.bytes(max(0, Int(row)) * size)
            self.done += n
            if batch.ends:
                self.done = 0
                self.item += self.crew.share.stride
            return True
        return False

    @always_inline
    def admit(mut self, mut batch: Batch) -> Bool:
        """Nothing to wait for: the experts have written their rows.

        Args:
            batch: The batch.

        Returns:
            True.
        """
        return True

    @always_inline
    def begin[
        units: Int
    ](
        self,
        mut sum: Array[SIMD[DType.float32, WarpTeam.sum_width], units],
        token: Int,
        span: Span,
    ):
        """Nothing comes before the rows.

        Parameters:
            units: Units of a slice.

        Args:
            sum: Zeros.
            token: Which token.
            span: The slice.
        """
        pass

    @always_inline
    def wants(self, lanes: LaneMask) -> Bool:
        """Whether a token has rows here.

        Args:
            lanes: Its lanes that have a row.

        Returns:
            True if there are any.
        """
        return lanes != 0

    @always_inline
    def put[
        units: Int
    ](
        mut self,
        sum: Array[SIMD[DType.float32, WarpTeam.sum_width], units],
        batch: Batch,
        token: Int,
        span: Span,
    ):
        """Round a sum, and store it to its source, in a launch that may go on.

        Parameters:
            units: Units of a slice.

        Args:
            sum: The lane's channels.
            batch: The token's batch.
            token: Which token.
            span: The slice.
        """
        comptime item = size_of[Scalar[Self.wire]]()
        comptime V = WarpTeam.sum_width
        release_slots()
        var slice = in_shared(self.slice)
        comptime for block in range(blocks(units)):
            if block == 0 or Int32(block * BLOCK * UNIT) < span.size:
                comptime for u in range(
                    block * BLOCK, min(units, (block + 1) * BLOCK)
                ):
                    store_f32[Self.wire, V](
                        slice, u * UNIT + Int(lane_id()) * V, sum[u]
                    )
        mark[MARK_COMBINE_SUM_READY](self.ep)
        if not self.opening.passed():
            return  # `finish` says so when the crew has met
        var at = partial_offset(self.ep.s, self.buffer, self.ep.me, token)
        store_slice(
            self.slice,
            batch.to.unsafe_offset(at + Int(span.begin) * item),
            Int(span.size) * item,
        )

    @always_inline
    def finish(mut self, batch: Batch) -> Bool:
        """Signal a chunk whose sums have all arrived.

        Args:
            batch: The batch.

        Returns:
            False where the launch may not go on.
        """
        if not batch.ends:
            return True
        finish_stores()
        mark[MARK_COMBINE_SUMS_ARRIVED](self.ep)
        self.crew.meet()  # all parts have arrived
        if not self.opening.passed():
            return False
        if lane_id() == 0 and self.crew.leads():
            publish(
                self.ep.count[Int(batch.source)],
                self.ep.window.signal(
                    self.buffer, self.ep.me, Int(batch.chunk)
                ),
                word(self.epoch, 0),
            )
        return True


@always_inline
def send_sums[
    dtype: DType, hidden: Int
](
    ep: Endpoint[False],
    x: CombineInput,
    epoch: UInt64,
    stage: Int32,
    tokens: Int32,
    items: Int,
    share: Share,
    opening: Opening,
):
    """Sum and send the calling warp's chunks, and signal.

    Parameters:
        dtype: Type of the rows, and on the wire.
        hidden: H.

    Args:
        ep: The rank.
        x: The rows.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        tokens: Lane r: tokens of source r.
        items: Chunks of all sources.
        share: The calling warp's chunks, of all sources in turn.
        opening: What the first store waits for.
    """
    comptime size = slice_bytes[dtype, hidden]()
    comptime mine = combine_bytes[dtype, hidden]()
    var ring = Ring[size](warp_memory(mine), sending=True)
    var sums = SourceSums[dtype, hidden](
        ep,
        x,
        epoch,
        stage,
        tokens,
        items,
        share,
        warp_memory(mine, RING_ROWS * size),
        opening,
    )
    var first = part_begin[WarpTeam, hidden](sums.crew.part, sums.crew.size)
    var end = part_begin[WarpTeam, hidden](sums.crew.part + 1, sums.crew.size)
    sum_all(sums, ring, ep.s.top_k, first, end)
    finish_stores()
