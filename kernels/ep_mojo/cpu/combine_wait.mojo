"""The host's combine_wait: what came back is summed into the tokens' outputs.

Reads this rank's combine windows of buffer `epoch mod B`. For each chunk of own tokens it awaits the signals of the
ranks that own one of the chunk's experts, then, in float32 and in this order,

    acc = ((0 + bias0) + bias1) + shared row
    reduce "source"   acc = fma(w, row, acc) over valid k ascending
    otherwise         acc = acc + partial over contributing ranks ascending

and rounds once to the output type. Rows past T come back zero. Then the buffer goes back by a credit.
"""

from ..launch import Endpoint
from ..layout import (
    FIELD_HANDLE_TOKENS,
    FIELD_REDUCE,
    KIND_SHAPE,
    combine_header,
    partial_offset,
    row_offset,
)
from ..numeric import accumulate, load_f32, store_f32
from ..peers import Bytes, View
from ..routing import NO_EXPERT, destination, normal_id
from ..signal import NO_SIGNAL, Waiter
from ..team import HostTeam, zero_bytes
from .combine_async import WIDTH
from .dispatch_async import token_count
from .workers import n_workers, share


comptime MAX_TERMS = 32
"""The most rows of one sum: K or R."""


struct CombineOutput[ids_dtype: DType](ImplicitlyCopyable, Movable):
    """A rank's own tokens again: where the sums go, and what they are made of. Absent tensors have size 0.

    Parameters:
        ids_dtype: DType.int32 or DType.int64.
    """

    var y: View[DType.uint8]
    """[rows, H] as bytes, out."""
    var rows: Int
    """Rows of `y`."""
    var ids: View[Self.ids_dtype]
    """[rows, K]."""
    var weights: View[DType.float32]
    """[rows, K], for reduce "source"; absent: 1."""
    var num_tokens: View[DType.int32]
    """[1], or absent: `rows`."""
    var bias0: View[DType.uint8]
    """[rows, H] as bytes, or absent."""
    var bias1: View[DType.uint8]
    """[rows, H] as bytes, or absent."""
    var shared_rows: View[DType.uint8]
    """[rows, H] as bytes, or absent: the shared expert's rows."""

    def __init__(
        out self,
        y: View[DType.uint8],
        rows: Int,
        ids: View[Self.ids_dtype],
        weights: View[DType.float32],
        num_tokens: View[DType.int32],
        bias0: View[DType.uint8],
        bias1: View[DType.uint8],
        shared_rows: View[DType.uint8],
    ):
        """Name the tensors.

        Args:
            y: Output, as bytes.
            rows: Rows of `y`.
            ids: The router's choices.
            weights: The router's weights, or absent.
            num_tokens: T, or absent.
            bias0: First bias, or absent.
            bias1: Second bias, or absent.
            shared_rows: The shared expert's rows, or absent.
        """
        self.y = y
        self.rows = rows
        self.ids = ids
        self.weights = weights
        self.num_tokens = num_tokens
        self.bias0 = bias0
        self.bias1 = bias1
        self.shared_rows = shared_rows

    @always_inline
    def weight(self, token: Int, k: Int, top_k: Int) -> Float32:
        """The router's weight of a choice.

        Args:
            token: The token.
            k: The choice.
            top_k: K.

        Returns:
            The weight, or 1 where there are none.
        """
        if self.weights.present():
            return self.weights[token * top_k + k]
        return 1


struct Terms(Movable):
    """The rows that a token's sum is made of, in order: offsets in a window, and a weight for each."""

    var window: Bytes
    """The rank's own recv window."""
    var offset: Array[Int, MAX_TERMS]
    """Byte offset of each row."""
    var weight: Array[Float32, MAX_TERMS]
    """Weight of each row."""
    var n: Int
    """Number of rows."""

    @always_inline
    def __init__(out self, window: Bytes):
        """Begin without rows.

        Args:
            window: The rank's own recv window.
        """
        self.window = window
        self.offset = Array[Int, MAX_TERMS](fill=0)
        self.weight = Array[Float32, MAX_TERMS](fill=0)
        self.n = 0

    @always_inline
    def add(mut self, offset: Int, weight: Float32):
        """Append a row.

        Args:
            offset: Its byte offset in the window.
            weight: Its weight; 1 for a plain addition, since fma(1, x, acc) is acc + x.
        """
        self.offset[self.n] = offset
        self.weight[self.n] = weight
        self.n += 1


