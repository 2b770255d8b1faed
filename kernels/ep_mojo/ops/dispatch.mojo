"""The ops of dispatch. See `ops/__init__.mojo` for what all ops share."""

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import FormatOf, check_format
from .exchange import exchange, send_tokens
from .receive import receive
from .tensors import raw, read_peers, view


@extensibility.register("ep_mojo_dispatch_async")
struct DispatchAsync:
    """Sends tokens; returns when all have left."""

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
        """Sends tokens; returns when all have left.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            slots: Slot policy, "rank" or "expert".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
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
            CorruptHeadError, ConfigMismatchError: As text in front of the message.
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
        send_tokens[F, x.dtype != F.input_dtype, slots, target](
            peers, input, ctx
        )


@extensibility.register("ep_mojo_dispatch_wait")
struct DispatchWait:
    """Receives tokens into expert or rank order."""

    @staticmethod
    def execute[
        hidden: Int,
        format: StaticString,
        scale: StaticString,
        by_column: Bool,
        layout: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        tokens: OutputTensor[...],
        scales: OutputTensor[rank=2, ...],
        row_offsets: OutputTensor[dtype=DType.uint32, rank=1, ...],
        counts: OutputTensor[dtype=DType.int32, rank=1, ...],
        expert_ids: OutputTensor[dtype=DType.int32, rank=1, ...],
        src_info: OutputTensor[dtype=DType.int32, rank=2, ...],
        local_ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        local_weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        recv_weights: OutputTensor[dtype=DType.float32, rank=3, ...],
        row_map: OutputTensor[dtype=DType.int32, rank=3, ...],
        recv_num_tokens: OutputTensor[dtype=DType.int32, rank=1, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives tokens into expert or rank order.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            layout: Output layout.
            slots: Slot policy, "rank" or "expert".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            tokens: Rows of tokens.
            scales: Their scales.
            row_offsets: First row of each group.
            counts: Rows of each group.
            expert_ids: Global expert of each group.
            src_info: Where each row comes from.
            local_ids: Local experts of each row, layout "rank".
            local_weights: Their weights.
            recv_weights: Weights of all sources [R, Tm, K].
            row_map: Row of each choice [R, Tm, K].
            recv_num_tokens: T of all sources [R].
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        var output = DispatchOutput(
            raw(tokens),
            raw(scales),
            view(row_offsets),
            view(counts),
            view(expert_ids),
            view(src_info),
            view(local_ids),
            view(local_weights),
            view(recv_weights),
            view(row_map),
            view(recv_num_tokens),
        )
        receive[F, layout, slots, target](peers, output, ctx)


@extensibility.register("ep_mojo_dispatch")
struct Dispatch:
    """Sends and receives tokens in one launch."""

    @staticmethod
    def execute[
        hidden: Int,
        format: StaticString,
        scale: StaticString,
        by_column: Bool,
        layout: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        tokens: OutputTensor[...],
        scales: OutputTensor[rank=2, ...],
        row_offsets: OutputTensor[dtype=DType.uint32, rank=1, ...],
        counts: OutputTensor[dtype=DType.int32, rank=1, ...],
        expert_ids: OutputTensor[dtype=DType.int32, rank=1, ...],
        src_info: OutputTensor[dtype=DType.int32, rank=2, ...],
        local_ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        local_weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        recv_weights: OutputTensor[dtype=DType.float32, rank=3, ...],
        row_map: OutputTensor[dtype=DType.int32, rank=3, ...],
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
        """Sends and receives tokens in one launch.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            layout: Output layout.
            slots: Slot policy, "rank" or "expert".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            tokens: Rows of tokens.
            scales: Their scales.
            row_offsets: First row of each group.
            counts: Rows of each group.
            expert_ids: Global expert of each group.
            src_info: Where each row comes from.
            local_ids: Local experts of each row, layout "rank".
            local_weights: Their weights.
            recv_weights: Weights of all sources [R, Tm, K].
            row_map: Row of each choice [R, Tm, K].
            recv_num_tokens: T of all sources [R].
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
            CorruptHeadError, ConfigMismatchError, OrderError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        comptime encoded = x.dtype != F.input_dtype
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
            view(expert_ids),
            view(src_info),
            view(local_ids),
            view(local_weights),
            view(recv_weights),
            view(row_map),
            view(recv_num_tokens),
        )
        exchange[F, encoded, layout, slots, target](
            peers,
            input,
            output,
            ctx,
        )
