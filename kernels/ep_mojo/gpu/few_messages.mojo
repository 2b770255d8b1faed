"""The pieces of a dispatch of few tokens: messages that leave, and messages that become rows
(`few_dispatch.mojo`)."""

from max.gpu import lane_id
from max.gpu.primitives import warp
from max.gpu.sync import barrier
from std.bit import count_trailing_zeros

from ..dispatch_tensors import DispatchInput, Rows
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import message_offset
from ..numeric import quotient, remainder
from ..peers import Bytes
from ..routing import NO_ROW, destination, normal_id
from ..signal import Waiter
from ..team import WarpTeam
from ..tokens import readable_tokens
from .cells import receive_bytes, send_bytes
from .dispatch_async import encode_parts
from .few_tokens import FewTokens
from .launch import warp_index, warps
from .opening import Opening
from .routing import ballot
from .share import Share
from .shared_memory import SLOTS, shared_memory
from .shared_rows import (
    SlotTeam,
    finish_stores,
    order_shared_for_bulk,
    release_slots,
)
from .tables_received import localise_cells
from .timeline import (
    MARK_IDS_READ,
    MARK_MESSAGES_ARRIVED,
    MARK_MESSAGE_LOADED,
    MARK_MESSAGE_READY,
    MARK_ROWS_WRITTEN,
    mark,
)


struct Part(TrivialRegisterPassable):
    """The calling CTA's part of what some CTAs do: `for i in range(part.first, n, part.ctas)`."""

    var first: Int
    """Its first piece."""
    var ctas: Int
    """CTAs that share the work."""

    @always_inline
    def __init__(out self, first: Int, ctas: Int):
        """Name it.

        Args:
            first: Its first piece.
            ctas: CTAs that share the work.
        """
        self.first = first
        self.ctas = ctas

    @always_inline
    def share(self) -> Share:
        """The calling warp's part of it.

        Returns:
            Warps of all these CTAs in turn.
        """
        return Share(warp_index() * self.ctas + self.first, warps() * self.ctas)


@always_inline
def send_messages_as_cells[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    epoch: UInt64,
    part: Part,
    mut opening: Opening,
):
    """Send tokens, a message to one rank at a time; the whole CTA calls this.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        part: The calling CTA's.
        opening: What the first store waits for.
    """
    var s = ep.s
    var lane = Int(lane_id())
    var T = readable_tokens(x.rows, x.num_tokens)
    var message = shared_memory(SLOTS)
    for i in range(part.first, T * s.n_ranks, part.ctas):
        var t = quotient(i, s.n_ranks)
        var peer = remainder(ep.me + i, s.n_ranks)
        var owner: UInt32 = 0
        if lane < s.top_k and not s.everywhere:
            var id = x.ids[t * s.top_k + lane].cast[DType.int64]()
            owner = destination(normal_id(id, s.n_experts), s.n_local_experts())
        mark[MARK_IDS_READ](ep)
        var wanted = s.everywhere or (s.shared_expert and peer == ep.me)
        if not wanted and ballot(owner == UInt32(1) << UInt32(peer)) == 0:
            continue
        var to = ep.recv[peer].unsafe_offset(
            message_offset(s, ep.buffer(epoch), ep.me, t)
        )
        var sent: Bool
        comptime if F.verbatim and not encoded:
            sent = send_bytes[F.message_bytes](
                x.tokens.bytes(t * F.message_bytes), to, epoch, opening
            )
        else:
            barrier()  # nobody reads the message any more
            _encode[F, ids_dtype, encoded](x, t, message)
            barrier()
            mark[MARK_MESSAGE_READY](ep)
            sent = send_bytes[F.message_bytes](message, to, epoch, opening)
        if not sent:
            return
        mark[MARK_MESSAGES_ARRIVED](ep)


@always_inline
def _encode[
    F: TokenFormat, ids_dtype: DType, encoded: Bool
](x: DispatchInput[ids_dtype], t: Int, message: Bytes):
    """Write a token's message to shared memory, each warp a part of it where the format has parts."""
    comptime parts = encode_parts[F, encoded]()
    comptime if parts == 1:
        if warp_index() == 0:
            x.write[F, encoded, WarpTeam](t, message)
    else:
        var factor = x.factor[0] if x.factor.present() else Float32(1)
        var token = x.tokens.bytes(t * 2 * F.hidden_size)
        for part in range(warp_index(), parts, warps()):
            F.encode_part[WarpTeam](token, factor, message, part)


@always_inline
def receive_messages[
    F: TokenFormat, layout: StaticString
](
    ep: Endpoint[True],
    epoch: UInt64,
    waiter: Waiter,
    part: Part,
    rows: Rows[F, layout],
    stage: Int32,
):
    """Map all tokens, then copy the CTA's messages to their rows as they arrive; the whole CTA calls this.

    Parameters:
        F: The format.
        layout: Output layout.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        waiter: The launch's waiter.
        part: The calling CTA's.
        rows: The outputs.
        stage: `STAGE_*`, for the failure record.
    """
    var s = ep.s
    var out_ = rows.out
    var few = FewTokens[layout](s)
    if not few.come(ep, epoch, waiter, out_):
        return
    if not few.give_rows[F](ep, epoch, out_, stage):
        return
    var lane = Int(lane_id())
    var buffer = ep.buffer(epoch)
    for i in range(part.first, s.n_ranks * s.max_tokens, part.ctas):
        var r = remainder(ep.me + i, s.n_ranks)
        var t = quotient(i, s.n_ranks)
        var row = NO_ROW
        comptime if layout == "gathered":
            if lane == 0 and t < Int(few.tokens[r]):
                row = Int32(few.before(r) + t)
        else:
            var at = (r * s.max_tokens + t) * s.top_k + lane
            if lane < s.top_k:
                row = few.rows[at]
                if warp_index() == 0:
                    out_.row_map[at] = row
        if row >= 0 and warp_index() == 0:
            var k = -1 if layout == "rank" or layout == "gathered" else lane
            out_.src_info[2 * Int(row)] = Int32(r * s.max_tokens + t)
            out_.src_info[2 * Int(row) + 1] = Int32(k)
        var left = ballot(row >= 0)
        var shared = s.shared_expert and r == ep.me and t < Int(few.tokens[r])
        if left == 0 and not shared:
            continue
        release_slots()
        barrier()  # nobody reads the last message any more
        if not receive_bytes[F.message_bytes](
            ep,
            waiter,
            epoch,
            r,
            quotient(t, s.tokens_per_signal),
            ep.recv[ep.me].unsafe_offset(message_offset(s, buffer, r, t)),
            few.message,
        ):
            few.failed[0] = 1
        order_shared_for_bulk()
        barrier()
        if few.failed[0] != 0:
            break
        mark[MARK_MESSAGE_LOADED](ep)
        var turn = 0
        while left != 0:
            var to = Int(
                warp.shuffle_idx(row, UInt32(count_trailing_zeros(left)))
            )
            left &= left - 1
            if turn == warp_index():
                rows.put[SlotTeam](few.message, to)
                comptime if layout == "rank" or layout == "gathered":
                    localise_cells[layout, False](
                        ep, waiter, epoch, r, t, to, out_
                    )
            turn = turn + 1 if turn + 1 < warps() else 0
        if shared and turn == warp_index():
            rows.put[SlotTeam](few.message, t)
            if lane == 0:
                out_.src_info[2 * t] = Int32(r * s.max_tokens + t)
                out_.src_info[2 * t + 1] = -1
    finish_stores()
    mark[MARK_ROWS_WRITTEN](ep)
