"""The seed-named device functions of combine: stages of ExpertSlots as GPU kernels, for programs that launch them
themselves.

Launch them with a `Shape` from `combine_async_shape` or `combine_wait_shape`: at most `n_sms` CTAs, all resident,
with that much dynamic shared memory. A launch whose counters were not made for these parameters and this rank does
nothing, but for empty outputs. The host functions `ep_combine_*_kernel_api` with target "gpu" launch these.
"""

from layout import TensorLayout, TileTensor
from max.gpu.host import DeviceContext

from ..combine_tensors import (
    CombineOutput,
    Epilogue,
    RouterWeights,
    row_bytes,
)
from ..gpu import expert_slots_combine_async, expert_slots_combine_wait
from ..gpu.combine_wait import zero_output
from ..gpu.launch import Peers, Shape
from ..layout import (
    HEAD_COMBINE_HASH,
    STAGE_COMBINE_ASYNC,
    STAGE_COMBINE_WAIT,
)
from ..peers import Bytes, PeerTable, View, Words
from ..settings import Settings
from ..setup import tile_bytes, tile_view
from .counters import EPLocalSyncCounters, is_mine
from .settings import combine_hash, combine_settings
from .target import check_target


def combine_async_kernel[
    input_type: DType,
    num_threads: Int,
    input_tokens_layout: TensorLayout,
    src_info_layout: TensorLayout,
    n_sms: Int,
    hidden_size: Int,
    top_k: Int,
    n_experts: Int,
    n_ranks: Int,
    max_tokens_per_rank: Int,
    p2p_world_size: Int,
    use_shmem: Bool = True,
](
    input_tokens: TileTensor[
        input_type, input_tokens_layout, ImmUntrackedOrigin
    ],
    src_info: TileTensor[DType.int32, src_info_layout, ImmUntrackedOrigin],
    send_buf_p: Bytes,
    recv_buf_ptrs: Array[Bytes, p2p_world_size],
    recv_count_ptrs: Array[Words, p2p_world_size],
    ep_counters: EPLocalSyncCounters[n_experts],
    my_rank: Int32,
):
    """Send expert rows back to the ranks of their tokens.

    Parameters:
        input_type: Type of the rows, bfloat16 or float32.
        num_threads: The most threads of a CTA, a multiple of the warp size.
        input_tokens_layout: Layout of the rows.
        src_info_layout: Layout of the sources.
        n_sms: The most CTAs.
        hidden_size: H.
        top_k: K.
        n_experts: E, experts of all ranks.
        n_ranks: R.
        max_tokens_per_rank: Tm.
        p2p_world_size: Ranks that reach one another: R.
        use_shmem: False: the NVSHMEM transport is missing.

    Args:
        input_tokens: [rows, H], in the rows of dispatch_wait.
        src_info: Int32 [rows, 2] of dispatch_wait; rows with (-1, -1) are skipped.
        send_buf_p: Staging buffer. Not used.
        recv_buf_ptrs: Combine recv windows, [Tm][K] rows.
        recv_count_ptrs: Combine count windows, u64 [E].
        ep_counters: Counters of this rank.
        my_rank: This rank, or -1.
    """
    check_target["gpu", use_shmem, 1]()
    comptime assert p2p_world_size == n_ranks, "p2p_world_size: all ranks"
    comptime hash = combine_hash[
        input_type, hidden_size, top_k, n_experts, max_tokens_per_rank, n_ranks
    ]()
    var peers = Peers(
        combine_settings[
            input_type,
            hidden_size,
            top_k,
            n_experts,
            max_tokens_per_rank,
            n_ranks,
        ](),
        hash,
        ep_counters.counters,
        PeerTable(recv_buf_ptrs),
        PeerTable(recv_count_ptrs),
        HEAD_COMBINE_HASH,
    )
    if is_mine(peers, my_rank):
        expert_slots_combine_async.send_back[input_type, hidden_size](
            peers.endpoint[False](),
            tile_bytes(input_tokens),
            tile_view(src_info),
            STAGE_COMBINE_ASYNC,
        )


