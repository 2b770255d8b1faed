"""The fused stages on a GPU: both halves in one launch, for ranks that run at the same time.

In dispatch some warps send while others copy what arrives (`Roles`). In combine every warp sends its part, then sums;
where there is more than that, some only sum (`SumRoles`), so that the links do not rest meanwhile. Nothing of the
sending half waits for a peer's receiving half of the same round.
"""

from max.gpu import block_idx, grid_dim, lane_id
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.sync import barrier

from ..combine_tensors import CombineInput, CombineOutput, row_bytes
from ..dispatch_tensors import DispatchInput, DispatchOutput, Rows
from ..formats import TokenFormat
from ..layout import STAGE_COMBINE, STAGE_DISPATCH
from ..settings import Settings
from ..signal import Waiter
from ..team import WarpTeam
from .combine_async import (
    announce_rows,
    give_shared,
    open_send_back,
    send_back,
)
from .combine_async import slot_bytes as row_slot_bytes
from .combine_wait import (
    close_receive_back,
    open_receive_back,
    receive_back,
    zero_output,
)
from .dispatch_async import open_send, send_messages, send_tables
from .dispatch_async import slot_bytes as token_slot_bytes
from .dispatch_wait import (
    close_wait,
    copy_rows,
    give_nothing,
    keep_weights,
    mark_rest,
)
from .gate import Gate
from .launch import ByValue, Peers, Shape, is_last_cta, warp_index, warps
from .mapping import cta_bytes, map_sources, name_groups
from .precedence import precedence
from .share import Share
from .timeline import (
    COMBINE_MARKS,
    MARK_BEGUN,
    MARK_ENDED,
    MARK_OPENED,
    mark,
)


def dispatch_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    output: ByValue[DispatchOutput],
):
    """The kernel of dispatch.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        input: Its tokens.
        output: The outputs.
    """
    if not peers.value.valid():
        give_nothing(output.value)
        return
    var ep = peers.value.endpoint[True]()
    var x = input.value
    var out_ = output.value
    var sent = ep.last_sent() + 1
    var epoch = ep.next_wait()
    var waiter = Waiter(ep.head, STAGE_DISPATCH, False)
    name_groups(ep, out_)
    var gate = Gate()
    mark[MARK_BEGUN](ep)
    if gate.opens():
        open_send(ep, x, STAGE_DISPATCH)
        if lane_id() == 0:
            _ = ep.begin_wait(STAGE_DISPATCH, sent)
        gate.decide(not ep.head.failed())
        mark[MARK_OPENED](ep)
    gate.settle()
    var roles = Roles(ep.s)
    if roles.sends:
        send_messages[F, ids_dtype, encoded](
            ep, x, sent, STAGE_DISPATCH, roles.share, gate
        )
    else:
        send_tables(ep, x, sent, gate)
    if not roles.apart:
        send_messages[F, ids_dtype, encoded](
            ep, x, sent, STAGE_DISPATCH, Share(), gate
        )
        barrier()
    if gate.passed():
        if roles.maps:
            map_sources[F, layout](ep, epoch, waiter, out_, STAGE_DISPATCH)
        if roles.sends:
            mark_rest[F, layout](ep, epoch, waiter, roles.share, Rows[F](out_))
        else:
            keep_weights(ep, epoch, waiter, roles.share, out_)
            copy_rows[F, layout, 2 * token_slot_bytes[F]()](
                ep, epoch, waiter, roles.share, Rows[F](out_)
            )
            if not roles.apart:
                mark_rest[F, layout](
                    ep, epoch, waiter, roles.share, Rows[F](out_)
                )
    mark[MARK_ENDED](ep)
    if is_last_cta(ep, sending=False) and warp_index() == 0:
        ep.end_send[WarpTeam](sent)
        close_wait(ep, epoch, out_)


comptime AT_ONCE = 32 * 1024
"""Bytes of messages that a CTA has on their way to each destination, where there are many."""


