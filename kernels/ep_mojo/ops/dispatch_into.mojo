"""Ops of dispatch that get everything by address, outputs too; `call.mojo` has the block. For programs that own the
memory, as PyTorch's do. What dispatch leaves beside rows and scales comes in one block of its own
(`handle_memory.mojo`).

Tensors, in order:

    rows | scales | the rest of the handle | x [T, H] | its scales, if it is encoded | topk_ids [T, K] |
    weights [T, K] or absent: 1 | num_tokens [1] or absent: T
"""

import extensibility
from extensibility import InputTensor, _MutableInputTensor
from max.gpu.host import DeviceContext
from std.sys import size_of

from ..dispatch_tensors import DispatchInput, DispatchOutput
from ..formats import FormatOf, TokenFormat, check_format
from ..handle_memory import packed_output
from ..peers import View
from ..settings import Settings
from .call import Call
from .checks import check_aligned, require
from .exchange import exchange, send_tokens
from .receive import receive

comptime N_TENSORS = 8
"""Tensors of a call."""


def _output[
    F: TokenFormat, layout: StaticString
](call: Call, s: Settings) raises -> DispatchOutput:
    """What is written."""
    var tokens, memory = call.raw(0), call.tensor[DType.int32](2)
    var rows = tokens.size // F.token_bytes
    var packed = packed_output[layout](s, tokens, call.raw(1), rows, memory)
    require("memory: words", memory.size, packed[1])
    return packed[0]


def _input[
    F: TokenFormat, encoded: Bool, ids_dtype: DType
](call: Call) -> DispatchInput[ids_dtype]:
    """What is sent."""
    comptime given = F.hidden_size * size_of[Scalar[F.input_dtype]]()
    comptime token = F.token_bytes if encoded else given
    var x = call.raw(3)
    return DispatchInput[ids_dtype](
        x,
        x.size // token,
        call.raw(4),
        call.tensor[ids_dtype](5),
        call.tensor[DType.float32](6),
        call.tensor[DType.int32](7),
        View[DType.float32](),
    )


@extensibility.register("ep_mojo_dispatch_from")
struct DispatchFrom:
    """Sends tokens of the caller; returns when all have left."""

    @staticmethod
    def execute[
        hidden: Int,
        format: StaticString,
        scale: StaticString,
        by_column: Bool,
        encoded: Bool,
        ids: DType,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends tokens of the caller; returns when all have left.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            encoded: Whether x is in the format already.
            ids: Element type of topk_ids.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        send_tokens[F, encoded, "rank", target](
            peers, _input[F, encoded, ids](given), ctx
        )


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
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Receives tokens into tensors of the caller.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            layout: Output layout.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        comptime if target == "gpu":
            check_aligned("tokens", given.raw(0))
        receive[F, layout, "rank", target](
            peers, _output[F, layout](given, peers.s), ctx
        )


@extensibility.register("ep_mojo_dispatch_into")
struct DispatchInto:
    """Sends and receives tokens in one launch, from and into tensors of the caller."""

    @staticmethod
    def execute[
        hidden: Int,
        format: StaticString,
        scale: StaticString,
        by_column: Bool,
        encoded: Bool,
        ids: DType,
        layout: StaticString,
        target: StaticString,
    ](
        order: _MutableInputTensor[dtype=DType.int32, rank=1, ...],
        call: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Sends and receives tokens in one launch, from and into tensors of the caller.

        Parameters:
            hidden: H.
            format: Name of the token format.
            scale: Its scale rule.
            by_column: Its scales layout.
            encoded: Whether x is in the format already.
            ids: Element type of topk_ids.
            layout: Output layout.
            target: Where MAX runs the op.

        Args:
            order: Shared by all ops of a graph.
            call: Int64, host: `call.mojo`.
            ctx: The device.

        Raises:
            CorruptHeadError, ConfigMismatchError, ShapeError, OrderError: As text in front of the message.
        """
        var given = Call(call, N_TENSORS)
        var peers = given.peers[target]()
        check_format[format]()
        comptime F = FormatOf[format, hidden, scale, by_column]
        exchange[F, encoded, layout, "rank", target](
            peers,
            _input[F, encoded, ids](given),
            _output[F, layout](given, peers.s),
            ctx,
        )
