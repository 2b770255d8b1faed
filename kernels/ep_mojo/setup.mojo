"""What a Mojo program needs besides the stages: settings from compile-time parameters, window sizes, a counters head.

For each rank allocate four windows and `atomic_counters`, all zero:

    dispatch recv    dispatch_recv_bytes(s)      combine recv    combine_recv_bytes(s)
    dispatch count   dispatch_count_bytes(s)     combine count   combine_count_bytes(s)
    atomic_counters  counters_words(s) int32, then init_counters(...)

and put the windows' addresses into tables, one address per rank: `recv_ptrs`, `recv_count_ptrs`. The count windows
are aligned to 8 bytes, the recv windows to 16. After a failure: zero all windows, `init_counters` again, on all
ranks, between rounds.
"""

from layout import TileTensor
from std.sys import size_of

from .formats import TokenFormat, format_tag
from .head import Head
from .layout import *
from .peers import MAX_RANKS, View
from .settings import (
    COMBINE_UNHASHED,
    CONFIG_UNHASHED,
    DISPATCH_UNHASHED,
    Settings,
)
from .signal import FAILED


def expert_slots_settings[
    token_fmt_type: TokenFormat, combine_dtype: DType
](
    *, n_ranks: Int, n_experts: Int, top_k: Int, max_token_per_rank: Int
) raises -> Settings:
    """Settings of the seed-named functions: ExpertSlots, layout "expert", reduce="source".

    Parameters:
        token_fmt_type: Format of dispatch.
        combine_dtype: Type of the expert rows, DType.bfloat16 or DType.float32.

    Args:
        n_ranks: R, 1 to 8.
        n_experts: E, a multiple of R, up to 2048.
        top_k: K, 1 to 32.
        max_token_per_rank: Tm, up to 2^22; Tm * K is below 2^24.

    Returns:
        The settings.

    Raises:
        ConfigError: As text in front of the message.
    """
    comptime assert (
        combine_dtype == DType.bfloat16 or combine_dtype == DType.float32
    ), "combine_dtype: bfloat16 or float32"
    if (
        not 1 <= n_ranks <= MAX_RANKS
        or not 1 <= n_experts <= MAX_EXPERTS
        or n_experts % n_ranks != 0
        or not 1 <= top_k <= MAX_TOP_K
        or not 1 <= max_token_per_rank <= MAX_TOKENS
        or max_token_per_rank * top_k > FAILED
    ):
        raise Error(
            "ep_mojo.ConfigError: n_ranks=",
            n_ranks,
            ", n_experts=",
            n_experts,
            ", top_k=",
            top_k,
            ", max_token_per_rank=",
            max_token_per_rank,
            (
                "; allowed: 1 to 8 ranks that divide n_experts (up to 2048), top_k 1 to 32,"
                " max_token_per_rank up to 2^22, times top_k below 2^24"
            ),
        )
    return Settings(
        n_ranks=n_ranks,
        n_experts=n_experts,
        top_k=top_k,
        max_tokens=max_token_per_rank,
        hidden_size=token_fmt_type.hidden_size,
        message_bytes=token_fmt_type.message_bytes + EXPERT_SLOTS_HEADER,
        row_bytes=token_fmt_type.hidden_size * size_of[Scalar[combine_dtype]](),
        format_tag=format_tag[token_fmt_type](),
    )


def dispatch_recv_bytes(s: Settings) -> Int:
    """Bytes of a rank's dispatch recv window.

    Args:
        s: The settings.

    Returns:
        The size of [L][R][Tm] messages, or [B][R][Tm] with RankSlots.
    """
    var slots = s.n_ranks * s.max_tokens
    if s.expert_slots:
        return s.n_local_experts() * slots * s.message_bytes
    return s.num_buffers * slots * s.message_stride()


def dispatch_count_bytes(s: Settings) -> Int:
    """Bytes of a rank's dispatch count window.

    Args:
        s: The settings.

    Returns:
        The size of u64 [L][R], or of a `DispatchWindow` with RankSlots.
    """
    if s.expert_slots:
        return 8 * s.n_experts
    return DispatchWindow(s).total


def combine_recv_bytes(s: Settings) -> Int:
    """Bytes of a rank's combine recv window.

    Args:
        s: The settings.

    Returns:
        The size of [B][Tm][S] rows; S is K and B is 1 with ExpertSlots.
    """
    return s.num_buffers * s.max_tokens * s.combine_slots * s.row_bytes


def combine_count_bytes(s: Settings) -> Int:
    """Bytes of a rank's combine count window.

    Args:
        s: The settings.

    Returns:
        The size of u64 [E], or of a `CombineWindow` with RankSlots.
    """
    if s.expert_slots:
        return 8 * s.n_experts
    return CombineWindow(s).total


