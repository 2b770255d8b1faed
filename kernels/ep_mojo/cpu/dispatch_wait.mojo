"""The host's dispatch_wait: messages become output rows.

Reads this rank's windows of buffer `epoch mod B`: every source's header (T), then its table; from the tables every
output row follows without looking at payload. Then, chunk by chunk, as its signal arrives, each message is copied to
its 0 to K rows. When all is read the buffer goes back by a credit to every sender.

Writes the outputs alone. They are the handle's own copies: nothing in them points into a window.
"""

from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import KIND_CAPACITY, message_offset
from ..peers import Bytes, Scratch, View, window_view
from ..routing import NO_ROW, count_rows, local_group, map_rows, row_starts
from ..settings import Settings
from ..signal import NO_SIGNAL, Waiter
from ..team import HostTeam, StreamingTeam, Team, copy_bytes, zero_bytes
from .workers import exceeds_caches, n_workers, share


struct DispatchOutput(ImplicitlyCopyable, Movable):
    """What a rank receives. Tensors that the layout does not have are of size 0."""

    var tokens: View[DType.uint8]
    """[rows, H] as bytes."""
    var scales: View[DType.uint8]
    """Row- or column-major scales as bytes, or of size 0."""
    var row_offsets: View[DType.uint32]
    """[groups + 1], or [R + 1] with layout "rank"."""
    var counts: View[DType.int32]
    """[groups], or [R] with layout "rank"."""
    var expert_ids: View[DType.int32]
    """[groups], or of size 0."""
    var src_info: View[DType.int32]
    """[rows, 2]: (source rank * Tm + token, k)."""
    var local_ids: View[DType.int32]
    """[rows, K] with layout "rank"."""
    var local_weights: View[DType.float32]
    """[rows, K] with layout "rank"."""
    var recv_weights: View[DType.float32]
    """[R, Tm, K]."""
    var row_map: View[DType.int32]
    """[R, Tm, K]."""
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

    def clear(self):
        """No rows: what a failed launch gives, so that later kernels stay in bounds."""
        self.row_offsets.fill(0)
        self.counts.fill(0)
        self.src_info.fill(-1)
        self.local_ids.fill(-1)
        self.local_weights.fill(0)
        self.recv_weights.fill(0)
        self.row_map.fill(NO_ROW)
        self.recv_num_tokens.fill(0)


struct Rows[F: TokenFormat](ImplicitlyCopyable, Movable):
    """Where output rows and their scales are.

    Parameters:
        F: The format.
    """

    var out: DispatchOutput
    """The outputs."""
    var capacity: Int
    """Rows that fit."""
    var streams: Bool
    """Whether rows go past the caches."""

    def __init__(out self, out_: DispatchOutput):
        """Derive the capacity from the outputs.

        Args:
            out_: The outputs.
        """
        self.out = out_
        self.streams = False
        self.capacity = out_.tokens.size // Self.F.token_bytes

    @always_inline
    def put(self, message: Bytes, row: Int):
        """Copy a message to a row.

        Args:
            message: The message.
            row: The row.
        """
        if self.streams:
            self._put[StreamingTeam](message, row)
        else:
            self._put[HostTeam](message, row)

    @always_inline
    def _put[T: Team](self, message: Bytes, row: Int):
        comptime unit = 4
        comptime if Self.F.scales_by_column:
            Self.F.unpack[T](
                message,
                self.out.tokens.bytes(row * Self.F.token_bytes),
                self.out.scales.bytes(row * unit),
                self.capacity,
            )
        else:
            Self.F.unpack[T](
                message,
                self.out.tokens.bytes(row * Self.F.token_bytes),
                self.out.scales.bytes(row * Self.F.scales_per_token * unit),
                1,
            )

    def zero(self, row: Int):
        """Zero a row and its scales.

        Args:
            row: A padding row.
        """
        zero_bytes[HostTeam](
            self.out.tokens.bytes(row * Self.F.token_bytes), Self.F.token_bytes
        )
        for i in range(Self.F.scales_per_token):
            comptime if Self.F.scales_by_column:
                zero_bytes[HostTeam](
                    self.out.scales.bytes((i * self.capacity + row) * 4), 4
                )
            else:
                zero_bytes[HostTeam](
                    self.out.scales.bytes(
                        (row * Self.F.scales_per_token + i) * 4
                    ),
                    4,
                )

    def zero_padding(self, group: Int):
        """Zero the rows between a group's last and the next group's first.

        Args:
            group: The group.
        """
        var first = (
            self.out.row_offsets[group]
            + self.out.counts[group].cast[DType.uint32]()
        )
        for row in range(Int(first), Int(self.out.row_offsets[group + 1])):
            self.zero(row)


def dispatch_wait[
    F: TokenFormat, layout: StaticString
](ep: Endpoint[True], out_: DispatchOutput, stage: Int32) raises:
    """Receive.

    Parameters:
        F: The format.
        layout: Output layout: "expert", "expert_padded" or "rank".

    Args:
        ep: The rank.
        out_: The outputs.
        stage: `STAGE_*`, for the failure record.

    Raises:
        What the worker pool raises; failures of the protocol go on record instead.
    """
    var s = ep.s
    var epoch = ep.begin_wait(stage)
    var waiter = Waiter(ep.head, stage, s.virtual)
    name_groups(s, ep.me, out_)
    for r in range(s.n_ranks):
        if ep.head.failed():
            break
        out_.recv_num_tokens[r] = Int32(ep.header_of(waiter, epoch, r))
    if not ep.head.failed():
        _receive[F, layout](ep, epoch, waiter, Rows[F](out_), stage)
    if ep.head.failed():
        out_.clear()
    ep.end_wait(epoch)


