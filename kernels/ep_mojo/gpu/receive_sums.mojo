"""The sums that combine receives: for each own token biases, the shared expert's row, then what came from other ranks.

A warp awaits the signals of a batch's chunk, lane r that of rank r, from the ranks that own one of its tokens' experts;
then their rows are brought from the window into shared memory and summed (`sums.mojo`).
"""

from max.gpu import lane_id
from max.gpu.sync import syncwarp

from ..combine_tensors import (
    CombineOutput,
    part_begin,
    row_bytes,
)
from ..launch import Endpoint
from ..layout import partial_offset, row_offset
from ..numeric import quotient, store_f32
from ..routing import destination, everyone, normal_id
from ..signal import MASKED, NO_SIGNAL, Waiter
from ..team import WarpTeam
from .launch import warp_memory
from .ring import Ring
from .routing import ballot
from .share import LATE, Share
from .shared_rows import order_for_bulk
from .slices import BLOCK, UNIT, Span, blocks, combine_bytes, slice_bytes
from .sums import Batch, LaneMask, Sums, add_row, sum_all
from .timeline import (
    MARK_COMBINE_SIGNALS_SEEN,
    MARK_COMBINE_TOKEN_WRITTEN,
    mark,
)
from .turns import Turns

comptime MAX_PARTS = 4
"""Warps that share one row, at most."""
comptime IDS_AHEAD = 8
"""Choices of a token that are looked at at once."""


struct TokenSums[
    wire: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    by_row: Bool,
](Movable, Sums):
    """The sums of the calling warp's tokens.

    Parameters:
        wire: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        by_row: Whether a row came for each choice, and not one from each rank.
    """

    comptime dtype = Self.wire
    """As given."""
    comptime channels = Self.hidden
    """As given."""
    var ep: Endpoint[False]
    """The rank."""
    var x: CombineOutput[Self.ids_dtype]
    """Its tokens."""
    var T: Int
    """How many."""
    var epoch: UInt64
    """The launch's epoch."""
    var buffer: Int
    """Its buffer."""
    var waiter: Waiter
    """The launch's waiter."""
    var width: Int
    """Lanes of a token in a batch: ranks, or choices."""
    var turns: Turns
    """The warp's chunks; the one that is fetched from next."""
    var done: Int
    """Tokens of it that have been fetched."""
    var awaited: Int
    """The last chunk of which signals have come."""
    var arrived: UInt32
    """From which ranks."""
    var masked: UInt32
    """Ranks of which nothing is added; those too that are lost meanwhile."""

    def __init__(
        out self,
        ep: Endpoint[False],
        x: CombineOutput[Self.ids_dtype],
        T: Int,
        epoch: UInt64,
        waiter: Waiter,
        masked: UInt32,
        share: Share,
    ):
        """Begin.

        Args:
            ep: The rank.
            x: Its tokens.
            T: How many.
            epoch: The launch's epoch.
            waiter: The launch's waiter.
            masked: Ranks of which nothing is added.
            share: The warp's first chunk, or `LATE`, and how many warps have one, as `stride`.
        """
        self.ep = ep
        self.x = x
        self.T = T
        self.epoch = epoch
        self.buffer = ep.buffer(epoch)
        self.waiter = waiter
        self.width = ep.s.top_k if Self.by_row else ep.s.n_ranks
        self.turns = Turns(ep, share, ep.s.n_signals(T))
        self.done = 0
        self.awaited = -1
        self.arrived = 0
        self.masked = masked

    @always_inline
    def fetch(mut self, mut batch: Batch) -> Bool:
        """The next tokens, and where their rows will be.

        Args:
            batch: Filled in.

        Returns:
            False where there is no more.
        """
        var s = self.ep.s
        var G = s.tokens_per_signal
        if self.done == 0 and not self.turns.next():
            return False
        var chunk = self.turns.chunk
        var begin = chunk * G + self.done
        var end = min((chunk + 1) * G, self.T)
        var width = self.width
        var n = min(quotient(WarpTeam.lanes, width), end - begin)
        batch.chunk = Int32(chunk)
        batch.token = Int32(begin)
        batch.tokens = Int32(n)
        batch.ends = begin + n == end
        self.done += n
        if batch.ends:
            self.done = 0
        var index = quotient(Int(lane_id()), width)
        var which = Int(lane_id()) - index * width
        var t = begin + index
        var peers: UInt32 = 0
        if index < n:
            comptime if Self.by_row:
                peers = self._destination(t * s.top_k + which)
                batch.weight = self.x.weight(t, which, s.top_k)
            else:
                if s.everywhere:
                    peers = everyone(s)
                else:
                    for k in range(0, s.top_k, IDS_AHEAD):
                        comptime for u in range(IDS_AHEAD):
                            if k + u < s.top_k:
                                peers |= self._destination(t * s.top_k + k + u)
                peers &= UInt32(1) << UInt32(which)
        batch.peers = peers
        batch.mask = LaneMask(ballot(peers != 0))
        var at: Int
        comptime if Self.by_row:
            at = row_offset(s, self.buffer, t, which)
        else:
            at = partial_offset(s, self.buffer, which, t)
        batch.row = self.ep.recv[self.ep.me].unsafe_offset(at)
        return True

    @always_inline
    def _destination(self, choice: Int) -> UInt32:
        var id = normal_id(
            self.x.ids[choice].cast[DType.int64](), self.ep.s.n_experts
        )
        var rank = destination(id, self.ep.s.n_local_experts())
        comptime if Self.by_row:
            rank &= ~self.masked
        return rank

    @always_inline
    def admit(mut self, mut batch: Batch) -> Bool:
        """Await the chunk's signals of the ranks that the batch's rows come from.

        Args:
            batch: The batch; loses the rows of ranks that are lost.

        Returns:
            False where one is missing.
        """
        var missing: UInt32 = 0
        for r in range(self.ep.s.n_ranks):
            if ballot((batch.peers >> UInt32(r)) & 1 == 1) != 0:
                missing |= UInt32(1) << UInt32(r)
        if Int(batch.chunk) != self.awaited:
            self.awaited = Int(batch.chunk)
            self.arrived = 0
        missing &= ~self.arrived
        comptime if Self.by_row:
            missing &= ~self.masked
        self.arrived |= missing
        var waiter = self.waiter
        comptime if not Self.by_row:
            waiter.shrinks = False
        var signal = 0
        var lane = Int(lane_id())
        if lane < self.ep.s.n_ranks and (missing >> UInt32(lane)) & 1 == 1:
            signal = self.ep.chunk_of(
                waiter, self.epoch, lane, Int(batch.chunk)
            )
        order_for_bulk()  # the rows may be brought in then
        if ballot(signal == NO_SIGNAL) != 0:
            return False
        comptime if Self.by_row:
            self.masked |= UInt32(ballot(signal == MASKED))
            batch.mask &= ~LaneMask(ballot(batch.peers & self.masked != 0))
        syncwarp()
        mark[MARK_COMBINE_SIGNALS_SEEN](self.ep)
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
        """Biases, then the shared expert's row.

        Parameters:
            units: Units of a slice.

        Args:
            sum: Zeros.
            token: Which token.
            span: The slice.
        """
        comptime bias_bytes = row_bytes[Self.bias_dtype, Self.hidden]()
        comptime shared_bytes = row_bytes[Self.wire, Self.hidden]()
        if self.x.bias0.present():
            add_row[Self.bias_dtype, units](
                sum, self.x.bias0.bytes(token * bias_bytes), span
            )
        if self.x.bias1.present():
            add_row[Self.bias_dtype, units](
                sum, self.x.bias1.bytes(token * bias_bytes), span
            )
        if self.x.shared_rows.present():
            add_row[Self.wire, units](
                sum, self.x.shared_rows.bytes(token * shared_bytes), span
            )

    @always_inline
    def wants(self, lanes: LaneMask) -> Bool:
        """Every token has an output.

        Args:
            lanes: Its lanes that have a row.

        Returns:
            True.
        """
        return True

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
        """Round a sum into the output.

        Parameters:
            units: Units of a slice.

        Args:
            sum: The lane's channels.
            batch: The token's batch.
            token: Which token.
            span: The slice.
        """
        comptime out_bytes = row_bytes[Self.out_dtype, Self.hidden]()
        var y = self.x.y.bytes(token * out_bytes)
        comptime for block in range(blocks(units)):
            if block == 0 or Int32(block * BLOCK * UNIT) < span.size:
                comptime for u in range(
                    block * BLOCK, min(units, (block + 1) * BLOCK)
                ):
                    var c = u * UNIT + Int(lane_id()) * WarpTeam.sum_width
                    if c < Int(span.size):
                        store_f32[Self.out_dtype, WarpTeam.sum_width](
                            y, Int(span.begin) + c, sum[u]
                        )
        mark[MARK_COMBINE_TOKEN_WRITTEN](self.ep)

    @always_inline
    def finish(mut self, batch: Batch) -> Bool:
        """Nothing is left to do.

        Args:
            batch: The batch.

        Returns:
            True.
        """
        return True


