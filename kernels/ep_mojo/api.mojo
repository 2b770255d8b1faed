"""The seed-named host functions: the four stages of ExpertSlots, for Mojo programs.

Everything is a compile-time parameter; sizes of windows and the head of `atomic_counters` come from `setup.mojo`, or from a
Python communicator with slots="expert". `context` names the device and is not used on the host. Stages raise where an
argument is wrong; what peers cause goes on record (`check_counters`).
"""

from layout import TileTensor
from max.gpu.host import DeviceContext
from std.sys import size_of
from std.utils import IndexList

from .cpu import expert_slots_combine, expert_slots_dispatch
from .cpu.combine_wait import CombineOutput
from .cpu.dispatch_async import DispatchInput
from .cpu.dispatch_wait import DispatchOutput
from .formats import TokenFormat, format_tag
from .launch import Endpoint, check_identity
from .layout import *
from .numeric import load_f32
from .ops.checks import check_expert_rows, check_input, require
from .peers import MAX_RANKS, View
from .settings import COMBINE_UNHASHED, DISPATCH_UNHASHED, Settings
from .setup import MAX_TOP_K, tile_bytes, tile_view
from .signal import Head

comptime InputScales = def[dtype: DType](Int) capturing -> Scalar[dtype]
"""Gives the factor for an expert; only the factor for expert 0 is used, for all."""
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


struct TokenHandler[token_fmt_type: TokenFormat](ImplicitlyCopyable, Movable):
    """A format together with the tensors that dispatch_wait writes for it.

    Parameters:
        token_fmt_type: The format.
    """

    var tokens: View[DType.uint8]
    """Output rows as bytes."""
    var scales: View[DType.uint8]
    """Their scales as bytes; size 0 without scales."""

    def __init__(out self, output_tokens: TileTensor[mut=True, ...]):
        """Wrap the output of a format without scales.

        Args:
            output_tokens: [rows, H] in the format's token dtype.
        """
        comptime F = Self.token_fmt_type
        comptime assert F.scales_per_token == 0, "this format has scales"
        comptime assert output_tokens.dtype == F.token_dtype, "tokens: dtype"
        self.tokens = tile_bytes(output_tokens)
        self.scales = View[DType.uint8](0, 0)

    def __init__(
        out self,
        output_tokens: TileTensor[mut=True, ...],
        output_scales: TileTensor[mut=True, ...],
    ):
        """Wrap the outputs of a format with scales.

        Args:
            output_tokens: [rows, H] in the format's token dtype.
            output_scales: [rows, S], or [S, rows] where the format says so.
        """
        comptime F = Self.token_fmt_type
        comptime assert output_tokens.dtype == F.token_dtype, "tokens: dtype"
        comptime assert output_scales.dtype == F.scale_dtype, "scales: dtype"
        self.tokens = tile_bytes(output_tokens)
        self.scales = tile_bytes(output_scales)


def check_target[target: StaticString, use_shmem: Bool, n_nodes: Int]():
    """Refuse, at compile time, what is not there yet.

    Parameters:
        target: Where to run.
        use_shmem: Whether to send through SHMEM.
        n_nodes: Number of nodes.
    """
    comptime assert n_nodes == 1, (
        "ep_mojo: n_nodes > 1 needs the NVSHMEM transport, which is missing;"
        " use n_nodes=1 (up to 8 ranks of one node)"
    )
    comptime assert not use_shmem, (
        "ep_mojo: use_shmem=True needs the NVSHMEM transport, which is missing;"
        " use use_shmem=False with peer-accessible windows"
    )
    comptime assert target == "cpu", (
        "ep_mojo: target 'gpu' is missing: it comes with the GPU stages; use"
        " target 'cpu'"
    )


