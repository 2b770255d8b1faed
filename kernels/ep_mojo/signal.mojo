"""Flags, fences and spins: this file, `bare.mojo`, `cell.mojo` and `head.mojo` alone have any.

A signal is one 64-bit word: epoch in the high 40 bits, value in the low 24 (`FAILED` when the sender has failed). It is
published with release at system scope after the payload that it covers, and awaited with acquire at system scope; so
whoever has seen the word of an epoch may read the payload. Nothing is ever reset: epochs only grow.

Waits are bounded. A wait that misses its deadline, or reads FAILED, fills the failure record in the rank's own counters
head; the record is sticky, and every later wait of that rank returns at once. Where ranks may be masked, it masks that
peer instead, and the launch goes on without it.
"""

from std.atomic import Atomic, Ordering
from std.sys import CompilationTarget, inlined_assembly
from std.sys import is_amd_gpu
from .head import Head
from .layout import *
from .patience import clock_ns, let_others_run
from .peers import Bytes, typed

comptime VALUE_BITS = 24
"""Bits of a signal's value."""
comptime FAILED = (1 << VALUE_BITS) - 1
"""The value that says that the sender has failed."""
comptime NO_SIGNAL = -1
"""Returned when it gave up."""
comptime MASKED = -2
"""Returned when nothing is to be expected of the peer, and the launch goes on."""
comptime NOT_YET = -3
"""Returned where there is no reason to give up waiting."""
comptime SPINS_BETWEEN_CHECKS = 64
"""Polls between two looks at header, record and clock."""


@always_inline
def word(epoch: UInt64, value: Int) -> UInt64:
    """Make a signal word.

    Args:
        epoch: The launch that it belongs to, below 2^40.
        value: Below 2^24.

    Returns:
        The word.
    """
    return (epoch << UInt64(VALUE_BITS)) | UInt64(value)


@always_inline
def epoch_of(w: UInt64) -> UInt64:
    """The epoch of a signal word.

    Args:
        w: The word.

    Returns:
        Its high 40 bits.
    """
    return w >> UInt64(VALUE_BITS)


@always_inline
def value_of(w: UInt64) -> Int:
    """The value of a signal word.

    Args:
        w: The word.

    Returns:
        Its low 24 bits.
    """
    return Int(w & UInt64(FAILED))


@always_inline
def publish(window: Bytes, offset: Int, w: UInt64):
    """Store a signal word with release at system scope: all earlier stores of this thread come first.

    Args:
        window: A peer's count window.
        offset: Byte offset of the word.
        w: The word.
    """
    Atomic[UInt64].store[ordering=Ordering.RELEASE](
        typed[DType.uint64](window, offset), w
    )


@always_inline
def device_scope() -> StaticString:
    """The name of the scope that holds this device's threads.

    Returns:
        LLVM's name on this target.
    """
    comptime if is_amd_gpu():
        return "agent"
    else:
        return "device"


@always_inline
def note(base: Bytes, offset: Int, w: UInt64):
    """Store a word for other CTAs of the same launch, with release among the device's threads.

    A release at system scope would wait until what this GPU has under way to its peers has arrived there.

    Args:
        base: The rank's own counters.
        offset: Byte offset of the word.
        w: The word.
    """
    Atomic[UInt64, scope=device_scope()].store[ordering=Ordering.RELEASE](
        typed[DType.uint64](base, offset), w
    )


@always_inline
def poll(window: Bytes, offset: Int) -> UInt64:
    """Load a signal word with acquire at system scope: all later loads of this thread come after.

    Args:
        window: The rank's own count window.
        offset: Byte offset of the word.

    Returns:
        The word.
    """
    return Atomic[UInt64].load[ordering=Ordering.ACQUIRE](
        typed[DType.uint64](window, offset)
    )


@always_inline
def arrive(base: Bytes, offset: Int, expected: Int) -> Bool:
    """Count one of `expected` arrivals of a launch, with acquire and release among the device's threads.

    Args:
        base: The rank's own counters.
        offset: Byte offset of a word that is 0 before the launch, and 0 again after the last arrival.
        expected: How many will arrive.

    Returns:
        Whether this is the last one.
    """
    var p = typed[DType.int32](base, offset)
    var before = Atomic[Int32, scope=device_scope()].fetch_add[
        ordering=Ordering.ACQUIRE_RELEASE
    ](p, Int32(1))
    if before != Int32(expected - 1):
        return False
    p.unsafe_store(0, Int32(0))
    return True


@always_inline
def finish_streaming():
    """Order stores that went past the caches before all later stores of this thread.

    On x86 nothing else orders non-temporal stores, a release store included; elsewhere a release is enough.
    """
    comptime if CompilationTarget.is_x86():
        inlined_assembly["sfence", NoneType, constraints="~{memory}"]()


