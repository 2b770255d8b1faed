"""The seed-named functions of combine."""

from layout import TileTensor
from max.gpu.host import DeviceContext, FuncAttribute
from std.utils import IndexList

from ..cpu import expert_slots_combine
from ..combine_tensors import (
    CombineOutput,
    EPILOGUE_WIDTH,
    Epilogue,
    RouterWeights,
)
from ..identity import check_identity
from ..launch import Endpoint
from ..layout import (
    HEAD_COMBINE_HASH,
    MAX_TOP_K,
    STAGE_COMBINE_ASYNC,
    STAGE_COMBINE_WAIT,
)
from ..numeric import load_f32
from ..ops.checks import check_aligned, check_expert_rows, require
from ..peers import PeerTable, Scratch, View
from ..setup import tile_bytes, tile_view
from .combine_kernels import (
    combine_async_kernel,
    combine_async_shape,
    combine_wait_kernel,
    combine_wait_shape,
)
from .counters import ANY_RANK, EPLocalSyncCounters
from .settings import combine_hash, combine_settings
from .target import MAX_SMS, MAX_THREADS, check_ranks, check_target


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
        target: Where to run: "cpu", or "gpu" on the device of `context`.
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
    var recv = tile_view(recv_ptrs)
    var count = tile_view(recv_count_ptrs)
    var rows = tile_bytes(input_tokens)
    comptime if target == "gpu":
        check_ranks[n_experts, n_gpus_per_node](recv, count)
        var s = combine_settings[
            combine_dtype,
            hidden_size,
            top_k,
            n_experts,
            max_token_per_rank,
            n_gpus_per_node,
        ]()
        check_expert_rows(s, rows, tile_view(src_info), s.row_bytes)
        check_aligned("input_tokens", rows)
        var shape = combine_async_shape[combine_dtype, hidden_size](
            context, s, src_info.num_elements() // 2
        )
        context.enqueue_function[
            combine_async_kernel[
                combine_dtype,
                MAX_THREADS,
                type_of(input_tokens).LayoutType,
                type_of(src_info).LayoutType,
                MAX_SMS,
                hidden_size,
                top_k,
                n_experts,
                n_gpus_per_node,
                max_token_per_rank,
                n_gpus_per_node,
                use_shmem,
            ]
        ](
            input_tokens,
            src_info,
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
        return
    var ep = _combine_endpoint[
        combine_dtype,
        hidden_size,
        top_k,
        n_experts,
        max_token_per_rank,
        n_gpus_per_node,
    ](tile_view(atomic_counters), recv, count)
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
        target: Where to run: "cpu", or "gpu" on the device of `context`.
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
    var recv = tile_view(recv_ptrs)
    var count = tile_view(recv_count_ptrs)
    var y = tile_bytes(output_tokens)
    var rows = Int(output_tokens.dim(0))
    comptime if target == "gpu":
        check_ranks[n_experts, n_gpus_per_node](recv, count)
        var s = combine_settings[
            combine_dtype,
            hidden_size,
            top_k,
            n_experts,
            max_token_per_rank,
            n_gpus_per_node,
        ]()
        require("output_tokens: bytes", y.size, rows * s.row_bytes)
        check_aligned("output_tokens", y)
        var shape = combine_wait_shape(context, s, rows)
        context.enqueue_function[
            combine_wait_kernel[
                combine_dtype,
                MAX_THREADS,
                type_of(output_tokens).LayoutType,
                MAX_SMS,
                hidden_size,
                top_k,
                n_experts,
                n_gpus_per_node,
                max_token_per_rank,
                router_weights_wrapper,
                epilogue_fn,
            ]
        ](
            output_tokens,
            PeerTable(recv).pointers[UInt8, n_gpus_per_node](),
            PeerTable(count).pointers[UInt64, n_gpus_per_node](),
            EPLocalSyncCounters[n_experts](atomic_counters),
            ANY_RANK,
            Int32(num_input_tokens),
            grid_dim=shape.ctas,
            block_dim=shape.threads,
            shared_mem_bytes=shape.shared_bytes,
        )
        return
    var ep = _combine_endpoint[
        combine_dtype,
        hidden_size,
        top_k,
        n_experts,
        max_token_per_rank,
        n_gpus_per_node,
    ](tile_view(atomic_counters), recv, count)
    require("output_tokens: bytes", y.size, rows * ep.s.row_bytes)
    var given = rows if num_input_tokens == -1 else num_input_tokens
    var T = max(0, min(rows, given))
    var num_tokens = Scratch[DType.int32](1, Int32(given))
    var weights = Scratch[DType.float32](T * top_k, 1)
    comptime if router_weights_wrapper:
        comptime weight_of = router_weights_wrapper.value()
        for i in range(T * top_k):
            weights.view()[i] = weight_of[1](i // top_k, i % top_k)[0]
    var none = View[DType.uint8]()
    var output = CombineOutput[DType.int32](
        y,
        rows,
        View[DType.int32](),
        weights.view(),
        num_tokens.view(),
        none,
        none,
        none,
    )
    expert_slots_combine.combine_wait[
        combine_dtype, combine_dtype, combine_dtype, DType.int32, hidden_size
    ](ep, output, STAGE_COMBINE_WAIT)
    _ = weights^
    _ = num_tokens^
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
    check_ranks[n_experts, n_ranks](recv_ptrs, recv_count_ptrs)
    var s = combine_settings[
        dtype, hidden, top_k, n_experts, max_tokens, n_ranks
    ]()
    check_identity(
        counters,
        s,
        HEAD_COMBINE_HASH,
        combine_hash[dtype, hidden, top_k, n_experts, max_tokens, n_ranks](),
    )
    return Endpoint[False](counters, s, recv_ptrs, recv_count_ptrs)
