"""Bare words: in a rank's own counters, for CTAs of one launch. Such a word covers nothing, so its accesses are in no
order with others: whoever has it knows what it says, and nothing else.
"""

from std.atomic import Atomic, Ordering
from std.sys import inlined_assembly, is_nvidia_gpu

from .peers import Bytes, typed
from .signal import device_scope


@always_inline
def take_ticket(base: Bytes, offset: Int) -> UInt32:
    """Count one of a launch's tickets, in no order with other accesses: a ticket covers nothing.

    Args:
        base: The rank's own counters.
        offset: Byte offset of a word that is 0 before the launch.

    Returns:
        How many were taken before: to each caller another number.
    """
    comptime if is_nvidia_gpu():
        return inlined_assembly[
            "atom.relaxed.gpu.global.add.u32 $0, [$1], $2; // ticket",
            UInt32,
            constraints="=r,l,r,~{memory}",
        ](UInt64(Int(base.unsafe_offset(offset))), UInt32(1))
    else:
        return Atomic[UInt32, scope=device_scope()].fetch_add[
            ordering=Ordering.RELAXED
        ](typed[DType.uint32](base, offset), UInt32(1))


@always_inline
def clear_tickets_at(base: Bytes, offset: Int):
    """Set the word of tickets to 0 again. Who calls this has acquired that nobody takes one any more.

    Args:
        base: The rank's own counters.
        offset: Byte offset of the word.
    """
    typed[DType.uint32](base, offset).unsafe_store(0, UInt32(0))


@always_inline
def count_off(base: Bytes, offset: Int, w: UInt64):
    """Store a word for other CTAs of the same launch, in no order with other stores: the word covers nothing.

    Args:
        base: The rank's own counters.
        offset: Byte offset of the word.
        w: The word.
    """
    comptime if is_nvidia_gpu():
        inlined_assembly[
            "st.relaxed.gpu.global.b64 [$0], $1; // count",
            NoneType,
            constraints="l,l,~{memory}",
        ](UInt64(Int(base.unsafe_offset(offset))), w)
    else:
        Atomic[UInt64, scope=device_scope()].store[ordering=Ordering.RELAXED](
            typed[DType.uint64](base, offset), w
        )


@always_inline
def look_up(base: Bytes, offset: Int) -> UInt64:
    """Load such a word, in no order with other loads, so that several may be under way.

    Args:
        base: The rank's own counters.
        offset: Byte offset of the word.

    Returns:
        The word.
    """
    comptime if is_nvidia_gpu():
        return inlined_assembly[
            "ld.relaxed.gpu.global.b64 $0, [$1]; // count",
            UInt64,
            constraints="=l,l,~{memory}",
        ](UInt64(Int(base.unsafe_offset(offset))))
    else:
        return Atomic[UInt64, scope=device_scope()].load[
            ordering=Ordering.RELAXED
        ](typed[DType.uint64](base, offset))