def ep_dispatch_async_kernel_api[
    token_fmt_type: TokenFormat,
    n_experts: Int,
    max_token_per_rank: Int,
    n_gpus_per_node: Int,
    n_nodes: Int,
    target: StaticString,
    input_scales_wrapper: Optional[InputScales] = None,
    use_shmem: Bool = (n_nodes > 1),
](
    atomic_counters: TileTensor[mut=True, DType.int32, ...],
    input_tokens: TileTensor[...],
    topk_ids: TileTensor[DType.int32, ...],
    send_ptrs: TileTensor[DType.uint64, ...],
    recv_ptrs: TileTensor[DType.uint64, ...],
    recv_count_ptrs: TileTensor[DType.uint64, ...],
    context: DeviceContext,
) raises:
    """Send this rank's tokens to their experts; returns when all have left.

    Parameters:
        token_fmt_type: How tokens travel.
        n_experts: E, experts of all ranks.
        max_token_per_rank: Tm, the most tokens of a rank.
        n_gpus_per_node: R, ranks.
        n_nodes: 1.
        target: Where to run: "cpu".
        input_scales_wrapper: Input scales; that of expert 0 multiplies all tokens before they are quantised.
        use_shmem: False.

    Args:
        atomic_counters: Int32, of this rank.
        input_tokens: [T, H] in the format's input dtype.
        topk_ids: Int32 [T, K]; an id outside [0, E) means "no expert".
        send_ptrs: Uint64 [R]: staging buffers. Not used.
        recv_ptrs: Uint64 [R]: dispatch recv windows, [L][R][Tm] messages.
        recv_count_ptrs: Uint64 [R]: dispatch count windows, u64 [L][R].
        context: The device.

    Raises:
        CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
    """
    check_target[target, use_shmem, n_nodes]()
    comptime F = token_fmt_type
    comptime assert (
        input_tokens.dtype == F.input_dtype
    ), "input_tokens: not in the format's input dtype"
    var ep = _dispatch_endpoint[
        F, n_experts, max_token_per_rank, n_gpus_per_node
    ](tile_view(atomic_counters), tile_view(recv_ptrs), tile_view(recv_count_ptrs))
    var factor: Float32 = 1
    comptime if input_scales_wrapper:
        comptime scale_of = input_scales_wrapper.value()
        factor = scale_of[DType.float32](0)
    var input = DispatchInput[DType.int32](
        tile_bytes(input_tokens),
        Int(input_tokens.dim(0)),
        View[DType.uint8](0, 0),
        tile_view(topk_ids),
        View[DType.float32](0, 0),
        View[DType.int32](0, 0),
        View[DType.float32](Int(Pointer(to=factor)), 1),
    )
    check_input[F, False, True](ep.s, input)
    expert_slots_dispatch.dispatch_async[F, DType.int32, False](
        ep, input, STAGE_DISPATCH_ASYNC
    )
    _ = factor


def ep_dispatch_wait_kernel_api[
    token_fmt_type: TokenFormat,
    //,
    n_experts: Int,
    max_token_per_rank: Int,
    n_gpus_per_node: Int,
    n_nodes: Int,
    target: StaticString,
    input_scales_wrapper: Optional[InputScales] = None,
](
    token_handler: TokenHandler[token_fmt_type],
    row_offsets: TileTensor[mut=True, DType.uint32, ...],
    expert_ids: TileTensor[mut=True, DType.int32, ...],
    src_info: TileTensor[mut=True, DType.int32, ...],
    recv_ptrs: TileTensor[DType.uint64, ...],
    recv_count_ptrs: TileTensor[DType.uint64, ...],
    atomic_counters: TileTensor[mut=True, DType.int32, ...],
    context: DeviceContext,
    num_input_tokens: Int = -1,
) raises:
    """Receive the tokens of this rank's experts, sorted by (expert, source rank, source token, k).

    Parameters:
        token_fmt_type: How tokens travel.
        n_experts: E, experts of all ranks.
        max_token_per_rank: Tm, the most tokens of a rank.
        n_gpus_per_node: R, ranks.
        n_nodes: 1.
        target: Where to run: "cpu".
        input_scales_wrapper: Accepted for symmetry; scales were applied before sending.

    Args:
        token_handler: Output tokens and scales.
        row_offsets: Uint32 [L + 1], out: first row of each expert.
        expert_ids: Int32 [L], out: global experts.
        src_info: Int32 [rows, 2], out: (source rank * Tm + token, k), -1 where there is no row.
        recv_ptrs: Uint64 [R]: dispatch recv windows.
        recv_count_ptrs: Uint64 [R]: dispatch count windows.
        atomic_counters: Int32, of this rank.
        context: The device.
        num_input_tokens: Accepted for symmetry: nothing here depends on this rank's own T.

    Raises:
        CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
    """
    check_target[target, False, n_nodes]()
    comptime F = token_fmt_type
    var ep = _dispatch_endpoint[
        F, n_experts, max_token_per_rank, n_gpus_per_node
    ](tile_view(atomic_counters), tile_view(recv_ptrs), tile_view(recv_count_ptrs))
    var rows = token_handler.tokens.size // F.token_bytes
    var n_local = ep.s.n_local_experts()
    require("row_offsets: elements", row_offsets.num_elements(), n_local + 1)
    require("expert_ids: elements", expert_ids.num_elements(), n_local)
    require("src_info: elements", src_info.num_elements(), 2 * rows)
    require(
        "scales: bytes",
        token_handler.scales.size,
        rows * F.scales_per_token * size_of[Scalar[F.scale_dtype]](),
    )
    var no_ints = View[DType.int32](0, 0)
    var no_floats = View[DType.float32](0, 0)
    var counts = List[Int32](length=n_local, fill=0)
    var output = DispatchOutput(
        token_handler.tokens,
        token_handler.scales,
        tile_view(row_offsets),
        View[DType.int32](Int(counts.unsafe_ptr()), n_local),
        tile_view(expert_ids),
        tile_view(src_info),
        no_ints,
        no_floats,
        no_floats,
        no_ints,
        no_ints,
    )
    expert_slots_dispatch.dispatch_wait[F, "expert"](
        ep, output, STAGE_DISPATCH_WAIT
    )
    _ = counts^


