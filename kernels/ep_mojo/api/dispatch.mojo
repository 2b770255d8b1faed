"""The seed-named functions of dispatch."""

from layout import TileTensor
from max.gpu.host import DeviceContext, FuncAttribute
from std.sys import size_of

from ..cpu import expert_slots_dispatch
from ..dispatch_tensors import DispatchInput, DispatchOutput, InputScales
from ..formats import TokenFormat
from ..head import Head
from ..identity import check_identity
from ..launch import Endpoint
from ..layout import (
    HEAD_DISPATCH_HASH,
    HEAD_TOP_K,
    MAX_TOP_K,
    STAGE_DISPATCH_ASYNC,
    STAGE_DISPATCH_WAIT,
)
from ..ops.checks import check_aligned, check_input, require
from ..peers import PeerTable, Scratch, View
from ..setup import tile_bytes, tile_view
from .counters import ANY_RANK, EPLocalSyncCounters
from .dispatch_kernels import (
    dispatch_async_kernel,
    dispatch_async_shape,
    dispatch_wait_kernel,
    dispatch_wait_shape,
)
from .settings import dispatch_hash, dispatch_settings
from .target import (
    MAX_SMS,
    MAX_THREADS,
    check_ranks,
    check_target,
    check_top_k,
)
from .token_handler import TokenHandler


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
        target: Where to run: "cpu", or "gpu" on the device of `context`.
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
    var factor = Scratch[DType.float32](1, 1)
    var input = DispatchInput[DType.int32](
        tile_bytes(input_tokens),
        Int(input_tokens.dim(0)),
        View[DType.uint8](),
        tile_view(topk_ids),
        View[DType.float32](),
        View[DType.int32](),
        factor.view(),
    )
    var recv = tile_view(recv_ptrs)
    var count = tile_view(recv_count_ptrs)
    comptime if target == "gpu":
        check_ranks[n_experts, n_gpus_per_node](recv, count)
        var top_k = Int(topk_ids.dim(1))
        check_top_k(top_k)
        var s = dispatch_settings[
            F, n_experts, max_token_per_rank, n_gpus_per_node
        ](top_k)
        check_input[F, False, True](s, input)
        check_aligned("input_tokens", input.tokens)
        var shape = dispatch_async_shape[F](context, s, input.rows)
        context.enqueue_function[
            dispatch_async_kernel[
                input_tokens.dtype,
                MAX_THREADS,
                type_of(input_tokens).LayoutType,
                type_of(topk_ids).LayoutType,
                MAX_SMS,
                n_experts,
                n_gpus_per_node,
                max_token_per_rank,
                n_gpus_per_node,
                F,
                input_scales_wrapper,
                use_shmem,
            ]
        ](
            input_tokens,
            topk_ids,
            PeerTable(recv)[0],
            PeerTable(recv).pointers[UInt8, n_gpus_per_node](),
            PeerTable(count).pointers[UInt64, n_gpus_per_node](),
            EPLocalSyncCounters[n_experts](atomic_counters),
            ANY_RANK,
            grid_dim=shape.ctas,
            block_dim=shape.threads,
            shared_mem_bytes=shape.shared_bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(shape.shared_bytes)
            ),
        )
    else:
        var ep = _dispatch_endpoint[
            F, n_experts, max_token_per_rank, n_gpus_per_node
        ](tile_view(atomic_counters), recv, count)
        comptime if input_scales_wrapper:
            comptime scale_of = input_scales_wrapper.value()
            factor.view()[0] = scale_of[DType.float32](0)
        check_input[F, False, True](ep.s, input)
        expert_slots_dispatch.dispatch_async[F, DType.int32, False](
            ep, input, STAGE_DISPATCH_ASYNC
        )
    _ = factor^


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
    token_handler: TokenHandler[token_fmt_type, ...],
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
        target: Where to run: "cpu", or "gpu" on the device of `context`.
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
    comptime n_local = n_experts // n_gpus_per_node
    var rows = token_handler.tokens.size // F.token_bytes
    require("row_offsets: elements", row_offsets.num_elements(), n_local + 1)
    require("expert_ids: elements", expert_ids.num_elements(), n_local)
    require("src_info: elements", src_info.num_elements(), 2 * rows)
    require(
        "scales: bytes",
        token_handler.scales.size,
        rows * F.scales_per_token * size_of[Scalar[F.scale_dtype]](),
    )
    var recv = tile_view(recv_ptrs)
    var count = tile_view(recv_count_ptrs)
    comptime if target == "gpu":
        check_ranks[n_experts, n_gpus_per_node](recv, count)
        check_aligned("tokens", token_handler.tokens)
        var shape = dispatch_wait_shape[F](
            context,
            dispatch_settings[
                F, n_experts, max_token_per_rank, n_gpus_per_node
            ](),
        )
        context.enqueue_function[
            dispatch_wait_kernel[
                MAX_THREADS,
                type_of(row_offsets).LayoutType,
                type_of(expert_ids).LayoutType,
                type_of(src_info).LayoutType,
                MAX_SMS,
                n_experts,
                n_gpus_per_node,
                max_token_per_rank,
                F,
            ]
        ](
            TokenHandler[F, MutUntrackedOrigin, MutUntrackedOrigin](
                token_handler.tokens, token_handler.scales
            ),
            row_offsets,
            expert_ids,
            src_info,
            PeerTable(recv).pointers[UInt8, n_gpus_per_node](),
            PeerTable(count).pointers[UInt64, n_gpus_per_node](),
            EPLocalSyncCounters[n_experts](atomic_counters),
            ANY_RANK,
            grid_dim=shape.ctas,
            block_dim=shape.threads,
            shared_mem_bytes=shape.shared_bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(shape.shared_bytes)
            ),
        )
        return
    var ep = _dispatch_endpoint[
        F, n_experts, max_token_per_rank, n_gpus_per_node
    ](tile_view(atomic_counters), recv, count)
    var no_ints = View[DType.int32]()
    var no_floats = View[DType.float32]()
    var counts = Scratch[DType.int32](n_local)
    var output = DispatchOutput(
        token_handler.tokens,
        token_handler.scales,
        tile_view(row_offsets),
        counts.view(),
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


def _dispatch_endpoint[
    F: TokenFormat, n_experts: Int, max_tokens: Int, n_ranks: Int
](
    counters: View[DType.int32],
    recv_ptrs: View[DType.uint64],
    recv_count_ptrs: View[DType.uint64],
) raises -> Endpoint[True]:
    """Settings from what a dispatch function knows, K from the head; compare them with the head's hash."""
    check_ranks[n_experts, n_ranks](recv_ptrs, recv_count_ptrs)
    var s = dispatch_settings[F, n_experts, max_tokens, n_ranks]()
    check_identity(
        counters,
        s,
        HEAD_DISPATCH_HASH,
        dispatch_hash[F, n_experts, max_tokens, n_ranks](),
    )
    s.top_k = Int(Head(counters.bytes()).i32(HEAD_TOP_K))
    if not 1 <= s.top_k <= MAX_TOP_K:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters names top_k ", s.top_k
        )
    s.combine_slots = s.top_k
    return Endpoint[True](counters, s, recv_ptrs, recv_count_ptrs)
