"""Begin and end of a launch: the part of the protocol that is the same in every stage, on every target.

    begin_send    epoch = sent + 1; at most B rounds in flight; await every reader's credit for the buffer
    end_send      on failure tell every peer in its header; sent = epoch
    begin_wait    epoch = waited + 1; there must have been a send
    end_wait      give every sender its credit back, or FAILED; waited = epoch

Each launch counts one epoch and signals every peer whatever happens in it: with T = 0, with nothing for a peer, and
after a failure too. After a failure the body between begin and end is skipped.
"""

from .layout import *
from .peers import MAX_RANKS, Bytes, PeerTable, View
from .settings import SETTINGS_WORDS, Settings, config_hash
from .signal import FAILED, NO_SIGNAL, Head, Waiter, publish, word


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
        self.s = settings
        self.head = Head(counters.bytes())
        self.recv = PeerTable(recv_ptrs)
        self.count = PeerTable(recv_count_ptrs)
        self.window = CountWindow[Self.has_table](self.s)
        self.me = self.head.my_rank()

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

    def begin_send(self, stage: Int32) -> UInt64:
        """Open a sending launch; afterwards `head.failed()` says whether to skip its body.

        Args:
            stage: `STAGE_*`.

        Returns:
            The launch's epoch.
        """
        var epoch = self.head.u64(Self.sent_index) + 1
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
        for i in range(self.s.n_ranks):
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

    def announce(self, epoch: UInt64, value: Int):
        """Publish the launch's header to every peer, oneself included.

        Args:
            epoch: The launch's epoch.
            value: T, or FAILED.
        """
        var offset = self.window.header(self.buffer(epoch), self.me)
        for i in range(self.s.n_ranks):
            publish(
                self.count[(self.me + i) % self.s.n_ranks],
                offset,
                word(epoch, value),
            )

    def end_send(self, epoch: UInt64):
        """Close a sending launch.

        Args:
            epoch: The launch's epoch.
        """
        if self.head.failed():
            self.announce(epoch, FAILED)
        self.head.set_u64(Self.sent_index, epoch)

    def begin_wait(self, stage: Int32) -> UInt64:
        """Open a receiving launch; afterwards `head.failed()` says whether to skip its body.

        Args:
            stage: `STAGE_*`.

        Returns:
            The launch's epoch.
        """
        var epoch = self.head.u64(Self.waited_index) + 1
        if not self.head.failed() and epoch > self.head.u64(Self.sent_index):
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

    def end_wait(self, epoch: UInt64):
        """Close a receiving launch: all reads of its buffer are done.

        Args:
            epoch: The launch's epoch.
        """
        var value = FAILED if self.head.failed() else 0
        for i in range(self.s.n_ranks):
            publish(
                self.count[(self.me + i) % self.s.n_ranks],
                self.window.credit(self.me),
                word(epoch, value),
            )
        self.head.set_u64(Self.waited_index, epoch)


def check_head(counters: View[DType.int32], settings: View[DType.int64]) raises:
    """Refuse counters that no communicator has made, or one with another config.

    Args:
        counters: `atomic_counters`, in host memory.
        settings: The settings tensor.

    Raises:
        CorruptHeadError, ConfigMismatchError: As text in front of the message.
    """
    if settings.size != SETTINGS_WORDS:
        raise Error(
            "ep_mojo.CorruptHeadError: settings has ",
            settings.size,
            " words; pass those of a communicator",
        )
    check_identity(
        counters,
        Settings(settings),
        HEAD_CONFIG_HASH,
        config_hash(settings),
    )


def check_identity(
    counters: View[DType.int32], s: Settings, hash_index: Int, hash: UInt64
) raises:
    """Refuse counters that were not made for these settings.

    Args:
        counters: `atomic_counters`, in host memory.
        s: The settings.
        hash_index: Which hash of the head to compare, `HEAD_*_HASH`.
        hash: What it must be.

    Raises:
        CorruptHeadError, ConfigMismatchError: As text in front of the message.
    """
    var words = HEAD_WORDS + (s.max_tokens if s.expert_slots else 0)
    if counters.size < words:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters has ",
            counters.size,
            " words, not ",
            words,
            "; pass those of a communicator",
        )
    var head = Head(counters.bytes())
    if (
        head.i32(HEAD_MAGIC) != MAGIC
        or head.i32(HEAD_LAYOUT_VERSION) != LAYOUT_VERSION
    ):
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters begins with magic ",
            head.i32(HEAD_MAGIC),
            " and layout version ",
            head.i32(HEAD_LAYOUT_VERSION),
            ", not ",
            MAGIC,
            " and ",
            LAYOUT_VERSION,
            "; make a new communicator",
        )
    if head.u64(hash_index) != hash:
        raise Error(
            "ep_mojo.ConfigMismatchError: these counters belong to a communicator with another config than the settings"
        )
    var rank = head.my_rank()
    if rank < 0 or rank >= s.n_ranks or s.n_ranks > MAX_RANKS:
        raise Error(
            "ep_mojo.CorruptHeadError: atomic_counters names rank ",
            rank,
            " of ",
            s.n_ranks,
        )