def ep_combine_async_kernel_api[
    combine_dtype: DType,
    hidden_size: Int,
    top_k: Int,
    n_experts: Int,
    max_token_per_rank: Int,
    n_gpus_per_node: Int,
    n_nodes: Int,
    target: StaticString,
    use_shmem: Bool = (n_nodes > 1),
](
    atomic_counters: TileTensor[mut=True, DType.int32, ...],
    input_tokens: TileTensor[combine_dtype, ...],
    src_info: TileTensor[DType.int32, ...],
    send_ptrs: TileTensor[DType.uint64, ...],
    recv_ptrs: TileTensor[DType.uint64, ...],
    recv_count_ptrs: TileTensor[DType.uint64, ...],
    context: DeviceContext,
) raises:
    """Send expert rows back to the ranks of their tokens; returns when all have left.

    ExpertSlots has no rows of a shared expert to filter out, so there is no output here.

    Parameters:
        combine_dtype: Type of the rows, bfloat16 or float32.
        hidden_size: H.
        top_k: K.
        n_experts: E, experts of all ranks.
        max_token_per_rank: Tm, the most tokens of a rank.
        n_gpus_per_node: R, ranks.
        n_nodes: 1.
        target: Where to run: "cpu".
        use_shmem: False.

    Args:
        atomic_counters: Int32, of this rank.
        input_tokens: [rows, H]: the experts' outputs, in the rows of dispatch_wait.
        src_info: Int32 [rows, 2] of dispatch_wait; rows with (-1, -1) are skipped.
        send_ptrs: Uint64 [R]: staging buffers. Not used.
        recv_ptrs: Uint64 [R]: combine recv windows, [Tm][K] rows.
        recv_count_ptrs: Uint64 [R]: combine count windows, u64 [E].
        context: The device.

    Raises:
        CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
    """
    check_target[target, use_shmem, n_nodes]()
    var ep = _combine_endpoint[
        combine_dtype,
        hidden_size,
        top_k,
        n_experts,
        max_token_per_rank,
        n_gpus_per_node,
    ](tile_view(atomic_counters), tile_view(recv_ptrs), tile_view(recv_count_ptrs))
    var rows = tile_bytes(input_tokens)
    check_expert_rows(ep.s, rows, tile_view(src_info), ep.s.row_bytes)
    expert_slots_combine.combine_async[combine_dtype, hidden_size](
        ep, rows, tile_view(src_info), STAGE_COMBINE_ASYNC
    )


