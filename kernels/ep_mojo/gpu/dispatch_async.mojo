"""The GPU's dispatch_async: routing table and messages leave for every destination rank.

    CTA b < R      writes the routing table into rank b's count window, and its header (value T); then messages too.
                   Where tables travel as cells every warp stores some of these instead, the last warps first
    every crew     takes chunks of G tokens: brings a token into shared memory, encodes it there once, stores the
                   message to every destination rank at once (a lane serves a rank, `rank_of_lane`), and when the
                   whole chunk has arrived publishes its signal, each lane to its rank. A crew is one warp; where the
                   format can be encoded in parts and crews of several would have a chunk each at most, it is several,
                   of which the first loads and stores

The last warp of each CTA awaits the buffer's credits, while the others load and encode their first token (`Opening`).
Then the tables go, as cells where there are not too many choices (`tables.mojo`), and the messages at once; or, where a
table goes with its header, the messages when these have left. Otherwise no warp waits for anything but its crew and its
own stores. The last CTA counts the epoch. Why the order holds: docs/protocol.md. Of few tokens messages leave as cells,
too: `few_dispatch.mojo`.
"""

from max.gpu import block_idx, lane_id
from max.gpu.host import DeviceContext

from ..dispatch_tensors import DispatchInput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import align_up, message_offset
from ..routing import NO_EXPERT, everyone, normal_id
from ..settings import Settings
from ..signal import publish, word
from ..team import WarpTeam
from ..tokens import given_tokens, readable_tokens, tokens_fit
from .launch import ByValue, Peers, Shape, is_last_cta, warp_index
from .opening import Opening
from .precedence import precedence, queue
from .routing import ballot, destination_of_lanes
from .share import MAX_CREW, Crew, Share, last_warps_first
from .shared_memory import SLOT_ALIGNMENT
from .shared_rows import finish_stores, release_slots, store_row
from .tables import send_tables, send_tables_as_cells, tables_have_left
from .timeline import (
    MARK_IDS_READ,
    MARK_MESSAGES_ARRIVED,
    MARK_MESSAGE_READY,
    MARK_TABLES_HAVE_LEFT,
    mark,
)


@always_inline
def slot_bytes[F: TokenFormat]() -> Int:
    """Shared memory for a token as it comes, or for its message.

    Parameters:
        F: The format.

    Returns:
        Bytes of one row slot.
    """
    return align_up(max(F.message_bytes, 2 * F.hidden_size), SLOT_ALIGNMENT)


@always_inline
def encode_parts[F: TokenFormat, encoded: Bool]() -> Int:
    """Parts of a message that several warps may encode.

    Parameters:
        F: The format.
        encoded: Whether tokens are in the format already.

    Returns:
        1 where there is nothing to share.
    """
    comptime assert F.encode_parts >= 1, "encode_parts: at least 1"
    comptime if not encoded and F.hidden_size % 8 == 0:
        return F.encode_parts
    else:
        return 1


@always_inline
def check_tokens[
    ids_dtype: DType
](ep: Endpoint[True], x: DispatchInput[ids_dtype], stage: Int32):
    """Record a failure where T is out of range; the warp that opens calls this before it decides.

    Parameters:
        ids_dtype: Type of the ids.

    Args:
        ep: The rank.
        x: Its tokens.
        stage: `STAGE_*`, for the failure record.
    """
    if lane_id() == 0:
        var given = given_tokens(x.rows, x.num_tokens)
        _ = tokens_fit(ep, stage, x.rows, given)


@always_inline
def rank_of_lane(s: Settings, me: Int, lane: Int) -> Int:
    """The rank that a lane of the calling warp serves. Stores of a warp leave in order of its lanes, so each CTA and
    warp begins with another rank: all of them would send to rank 0 first, and its links alone would be in use.

    Args:
        s: The settings.
        me: The own rank.
        lane: The lane; those below R serve a rank each.

    Returns:
        0 to R-1.
    """
    var turn = UInt32(me + Int(block_idx.x) + warp_index() + lane)
    return Int(turn % UInt32(s.n_ranks))


