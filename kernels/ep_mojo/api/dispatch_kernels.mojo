"""The seed-named device functions of dispatch: stages of ExpertSlots as GPU kernels, for programs that launch them
themselves.

Launch them with a `Shape` from `dispatch_async_shape` or `dispatch_wait_shape`: at most `n_sms` CTAs, all resident,
with that much dynamic shared memory. A launch whose counters were not made for these parameters, this rank and this K
does nothing, but for empty outputs. The host functions `ep_dispatch_*_kernel_api` with target "gpu" launch these.
"""

from layout import TensorLayout, TileTensor
from max.gpu.host import DeviceContext

from ..dispatch_tensors import DispatchInput, DispatchOutput, InputScales
from ..formats import TokenFormat
from ..gpu import expert_slots_dispatch_async, expert_slots_dispatch_wait
from ..gpu.dispatch_wait import give_nothing
from ..gpu.launch import Peers, Shape
from ..layout import (
    HEAD_DISPATCH_HASH,
    STAGE_DISPATCH_ASYNC,
    STAGE_DISPATCH_WAIT,
)
from ..peers import Bytes, PeerTable, View, Words
from ..settings import Settings
from ..setup import tile_bytes, tile_view
from .counters import EPLocalSyncCounters, is_mine
from .settings import dispatch_hash, dispatch_settings
from .target import check_target
from .token_handler import TokenHandler


def dispatch_async_kernel[
    input_type: DType,
    num_threads: Int,
    input_tokens_layout: TensorLayout,
    topk_ids_layout: TensorLayout,
    n_sms: Int,
    n_experts: Int,
    n_ranks: Int,
    max_tokens_per_rank: Int,
    p2p_world_size: Int,
    token_fmt_type: TokenFormat,
    input_scales_wrapper: Optional[InputScales] = None,
    use_shmem: Bool = True,
](
    input_tokens: TileTensor[
        input_type, input_tokens_layout, ImmUntrackedOrigin
    ],
    topk_ids: TileTensor[DType.int32, topk_ids_layout, ImmUntrackedOrigin],
    send_buf_p: Bytes,
    recv_buf_ptrs: Array[Bytes, p2p_world_size],
    recv_count_ptrs: Array[Words, p2p_world_size],
    ep_counters: EPLocalSyncCounters[n_experts],
    my_rank: Int32,
):
    """Send tokens to the ranks of their experts, one message for each distinct (token, expert).

    Parameters:
        input_type: Dtype of the tokens, the format's input dtype.
        num_threads: The most threads of a CTA, a multiple of the warp size.
        input_tokens_layout: Layout of the tokens.
        topk_ids_layout: Layout of the ids.
        n_sms: The most CTAs.
        n_experts: E, experts of all ranks.
        n_ranks: R.
        max_tokens_per_rank: Tm.
        p2p_world_size: Ranks that reach one another: R.
        token_fmt_type: How tokens travel.
        input_scales_wrapper: Input scales, called on the device; that of expert 0 multiplies all tokens.
        use_shmem: False: the NVSHMEM transport is missing.

    Args:
        input_tokens: [T, H].
        topk_ids: Int32 [T, K]; an id outside [0, E) means "no expert".
        send_buf_p: Staging buffer. Not used.
        recv_buf_ptrs: Dispatch recv windows, [L][R][Tm] messages.
        recv_count_ptrs: Dispatch count windows, u64 [L][R].
        ep_counters: Counters of this rank.
        my_rank: This rank, or -1.
    """
    check_target["gpu", use_shmem, 1]()
    comptime assert p2p_world_size == n_ranks, "p2p_world_size: all ranks"
    comptime F = token_fmt_type
    comptime hash = dispatch_hash[F, n_experts, max_tokens_per_rank, n_ranks]()
    var T = Int(input_tokens.dim(0))
    var ids = tile_view(topk_ids)
    var top_k = Int(topk_ids.dim(1))
    var peers = Peers(
        dispatch_settings[F, n_experts, max_tokens_per_rank, n_ranks](top_k),
        hash,
        ep_counters.counters,
        PeerTable(recv_buf_ptrs),
        PeerTable(recv_count_ptrs),
        HEAD_DISPATCH_HASH,
    )
    if not is_mine(peers, my_rank, top_k):  # no hash covers K
        return
    var x = DispatchInput[DType.int32](
        tile_bytes(input_tokens),
        T,
        View[DType.uint8](),
        ids,
        View[DType.float32](),
        View[DType.int32](),
        View[DType.float32](),
    )
    expert_slots_dispatch_async.send[
        F, DType.int32, False, input_scales=input_scales_wrapper
    ](peers.endpoint[True](), x, STAGE_DISPATCH_ASYNC)


