"""What a combine reads and writes besides the windows, and the sum of a token, the same on every target."""

from std.sys import size_of
from std.utils import IndexList

from .launch import Endpoint
from .layout import (
    FIELD_HANDLE_TOKENS,
    FIELD_REDUCE,
    KIND_SHAPE,
    combine_header,
)
from .numeric import accumulate, store_f32
from .peers import Bytes, View
from .routing import by_source
from .team import Team

comptime RouterWeights = def[width: Int](
    token_idx: Int, topk_id: Int
) capturing -> SIMD[DType.float32, width]
"""Gives the weights of `width` choices of a token, from choice `topk_id` on."""
comptime Epilogue = def[dtype: DType, width: Int, *, alignment: Int = 1](
    IndexList[2], SIMD[dtype, width]
) capturing -> None
"""Takes `width` sums from (token, channel) on."""
comptime EPILOGUE_WIDTH = 8
"""Channels that an epilogue takes at a time."""


struct CombineInput(TrivialRegisterPassable):
    """Expert rows, and what the handle says about them."""

    var rows: View[DType.uint8]
    """[rows, H] as bytes."""
    var row_map: View[DType.int32]
    """[R, Tm, K]."""
    var weights: View[DType.float32]
    """[R, Tm, K]."""
    var num_tokens: View[DType.int32]
    """[R]."""
    var shared_out: View[DType.uint8]
    """[T, H] as bytes: receives the shared expert's rows; size 0 without a shared expert."""

    def __init__(
        out self,
        rows: View[DType.uint8],
        row_map: View[DType.int32],
        weights: View[DType.float32],
        num_tokens: View[DType.int32],
        shared_out: View[DType.uint8],
    ):
        """Name the tensors.

        Args:
            rows: Expert rows as bytes.
            row_map: The row of each choice.
            weights: All sources' weights.
            num_tokens: All sources' T.
            shared_out: Output for the shared expert's rows.
        """
        self.rows = rows
        self.row_map = row_map
        self.weights = weights
        self.num_tokens = num_tokens
        self.shared_out = shared_out

    @always_inline
    def terms[dtype: DType, hidden: Int](self, at: Int, top_k: Int) -> Terms:
        """A source token's rows on this rank, k ascending, with the router's weights.

        Parameters:
            dtype: Type of the rows.
            hidden: H.

        Args:
            at: Index of the token's first choice in `row_map`.
            top_k: K.

        Returns:
            The rows, perhaps none.
        """
        var terms = Terms()
        for k in range(top_k):
            var row = Int(self.row_map[at + k])
            if row >= 0:
                terms.add(
                    self.rows.bytes(row * row_bytes[dtype, hidden]()),
                    self.weights[at + k],
                )
        return terms^


comptime MAX_TERMS = 36
"""The most rows of one sum: K or R, two biases and a shared row."""


struct CombineOutput[ids_dtype: DType](TrivialRegisterPassable):
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
    """The rows that a sum is made of, in order, with a weight for each. Biases come first: they may be of another
    type."""

    var row: Array[Bytes, MAX_TERMS]
    """First byte of each row."""
    var weight: Array[Float32, MAX_TERMS]
    """Weight of each row."""
    var biases: Int
    """How many of the rows are biases."""
    var n: Int
    """Number of rows."""

    @always_inline
    def __init__(out self):
        """Begin without rows."""
        self.row = Array[Bytes, MAX_TERMS](uninitialized=True)
        self.weight = Array[Float32, MAX_TERMS](uninitialized=True)
        self.biases = 0
        self.n = 0

    @always_inline
    def add(mut self, row: Bytes, weight: Float32 = 1):
        """Append a row.

        Args:
            row: Its first byte.
            weight: Its weight; 1 for a plain addition, since fma(1, x, acc) is acc + x.
        """
        self.row[self.n] = row
        self.weight[self.n] = weight
        self.n += 1

    @always_inline
    def add_bias(mut self, row: Bytes):
        """Append a bias, before any other row.

        Args:
            row: Its first byte.
        """
        self.add(row)
        self.biases += 1


@always_inline
def travels_by_row[layout: StaticString, reduce: StaticString]() -> Bool:
    """Whether combine sends a row for each choice, and not one for each token of a source.

    Parameters:
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Returns:
        False with rows by source, where a token has one row.
    """
    return reduce == "source" and not by_source[layout]()


@always_inline
def row_bytes[dtype: DType, hidden: Int]() -> Int:
    """Size of a row.

    Parameters:
        dtype: Its type.
        hidden: H.

    Returns:
        Bytes.
    """
    return hidden * size_of[Scalar[dtype]]()


