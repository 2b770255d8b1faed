"""Ops of dispatch with outputs that the caller gives, for programs that own the memory, as PyTorch's do: rows, their
scales, and the rest of a handle in one block (`handle_memory.mojo`). See `ops/__init__.mojo` for what all ops share."""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext

from ..dispatch_tensors import DispatchInput
from ..formats import FormatOf, check_format
from ..handle_memory import packed_output
from ..peers import View
from .checks import check_aligned, require
from .exchange import exchange
from .receive import receive
from .tensors import raw, read_settings, view


@extensibility.register("ep_mojo_dispatch_wait_into")
struct DispatchWaitInto:
    """Receives tokens into tensors of the caller."""

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
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        tokens: _MutableInputTensor[...],
        scales: _MutableInputTensor[rank=2, ...],
        memory: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives tokens into tensors of the caller.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            layout: Output layout.
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
            tokens: Rows of tokens.
            scales: Their scales.
            memory: The rest of the handle.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var s = read_settings[target, n_sms](settings, counters)
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        var bytes = raw(tokens)
        var packed = packed_output[layout](
            s, bytes, raw(scales), bytes.size // F.token_bytes, view(memory)
        )
        require("memory: words", memory.size(), packed[1])
        comptime if target == "gpu":
            check_aligned("tokens", bytes)
        receive[F, layout, slots, target](
            s, packed[0], settings, counters, recv_ptrs, recv_count_ptrs, ctx
        )


@extensibility.register("ep_mojo_dispatch_into")
struct DispatchInto:
    """Sends and receives tokens in one launch, into tensors of the caller."""

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
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        counters: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        settings: InputTensor[dtype=DType.int64, rank=1, ...],
        send_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        recv_count_ptrs: InputTensor[dtype=DType.uint64, rank=1, ...],
        tokens: _MutableInputTensor[...],
        scales: _MutableInputTensor[rank=2, ...],
        memory: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        x: InputTensor[rank=2, ...],
        x_scales: InputTensor[rank=2, ...],
        topk_ids: InputTensor[rank=2, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        num_tokens: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends and receives tokens in one launch, into tensors of the caller.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            layout: Output layout.
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
            tokens: Rows of tokens.
            scales: Their scales.
            memory: The rest of the handle.
            x: Tokens [T, H].
            x_scales: Scales of tokens that are encoded already, or of size 0.
            topk_ids: The router's choices [T, K], int32 or int64.
            weights: The router's weights [T, K], or of size 0.
            num_tokens: T where it is less than the rows of x, or of size 0.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var s = read_settings[target, n_sms](settings, counters)
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        var bytes = raw(tokens)
        var packed = packed_output[layout](
            s, bytes, raw(scales), bytes.size // F.token_bytes, view(memory)
        )
        require("memory: words", memory.size(), packed[1])
        var input = DispatchInput[topk_ids.dtype](
            raw(x),
            x.dim_size(0),
            raw(x_scales),
            view(topk_ids),
            view(weights),
            view(num_tokens),
            View[DType.float32](),
        )
        exchange[F, x.dtype != F.input_dtype, layout, slots, target](
            s,
            input,
            packed[0],
            settings,
            counters,
            recv_ptrs,
            recv_count_ptrs,
            ctx,
        )
