"""What CTAs of one launch tell each other by words in the rank's own counters: notes, which cover what their CTA has
stored (`signal.note`), and counts, which cover nothing (`bare.mojo`)."""

from max.gpu import block_idx, thread_idx

from ..bare import count_off, look_up
from ..launch import Endpoint
from ..layout import (
    CHUNK_HEADER,
    MAX_PIECES,
    NOTE_COPIES,
    WORK_COUNTED,
    WORK_COUNTS,
    WORK_MAPPED,
)
from ..signal import (
    NO_SIGNAL,
    SPINS_BETWEEN_CHECKS,
    Waiter,
    epoch_of,
    note,
    value_of,
    word,
)
from .pieces import Pieces


@always_inline
def await_note(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    words: Int,
    which: Int,
    peer: Int,
) -> Int:
    """Await what another CTA of this launch notes.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        words: First of a row of (u64) words, an index of int32: `WORK_*`.
        which: Index in the row.
        peer: The rank that the note is about, for a failure record.

    Returns:
        The note's value, or `NO_SIGNAL`.
    """
    var offset = 4 * words + 8 * which
    var spinning = waiter
    spinning.virtual = False  # who notes it runs at the same time
    # And has deadlines of its own, which say more: one, or one for each peer that is lost in this launch.
    spinning.until += spinning.limit * (ep.s.n_ranks + 1 if ep.s.shrinks else 1)
    spinning.shrinks = False  # the peer is not to blame
    return spinning.reach(
        ep.head.base,
        offset,
        epoch,
        peer=peer,
        chunk=CHUNK_HEADER,
        header=offset,
    )


@always_inline
def _mapped_at(copy: Int) -> Int:
    """Where a copy of the notes about mapped pieces begins, an index of int32."""
    return WORK_MAPPED + 2 * MAX_PIECES * copy


@always_inline
def note_mapped(ep: Endpoint[True], epoch: UInt64, piece: Int, tokens: Int):
    """Note for all warps of this launch that a piece is mapped; a CTA calls this, behind a barrier.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        piece: The piece.
        tokens: T of its source.
    """
    var copy = Int(thread_idx.x)
    if copy < NOTE_COPIES:
        var offset = 4 * _mapped_at(copy) + 8 * piece
        note(ep.head.base, offset, word(epoch, tokens))


@always_inline
def await_mapped(
    ep: Endpoint[True], waiter: Waiter, epoch: UInt64, piece: Int, peer: Int
) -> Int:
    """Await that a piece is mapped, by the copy of the calling CTA.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        piece: The piece.
        peer: Its source, for a failure record.

    Returns:
        T of the source, or `NO_SIGNAL`.
    """
    var copy = Int(block_idx.x) % NOTE_COPIES
    return await_note(ep, waiter, epoch, _mapped_at(copy), piece, peer=peer)


@always_inline
def _count_at(groups: Int, piece: Int, group: Int) -> Int:
    """Byte offset of a count in the rank's own counters."""
    return 4 * WORK_COUNTS + 8 * (piece * groups + group)


@always_inline
def tell_count(
    ep: Endpoint[True],
    epoch: UInt64,
    groups: Int,
    piece: Int,
    group: Int,
    rows: Int32,
):
    """Tell the CTAs of this launch how many rows of a group a piece has.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        groups: Groups of rows.
        piece: The piece.
        group: The group.
        rows: Its rows, below 2^24.
    """
    count_off(
        ep.head.base,
        _count_at(groups, piece, group),
        word(epoch, Int(rows)),
    )


@always_inline
def await_counts[
    n: Int
](
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    pieces: Pieces,
    groups: Int,
    first: Int,
    group: Int,
    mut rows: Array[Int32, n],
) -> Bool:
    """Await how many rows of a group some consecutive pieces have, each lane by itself.

    Parameters:
        n: How many pieces, all awaited at once.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        pieces: All pieces.
        groups: Groups of rows.
        first: The first of the pieces.
        group: The group.
        rows: Out: of each piece; 0 behind the last one.

    Returns:
        False when the rank has failed.
    """
    var base = ep.head.base
    var spins = 0
    while True:
        var words = Array[UInt64, n](fill=word(epoch, 0))
        comptime for i in range(n):  # all loads first
            if first + i < pieces.n:
                words[i] = look_up(base, _count_at(groups, first + i, group))
        var missing = -1
        comptime for i in range(n):
            rows[i] = Int32(value_of(words[i]))
            if epoch_of(words[i]) != epoch:
                missing = first + i
        if missing < 0:
            return True
        spins += 1
        if spins % SPINS_BETWEEN_CHECKS == 0:
            # Told behind the counts by a thread that may be ahead of others: these will come, too.
            var source = pieces.source(missing)
            var T = await_note(
                ep, waiter, epoch, WORK_COUNTED, missing, peer=source
            )
            if T == NO_SIGNAL:
                return False
