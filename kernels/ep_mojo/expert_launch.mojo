"""Begin and end of a launch with ExpertSlots: the part that is the same on every target. For `RankSlots` see
`launch.mojo`.

The windows have exactly the seed's sizes: one buffer, and one signal word for each (expert, rank), so there is no
room for credits. Instead dispatch and combine alternate. With n for the epoch, a rank's own counters must say

    dispatch_async n    combine_wait n-1 is done on this rank
    dispatch_wait n     dispatch_async n is done
    combine_async n     dispatch_wait n is done
    combine_wait n      combine_async n is done

and anything else is an order failure. (After a reset all four epochs are equal, so n starts anew from there.)

That frees both windows without credits:

- Rank p stores messages of epoch n into q's dispatch window after p's combine_wait n-1. That returned because every
  rank, q included, had published its combine signals n-1 to p. q published them in combine_async n-1, after its own
  dispatch_wait n-1 had copied every message out. So nobody reads what p overwrites, the signal words included.
- Rank q stores rows of epoch n into p's combine window after q's dispatch_wait n. That returned because p had published
  its message counts n to q. p published them in dispatch_async n, after its own combine_wait n-1 had read every row.

A failed launch publishes FAILED in all words that it would have published; a failed rank goes on doing so in every
later launch and waits for nothing. A word that holds FAILED of a later epoch than awaited counts too: the peer has
given the awaited one up.
"""

from .launch import Endpoint
from .layout import (
    HEAD_COMBINE_WAITED,
    HEAD_DISPATCH_WAITED,
    KIND_ORDER,
    expert_count_offset,
    expert_signal_offset,
)
from .peers import View
from .signal import FAILED, NO_SIGNAL, Waiter, publish, word


def begin_send[
    has_table: Bool
](ep: Endpoint[has_table], stage: Int32) -> UInt64:
    """Open a sending launch; afterwards `ep.head.failed()` says whether to skip its body.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.
        stage: `STAGE_*`.

    Returns:
        The launch's epoch.
    """
    comptime before = HEAD_COMBINE_WAITED if has_table else HEAD_DISPATCH_WAITED
    var epoch = ep.head.u64(ep.sent_index) + 1
    var needed = epoch - 1 if has_table else epoch
    var done = ep.head.u64(before)
    if not ep.head.failed() and done != needed:
        ep.head.fail(KIND_ORDER, stage, expected=needed, seen=done)
    return epoch


def end_dispatch_send(
    ep: Endpoint[True],
    epoch: UInt64,
    counts: View[DType.int32],
    first: Int = 0,
    stride: Int = 1,
):
    """Close dispatch_async: publish the number of messages for every expert of every rank, also where it is 0.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        counts: Int32 [E], messages for each expert. Not read after a failure.
        first: Which of the threads that share the work calls this.
        stride: How many they are.
    """
    var s = ep.s
    var failed = ep.head.failed()
    for i in range(first, s.n_experts, stride):
        var peer = (ep.me + i // s.n_local) % s.n_ranks
        var e = i % s.n_local
        var value = FAILED if failed else Int(counts[peer * s.n_local + e])
        publish(
            ep.count[peer],
            expert_count_offset(s, e, ep.me),
            word(epoch, value),
        )
    if first == 0:
        ep.head.set_u64(ep.sent_index, epoch)


def end_combine_send(
    ep: Endpoint[False], epoch: UInt64, first: Int = 0, stride: Int = 1
):
    """Close combine_async: publish to every rank that the rows of each own expert are there, also where there were
    none.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
        first: Which of the threads that share the work calls this.
        stride: How many they are.
    """
    var s = ep.s
    var value = FAILED if ep.head.failed() else 0
    for i in range(first, s.n_experts, stride):
        publish(
            ep.count[(ep.me + i // s.n_local) % s.n_ranks],
            expert_signal_offset(ep.me * s.n_local + i % s.n_local),
            word(epoch, value),
        )
    if first == 0:
        ep.head.set_u64(ep.sent_index, epoch)


def message_count(
    ep: Endpoint[True],
    waiter: Waiter,
    epoch: UInt64,
    *,
    expert: Int,
    source: Int,
) -> Int:
    """Await the number of messages from a source to an expert; then they may be read.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        expert: Local expert.
        source: The sending rank.

    Returns:
        The number, or `NO_SIGNAL`.
    """
    var offset = expert_count_offset(ep.s, expert, source)
    return waiter.reach(
        ep.own_count(),
        offset,
        epoch,
        peer=source,
        chunk=Int32(expert),
        header=offset,
    )


def rows_arrived(
    ep: Endpoint[False], waiter: Waiter, epoch: UInt64, expert: Int
) -> Bool:
    """Await an expert's rows.

    Args:
        ep: The rank.
        waiter: The launch's waiter.
        epoch: The launch's epoch.
        expert: Global expert.

    Returns:
        Whether they may be read.
    """
    var offset = expert_signal_offset(expert)
    var got = waiter.reach(
        ep.own_count(),
        offset,
        epoch,
        peer=expert // ep.s.n_local_experts(),
        chunk=Int32(expert),
        header=offset,
    )
    return got != NO_SIGNAL


def end_wait[has_table: Bool](ep: Endpoint[has_table], epoch: UInt64):
    """Close a receiving launch: all reads of its window are done.

    Parameters:
        has_table: True for dispatch, False for combine.

    Args:
        ep: The rank.
        epoch: The launch's epoch.
    """
    ep.head.set_u64(ep.waited_index, epoch)