def ep_combine_wait_kernel_api[
    combine_dtype: DType,
    //,
    hidden_size: Int,
    top_k: Int,
    n_experts: Int,
    max_token_per_rank: Int,
    n_gpus_per_node: Int,
    n_nodes: Int,
    target: StaticString,
    router_weights_wrapper: Optional[RouterWeights] = None,
    epilogue_fn: Optional[Epilogue] = None,
](
    output_tokens: TileTensor[mut=True, combine_dtype, ...],
    atomic_counters: TileTensor[mut=True, DType.int32, ...],
    recv_ptrs: TileTensor[DType.uint64, ...],
    recv_count_ptrs: TileTensor[DType.uint64, ...],
    context: DeviceContext,
    num_input_tokens: Int = -1,
) raises:
    """Receive expert rows and sum them: fma in float32 over k ascending, rounded once.

    Parameters:
        combine_dtype: Type of the rows and of the output.
        hidden_size: H.
        top_k: K.
        n_experts: E, experts of all ranks.
        max_token_per_rank: Tm, the most tokens of a rank.
        n_gpus_per_node: R, ranks.
        n_nodes: 1.
        target: Where to run: "cpu".
        router_weights_wrapper: The router's weights; None: 1.
        epilogue_fn: Called with the sums of every token after they were stored, 8 channels at a time.

    Args:
        output_tokens: [T, H], out; zero past `num_input_tokens`.
        atomic_counters: Int32, of this rank.
        recv_ptrs: Uint64 [R]: combine recv windows.
        recv_count_ptrs: Uint64 [R]: combine count windows.
        context: The device.
        num_input_tokens: Tokens that were dispatched; -1: all of `output_tokens`.

    Raises:
        CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
    """
    check_target[target, False, n_nodes]()
    var ep = _combine_endpoint[
        combine_dtype,
        hidden_size,
        top_k,
        n_experts,
        max_token_per_rank,
        n_gpus_per_node,
    ](tile_view(atomic_counters), tile_view(recv_ptrs), tile_view(recv_count_ptrs))
    var y = tile_bytes(output_tokens)
    var rows = Int(output_tokens.dim(0))
    require("output_tokens: bytes", y.size, rows * ep.s.row_bytes)
    var given = Int32(rows if num_input_tokens == -1 else num_input_tokens)
    var T = max(0, min(rows, Int(given)))
    var weights = List[Float32](length=T * top_k, fill=1)
    comptime if router_weights_wrapper:
        comptime weight_of = router_weights_wrapper.value()
        for i in range(T * top_k):
            weights[i] = weight_of[1](i // top_k, i % top_k)[0]
    var none = View[DType.uint8](0, 0)
    var output = CombineOutput[DType.int32](
        y,
        rows,
        View[DType.int32](0, 0),
        View[DType.float32](Int(weights.unsafe_ptr()), len(weights)),
        View[DType.int32](Int(Pointer(to=given)), 1),
        none,
        none,
        none,
    )
    expert_slots_combine.combine_wait[
        combine_dtype, combine_dtype, combine_dtype, DType.int32, hidden_size
    ](ep, output, STAGE_COMBINE_WAIT)
    _ = weights^
    _ = given
    comptime if epilogue_fn:
        comptime epilogue = epilogue_fn.value()
        for t in range(T):
            for i in range(0, hidden_size, EPILOGUE_WIDTH):
                var sums = load_f32[combine_dtype, EPILOGUE_WIDTH](
                    y.bytes(t * ep.s.row_bytes), i
                )
                epilogue[combine_dtype, EPILOGUE_WIDTH](
                    IndexList[2](t, i), sums.cast[combine_dtype]()
                )


def _dispatch_endpoint[
    F: TokenFormat, n_experts: Int, max_tokens: Int, n_ranks: Int
](
    counters: View[DType.int32],
    recv_ptrs: View[DType.uint64],
    recv_count_ptrs: View[DType.uint64],
) raises -> Endpoint[True]:
    """Settings from what a dispatch function knows, K from the head; compare them with the head's hash."""
    _check_ranks[n_experts, n_ranks](recv_ptrs, recv_count_ptrs)
    var s = Settings(
        n_ranks=n_ranks,
        n_experts=n_experts,
        top_k=1,
        max_tokens=max_tokens,
        hidden_size=F.hidden_size,
        message_bytes=F.message_bytes + EXPERT_SLOTS_HEADER,
        row_bytes=0,
        format_tag=format_tag[F](),
    )
    check_identity(counters, s, HEAD_DISPATCH_HASH, s.hash(DISPATCH_UNHASHED))
    s.top_k = Int(Head(counters.bytes()).i32(HEAD_TOP_K))
    if not 1 <= s.top_k <= MAX_TOP_K:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters names top_k ", s.top_k
        )
    s.combine_slots = s.top_k
    return Endpoint[True](counters, s, recv_ptrs, recv_count_ptrs)


def _combine_endpoint[
    dtype: DType,
    hidden: Int,
    top_k: Int,
    n_experts: Int,
    max_tokens: Int,
    n_ranks: Int,
](
    counters: View[DType.int32],
    recv_ptrs: View[DType.uint64],
    recv_count_ptrs: View[DType.uint64],
) raises -> Endpoint[False]:
    """Settings from what a combine function knows; compare them with the head's hash."""
    comptime assert hidden % 8 == 0, "hidden_size: a multiple of 8"
    comptime assert 1 <= top_k <= MAX_TOP_K, "top_k: 1 to 32"
    _check_ranks[n_experts, n_ranks](recv_ptrs, recv_count_ptrs)
    var s = Settings(
        n_ranks=n_ranks,
        n_experts=n_experts,
        top_k=top_k,
        max_tokens=max_tokens,
        hidden_size=hidden,
        message_bytes=0,
        row_bytes=hidden * size_of[Scalar[dtype]](),
        format_tag=0,
    )
    check_identity(counters, s, HEAD_COMBINE_HASH, s.hash(COMBINE_UNHASHED))
    return Endpoint[False](counters, s, recv_ptrs, recv_count_ptrs)


def _check_ranks[
    n_experts: Int, n_ranks: Int
](recv_ptrs: View[DType.uint64], recv_count_ptrs: View[DType.uint64]) raises:
    comptime assert (
        1 <= n_ranks <= MAX_RANKS and n_experts % n_ranks == 0
    ), "n_gpus_per_node: 1 to 8, a divisor of n_experts"
    require("recv_ptrs: elements", recv_ptrs.size, n_ranks)
    require("recv_count_ptrs: elements", recv_count_ptrs.size, n_ranks)
