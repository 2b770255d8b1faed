"""How CPU stages share their work between cores.

`sync_parallelize` runs its tasks with subnormals flushed to zero. The contract's arithmetic keeps them, and the result
may not depend on the number of workers: so `share` turns flushing off around each piece of work, also where there is
one worker only.
"""

from max.algorithm import sync_parallelize
from std.atomic import Atomic
from std.sys import CompilationTarget, inlined_assembly, num_physical_cores

from ..settings import Settings
from ..signal import finish_streaming

comptime SMALL_BYTES = 1 << 15
"""Below this much payload one thread is faster than waking others."""
comptime CACHED_BYTES = 1 << 23
"""More than this much output is not found in a cache again: then it need not go through one."""
comptime FLUSHING_X86: UInt32 = 0x8040
"""MXCSR: subnormal operands (bit 6) and results (bit 15) become zero."""
comptime FLUSHING_ARM: UInt64 = 1 << 24
"""FPCR: the same."""


def n_workers(s: Settings, items: Int, payload_bytes: Int) -> Int:
    """How many workers to start.

    Args:
        s: The settings, with the budget `n_sms`.
        items: Independent pieces of work.
        payload_bytes: Bytes that the launch moves.

    Returns:
        1 or more; no more than cores, budget and items.
    """
    if payload_bytes < SMALL_BYTES:
        return 1
    var most = num_physical_cores()
    if s.n_sms > 0:
        most = min(most, s.n_sms)
    return max(1, min(most, items))


@always_inline
def exceeds_caches(payload_bytes: Int) -> Bool:
    """Whether a launch writes so much that its stores had better go past the caches.

    Args:
        payload_bytes: Bytes that the launch writes.

    Returns:
        True above `CACHED_BYTES`.
    """
    return payload_bytes > CACHED_BYTES


def share[
    Work: def(Int) raises -> None
](work: Work, items: Int, workers: Int) raises:
    """Run `work(0)` to `work(items - 1)`, with subnormals kept and streamed stores finished at the end.

    A worker takes the next item when it has done one, since cores wake up late and are taken away: nobody waits for
    the slowest. Items are begun in ascending order.

    Parameters:
        Work: Type of `work`.

    Args:
        work: Does one item.
        items: How many there are.
        workers: From `n_workers`.

    Raises:
        What `work` or the worker pool raises.
    """
    var next = Atomic[Int64](0)

    def take_items(worker: Int) raises {imm, mut next}:
        var mode = keep_subnormals()
        try:
            while True:
                var item = Int(next.fetch_add(1))
                if item >= items:
                    break
                work(item)
        finally:
            finish_streaming()
            restore_mode(mode)

    if workers == 1:
        take_items(0)
    else:
        sync_parallelize(take_items, workers)


def keep_subnormals() -> UInt64:
    """Turn flushing to zero off on this thread.

    Returns:
        The mode before, for `restore_mode`.
    """
    comptime if CompilationTarget.is_x86():
        var word = Array[UInt32, 1](fill=0)
        inlined_assembly["stmxcsr ($0)", NoneType, constraints="r,~{memory}"](
            Pointer(to=word)
        )
        var before = word[0]
        word[0] = before & ~FLUSHING_X86
        inlined_assembly["ldmxcsr ($0)", NoneType, constraints="r,~{memory}"](
            Pointer(to=word)
        )
        _ = word
        return UInt64(before)
    else:
        var before = inlined_assembly[
            "mrs $0, fpcr", UInt64, constraints="=r,~{memory}"
        ]()
        inlined_assembly["msr fpcr, $0", NoneType, constraints="r,~{memory}"](
            before & ~FLUSHING_ARM
        )
        return before


def restore_mode(mode: UInt64):
    """Undo `keep_subnormals`.

    Args:
        mode: What it returned.
    """
    comptime if CompilationTarget.is_x86():
        var word = Array[UInt32, 1](fill=UInt32(mode))
        inlined_assembly["ldmxcsr ($0)", NoneType, constraints="r,~{memory}"](
            Pointer(to=word)
        )
        _ = word
    else:
        inlined_assembly["msr fpcr, $0", NoneType, constraints="r,~{memory}"](
            mode
        )
