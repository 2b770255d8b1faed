"""The ops of layout "gathered", in one launch each. Their halves are those of dispatch and combine with that layout.
See `ops/__init__.mojo` for what all ops share."""

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..combine_tensors import CombineInput, CombineOutput
from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import FormatOf, check_format
from ..peers import View
from .exchange import exchange, exchange_sums
from .tensors import raw, read_peers, view


@extensibility.register("ep_mojo_all_gather_v")
struct AllGatherV:
    """Sends every token to all ranks, and receives those of all."""

    @staticmethod
    def execute[
        hidden: Int,
        format: StaticString,
        scale: StaticString,
        by_column: Bool,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        tokens: OutputTensor[rank=2, ...],
        scales: OutputTensor[rank=2, ...],
        row_offsets: OutputTensor[dtype=DType.uint32, rank=1, ...],
        counts: OutputTensor[dtype=DType.int32, rank=1, ...],
        src_info: OutputTensor[dtype=DType.int32, rank=2, ...],
        all_ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        all_weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        recv_num_tokens: OutputTensor[dtype=DType.int32, rank=1, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        x: InputTensor[rank=2, ...],
        x_scales: InputTensor[rank=2, ...],
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        input_scale: InputTensor[dtype=DType.float32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends every token to all ranks, and receives those of all.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            slots: Slot policy: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            tokens: All ranks' tokens.
            scales: Their scales.
            row_offsets: First row of each rank.
            counts: Rows of each rank.
            src_info: Where each row comes from.
            all_ids: What each row's token has chosen.
            all_weights: With which weights.
            recv_num_tokens: T of all ranks.
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            x: Tokens [T, H].
            x_scales: Scales of tokens that are encoded already, or of size 0.
            topk_ids: The router's choices [T, K], int32 or int64.
            weights: The router's weights [T, K], or of size 0.
            num_tokens: T where it is less than the rows of x, or of size 0.
            input_scale: Factor applied before quantising, or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        var input = DispatchInput[topk_ids.dtype](
            raw(x),
            x.dim_size(0),
            raw(x_scales),
            view(topk_ids),
            view(weights),
            view(num_tokens),
            view(input_scale),
        )
        var output = DispatchOutput(
            raw(tokens),
            raw(scales),
            view(row_offsets),
            view(counts),
            View[DType.int32](),
            view(src_info),
            view(all_ids),
            view(all_weights),
            View[DType.float32](),
            View[DType.int32](),
            view(recv_num_tokens),
        )
        exchange[F, x.dtype != F.input_dtype, "gathered", slots, target](
            peers,
            input,
            output,
            ctx,
        )


@extensibility.register("ep_mojo_reduce_scatter_v")
struct ReduceScatterV:
    """Sends every row back to where its token came from, receives and sums one from each rank."""

    @staticmethod
    def execute[
        hidden: Int,
        reduce: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        y: OutputTensor[rank=2, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        rows: InputTensor[rank=2, ...],
        recv_num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        topk_ids: InputTensor[rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        bias0: InputTensor[rank=2, ...],
        bias1: InputTensor[dtype=bias0.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends every row back to where its token came from, receives and sums one from each rank.

        Parameters:
            hidden: H.
            reduce: Reduce mode of the config, which changes nothing here.
            slots: Slot policy: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            y: Sums [T, H].
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            rows: A row for each row of the gather.
            recv_num_tokens: From the gather.
            topk_ids: The rank's own choices [T, K]; only their shape matters.
            num_tokens: T where it is less than the rows of y, or of size 0.
            bias0: First bias [T, H], or of size 0.
            bias1: Second bias [T, H], or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        var absent = View[DType.uint8]()
        var input = CombineInput(
            raw(rows),
            View[DType.int32](),
            View[DType.float32](),
            view(recv_num_tokens),
            absent,
        )
        var output = CombineOutput[topk_ids.dtype](
            raw(y),
            y.dim_size(0),
            view(topk_ids),
            View[DType.float32](),
            view(num_tokens),
            raw(bias0),
            raw(bias1),
            absent,
        )
        exchange_sums[
            rows.dtype,
            y.dtype,
            bias0.dtype,
            topk_ids.dtype,
            hidden,
            "gathered",
            reduce,
            slots,
            target,
        ](peers, input, output, ctx)