struct Waiter(ImplicitlyCopyable, Movable):
    """Awaits signals for one launch of one rank."""

    var head: Head
    """Where a failure is recorded."""
    var stage: Int32
    """Named in the record."""
    var virtual: Bool
    """Never spin: the sender shares this queue."""
    var shrinks: Bool
    """Mask a peer that does not come, and go on. Then each wait has a deadline of its own: what a lost peer has taken
    must not be missing where a peer is awaited that has waited for it too."""
    var limit: Int
    """Longest wait in nanoseconds, 0 = for ever."""
    var until: Int
    """`clock_ns` at the deadline, 0 = none."""

    def __init__(
        out self,
        head: Head,
        stage: Int32,
        virtual: Bool,
        shrinks: Bool = False,
    ):
        """Start the launch's clock.

        Args:
            head: The rank's head.
            stage: `STAGE_*`.
            virtual: Whether ranks share one queue.
            shrinks: Whether a peer that does not come is masked, and no failure.
        """
        self.head = head
        self.stage = stage
        self.virtual = virtual
        self.shrinks = shrinks
        self.limit = Int(head.u64(HEAD_DEADLINE_NS))
        self.until = clock_ns() + self.limit if self.limit > 0 else 0

    def reach[
        at_least: Bool = False
    ](
        self,
        window: Bytes,
        offset: Int,
        epoch: UInt64,
        *,
        peer: Int,
        chunk: Int32,
        header: Int,
    ) -> Int:
        """Wait until a word holds the epoch.

        Parameters:
            at_least: A later epoch will do too (credits).

        Args:
            window: The rank's own count window.
            offset: Byte offset of the word.
            epoch: The epoch to wait for.
            peer: Who publishes the word.
            chunk: For the record.
            header: Byte offset of the header where `peer` says that it has failed in this epoch.

        Returns:
            The word's value; `NO_SIGNAL` when the rank has failed; `MASKED` when the peer is, and the word is not
            there.
        """
        var spins = 0
        var until = self.until
        while True:
            var w = poll(window, offset)
            var there = epoch_of(w) == epoch
            comptime if at_least:
                there = epoch_of(w) >= epoch or value_of(w) == FAILED
            if there:
                if value_of(w) != FAILED:
                    return value_of(w)
                if self.shrinks:
                    return self._give_up[True](
                        KIND_PEER_FAILED, w, epoch, peer, chunk
                    )
                return self._give_up[False](
                    KIND_PEER_FAILED, w, epoch, peer, chunk
                )
            spins += 1
            if self.shrinks and spins == SPINS_BETWEEN_CHECKS:
                until = clock_ns() + self.limit
            if self.virtual or spins % SPINS_BETWEEN_CHECKS == 0:
                var verdict: Int
                if self.shrinks:
                    verdict = self._look_or_mask(
                        window, w, epoch, until, peer, chunk, header
                    )
                else:
                    verdict = self.look(window, w, epoch, peer, chunk, header)
                if verdict != NOT_YET:
                    return verdict
                let_others_run(spins)

    @no_inline
    def look(
        self,
        window: Bytes,
        w: UInt64,
        epoch: UInt64,
        peer: Int,
        chunk: Int32,
        header: Int,
    ) -> Int:
        """Whether to poll on, asked now and then by who has not found what it waits for. Where nobody is masked.

        Args:
            window: The rank's own count window.
            w: The word that was found.
            epoch: The epoch that is awaited.
            peer: Who is awaited.
            chunk: For the record.
            header: Byte offset of the header where `peer` says that it has failed in this epoch.

        Returns:
            `NOT_YET` to go on; `NO_SIGNAL` when the rank has failed.
        """
        return self._look[False](
            window, w, epoch, self.until, peer, chunk, header
        )

    @no_inline
    def _look_or_mask(
        self,
        window: Bytes,
        w: UInt64,
        epoch: UInt64,
        until: Int,
        peer: Int,
        chunk: Int32,
        header: Int,
    ) -> Int:
        """`look`, where a peer that does not come is masked; this wait has a deadline of its own."""
        return self._look[True](window, w, epoch, until, peer, chunk, header)

    @always_inline
    def _look[
        masks: Bool
    ](
        self,
        window: Bytes,
        w: UInt64,
        epoch: UInt64,
        until: Int,
        peer: Int,
        chunk: Int32,
        header: Int,
    ) -> Int:
        var h = poll(window, header)
        if value_of(h) == FAILED and epoch_of(h) >= epoch:
            return self._give_up[masks](KIND_PEER_FAILED, h, epoch, peer, chunk)
        if self.virtual:
            return self._give_up[masks](KIND_ORDER, w, epoch, peer, chunk)
        if self.head.failed():
            return NO_SIGNAL
        if self.until != 0 and clock_ns() > until:
            return self._give_up[masks](KIND_TIMEOUT, w, epoch, peer, chunk)
        comptime if masks:
            if self.head.masked(peer):
                return MASKED
        return NOT_YET

    @no_inline
    def _give_up[
        masks: Bool
    ](
        self, kind: Int32, w: UInt64, epoch: UInt64, peer: Int, chunk: Int32
    ) -> Int:
        """Mask the peer, or put on record that it has not come."""
        comptime if masks:
            if self.head.mask(peer):
                return MASKED
        self.head.fail(
            kind,
            self.stage,
            peer=peer,
            chunk=chunk,
            expected=epoch,
            seen=epoch_of(w),
        )
        return NO_SIGNAL
