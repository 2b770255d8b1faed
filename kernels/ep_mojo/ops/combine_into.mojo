"""Ops of combine with outputs that the caller gives, for programs that own the memory, as PyTorch's do: sums. What
dispatch left comes in one block (`handle_memory.mojo`). See `ops/__init__.mojo` for what all ops share."""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..combine_tensors import CombineOutput
from ..handle_memory import packed_input
from ..peers import View
from .checks import check_aligned, require_at_most
from .exchange import exchange_sums, send_rows
from .receive import receive_sums
from .tensors import raw, read_settings, view


@extensibility.register("ep_mojo_combine_async_from")
struct CombineAsyncFrom:
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
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        rows: InputTensor[...],
        memory: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends expert rows back; returns when all have left.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            rows: Expert rows, in the rows of the dispatch.
            memory: The rest of the handle.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var s = read_settings[target, n_sms](settings, counters)
        var packed = packed_input[layout](
            s, raw(rows), view(memory), View[DType.uint8]()
        )
        require_at_most("memory: words needed", packed[1], memory.size())
        send_rows[rows.dtype, hidden, layout, reduce, slots, target](
            s, packed[0], settings, counters, recv_ptrs, recv_count_ptrs, ctx
        )


@extensibility.register("ep_mojo_combine_wait_into")
struct CombineWaitInto:
    """Receives and sums expert rows, of the dtype of y, without biases, into a tensor of the caller."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
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
        y: _MutableInputTensor[rank=2, ...],
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives and sums expert rows, of the dtype of y, without biases, into a tensor of the caller.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            y: Sums [T, H].
            topk_ids: The router's choices [T, K].
            weights: The router's weights [T, K] for reduce "source", or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var s = read_settings[target, n_sms](settings, counters)
        var absent = View[DType.uint8]()
        var output = CombineOutput[topk_ids.dtype](
            raw(y),
            y.dim_size(0),
            view(topk_ids),
            view(weights),
            View[DType.int32](),
            absent,
            absent,
            absent,
        )
        comptime if target == "gpu":
            check_aligned("y", output.y)
        receive_sums[
            y.dtype,
            y.dtype,
            y.dtype,
            topk_ids.dtype,
            hidden,
            layout,
            reduce,
            slots,
            target,
        ](s, output, settings, counters, recv_ptrs, recv_count_ptrs, ctx)


@extensibility.register("ep_mojo_combine_into")
struct CombineInto:
    """Sends back, receives and sums expert rows in one launch, into a tensor of the caller."""

    @staticmethod
    def execute[
        hidden: Int,
        layout: StaticString,
        reduce: StaticString,
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
        y: _MutableInputTensor[rank=2, ...],
        rows: InputTensor[...],
        memory: InputTensor[dtype=DType.int32, rank=1, ...],
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        bias0: InputTensor[rank=2, ...],
        bias1: InputTensor[dtype=bias0.dtype, rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends back, receives and sums expert rows in one launch, into a tensor of the caller.

        Parameters:
            hidden: H.
            layout: Output layout.
            reduce: Reduce mode, "expert" or "source".
            slots: Slot policy: "rank".
            n_sms: The op's own budget of SMs, 0 = the config's.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            counters: The rank's `atomic_counters`.
            settings: Int64 [17], host.
            send_ptrs: Uint64 [R], host: staging buffers, 0 where there are none.
            recv_ptrs: Uint64 [R], host: recv windows.
            recv_count_ptrs: Uint64 [R], host: count windows.
            y: Sums [T, H].
            rows: Expert rows, in the rows of the dispatch.
            memory: The rest of the handle.
            topk_ids: The router's choices [T, K].
            weights: The router's weights [T, K] for reduce "source", or of size 0.
            bias0: First bias [T, H], or of size 0.
            bias1: Second bias [T, H], or of size 0.
            num_tokens: T where it is less than the rows of y, or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var s = read_settings[target, n_sms](settings, counters)
        var absent = View[DType.uint8]()
        var packed = packed_input[layout](s, raw(rows), view(memory), absent)
        require_at_most("memory: words needed", packed[1], memory.size())
        var output = CombineOutput[topk_ids.dtype](
            raw(y),
            y.dim_size(0),
            view(topk_ids),
            view(weights),
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
            layout,
            reduce,
            slots,
            target,
        ](
            s,
            packed[0],
            output,
            settings,
            counters,
            recv_ptrs,
            recv_count_ptrs,
            ctx,
        )
