"""The ops of combine. See `ops/__init__.mojo` for what all ops share."""

import extensibility
from extensibility import InputTensor, OutputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..combine_tensors import CombineInput, CombineOutput
from .exchange import exchange_sums, send_rows
from .receive import receive_sums
from .tensors import raw, read_peers, view


@extensibility.register("ep_mojo_combine_async")
struct CombineAsync:
    """Sends expert rows back; returns when all have left."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        shared_out: OutputTensor[rank=2, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        rows: InputTensor[...],
        row_map: InputTensor[dtype=DType.int32, ...],
        recv_weights: InputTensor[dtype=DType.float32, rank=3, ...],
        recv_num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends expert rows back; returns when all have left.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy, "rank" or "expert".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            shared_out: The shared expert's rows [T, H], or of size 0.
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            rows: Expert rows, in the rows of the dispatch.
            row_map: From the handle; with slots "expert" the handle's src_info instead.
            recv_weights: From the handle.
            recv_num_tokens: From the handle.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        var input = CombineInput(
            raw(rows),
            view(row_map),
            view(recv_weights),
            view(recv_num_tokens),
            raw(shared_out),
        )
        send_rows[rows.dtype, hidden, layout, reduce, slots, target](
            peers, input, ctx
        )


@extensibility.register("ep_mojo_combine_wait")
struct CombineWait:
    """Receives and sums expert rows."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
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
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        bias0: InputTensor[rank=2, ...],
        bias1: InputTensor[dtype=bias0.dtype, rank=2, ...],
        shared_rows: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives and sums expert rows.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy, "rank" or "expert".
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
            topk_ids: The router's choices [T, K].
            weights: The router's weights [T, K] for reduce "source", or of size 0.
            num_tokens: T where it is less than the rows of y, or of size 0.
            bias0: First bias [T, H], or of size 0.
            bias1: Second bias [T, H], or of size 0.
            shared_rows: Output of `ep_mojo_combine_async`; its dtype is that of the wire.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        var output = CombineOutput[topk_ids.dtype](
            raw(y),
            y.dim_size(0),
            view(topk_ids),
            view(weights),
            view(num_tokens),
            raw(bias0),
            raw(bias1),
            raw(shared_rows),
        )
        receive_sums[
            shared_rows.dtype,
            y.dtype,
            bias0.dtype,
            topk_ids.dtype,
            hidden,
            layout,
            reduce,
            slots,
            target,
        ](peers, output, ctx)


@extensibility.register("ep_mojo_combine")
struct Combine:
    """Sends back, receives and sums expert rows in one launch."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
        slots: StaticString,
        n_sms: Int,
        target: StaticString,
    ](
        y: OutputTensor[rank=2, ...],
        shared_out: OutputTensor[rank=2, ...],
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        rows: InputTensor[...],
        row_map: InputTensor[dtype=DType.int32, rank=3, ...],
        recv_weights: InputTensor[dtype=DType.float32, rank=3, ...],
        recv_num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        bias0: InputTensor[rank=2, ...],
        bias1: InputTensor[dtype=bias0.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends back, receives and sums expert rows in one launch.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy, "rank" or "expert".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            y: Sums [T, H].
            shared_out: The shared expert's rows [T, H], or of size 0.
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            rows: Expert rows, in the rows of the dispatch.
            row_map: From the handle.
            recv_weights: From the handle.
            recv_num_tokens: From the handle.
            topk_ids: The router's choices [T, K].
            weights: The router's weights [T, K] for reduce "source", or of size 0.
            num_tokens: T where it is less than the rows of y, or of size 0.
            bias0: First bias [T, H], or of size 0.
            bias1: Second bias [T, H], or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, OrderError: As text in front of the message.
        """
        var peers = read_peers[target, n_sms](
            settings, counters, recv_ptrs, recv_count_ptrs
        )
        var input = CombineInput(
            raw(rows),
            view(row_map),
            view(recv_weights),
            view(recv_num_tokens),
            raw(shared_out),
        )
        var output = CombineOutput[topk_ids.dtype](
            raw(y),
            y.dim_size(0),
            view(topk_ids),
            view(weights),
            view(num_tokens),
            raw(bias0),
            raw(bias1),
            raw(shared_out),
        )
        exchange_sums[
            rows.dtype,
            y.dtype,
            bias0.dtype,
            topk_ids.dtype,
            hidden,
            layout,
            reduce,
            slots,
            target,
        ](peers, input, output, ctx)