struct Roles(TrivialRegisterPassable):
    """Who does what in a fused dispatch.

    The first R CTAs map; of the others some warps send, then mark what no row fills, while the rest copies. Half of
    them send where each CTA has one token at most, otherwise as many as have `AT_ONCE` bytes of messages under way:
    with more the links are no faster, and the rows come later. Where the budget is too small for all this, every warp
    sends first and copies then.
    """

    var apart: Bool
    """Whether roles differ between warps."""
    var maps: Bool
    """Whether the CTA maps sources."""
    var sends: Bool
    """Whether the warp sends, and does not copy."""
    var share: Share
    """The warp's part of its role's work."""

    @always_inline
    def __init__(out self, s: Settings):
        """Find out the calling warp's.

        Args:
            s: The settings.
        """
        var n_ranks = s.n_ranks
        var ctas = Int(grid_dim.x)
        var cta = Int(block_idx.x)
        var w = warp_index()
        var others = ctas - n_ranks
        var few = s.n_signals(s.max_tokens) <= others
        var senders = warps() // 2
        if not few:
            senders = max(1, min(senders, AT_ONCE // s.message_bytes))
        self.apart = others >= n_ranks and warps() > 1
        self.maps = cta < n_ranks
        self.sends = self.apart and not self.maps and w < senders
        if not self.apart:
            self.share = Share()
        elif self.sends:
            self.share = Share(
                w * others + cta - n_ranks, senders * others, others
            )
        else:
            var copiers = (warps() - senders) * others
            var first = copiers + w * n_ranks + cta
            if not self.maps:
                first = (w - senders) * others + cta - n_ranks
            self.share = Share(first, copiers + warps() * n_ranks)


struct SumRoles(TrivialRegisterPassable):
    """Who does what in a fused combine: every warp sends, then sums; with more tokens than two turns of that take, the
    last quarter of each CTA's warps only sums."""

    var sends: Bool
    """Whether the warp sends."""
    var sums: Bool
    """Whether it sums its rank's tokens."""
    var sending: Share
    """Its part of what is sent."""
    var summing: Share
    """Its part of the tokens."""

    @always_inline
    def __init__(out self, s: Settings):
        """Find out the calling warp's.

        Args:
            s: The settings.
        """
        var ctas = Int(grid_dim.x)
        var cta = Int(block_idx.x)
        var w = warp_index()
        var summers = warps() // 4
        var senders = warps() - summers
        self.sends = True
        self.sums = True
        self.sending = Share()
        self.summing = Share()
        if (
            summers > 0
            and s.n_ranks * s.n_signals(s.max_tokens) > 2 * ctas * warps()
        ):
            self.sends = w < senders
            self.sums = not self.sends
            self.sending = Share(w * ctas + cta, senders * ctas, ctas)
            self.summing = Share(
                (w - senders) * ctas + cta, summers * ctas, ctas
            )


def dispatch[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, layout: StaticString
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    out_: DispatchOutput,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        layout: Output layout.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        out_: The outputs, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=2 * token_slot_bytes[F](),
        cta_bytes=cta_bytes[layout](peers),
    )
    ctx.enqueue_function[dispatch_stage[F, ids_dtype, encoded, layout]](
        ByValue(peers),
        ByValue(x),
        ByValue(out_),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(shape.shared_bytes)
        ),
    )


def combine_stage[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: ByValue[Peers],
    input: ByValue[CombineInput],
    output: ByValue[CombineOutput[ids_dtype]],
):
    """The kernel of combine.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        input: The expert rows.
        output: The rank's tokens.
    """
    comptime out_bytes = row_bytes[out_dtype, hidden]()
    if not peers.value.valid():
        zero_output[out_bytes](output.value)
        return
    var ep = peers.value.endpoint[False]()
    var x = input.value
    var y = output.value
    var sent = ep.last_sent() + 1
    var epoch = ep.next_wait()
    var gate = Gate()
    mark[COMBINE_MARKS + MARK_BEGUN](ep)
    if gate.opens():
        open_send_back[dtype, hidden](ep, x, STAGE_COMBINE)
        if lane_id() == 0:
            open_receive_back(ep, y, sent, STAGE_COMBINE)
        gate.decide(not ep.head.failed())
        mark[COMBINE_MARKS + MARK_OPENED](ep)
        if gate.passed():
            announce_rows[layout, reduce](ep, x, sent)
    gate.settle()
    var roles = SumRoles(ep.s)
    if roles.sends:
        send_back[dtype, hidden, layout, reduce](
            ep, x, sent, STAGE_COMBINE, roles.sending, gate
        )
    give_shared[dtype, hidden](
        x, Int(x.num_tokens[ep.me]) if gate.passed() else 0
    )
    if roles.sums and gate.passed():
        if y.shared_rows.present():
            y.shared_rows = x.rows  # the copy may not be there yet
        receive_back[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ](ep, y, epoch, STAGE_COMBINE, roles.summing)
    mark[COMBINE_MARKS + MARK_ENDED](ep)
    if is_last_cta(ep, sending=False):
        if warp_index() == 0:
            ep.end_send[WarpTeam](sent)
        close_receive_back[out_bytes](ep, y, epoch)


def combine[
    dtype: DType,
    out_dtype: DType,
    bias_dtype: DType,
    ids_dtype: DType,
    hidden: Int,
    layout: StaticString,
    reduce: StaticString,
](
    peers: Peers,
    x: CombineInput,
    y: CombineOutput[ids_dtype],
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        dtype: Type on the wire.
        out_dtype: Type of the output.
        bias_dtype: Type of both biases.
        ids_dtype: Type of the ids.
        hidden: H.
        layout: Output layout of the dispatch.
        reduce: "expert" or "source".

    Args:
        peers: The rank's side.
        x: The expert rows, in device memory.
        y: The rank's tokens, in device memory.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var s = peers.s
    var shape = Shape(
        ctx,
        s,
        items=s.n_ranks * s.n_signals(s.max_tokens),
        warp_bytes=row_slot_bytes[dtype, hidden](),
    )
    ctx.enqueue_function[
        combine_stage[
            dtype, out_dtype, bias_dtype, ids_dtype, hidden, layout, reduce
        ]
    ](
        ByValue(peers),
        ByValue(x),
        ByValue(y),
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(shape.shared_bytes)
        ),
    )