@always_inline
def tile_view[dtype: DType](t: TileTensor[dtype, ...]) -> View[dtype]:
    """A tensor's elements.

    Parameters:
        dtype: Element type.

    Args:
        t: A row-major tensor in host memory.

    Returns:
        The view.
    """
    comptime assert t.is_row_major, "ep_mojo: tensors must be row-major"
    return View[dtype](Int(t.ptr), t.num_elements())


@always_inline
def tile_bytes(t: TileTensor[...]) -> View[DType.uint8]:
    """A tensor's memory.

    Args:
        t: A row-major tensor in host memory.

    Returns:
        The view, in bytes.
    """
    comptime assert t.is_row_major, "ep_mojo: tensors must be row-major"
    return View[DType.uint8](
        Int(t.ptr), t.num_elements() * size_of[Scalar[t.dtype]]()
    )


def init_counters(
    atomic_counters: TileTensor[mut=True, DType.int32, ...],
    s: Settings,
    *,
    rank: Int,
    timeout_ns: Int = 30_000_000_000,
    epoch: UInt64 = 0,
) raises:
    """Write a fresh head: identity, deadline, all epochs equal, no failure on record.

    Args:
        atomic_counters: Int32 [counters_words(s)] of the rank.
        s: The settings.
        rank: The rank that owns them.
        timeout_ns: Longest wait of one launch in nanoseconds, 0 = none.
        epoch: Where epochs start, the same on all ranks: 0 with zeroed windows.

    Raises:
        ShapeError: As text in front of the message.
    """
    var counters = tile_view(atomic_counters)
    if counters.size < counters_words(s) or not 0 <= rank < s.n_ranks:
        raise Error(
            "ep_mojo.ShapeError: atomic_counters has ",
            counters.size,
            " words, rank = ",
            rank,
            "; allowed: at least ",
            counters_words(s),
            " words, ranks 0 to ",
            s.n_ranks - 1,
        )
    counters.fill(0)
    var head = Head(counters.bytes())
    head.set_i32(HEAD_MAGIC, MAGIC)
    head.set_i32(HEAD_LAYOUT_VERSION, LAYOUT_VERSION)
    head.set_u64(HEAD_CONFIG_HASH, s.hash(CONFIG_UNHASHED))
    head.set_u64(HEAD_DISPATCH_HASH, s.hash(DISPATCH_UNHASHED))
    head.set_u64(HEAD_COMBINE_HASH, s.hash(COMBINE_UNHASHED))
    head.set_i32(HEAD_MY_RANK, Int32(rank))
    head.set_i32(HEAD_N_RANKS, Int32(s.n_ranks))
    head.set_i32(HEAD_TOP_K, Int32(s.top_k))
    head.set_u64(HEAD_DEADLINE_NS, UInt64(timeout_ns))
    head.set_u64(HEAD_DISPATCH_SENT, epoch)
    head.set_u64(HEAD_DISPATCH_WAITED, epoch)
    head.set_u64(HEAD_COMBINE_SENT, epoch)
    head.set_u64(HEAD_COMBINE_WAITED, epoch)


def check_counters(atomic_counters: TileTensor[DType.int32, ...]) raises:
    """Raise the failure on record, if there is one. Call it after a round: stages do not raise what peers cause.

    Args:
        atomic_counters: The rank's own.

    Raises:
        PeerTimeoutError, CapacityError, OrderError, ShapeError: As text in front of the message.
    """
    var head = Head(tile_view(atomic_counters).bytes())
    if not head.failed():
        return
    var kind = head.i32(REC_KIND)
    var name = "PeerTimeoutError"
    if kind == KIND_CAPACITY:
        name = "CapacityError"
    elif kind == KIND_ORDER:
        name = "OrderError"
    elif kind == KIND_SHAPE:
        name = "ShapeError"
    raise Error(
        "ep_mojo.",
        name,
        ": rank ",
        head.i32(REC_RANK),
        ", stage ",
        head.i32(REC_STAGE),
        " (1 dispatch_async, 2 dispatch_wait, 3 combine_async, 4 combine_wait), kind ",
        kind,
        ", peer ",
        head.i32(REC_PEER),
        ", signal ",
        head.i32(REC_CHUNK),
        ", epoch expected ",
        head.u64(REC_EXPECTED),
        " seen ",
        head.u64(REC_SEEN),
        ", value ",
        head.u64(REC_VALUE),
        " limit ",
        head.u64(REC_LIMIT),
    )
