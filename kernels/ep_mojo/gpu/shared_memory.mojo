"""The shared memory of a CTA: what lies where, and barriers in it.

    0        thread 0's word for all threads (`told`); two of those that bring choices (`tables_received.mojo`)
    16       the opening warp's word, and the mbarrier behind which it stands (`Opening`)
    64       an mbarrier for each warp and half of the launch, counting bytes of bulk loads (`RowSlot`)
    320      mbarriers at which several warps meet (`Crew`)
    384      an mbarrier for each row of each warp's ring, and half of the launch (`Ring`)
    896      the warps' row slots and rings; a histogram while rows are mapped; with few tokens, what maps them, and one
             message of the CTA
"""

from max.gpu.memory import external_memory
from std.sys import inlined_assembly, is_nvidia_gpu

from ..peers import Bytes
from ..team import is_sm_90_or_newer

comptime MAX_WARPS = 8
"""Warps of a CTA, where their row slots fit into shared memory."""
comptime VERDICT = 0
"""Byte offset of thread 0's word."""
comptime TABLE_WORDS = 4
"""Byte offset of two words (i32): whether a table's cells have come, and T."""
comptime OPENING_WORD = 16
"""Byte offset of the opening warp's word."""
comptime OPENING_BARRIER = 32
"""Byte offset of its mbarrier."""
comptime BARRIERS = 64
"""Byte offset of the warps' mbarriers."""
comptime CREW_BARRIERS = 320
"""Byte offset of the crews' mbarriers."""
comptime RING_BARRIERS = 384
"""Byte offset of the mbarriers of the warps' rings."""
comptime RING_ROWS = 2
"""Rows that a warp has under way into shared memory, where they are summed."""
comptime SLOTS = 896
"""Byte offset of the warps' row slots."""
comptime BARRIER_BYTES = 16
"""Bytes of one mbarrier, rounded up."""
comptime NO_SLOT = 16
"""Bytes for each warp, for launches whose warps have no slots of their own."""
comptime SLOT_ALIGNMENT = 128
"""Bytes that slots and what stands in front of them are rounded up to."""


@always_inline
def moves_in_bulk() -> Bool:
    """Whether this target has bulk copies between global and shared memory, and mbarriers to wait for them.

    Returns:
        True on sm_90 and newer.
    """
    return is_sm_90_or_newer()


comptime SharedBytes = Pointer[
    UInt8, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]
"""Shared memory, which is loaded and stored by the instructions that know it: ordinary pointers are looked at first."""


@always_inline
def shared_place(offset: Int) -> SharedBytes:
    """The launch's dynamic shared memory.

    Args:
        offset: Byte offset in it.

    Returns:
        A pointer.
    """
    var base = external_memory[
        UInt8, address_space=AddressSpace.SHARED, alignment=SLOT_ALIGNMENT
    ]()
    return SharedBytes(unsafe_from_address=Int(base) + offset)


@always_inline
def shared_memory(offset: Int) -> Bytes:
    """The same as an ordinary pointer.

    Args:
        offset: Byte offset in it.

    Returns:
        The pointer.
    """
    comptime if is_nvidia_gpu():
        var generic = inlined_assembly[
            "cvta.shared.u64 $0, $1;", UInt64, constraints="=l,l"
        ](UInt64(Int(shared_place(0))))
        return Bytes(unsafe_from_address=Int(generic) + offset)
    else:
        var generic = shared_place(0).unsafe_address_space_cast[
            AddressSpace.GENERIC
        ]()
        return Bytes(unsafe_from_address=Int(generic) + offset)


@always_inline
def shared_address(p: Bytes) -> UInt32:
    """The 32-bit address that PTX wants for shared memory.

    Args:
        p: An ordinary pointer into it.

    Returns:
        The address.
    """
    return UInt32(
        inlined_assembly[
            "cvta.to.shared.u64 $0, $1;", UInt64, constraints="=l,l"
        ](UInt64(Int(p)))
    )


@always_inline
def in_shared(p: Bytes) -> SharedBytes:
    """The same place, as what it is.

    Args:
        p: An ordinary pointer into shared memory.

    Returns:
        The pointer.
    """
    comptime if is_nvidia_gpu():
        return SharedBytes(unsafe_from_address=Int(shared_address(p)))
    else:
        return p.unsafe_address_space_cast[AddressSpace.SHARED]()


@always_inline
def shared_address(p: SharedBytes) -> UInt32:
    """The same of a pointer that is of shared memory already.

    Args:
        p: The pointer.

    Returns:
        The address.
    """
    return UInt32(Int(p))


struct SharedBarrier(TrivialRegisterPassable):
    """An mbarrier, on sm_90 and newer: a phase ends when all its arrivals have come, and the bytes that were announced.

    What a thread did before it arrived is visible to all that have waited for the phase.
    """

    var at: SharedBytes
    """Where it is."""

    @always_inline
    def __init__(out self, at: SharedBytes):
        """Name it.

        Args:
            at: `BARRIER_BYTES` of shared memory.
        """
        self.at = at

    @always_inline
    def begin(self, arrivals: Int):
        """Set it up, by one thread; before others use it, they meet that thread.

        Args:
            arrivals: How many end a phase.
        """
        inlined_assembly[
            "mbarrier.init.shared::cta.b64 [$0], $1;",
            NoneType,
            constraints="r,r,~{memory}",
        ](shared_address(self.at), Int32(arrivals))
        inlined_assembly[
            "fence.mbarrier_init.release.cluster;",
            NoneType,
            constraints="~{memory}",
        ]()

    @always_inline
    def arrive(self, arrivals: Int):
        """Arrive, with release among the CTA's threads.

        Args:
            arrivals: As how many.
        """
        inlined_assembly[
            "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0], $1;",
            NoneType,
            constraints="r,r,~{memory}",
        ](shared_address(self.at), Int32(arrivals))

    @always_inline
    def expect(self, bytes: Int):
        """Arrive once, and announce what bulk copies will bring in this phase.

        Args:
            bytes: How much.
        """
        inlined_assembly[
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
            NoneType,
            constraints="r,r,~{memory}",
        ](shared_address(self.at), Int32(bytes))

    @always_inline
    def wait(self, parity: UInt32):
        """Wait for the end of a phase, with acquire among the CTA's threads.

        Args:
            parity: Of the phase's number; the first one is 0.
        """
        inlined_assembly[
            (
                "{\n.reg .pred p;\nWAIT_${:uid}:\n"
                "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n"
                "@p bra DONE_${:uid};\nbra WAIT_${:uid};\nDONE_${:uid}:\n}"
            ),
            NoneType,
            constraints="r,r,~{memory}",
        ](shared_address(self.at), parity)