def dispatch_async_shape[
    F: TokenFormat
](ctx: DeviceContext, s: Settings, tokens: Int) raises -> Shape:
    """How to launch `dispatch_async_kernel`.

    Parameters:
        F: The format.

    Args:
        ctx: The device.
        s: The settings.
        tokens: T.

    Returns:
        The size of the launch.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return expert_slots_dispatch_async.async_shape[F](ctx, s, tokens)


def dispatch_wait_kernel[
    num_threads: Int,
    row_offsets_layout: TensorLayout,
    expert_ids_layout: TensorLayout,
    src_info_layout: TensorLayout,
    n_sms: Int,
    n_experts: Int,
    n_ranks: Int,
    max_tokens_per_rank: Int,
    token_fmt_type: TokenFormat,
](
    token_handler: TokenHandler[
        token_fmt_type, MutUntrackedOrigin, MutUntrackedOrigin
    ],
    row_offsets: TileTensor[
        DType.uint32, row_offsets_layout, MutUntrackedOrigin
    ],
    expert_ids: TileTensor[DType.int32, expert_ids_layout, MutUntrackedOrigin],
    src_info: TileTensor[DType.int32, src_info_layout, MutUntrackedOrigin],
    recv_buf_ptrs: Array[Bytes, n_ranks],
    recv_count_ptrs: Array[Words, n_ranks],
    ep_counters: EPLocalSyncCounters[n_experts],
    my_rank: Int32,
):
    """Receive the tokens of this rank's experts, sorted by (expert, source rank, source token, k).

    Parameters:
        num_threads: The most threads of a CTA, a multiple of the warp size.
        row_offsets_layout: Layout of the offsets.
        expert_ids_layout: Layout of the expert ids.
        src_info_layout: Layout of the sources.
        n_sms: The most CTAs.
        n_experts: E, experts of all ranks.
        n_ranks: R.
        max_tokens_per_rank: Tm.
        token_fmt_type: How tokens travel.

    Args:
        token_handler: Output tokens and scales.
        row_offsets: Uint32 [L + 1], out: first row of each expert.
        expert_ids: Int32 [L], out: global experts.
        src_info: Int32 [rows, 2], out: (source rank * Tm + token, k), -1 where there is no row.
        recv_buf_ptrs: Dispatch recv windows; this rank's is read.
        recv_count_ptrs: Dispatch count windows; this rank's is read.
        ep_counters: Counters of this rank.
        my_rank: This rank, or -1.
    """
    comptime F = token_fmt_type
    comptime hash = dispatch_hash[F, n_experts, max_tokens_per_rank, n_ranks]()
    var peers = Peers(
        dispatch_settings[F, n_experts, max_tokens_per_rank, n_ranks](),
        hash,
        ep_counters.counters,
        PeerTable(recv_buf_ptrs),
        PeerTable(recv_count_ptrs),
        HEAD_DISPATCH_HASH,
    )
    var none = View[DType.int32]()
    var out_ = DispatchOutput(
        token_handler.tokens,
        token_handler.scales,
        tile_view(row_offsets),
        none,
        tile_view(expert_ids),
        tile_view(src_info),
        none,
        View[DType.float32](),
        View[DType.float32](),
        none,
        none,
    )
    if not is_mine(peers, my_rank):
        give_nothing(out_)
        return
    expert_slots_dispatch_wait.receive[F, "expert"](
        peers.endpoint[True](), out_, STAGE_DISPATCH_WAIT
    )


def dispatch_wait_shape[
    F: TokenFormat
](ctx: DeviceContext, s: Settings) raises -> Shape:
    """How to launch `dispatch_wait_kernel`.

    Parameters:
        F: The format.

    Args:
        ctx: The device.
        s: The settings.

    Returns:
        The size of the launch.

    Raises:
        UnsupportedError as text in front of the message.
    """
    return expert_slots_dispatch_wait.wait_shape[F](ctx, s)