@always_inline
def sum_token[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
](x: CombineOutput[ids_dtype], token: Int, terms: Terms):
    """Write a token's output: biases, shared row and terms, added in that order in float32, rounded once.

    Parameters:
        dtype: Type of the terms and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.

    Args:
        x: The rank's tokens.
        token: Which one.
        terms: The rows.
    """
    comptime out_bytes = hidden * (2 if out_dtype == DType.bfloat16 else 4)
    comptime bias_bytes = hidden * (2 if bias_dtype == DType.bfloat16 else 4)
    comptime row_bytes = hidden * (2 if dtype == DType.bfloat16 else 4)
    var y = x.y.bytes(token * out_bytes)

    @always_inline
    def sum[width: Int](i: Int) {imm}:
        var acc = SIMD[DType.float32, width](0)
        if x.bias0.present():
            acc += load_f32[bias_dtype, width](
                x.bias0.bytes(token * bias_bytes), i
            )
        if x.bias1.present():
            acc += load_f32[bias_dtype, width](
                x.bias1.bytes(token * bias_bytes), i
            )
        if x.shared_rows.present():
            acc += load_f32[dtype, width](
                x.shared_rows.bytes(token * row_bytes), i
            )
        for j in range(terms.n):
            acc = accumulate[dtype, width](
                acc,
                terms.window.unsafe_offset(terms.offset[j]),
                i,
                terms.weight[j],
            )
        store_f32[out_dtype, width](y, i, acc)

    comptime whole = hidden // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        sum[WIDTH](i)
    for i in range(whole, hidden, 8):
        sum[8](i)


def check_header(
    ep: Endpoint[False],
    stage: Int32,
    peer: Int,
    header: Int,
    T: Int,
    by_row: Bool,
):
    """Record a failure where a peer sends rows of another dispatch than this rank sums, or in another mode.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        peer: The sender.
        header: The value of its header, see `combine_header`.
        T: Tokens of this launch.
        by_row: Whether this launch expects a row for each choice.
    """
    if header >> 1 != T:
        ep.head.fail(
            KIND_SHAPE,
            stage,
            peer=peer,
            chunk=FIELD_HANDLE_TOKENS,
            value=header >> 1,
            limit=T,
        )
    elif header != combine_header(T, by_row):
        ep.head.fail(
            KIND_SHAPE,
            stage,
            peer=peer,
            chunk=FIELD_REDUCE,
            value=header & 1,
            limit=Int(by_row),
        )


def combine_wait[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](ep: Endpoint[False], x: CombineOutput[ids_dtype], stage: Int32) raises:
    """Receive and sum.

    Parameters:
        dtype: Type on the wire, and of the shared expert's rows.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    comptime out_bytes = hidden * (2 if out_dtype == DType.bfloat16 else 4)
    comptime by_row = reduce == "source" and layout != "rank"
    var s = ep.s
    var K = s.top_k
    var epoch = ep.begin_wait(stage)
    var buffer = ep.buffer(epoch)
    var waiter = Waiter(ep.head, stage, s.virtual)
    var T = token_count(ep, stage, x.rows, x.num_tokens)
    for r in range(s.n_ranks):
        if ep.head.failed():
            break
        var header = ep.header_of(waiter, epoch, r)
        if header != NO_SIGNAL:
            check_header(ep, stage, r, header, T, by_row)
    var n_chunks = s.n_signals(T)
    var workers = n_workers(s, n_chunks, T * out_bytes)

    def work(chunk: Int) raises {imm}:
        var ids = Array[Int16, MAX_TERMS](fill=NO_EXPERT)
        var arrived: UInt32 = 0
        var first = chunk * s.tokens_per_signal
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var mask: UInt32 = 0
            for k in range(K):
                ids[k] = normal_id(
                    x.ids[t * K + k].cast[DType.int64](), s.n_experts
                )
                mask |= destination(ids[k], s.n_local_experts())
            for r in range(s.n_ranks):
                var bit = UInt32(1) << UInt32(r)
                if mask & bit & ~arrived != 0:
                    if not ep.chunk_of(waiter, epoch, r, chunk):
                        return
                    arrived |= bit
            var terms = Terms(ep.recv[ep.me])
            comptime if by_row:
                for k in range(K):
                    if ids[k] >= 0:
                        terms.add(
                            row_offset(s, buffer, t, k), x.weight(t, k, K)
                        )
            else:
                for r in range(s.n_ranks):
                    if (mask >> UInt32(r)) & 1 == 1:
                        terms.add(partial_offset(s, buffer, r, t), 1)
            sum_token[dtype, out_dtype, bias_dtype, ids_dtype, hidden](
                x, t, terms
            )

    if not ep.head.failed():
        share(work, n_chunks, workers)
    var done = 0 if ep.head.failed() else T * out_bytes
    zero_bytes[HostTeam](x.y.bytes(done), x.y.size - done)
    ep.end_wait(epoch)
