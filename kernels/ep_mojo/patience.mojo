"""What a wait needs of the machine: a clock, and a way to let others run meanwhile."""

from std.ffi import external_call
from std.sys import is_gpu
from std.time import global_perf_counter_ns, perf_counter_ns

comptime SPINS_BEFORE_SLEEP = 4096
"""Polls after which a waiting CPU thread sleeps 50 us between looks: the peer may need this very core."""


@always_inline
def clock_ns() -> Int:
    """A monotonic clock.

    Returns:
        Nanoseconds.
    """
    comptime if is_gpu():
        return Int(global_perf_counter_ns())
    else:
        return Int(perf_counter_ns())


@always_inline
def let_others_run(spins: Int):
    """Give this core to other threads, which may be the peers waited for; a GPU thread goes on.

    Args:
        spins: Polls so far; a long wait sleeps.
    """
    comptime if not is_gpu():
        if spins < SPINS_BEFORE_SLEEP:
            _ = external_call["sched_yield", Int32]()
        else:
            _ = external_call["usleep", Int32](UInt32(50))