def combine_async_shape[
    dtype: DType, hidden: Int
](ctx: DeviceContext, s: Settings, rows: Int) raises -> Shape:
    """How to launch `combine_async_kernel`.

    Parameters:
        dtype: Type of the rows.
        hidden: H.

    Args:
        ctx: The device.
        s: The settings.
        rows: Rows of `input_tokens`.

    Returns:
        The size of the launch.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return expert_slots_combine_async.async_shape[dtype, hidden](ctx, s, rows)


def combine_wait_kernel[
    output_type: DType,
    num_threads: Int,
    output_tokens_layout: TensorLayout,
    n_sms: Int,
    hidden_size: Int,
    top_k: Int,
    n_experts: Int,
    n_ranks: Int,
    max_tokens_per_rank: Int,
    router_weights_wrapper: Optional[RouterWeights] = None,
    epilogue_fn: Optional[Epilogue] = None,
](
    output_tokens: TileTensor[
        output_type, output_tokens_layout, MutUntrackedOrigin
    ],
    recv_buf_ptrs: Array[Bytes, n_ranks],
    recv_count_ptrs: Array[Words, n_ranks],
    ep_counters: EPLocalSyncCounters[n_experts],
    my_rank: Int32,
    num_input_tokens: Int32,
):
    """Receive expert rows and sum them: fma in float32 over k ascending, rounded once.

    Parameters:
        output_type: Type of the rows and of the output.
        num_threads: The most threads of a CTA, a multiple of the warp size.
        output_tokens_layout: Layout of the output.
        n_sms: The most CTAs.
        hidden_size: H.
        top_k: K.
        n_experts: E, experts of all ranks.
        n_ranks: R.
        max_tokens_per_rank: Tm.
        router_weights_wrapper: The router's weights, called on the device; None: 1.
        epilogue_fn: Called on the device with the sums of every token after they were stored, 8 channels at a time.

    Args:
        output_tokens: [T, H], out; zero past `num_input_tokens`.
        recv_buf_ptrs: Combine recv windows; this rank's is read.
        recv_count_ptrs: Combine count windows; this rank's is read.
        ep_counters: Counters of this rank.
        my_rank: This rank, or -1.
        num_input_tokens: Tokens that were dispatched; -1: all of `output_tokens`.
    """
    comptime hash = combine_hash[
        output_type, hidden_size, top_k, n_experts, max_tokens_per_rank, n_ranks
    ]()
    comptime row = row_bytes[output_type, hidden_size]()
    var peers = Peers(
        combine_settings[
            output_type,
            hidden_size,
            top_k,
            n_experts,
            max_tokens_per_rank,
            n_ranks,
        ](),
        hash,
        ep_counters.counters,
        PeerTable(recv_buf_ptrs),
        PeerTable(recv_count_ptrs),
        HEAD_COMBINE_HASH,
    )
    var none = View[DType.uint8]()
    var y = CombineOutput[DType.int32](
        tile_bytes(output_tokens),
        Int(output_tokens.dim(0)),
        View[DType.int32](),
        View[DType.float32](),
        View[DType.int32](),
        none,
        none,
        none,
    )
    if not is_mine(peers, my_rank):
        zero_output[row](y)
        return
    expert_slots_combine_wait.receive_back[
        output_type,
        output_type,
        output_type,
        DType.int32,
        hidden_size,
        router_weights_wrapper,
        epilogue_fn,
    ](
        peers.endpoint[False](),
        y,
        STAGE_COMBINE_WAIT,
        y.rows if num_input_tokens == -1 else Int(num_input_tokens),
    )


def combine_wait_shape(
    ctx: DeviceContext, s: Settings, tokens: Int
) raises -> Shape:
    """How to launch `combine_wait_kernel`.

    Args:
        ctx: The device.
        s: The settings.
        tokens: Rows of `output_tokens`.

    Returns:
        The size of the launch.

    Raises:
        What the driver raises.
    """
    return expert_slots_combine_wait.wait_shape(ctx, s, tokens)