@always_inline
def begin_token[
    dtype: DType, bias_dtype: DType, ids_dtype: DType, hidden: Int
](mut terms: Terms, x: CombineOutput[ids_dtype], token: Int):
    """Add the first terms of a token's sum: biases, then the shared expert's row.

    Parameters:
        dtype: Type of the shared expert's rows.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.

    Args:
        terms: No terms yet.
        x: The rank's tokens.
        token: Which one.
    """
    comptime bias_bytes = row_bytes[bias_dtype, hidden]()
    if x.bias0.present():
        terms.add_bias(x.bias0.bytes(token * bias_bytes))
    if x.bias1.present():
        terms.add_bias(x.bias1.bytes(token * bias_bytes))
    if x.shared_rows.present():
        terms.add(x.shared_rows.bytes(token * row_bytes[dtype, hidden]()))


@always_inline
def sum_terms[
    T: Team,
    dtype: DType,
    bias_dtype: DType,
    out_dtype: DType,
    hidden: Int,
    streams: Bool = False,
](terms: Terms, target: Bytes, part: Int = 0, parts: Int = 1):
    """Write a sum, or a part of its channels: the terms added in order in float32, rounded once.

    Parameters:
        T: Who sums.
        dtype: Type of the terms that are no biases.
        bias_dtype: Type of the biases.
        out_dtype: Type of the result.
        hidden: H.
        streams: Whether the result goes past the caches; then `target` is aligned to 64.

    Args:
        terms: The rows.
        target: Where to.
        part: Which part of the channels, 0 to parts - 1.
        parts: Into how many the row is divided between teams.
    """

    @always_inline
    def sum[width: Int, steps: Int](first: Int) {imm}:
        comptime stride = T.lanes * width
        var acc = Array[SIMD[DType.float32, width], steps](fill=0)
        for j in range(terms.biases):
            comptime for u in range(steps):
                acc[u] = accumulate[bias_dtype, width](
                    acc[u], terms.row[j], first + u * stride, 1
                )
        for j in range(terms.biases, terms.n):
            var row = terms.row[j]
            var weight = terms.weight[j]
            comptime for u in range(steps):
                acc[u] = accumulate[dtype, width](
                    acc[u], row, first + u * stride, weight
                )
        comptime for u in range(steps):
            store_f32[out_dtype, width, streams](
                target, first + u * stride, acc[u]
            )

    comptime W = T.sum_width
    comptime S = max(1, T.sum_steps * 2 // size_of[Scalar[dtype]]())
    comptime stride = T.lanes * W
    comptime units = hidden // stride
    var unit = part_begin[T, hidden](part, parts) // stride
    var end = part_begin[T, hidden](part + 1, parts) // stride
    while unit + S <= end:
        sum[W, S](unit * stride + T.lane() * W)
        unit += S
    comptime for few in [S // 2, S // 4]:
        comptime if few > 1:
            while unit + few <= end:
                sum[W, few](unit * stride + T.lane() * W)
                unit += few
    while unit < end:
        sum[W, 1](unit * stride + T.lane() * W)
        unit += 1
    if part == parts - 1:
        for i in range(units * stride + T.lane() * 8, hidden, T.lanes * 8):
            sum[8, 1](i)


@always_inline
def part_begin[T: Team, hidden: Int](part: Int, parts: Int) -> Int:
    """Where a part of a row begins, as `sum_terms` divides it.

    Parameters:
        T: Who sums.
        hidden: H.

    Args:
        part: 0 to parts; the last one is the end of the row.
        parts: How many parts.

    Returns:
        Its first channel.
    """
    comptime stride = T.lanes * T.sum_width
    if part == parts:
        return hidden
    return part * (hidden // stride) // parts * stride


def check_header(
    ep: Endpoint[False],
    stage: Int32,
    peer: Int,
    header: Int,
    T: Int,
    by_row: Bool,
) -> Bool:
    """Record a failure where a peer sends rows of another dispatch than this rank sums, or in another mode.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        peer: The sender.
        header: The value of its header, see `combine_header`.
        T: Tokens of this launch.
        by_row: Whether this launch expects a row for each choice.

    Returns:
        Whether all is well.
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
        return False
    if header != combine_header(T, by_row):
        ep.head.fail(
            KIND_SHAPE,
            stage,
            peer=peer,
            chunk=FIELD_REDUCE,
            value=header & 1,
            limit=Int(by_row),
        )
        return False
    return True
