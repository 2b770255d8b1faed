"""Begin and end of a launch: the part of the protocol that is the same in every stage, on every target.

    begin_send    epoch = sent + 1; at most B rounds in flight; await every reader's credit for the buffer
    end_send      on failure tell every peer in its header; sent = epoch
    begin_wait    epoch = waited + 1; there must have been a send
    end_wait      give every sender its credit back, or FAILED; waited = epoch

Each launch counts one epoch and signals every peer whatever happens in it: with T = 0, with nothing for a peer, and
after a failure too. After a failure the body between begin and end is skipped.
"""

from .layout import *
from .peers import Bytes, PeerTable, View
from .settings import Settings
from .signal import FAILED, NO_SIGNAL, Head, Waiter, publish, word
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
        settings: View[DType.int64],
        recv_ptrs: View[DType.uint64],
        recv_count_ptrs: View[DType.uint64],
    ):
        """Put the parts together. `check_head` comes first, where the head is in host memory.

        Args:
            counters: `atomic_counters`.
            settings: The settings tensor.
            recv_ptrs: Addresses of the recv windows.
            recv_count_ptrs: Addresses of the count windows.
        """
        self = Self(counters, Settings(settings), recv_ptrs, recv_count_ptrs)

    def __init__(
        out self,
        counters: View[DType.int32],
        settings: Settings,
        recv_ptrs: View[DType.uint64],
        recv_count_ptrs: View[DType.uint64],
    ):
        """Put the parts together, from settings that are not in a tensor.

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
        return Int(epoch % UInt64(self.s.num_buffers))

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

    def begin_send[T: Team](self, stage: Int32) -> UInt64:
        """Open a sending launch; afterwards `head.failed()` says whether to skip its body.

        Parameters:
            T: Who opens it; its lanes look at peers in parallel.

        Args:
            stage: `STAGE_*`.

        Returns:
            The launch's epoch.
        """
        var epoch = self.last_sent() + 1
        if self.head.failed():
            return epoch
        var waited = self.head.u64(Self.waited_index)
        var buffers = UInt64(self.s.num_buffers)
        if epoch - waited > buffers:
            self.head.fail(
                KIND_ORDER, stage, expected=waited + buffers, seen=epoch
            )
            return epoch
        if epoch <= buffers:
            return epoch
        var waiter = Waiter(self.head, stage, self.s.virtual)
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            var peer = (self.me + i) % self.s.n_ranks
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
        return epoch

    def announce[T: Team](self, epoch: UInt64, value: Int):
        """Publish the launch's header to every peer, oneself included.

        Parameters:
            T: Who publishes, a lane a peer.

        Args:
            epoch: The launch's epoch.
            value: T, or FAILED.
        """
        var offset = self.window.header(self.buffer(epoch), self.me)
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            publish(
                self.count[(self.me + i) % self.s.n_ranks],
                offset,
                word(epoch, value),
            )

    def end_send[T: Team](self, epoch: UInt64):
        """Close a sending launch.

        Parameters:
            T: Who closes it.

        Args:
            epoch: The launch's epoch.
        """
        if self.head.failed():
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
            T of the peer, or `NO_SIGNAL`.
        """
        var offset = self.window.header(self.buffer(epoch), peer)
        return waiter.reach(
            self.own_count(),
            offset,
            epoch,
            peer=peer,
            chunk=CHUNK_HEADER,
            header=offset,
        )

    def chunk_of(
        self, waiter: Waiter, epoch: UInt64, peer: Int, chunk: Int
    ) -> Bool:
        """Await the signal of a chunk.

        Args:
            waiter: The launch's waiter.
            epoch: The launch's epoch.
            peer: The sender.
            chunk: Index of the signal.

        Returns:
            Whether its payload may be read.
        """
        var buffer = self.buffer(epoch)
        var got = waiter.reach(
            self.own_count(),
            self.window.signal(buffer, peer, chunk),
            epoch,
            peer=peer,
            chunk=Int32(chunk),
            header=self.window.header(buffer, peer),
        )
        return got != NO_SIGNAL

    def end_wait[T: Team](self, epoch: UInt64):
        """Close a receiving launch: all reads of its buffer are done.

        Parameters:
            T: Who closes it.

        Args:
            epoch: The launch's epoch.
        """
        var value = FAILED if self.head.failed() else 0
        for i in range(T.lane(), self.s.n_ranks, T.lanes):
            publish(
                self.count[(self.me + i) % self.s.n_ranks],
                self.window.credit(self.me),
                word(epoch, value),
            )
        self.head.set_u64(Self.waited_index, epoch)


@always_inline
def given_tokens(rows: Int, num_tokens: View[DType.int32]) -> Int:
    """T of a launch as it is given; `tokens_fit` finds out whether it is in range.

    Args:
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        T.
    """
    return Int(num_tokens[0]) if num_tokens.present() else rows


@always_inline
def readable_tokens(rows: Int, num_tokens: View[DType.int32]) -> Int:
    """Tokens that may be read before it is known whether T is in range: T where it is.

    Args:
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        0 to rows.
    """
    return max(0, min(rows, given_tokens(rows, num_tokens)))


def token_count(
    ep: Endpoint, stage: Int32, rows: Int, num_tokens: View[DType.int32]
) -> Int:
    """T of this launch; records a failure where it is out of range.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        T, or 0 after a failure.
    """
    var given = given_tokens(rows, num_tokens)
    if not tokens_fit(ep, stage, rows, given) or ep.head.failed():
        return 0
    return given


def tokens_fit(ep: Endpoint, stage: Int32, rows: Int, given: Int) -> Bool:
    """Record a failure where T is out of range.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        rows: Rows of the tensor.
        given: What the launch was told.

    Returns:
        Whether it is in range.
    """
    if rows > ep.s.max_tokens:
        ep.head.fail(
            KIND_SHAPE,
            stage,
            chunk=FIELD_TOKENS,
            value=rows,
            limit=ep.s.max_tokens,
        )
        return False
    if given < 0 or given > rows:
        ep.head.fail(
            KIND_SHAPE, stage, chunk=FIELD_NUM_TOKENS, value=given, limit=rows
        )
        return False
    return True
