"""What CTAs of one launch tell each other: words in the rank's own counters, noted (`signal.note`) and awaited here."""

from ..launch import Endpoint
from ..layout import CHUNK_HEADER
from ..signal import Waiter


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