@always_inline
def receive_sums[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    by_row: Bool,
](
    ep: Endpoint[False],
    x: CombineOutput[ids_dtype],
    T: Int,
    epoch: UInt64,
    waiter: Waiter,
    masked: UInt32,
    share: Share,
):
    """Sum the calling warp's tokens, as what they are made of arrives.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        by_row: Whether a row came for each choice, and not one from each rank.

    Args:
        ep: The rank.
        x: Its tokens.
        T: How many.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        masked: Ranks of which nothing is added.
        share: The calling warp's first chunk, or `LATE`; and how many warps have one.
    """
    comptime size = slice_bytes[dtype, hidden]()
    var chunks = max(1, ep.s.n_signals(T))
    # Few tokens: several warps sum one row, each a part of its channels.
    var parts = 1
    if share.first != LATE:
        parts = max(1, min(MAX_PARTS, quotient(share.stride, chunks)))
    var part = quotient(share.first, chunks) if parts > 1 else 0
    if part >= parts:
        return
    var ring = Ring[size](
        warp_memory(combine_bytes[dtype, hidden]()), sending=False
    )
    var sums = TokenSums[
        dtype, out_dtype, bias_dtype, ids_dtype, hidden, by_row
    ](
        ep,
        x,
        T,
        epoch,
        waiter,
        masked,
        Share(share.first - part * chunks, share.stride),
    )
    sum_all(
        sums,
        ring,
        sums.width,
        part_begin[WarpTeam, hidden](part, parts),
        part_begin[WarpTeam, hidden](part + 1, parts),
    )