def name_groups(s: Settings, rank: Int, out_: DispatchOutput):
    """Fill `expert_ids`: global ids, and E for the shared expert's group.

    Args:
        s: The settings.
        rank: My rank.
        out_: The outputs.
    """
    for g in range(out_.expert_ids.size):
        var local = g - Int(s.shared_expert)
        out_.expert_ids[g] = Int32(
            s.n_experts if local < 0 else rank * s.n_local_experts() + local
        )


def _receive[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    var rows: Rows[F],
    stage: Int32,
) raises:
    var s = ep.s
    var out_ = rows.out
    var buffer = ep.buffer(epoch)
    var groups = 1 if layout == "rank" else s.n_groups()
    var starts = Scratch[DType.int32](s.n_ranks * groups)
    var start = starts.view()
    var block = s.max_tokens * s.top_k

    def count(r: Int) raises {imm}:
        var ids = _table(ep, buffer, r)
        var mine = start.part(r * groups, groups)
        count_rows[layout](s, ids, Int(out_.recv_num_tokens[r]), r, ep.me, mine)

    def map(r: Int) raises {imm}:
        var T = Int(out_.recv_num_tokens[r])
        var mine = start.part(r * groups, groups)
        var to = out_.row_map.part(r * block, block)
        map_rows[layout](s, _table(ep, buffer, r), T, ep.me, mine, to)
        var weights = ep.own_count().unsafe_offset(
            ep.window.table_weights(buffer, r)
        )
        var kept = out_.recv_weights.bytes(r * block)
        copy_bytes[HostTeam](weights, kept, 4 * T * s.top_k)
        zero_bytes[HostTeam](
            kept.unsafe_offset(4 * T * s.top_k), 4 * (block - T * s.top_k)
        )

    for r in range(s.n_ranks):
        count(r)
    var needed = row_starts[layout](s, start, out_.row_offsets, out_.counts)
    var room = (
        s.n_ranks * s.max_tokens if layout == "expert_padded" else rows.capacity
    )
    if needed > room:
        ep.head.fail(KIND_CAPACITY, stage, value=needed, limit=room)
        return

    rows.streams = exceeds_caches(needed * F.token_bytes)
    out_.src_info.fill(-1)
    var shared_first = Int(start[ep.me * groups])
    var tokens = 0
    for r in range(s.n_ranks):
        tokens += Int(out_.recv_num_tokens[r])
        map(r)
    out_.local_ids.fill(-1)
    out_.local_weights.fill(0)

    var per_source = s.n_signals(s.max_tokens)
    var items = s.n_ranks * per_source
    var workers = n_workers(s, items, tokens * F.message_bytes)

    def work(i: Int) raises {imm}:
        if i >= items:
            rows.zero_padding(i - items)
            return
        var r = (ep.me + i) % s.n_ranks
        var chunk = i // s.n_ranks
        var first = chunk * s.tokens_per_signal
        var T = Int(out_.recv_num_tokens[r])
        if first >= T:
            return
        if not ep.chunk_of(waiter, epoch, r, chunk):
            return
        for t in range(first, min(first + s.tokens_per_signal, T)):
            var message = ep.recv[ep.me].unsafe_offset(
                message_offset(s, buffer, r, t)
            )
            for k in range(s.top_k):
                var row = Int(out_.row_map[r * block + t * s.top_k + k])
                if row < 0:
                    continue
                rows.put(message, row)
                out_.src_info[2 * row] = Int32(r * s.max_tokens + t)
                comptime if layout == "rank":
                    _localise(ep, buffer, r, t, row, out_)
                else:
                    out_.src_info[2 * row + 1] = Int32(k)
            if s.shared_expert and r == ep.me:
                rows.put(message, shared_first + t)
                out_.src_info[2 * (shared_first + t)] = Int32(
                    r * s.max_tokens + t
                )

    var padded = layout == "expert" and s.alignment > 1
    share(work, items + (groups if padded else 0), workers)
    _ = starts^


@always_inline
def _table(ep: Endpoint[True], buffer: Int, source: Int) -> View[DType.int16]:
    return window_view[DType.int16](
        ep.own_count(),
        ep.window.table_ids(buffer, source),
        ep.s.max_tokens * ep.s.top_k,
    )


@always_inline
def _localise(
    ep: Endpoint[True],
    buffer: Int,
    source: Int,
    token: Int,
    row: Int,
    out_: DispatchOutput,
):
    """Write a row's local ids and weights (layout "rank")."""
    var ids = _table(ep, buffer, source)
    var K = ep.s.top_k
    for k in range(K):
        var local = local_group(ep.s, ids[token * K + k], ep.me)
        if local >= 0:
            out_.local_ids[row * K + k] = Int32(local)
            out_.local_weights[row * K + k] = out_.recv_weights[
                (source * ep.s.max_tokens + token) * K + k
            ]
