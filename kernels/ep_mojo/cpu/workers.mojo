"""How CPU stages share their work between cores."""

from std.sys import num_physical_cores

from ..settings import Settings

comptime SMALL_BYTES = 1 << 15
"""Below this much payload one thread is faster than waking others."""


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