@always_inline
def send_messages[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, table_cells: Bool
](
    ep: Endpoint[True],
    x: DispatchInput[ids_dtype],
    epoch: UInt64,
    stage: Int32,
    share: Share,
    mut opening: Opening,
):
    """Store tokens' messages, chunk by chunk, and signal.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether `x.tokens` and `x.scales` are in the format already.
        table_cells: Whether tables travel as cells, which no message waits for.

    Args:
        ep: The rank.
        x: Its tokens.
        epoch: The launch's epoch.
        stage: `STAGE_*`, for the failure record.
        share: The calling warp's chunks.
        opening: What the first store waits for.
    """
    comptime assert F.message_bytes % 16 == 0, "message_bytes: a multiple of 16"
    comptime size = slot_bytes[F]()
    comptime parts = encode_parts[F, encoded]()
    comptime as_it_is = F.verbatim and not encoded
    comptime assert (
        not as_it_is or F.message_bytes == 2 * F.hidden_size
    ), "verbatim: a message of 2 * hidden_size bytes"
    var s = ep.s
    var T = readable_tokens(x.rows, x.num_tokens)
    var buffer = ep.buffer(epoch)
    var lane = Int(lane_id())
    var peer = rank_of_lane(s, ep.me, lane)
    var recv = ep.recv[peer]
    var count = ep.count[peer]
    var crew = Crew(share, s.n_signals(T), min(parts, MAX_CREW))
    var token = crew.slot(crew.memory(2 * size))
    var message = crew.memory(2 * size, 0 if as_it_is else size)
    var factor = x.factor[0] if x.factor.present() else Float32(1)
    var asked = False
    var stores = crew.leads()
    for chunk in range(crew.share.first, s.n_signals(T), crew.share.stride):
        var begin = chunk * s.tokens_per_signal
        for t in range(begin, min(begin + s.tokens_per_signal, T)):
            var id = NO_EXPERT
            if lane < s.top_k:
                id = normal_id(
                    x.ids[t * s.top_k + lane].cast[DType.int64](), s.n_experts
                )
            var targets = destination_of_lanes(s, id)
            if s.everywhere:
                targets = everyone(s)
            if s.shared_expert:
                targets |= UInt32(1) << UInt32(ep.me)
            if targets == 0:
                continue
            mark[MARK_IDS_READ](ep)
            release_slots()
            crew.meet()  # the slots are free
            comptime if encoded:
                x.write[F, True, WarpTeam](t, message)
            else:
                token.load[2 * F.hidden_size](
                    x.tokens.bytes(t * 2 * F.hidden_size)
                )
                comptime if parts == 1:
                    comptime if not as_it_is:
                        F.encode[WarpTeam](token.row, factor, message)
                else:
                    for part in range(crew.part, parts, crew.size):
                        F.encode_part[WarpTeam](
                            token.row, factor, message, part
                        )
            crew.meet()  # the message is complete
            mark[MARK_MESSAGE_READY](ep)
            if not opening.passed():
                break
            comptime if not table_cells:
                if stores and not asked:
                    asked = True
                    stores = tables_have_left(ep, epoch, stage)
                    mark[MARK_TABLES_HAVE_LEFT](ep)
            targets &= ~opening.masked
            # The crew goes on meeting.
            var mine = stores and lane < s.n_ranks
            store_row[F.message_bytes](
                message,
                UInt32(ballot(mine and (targets >> UInt32(peer)) & 1 == 1)),
                recv.unsafe_offset(message_offset(s, buffer, ep.me, t)),
            )
        finish_stores()
        mark[MARK_MESSAGES_ARRIVED](ep)
        if not opening.passed():
            return
        if lane < s.n_ranks and stores and opening.serves(peer):
            publish(
                count,
                ep.window.signal(buffer, ep.me, chunk),
                word(epoch, 0),
            )


def dispatch_async_stage[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, table_cells: Bool
](
    peers: ByValue[Peers],
    input: ByValue[DispatchInput[ids_dtype]],
    stage: Int32,
):
    """The kernel.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        table_cells: Whether tables travel as cells; then no peer can be masked.

    Args:
        peers: The rank's side.
        input: Its tokens.
        stage: `STAGE_*`.
    """
    if not peers.value.valid():
        return
    var ep = peers.value.endpoint[
        True, may_shrink=not table_cells, table_cells=table_cells
    ]()
    var epoch = ep.last_sent() + 1
    var opening = Opening()
    if opening.opens():
        check_tokens(ep, input.value, stage)
        opening.decide(ep, stage)
    opening.settle()
    comptime if table_cells:
        send_tables_as_cells(
            ep, input.value, epoch, last_warps_first(), opening
        )
    else:
        send_tables(ep, input.value, epoch, opening)
    # Not to wait for the CTAs that write tables.
    var share = Share(skip=0 if table_cells else ep.s.n_ranks)
    send_messages[F, ids_dtype, encoded, table_cells](
        ep, input.value, epoch, stage, share, opening
    )
    if is_last_cta(ep, sending=True) and warp_index() == 0:
        ep.end_send[WarpTeam](epoch, ep.head.failed())


def dispatch_async[
    F: TokenFormat, ids_dtype: DType, encoded: Bool, table_cells: Bool
](
    peers: Peers,
    x: DispatchInput[ids_dtype],
    stage: Int32,
    ctx: DeviceContext,
) raises:
    """Launch it.

    Parameters:
        F: The format.
        ids_dtype: Type of the ids.
        encoded: Whether tokens are in the format already.
        table_cells: Whether tables travel as cells; then no peer can be masked.

    Args:
        peers: The rank's side.
        x: Its tokens, in device memory.
        stage: `STAGE_*`.
        ctx: The device.

    Raises:
        UnsupportedError as text in front of the message, or what the driver raises.
    """
    var shape = Shape(
        ctx,
        peers.s,
        items=max(peers.s.n_ranks, peers.s.n_signals(x.rows)),
        warp_bytes=2 * slot_bytes[F](),
    )
    queue(ctx, peers.s).enqueue_function(
        ctx.compile_function[
            dispatch_async_stage[F, ids_dtype, encoded, table_cells]
        ](func_attribute=shape.memory()),
        ByValue(peers),
        ByValue(x),
        stage,
        grid_dim=shape.ctas,
        block_dim=shape.threads,
        shared_mem_bytes=shape.shared_bytes,
        attributes=precedence(ctx, peers.s),
    )
