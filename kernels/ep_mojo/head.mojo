"""The head of a rank's own counters: identity, deadline, epochs, the failure record, and which peers are masked.

A mask is an int32 for each rank, in memory of the device that the head names: 1 = nothing goes to that peer, and
nothing is awaited of it. The caller writes them between launches, on the same queue; a launch that may mask peers sets
the word of one that does not come, and never clears one. All rounds of a Buffer share them.
"""

from std.atomic import Atomic, Ordering
from .layout import *
from .peers import Bytes, View, typed


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
            Atomic[UInt64].load[ordering=Ordering.ACQUIRE](
                typed[DType.uint64](self.base, 4 * REC_STATE)
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
        # State and kind are one word, which is only accessed as a whole while launches run.
        var word = typed[DType.uint64](self.base, 4 * REC_STATE)
        var kind_bits = UInt64(kind.cast[DType.uint32]()) << 32
        var empty: UInt64 = 0
        if not Atomic[UInt64].compare_exchange(word, empty, kind_bits | 1):
            return
        self.set_i32(REC_STAGE, stage)
        self.set_i32(REC_RANK, self.i32(HEAD_MY_RANK))
        self.set_i32(REC_PEER, Int32(peer))
        self.set_i32(REC_CHUNK, chunk)
        self.set_u64(REC_EXPECTED, expected)
        self.set_u64(REC_SEEN, seen)
        self.set_u64(REC_VALUE, UInt64(value))
        self.set_u64(REC_LIMIT, UInt64(limit))
        Atomic[UInt64].store[ordering=Ordering.RELEASE](word, kind_bits | 2)
        var note = self.u64(HEAD_NOTE)
        if note != 0 and note == ~self.u64(HEAD_NOTE_CHECK):
            var word = View[DType.int32](Int(note), 1)
            Atomic[Int32].store[ordering=Ordering.RELEASE](word.ptr, Int32(1))

    @always_inline
    def _masks(self) -> Int:
        """Where the masks are, 0 = nowhere."""
        var at = self.u64(HEAD_MASKS)
        return Int(at) if at == ~self.u64(HEAD_MASKS_CHECK) else 0

    @no_inline
    def masked(self, peer: Int) -> Bool:
        """Whether a peer is masked. For ranks that have masks.

        Args:
            peer: Which one.

        Returns:
            False for the rank itself.
        """
        var at = self._masks()
        if at == 0:
            return False
        return (
            Atomic[Int32].load[ordering=Ordering.ACQUIRE](
                View[DType.int32](at + 4 * peer, 1).ptr
            )
            != 0
        )

    @no_inline
    def mask(self, peer: Int) -> Bool:
        """Mask a peer that has not come, in this launch and from now on.

        Args:
            peer: Which one.

        Returns:
            False where it cannot be: the rank itself, or no masks.
        """
        var at = self._masks()
        if at == 0 or peer == self.my_rank():
            return False
        Atomic[Int32].store[ordering=Ordering.RELEASE](
            View[DType.int32](at + 4 * peer, 1).ptr, Int32(1)
        )
        return True
