"""Begin and end of a launch: the part of the protocol that is the same in every stage, on every target.

    begin_send    epoch = sent + 1; at most B rounds in flight; await every reader's credit for the buffer
    end_send      on failure tell every peer in its header; sent = epoch
    begin_wait    epoch = waited + 1; there must have been a send
    end_wait      give every sender its credit back, or FAILED; waited = epoch

Each launch counts one epoch and signals every peer whatever happens in it: with T = 0, with nothing for a peer, and
after a failure too. After a failure the body between begin and end is skipped.

Where peers can be masked, nothing is sent to one that is, but credits and FAILED: they say what is true in any case.
"""

from .head import Head
from .layout import *
from .numeric import remainder
from .peers import Bytes, PeerTable, View
from .settings import Settings
from .signal import (
    FAILED,
    MASKED,
    NO_SIGNAL,
    Waiter,
    epoch_of,
    poll,
    publish,
    word,
)
from .team import Team


struct Endpoint[has_table: Bool](ImplicitlyCopyable, Movable):
    """One rank's side of dispatch or combine: its own head and everybody's windows.

    Parameters:
        has_table: True for dispatch, False for combine.
    """

    comptime sent_index = HEAD_DISPATCH_SENT if Self.has_table else HEAD_COMBINE_SENT
    """Where the epoch of the last send is."""
    comptime waited_index = HEAD_DISPATCH_WAITED if Self.has_table else HEAD_COMBINE_WAITED
    """Where the epoch of the last wait is."""

    var s: Settings
    """The settings."""
    var head: Head
    """The rank's own counters."""
    var recv: PeerTable
    """Everybody's recv windows."""
    var count: PeerTable
    """Everybody's count windows."""
    var window: CountWindow[Self.has_table]
    """Offsets in a count window."""
    var me: Int
    """My rank."""
    var timeline: UInt64
    """Address for the times of a launch on a GPU, 0 = none. See `gpu/timeline.mojo`."""

    def __init__(
        out self,
        counters: View[DType.int32],
        settings: Settings,
        recv_ptrs: View[DType.uint64],
        recv_count_ptrs: View[DType.uint64],
    ):
        """Put the parts together. `check_head` comes first, where the head is in host memory.

        Args:
            counters: `atomic_counters`.
            settings: The settings.
            recv_ptrs: Addresses of the recv windows.
            recv_count_ptrs: Addresses of the count windows.
        """
        self = Self(
            counters, settings, PeerTable(recv_ptrs), PeerTable(recv_count_ptrs)
        )

    @always_inline
    def __init__(
        out self,
        counters: View[DType.int32],
        settings: Settings,
        recv: PeerTable,
        count: PeerTable,
    ):
        """Put the parts together, from tables that have been copied.

        Args:
            counters: `atomic_counters`.
            settings: The settings.
            recv: Addresses of the recv windows.
            count: Addresses of the count windows.
        """
        self.s = settings
        self.head = Head(counters.bytes())
        self.recv = recv
        self.count = count
        self.window = CountWindow[Self.has_table](self.s)
        self.me = self.head.my_rank()
        var times = self.head.u64(HEAD_TIMELINE)
        var good = times == ~self.head.u64(HEAD_TIMELINE_CHECK)
        self.timeline = times if good else UInt64(0)

    @always_inline
    def buffer(self, epoch: UInt64) -> Int:
        """The buffer of an epoch.

        Args:
            epoch: A launch.

        Returns:
            Epoch mod B.
        """
        var b = UInt32(self.s.num_buffers)
        var high = UInt32(epoch >> 32)
        var low = UInt32(epoch & 0xFFFFFFFF) % b
        if high != 0:  # in 32 bits, see `quotient`
            low = (high % b * ((UInt32.MAX % b + 1) % b) + low) % b
        return Int(low)

    @always_inline
    def own_count(self) -> Bytes:
        """The count window that this rank reads.

        Returns:
            Its first byte.
        """
        return self.count[self.me]

    @always_inline
    def last_sent(self) -> UInt64:
        """The epoch of the last send.

        Returns:
            0 before the first.
        """
        return self.head.u64(Self.sent_index)

    @always_inline
    def next_wait(self) -> UInt64:
        """The epoch of the next wait.

        Returns:
            1 or more.
        """
        return self.head.u64(Self.waited_index) + 1

    @always_inline
    def waiter(self, stage: Int32) -> Waiter:
        """Start the clock of a launch.

        Args:
            stage: `STAGE_*`.

        Returns:
            What awaits its signals.
        """
        return Waiter(self.head, stage, self.s.virtual, self.s.shrinks)

    @always_inline
    def is_masked(self, peer: Int) -> Bool:
        """Whether a peer is masked by now.

        Args:
            peer: Which one.

        Returns:
            False where peers cannot be.
        """
        return self.s.shrinks and self.head.masked(peer)

    @always_inline
    def masked(self) -> UInt32:
        """All peers that are masked by now.

        Returns:
            One bit for each; 0 where peers cannot be.
        """
        var found: UInt32 = 0
        if self.s.shrinks:
            for peer in range(self.s.n_ranks):
                found |= UInt32(Int(self.head.masked(peer))) << UInt32(peer)
        return found

    def begin_send[T: Team](self, stage: Int32) -> UInt64:
        """Open a sending launch; afterwards `head.failed()` says whether to skip its body, and `masked` whom to send
        nothing: every other peer has given the buffer back.

        Parameters:
            T: Who opens it; its lanes look at peers in parallel.

        Args:
            stage: `STAGE_*`.

        Returns:
            The launch's epoch.
        """
        var epoch = self.last_sent() + 1
        # Loaded before, since an acquire ends what a GPU holds in its caches.
        var waited = self.head.u64(Self.waited_index)
        var waiter = self.waiter(stage)
        if self.s.shrinks and self.head.failed():
            return epoch  # nobody is masked any more
        var buffers = UInt64(self.s.num_buffers)
        if epoch - waited > buffers:
            self.head.fail(
                KIND_ORDER, stage, expected=waited + buffers, seen=epoch
            )
            return epoch
        if epoch <= buffers and not self.s.shrinks:
            return epoch
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            var peer = remainder(self.me + i, self.s.n_ranks)
            if self.is_masked(peer):
                continue
            if epoch > buffers:
                var got = waiter.reach[at_least=True](
                    self.own_count(),
                    self.window.credit(peer),
                    epoch - buffers,
                    peer=peer,
                    chunk=CHUNK_CREDIT,
                    header=self.window.header(self.buffer(epoch), peer),
                )
                if got == NO_SIGNAL:
                    break
            self._notice_going_on(peer, epoch)
        return epoch

    @always_inline
    def _notice_going_on(self, peer: Int, epoch: UInt64):
        """Mask a peer that has closed this combine before it was sent: it has gone on without this rank.

        Its slots may belong to others by now: those of a combine are a choice's, not a sender's. Where other CTAs of
        this launch have sent already, it may have closed it rightly; they have noted that before.
        """
        comptime if not Self.has_table:
            if self.s.shrinks:
                var credit = poll(self.own_count(), self.window.credit(peer))
                if epoch_of(credit) >= epoch:
                    var begun = poll(self.head.base, 4 * HEAD_COMBINE_BEGUN)
                    if begun != epoch:
                        _ = self.head.mask(peer)

    def announce[T: Team](self, epoch: UInt64, value: Int, masked: UInt32 = 0):
        """Publish the launch's header to every peer, oneself included.

        Parameters:
            T: Who publishes, a lane a peer.

        Args:
            epoch: The launch's epoch.
            value: T, or FAILED.
            masked: Who is left out.
        """
        var offset = self.window.header(self.buffer(epoch), self.me)
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            var peer = remainder(self.me + i, self.s.n_ranks)
            if (masked >> UInt32(peer)) & 1 == 0:
                publish(self.count[peer], offset, word(epoch, value))

    def end_send[T: Team](self, epoch: UInt64, failed: Bool):
        """Close a sending launch.

        Parameters:
            T: Who closes it.

        Args:
            epoch: The launch's epoch.
            failed: `head.failed()`, asked once for both halves.
        """
        if failed:
            self.announce[T](epoch, FAILED)
        self.head.set_u64(Self.sent_index, epoch)

    def begin_wait(self, stage: Int32, sent: UInt64) -> UInt64:
        """Open a receiving launch; afterwards `head.failed()` says whether to skip its body.

        Args:
            stage: `STAGE_*`.
            sent: The epoch of the last send, one of this very launch included.

        Returns:
            The launch's epoch.
        """
        var epoch = self.next_wait()
        if epoch > sent and not self.head.failed():
            self.head.fail(KIND_ORDER, stage, expected=epoch, seen=epoch - 1)
        return epoch

    def header_of(self, waiter: Waiter, epoch: UInt64, peer: Int) -> Int:
        """Await a peer's header.

        Args:
            waiter: The launch's waiter.
            epoch: The launch's epoch.
            peer: The sender.

        Returns:
            Its value; `NO_SIGNAL`, or `MASKED`, also if it is there.
        """
        if self.is_masked(peer):
            return MASKED
        var offset = self.window.header(self.buffer(epoch), peer)
        return waiter.reach(
            self.own_count(),
            offset,
            epoch,
            peer=peer,
            chunk=CHUNK_HEADER,
            header=offset,
        )

    def tokens_of(self, waiter: Waiter, epoch: UInt64, peer: Int) -> Int:
        """Await how many tokens a peer has in this dispatch; a masked one has none.

        Args:
            waiter: The launch's waiter.
            epoch: The launch's epoch.
            peer: The sender.

        Returns:
            T of the peer, or `NO_SIGNAL`.
        """
        var T = self.header_of(waiter, epoch, peer)
        return 0 if T == MASKED else T

    def chunk_of(
        self, waiter: Waiter, epoch: UInt64, peer: Int, chunk: Int
    ) -> Int:
        """Await the signal of a chunk.

        Args:
            waiter: The launch's waiter.
            epoch: The launch's epoch.
            peer: The sender.
            chunk: Index of the signal.

        Returns:
            0: its payload may be read; `NO_SIGNAL`; `MASKED`: it has not come, and the launch goes on without it.
        """
        var buffer = self.buffer(epoch)
        return waiter.reach(
            self.own_count(),
            self.window.signal(buffer, peer, chunk),
            epoch,
            peer=peer,
            chunk=Int32(chunk),
            header=self.window.header(buffer, peer),
        )

    def end_wait[T: Team](self, epoch: UInt64, failed: Bool):
        """Close a receiving launch: all reads of its buffer are done.

        Parameters:
            T: Who closes it.

        Args:
            epoch: The launch's epoch.
            failed: As for `end_send`.
        """
        var value = FAILED if failed else 0
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            publish(
                self.count[remainder(self.me + i, self.s.n_ranks)],
                self.window.credit(self.me),
                word(epoch, value),
            )
        self.head.set_u64(Self.waited_index, epoch)
