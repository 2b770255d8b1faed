"""What a dispatch reads and writes besides the windows, the same on every target."""

from .formats import TokenFormat
from .launch import Endpoint
from .peers import Bytes, View, window_view
from .routing import NO_ROW, local_group
from .team import Team, fill, zero_bytes

comptime SCALE_BYTES = 4
"""Bytes of one scale."""

comptime InputScales = def[dtype: DType](Int) capturing -> Scalar[dtype]
"""Gives the factor for an expert; only the factor for expert 0 is used, for all."""


struct DispatchInput[ids_dtype: DType](TrivialRegisterPassable):
    """What a rank dispatches. Absent tensors have size 0.

    Parameters:
        ids_dtype: DType.int32 or DType.int64.
    """

    var tokens: View[DType.uint8]
    """[rows, H] as bytes."""
    var rows: Int
    """Rows of `tokens`."""
    var scales: View[DType.uint8]
    """[rows, scales_per_token] as bytes, for tokens that are encoded already."""
    var ids: View[Self.ids_dtype]
    """[rows, K]."""
    var weights: View[DType.float32]
    """[rows, K], or absent: 1."""
    var num_tokens: View[DType.int32]
    """[1], or absent: `rows`."""
    var factor: View[DType.float32]
    """[1]: input scale, or absent: 1."""

    def __init__(
        out self,
        tokens: View[DType.uint8],
        rows: Int,
        scales: View[DType.uint8],
        ids: View[Self.ids_dtype],
        weights: View[DType.float32],
        num_tokens: View[DType.int32],
        factor: View[DType.float32],
    ):
        """Name the tensors.

        Args:
            tokens: [rows, H] as bytes.
            rows: Rows of `tokens`.
            scales: Scales of encoded tokens, as bytes.
            ids: [rows, K].
            weights: [rows, K], or absent.
            num_tokens: [1], or absent.
            factor: [1], or absent.
        """
        self.tokens = tokens
        self.rows = rows
        self.scales = scales
        self.ids = ids
        self.weights = weights
        self.num_tokens = num_tokens
        self.factor = factor

    @always_inline
    def write[
        F: TokenFormat, encoded: Bool, T: Team
    ](self, token: Int, message: Bytes):
        """Write a token's message.

        Parameters:
            F: The format.
            encoded: Whether tokens and scales are in the format already.
            T: Who writes.

        Args:
            token: The token.
            message: Where to.
        """
        comptime if encoded:
            F.pack[T](
                self.tokens.bytes(token * F.token_bytes),
                self.scales.bytes(token * F.scales_per_token * 4),
                message,
            )
        else:
            var factor = self.factor[0] if self.factor.present() else Float32(1)
            F.encode[T](
                self.tokens.bytes(token * F.hidden_size * 2), factor, message
            )


struct DispatchOutput(TrivialRegisterPassable):
    """What a rank receives. Tensors that the layout does not have are of size 0."""

    var tokens: View[DType.uint8]
    """[rows, H] as bytes."""
    var scales: View[DType.uint8]
    """Row- or column-major scales as bytes, or of size 0."""
    var row_offsets: View[DType.uint32]
    """[groups + 1], or [R + 1] with rows by source."""
    var counts: View[DType.int32]
    """[groups], or [R] with rows by source."""
    var expert_ids: View[DType.int32]
    """[groups], or of size 0."""
    var src_info: View[DType.int32]
    """[rows, 2]: (source rank * Tm + token, k)."""
    var local_ids: View[DType.int32]
    """[rows, K] with rows by source."""
    var local_weights: View[DType.float32]
    """[rows, K] with rows by source."""
    var recv_weights: View[DType.float32]
    """[R, Tm, K]; of size 0 with layout "gathered"."""
    var row_map: View[DType.int32]
    """[R, Tm, K]; of size 0 with layout "gathered"."""
    var recv_num_tokens: View[DType.int32]
    """[R]."""

    def __init__(
        out self,
        tokens: View[DType.uint8],
        scales: View[DType.uint8],
        row_offsets: View[DType.uint32],
        counts: View[DType.int32],
        expert_ids: View[DType.int32],
        src_info: View[DType.int32],
        local_ids: View[DType.int32],
        local_weights: View[DType.float32],
        recv_weights: View[DType.float32],
        row_map: View[DType.int32],
        recv_num_tokens: View[DType.int32],
    ):
        """Name the tensors, in the order of the op's outputs.

        Args:
            tokens: Rows as bytes.
            scales: Scales as bytes.
            row_offsets: First row of each group.
            counts: Rows of each group.
            expert_ids: Global expert of each group.
            src_info: Where each row comes from.
            local_ids: Local experts of each row.
            local_weights: Weights of each row.
            recv_weights: All sources' weights.
            row_map: The row of each choice.
            recv_num_tokens: All sources' T.
        """
        self.tokens = tokens
        self.scales = scales
        self.row_offsets = row_offsets
        self.counts = counts
        self.expert_ids = expert_ids
        self.src_info = src_info
        self.local_ids = local_ids
        self.local_weights = local_weights
        self.recv_weights = recv_weights
        self.row_map = row_map
        self.recv_num_tokens = recv_num_tokens

    def clear[T: Team](self):
        """No rows: what a failed launch gives, so that later kernels stay in bounds.

        Parameters:
            T: Who writes.
        """
        fill[T](self.row_offsets, 0)
        fill[T](self.counts, 0)
        fill[T](self.src_info, -1)
        fill[T](self.local_ids, -1)
        fill[T](self.local_weights, 0)
        fill[T](self.recv_weights, 0)
        fill[T](self.row_map, NO_ROW)
        fill[T](self.recv_num_tokens, 0)


