"""Flags, fences and spins: the only file that has any.

A signal is one 64-bit word: epoch in the high 40 bits, value in the low 24 (`FAILED` when the sender has failed). It is
published with release at system scope after the payload that it covers, and awaited with acquire at system scope; so
whoever has seen the word of an epoch may read the payload. Nothing is ever reset: epochs only grow.

Waits are bounded. A wait that misses its deadline, or reads FAILED, fills the failure record in the rank's own counters
head; the record is sticky, and every later wait of that rank returns at once.
"""

from std.atomic import Atomic, Ordering
from std.sys import CompilationTarget, inlined_assembly
from std.sys import is_amd_gpu
from .layout import *
from .patience import clock_ns, let_others_run
from .peers import Bytes, View, typed

comptime VALUE_BITS = 24
"""Bits of a signal's value."""
comptime FAILED = (1 << VALUE_BITS) - 1
"""The value that says that the sender has failed."""
comptime NO_SIGNAL = -1
"""Returned when it gave up."""
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


struct Head(TrivialRegisterPassable):
    """The head of `atomic_counters`: identity, deadline, epochs and failure record of one rank."""

    var base: Bytes
    """First byte."""

    def __init__(out self, base: Bytes):
        """Wrap the counters.

        Args:
            base: First byte of `atomic_counters`.
        """
        self.base = base

    @always_inline
    def i32(self, index: Int) -> Int32:
        """Read a word.

        Args:
            index: `HEAD_*` or `REC_*`.

        Returns:
            The word.
        """
        return typed[DType.int32](self.base, 4 * index).unsafe_load[
            invariant=False
        ](0)

    @always_inline
    def set_i32(self, index: Int, value: Int32):
        """Write a word.

        Args:
            index: `REC_*`.
            value: What to write.
        """
        typed[DType.int32](self.base, 4 * index).unsafe_store(0, value)

    @always_inline
    def u64(self, index: Int) -> UInt64:
        """Read a field of two words.

        Args:
            index: `HEAD_*`.

        Returns:
            The field.
        """
        return typed[DType.uint64](self.base, 4 * index).unsafe_load[
            invariant=False
        ](0)

    @always_inline
    def set_u64(self, index: Int, value: UInt64):
        """Write a field of two words.

        Args:
            index: `HEAD_*` or `REC_*`.
            value: What to write.
        """
        typed[DType.uint64](self.base, 4 * index).unsafe_store(0, value)

    @always_inline
    def my_rank(self) -> Int:
        """The rank that owns these counters.

        Returns:
            0 to R-1.
        """
        return Int(self.i32(HEAD_MY_RANK))

    @always_inline
    def failed(self) -> Bool:
        """Whether a failure is on record; stays so until the communicator is reset.

        Returns:
            True after the first failure.
        """
        return (
            Atomic[Int32].load[ordering=Ordering.ACQUIRE](
                typed[DType.int32](self.base, 4 * REC_STATE)
            )
            != 0
        )

    @no_inline
    def fail(
        self,
        kind: Int32,
        stage: Int32,
        *,
        peer: Int = -1,
        chunk: Int32 = 0,
        expected: UInt64 = 0,
        seen: UInt64 = 0,
        value: Int = 0,
        limit: Int = 0,
    ):
        """Write the failure record, unless one is there already: the first failure is the one that is reported.

        Args:
            kind: `KIND_*`.
            stage: `STAGE_*`.
            peer: The peer concerned, -1 = none.
            chunk: Signal index, `CHUNK_*`, or `FIELD_*`.
            expected: Epoch waited for.
            seen: Epoch seen.
            value: Size given or needed.
            limit: Size allowed.
        """
        var state = typed[DType.int32](self.base, 4 * REC_STATE)
        var empty: Int32 = 0
        if not Atomic[Int32].compare_exchange(state, empty, Int32(1)):
            return
        self.set_i32(REC_KIND, kind)
        self.set_i32(REC_STAGE, stage)
        self.set_i32(REC_RANK, self.i32(HEAD_MY_RANK))
        self.set_i32(REC_PEER, Int32(peer))
        self.set_i32(REC_CHUNK, chunk)
        self.set_u64(REC_EXPECTED, expected)
        self.set_u64(REC_SEEN, seen)
        self.set_u64(REC_VALUE, UInt64(value))
        self.set_u64(REC_LIMIT, UInt64(limit))
        Atomic[Int32].store[ordering=Ordering.RELEASE](state, Int32(2))
        var note = self.u64(HEAD_NOTE)
        if note != 0 and note == ~self.u64(HEAD_NOTE_CHECK):
            var word = View[DType.int32](Int(note), 1)
            Atomic[Int32].store[ordering=Ordering.RELEASE](word.ptr, Int32(1))


struct Waiter(ImplicitlyCopyable, Movable):
    """Awaits signals for one launch of one rank."""

    var head: Head
    """Where a failure is recorded."""
    var stage: Int32
    """Named in the record."""
    var virtual: Bool
    """Never spin: the sender shares this queue."""
    var limit: Int
    """Longest wait in nanoseconds, 0 = for ever."""
    var until: Int
    """`clock_ns` at the deadline, 0 = none."""

    def __init__(out self, head: Head, stage: Int32, virtual: Bool):
        """Start the launch's clock.

        Args:
            head: The rank's head.
            stage: `STAGE_*`.
            virtual: Whether ranks share one queue.
        """
        self.head = head
        self.stage = stage
        self.virtual = virtual
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
            The word's value, or `NO_SIGNAL` when the rank has failed.
        """
        var spins = 0
        while True:
            var w = poll(window, offset)
            comptime if at_least:
                if value_of(w) == FAILED:
                    return self._peer_failed(w, epoch, peer, chunk)
                if epoch_of(w) >= epoch:
                    return value_of(w)
            else:
                if epoch_of(w) == epoch:
                    if value_of(w) == FAILED:
                        return self._peer_failed(w, epoch, peer, chunk)
                    return value_of(w)
            spins += 1
            if not self.virtual and spins % SPINS_BETWEEN_CHECKS != 0:
                continue
            var h = poll(window, header)
            if value_of(h) == FAILED and epoch_of(h) >= epoch:
                return self._peer_failed(h, epoch, peer, chunk)
            if self.virtual:
                self.head.fail(
                    KIND_ORDER,
                    self.stage,
                    peer=peer,
                    chunk=chunk,
                    expected=epoch,
                    seen=epoch_of(w),
                )
                return NO_SIGNAL
            if self.head.failed():
                return NO_SIGNAL
            if self.until != 0 and clock_ns() > self.until:
                self.head.fail(
                    KIND_TIMEOUT,
                    self.stage,
                    peer=peer,
                    chunk=chunk,
                    expected=epoch,
                    seen=epoch_of(w),
                )
                return NO_SIGNAL
            let_others_run(spins)

    def _peer_failed(
        self, w: UInt64, epoch: UInt64, peer: Int, chunk: Int32
    ) -> Int:
        self.head.fail(
            KIND_PEER_FAILED,
            self.stage,
            peer=peer,
            chunk=chunk,
            expected=epoch,
            seen=epoch_of(w),
        )
        return NO_SIGNAL