struct Rows[F: TokenFormat, layout: StaticString](ImplicitlyCopyable, Movable):
    """Where output rows and their scales are.

    Parameters:
        F: The format.
        layout: Output layout.
    """

    var out: DispatchOutput
    """The outputs."""
    var capacity: Int
    """Rows that fit."""
    var column: Int
    """Rows whose scales stand together, where they come by column: those of a group if they have a block each."""

    def __init__(out self, out_: DispatchOutput):
        """Derive the capacity from the outputs.

        Args:
            out_: The outputs.
        """
        self.out = out_
        self.capacity = out_.tokens.size // Self.F.token_bytes
        comptime if Self.layout == "expert_padded":
            self.column = self.capacity // max(1, out_.counts.size)
        else:
            self.column = self.capacity

    @always_inline
    def scale(self, row: Int) -> Bytes:
        """Where a row's first scale is; the next one is the stride of `put` further on.

        Args:
            row: The row.

        Returns:
            Its place.
        """
        comptime S = Self.F.scales_per_token
        comptime if not Self.F.scales_by_column:
            return self.out.scales.bytes(row * S * SCALE_BYTES)
        elif Self.layout == "expert_padded":
            var group = row // self.column
            var first = group * S * self.column + row - group * self.column
            return self.out.scales.bytes(first * SCALE_BYTES)
        else:
            return self.out.scales.bytes(row * SCALE_BYTES)

    @always_inline
    def put[T: Team](self, message: Bytes, row: Int):
        """Copy a message to a row.

        Parameters:
            T: Who copies.

        Args:
            message: The message.
            row: The row.
        """
        Self.F.unpack[T](
            message,
            self.out.tokens.bytes(row * Self.F.token_bytes),
            self.scale(row),
            self.column if Self.F.scales_by_column else 1,
        )

    def zero[T: Team](self, row: Int):
        """Zero a row and its scales.

        Parameters:
            T: Who writes.

        Args:
            row: A padding row.
        """
        zero_bytes[T](
            self.out.tokens.bytes(row * Self.F.token_bytes), Self.F.token_bytes
        )
        var stride = self.column if Self.F.scales_by_column else 1
        for i in range(Self.F.scales_per_token):
            zero_bytes[T](
                self.scale(row).unsafe_offset(i * stride * SCALE_BYTES),
                SCALE_BYTES,
            )

    def zero_padding[T: Team](self, group: Int):
        """Zero the rows between a group's last and the next group's first.

        Parameters:
            T: Who writes.

        Args:
            group: The group.
        """
        var first = (
            self.out.row_offsets[group]
            + self.out.counts[group].cast[DType.uint32]()
        )
        for row in range(Int(first), Int(self.out.row_offsets[group + 1])):
            self.zero[T](row)


@always_inline
def table_ids(
    ep: Endpoint[True], buffer: Int, source: Int
) -> View[DType.int16]:
    """The routing table of a source, in the rank's own count window.

    Args:
        ep: The rank.
        buffer: Epoch mod B.
        source: The source.

    Returns:
        Ids [Tm, K]; T of the source are valid.
    """
    return window_view[DType.int16](
        ep.own_count(),
        ep.window.table_ids(buffer, source),
        ep.s.max_tokens * ep.s.top_k,
    )


@always_inline
def table_weights(
    ep: Endpoint[True], buffer: Int, source: Int
) -> View[DType.float32]:
    """The weights that a source's routing table holds, in the rank's own count window.

    Args:
        ep: The rank.
        buffer: Epoch mod B.
        source: The source.

    Returns:
        Weights [Tm, K]; T of the source are valid.
    """
    return window_view[DType.float32](
        ep.own_count(),
        ep.window.table_weights(buffer, source),
        ep.s.max_tokens * ep.s.top_k,
    )


@always_inline
def localise[
    T: Team, layout: StaticString
](
    ep: Endpoint[True],
    buffer: Int,
    source: Int,
    token: Int,
    row: Int,
    out_: DispatchOutput,
):
    """Write a row's ids and weights: with layout "rank" local ids, -1 and 0 for experts of other ranks; with
    "gathered" as they came.

    Parameters:
        T: Who writes.
        layout: Output layout.

    Args:
        ep: The rank.
        buffer: Epoch mod B.
        source: The source.
        token: Its token.
        row: The row.
        out_: The outputs.
    """
    var ids = table_ids(ep, buffer, source)
    var weights = table_weights(ep, buffer, source)
    var K = ep.s.top_k
    for k in range(T.lane(), K, T.lanes):
        var i = token * K + k
        put_choice[layout](ep, row * K + k, ids[i], weights[i], out_)


@always_inline
def put_choice[
    layout: StaticString
](
    ep: Endpoint[True],
    at: Int,
    id: Int16,
    weight: Float32,
    out_: DispatchOutput,
):
    """Write one of a row's choices, as `localise` does.

    Parameters:
        layout: Output layout.

    Args:
        ep: The rank.
        at: Row * K + k.
        id: The expert.
        weight: Its weight.
        out_: The outputs.
    """
    comptime if layout == "rank":
        var group = local_group(ep.s, id, ep.me)
        out_.local_ids[at] = Int32(group)
        out_.local_weights[at] = weight if group >= 0 else Float32(0)
    else:
        out_.local_ids[at] = Int32(id)
        out_.local_weights[at] = weight
