"""Windows that are longer than they should be: what is behind their end stays zero, whatever ranks are given."""

from contextlib import contextmanager

from ep_mojo.comm import device_memory, windows

GUARD = 4096
"""Bytes behind each window."""


@contextmanager
def longer_windows():
    """Windows of all communicators made meanwhile end `GUARD` bytes behind what their config says."""

    def longer(cfg):
        return {name: size + GUARD * (name != "counters") for name, size in windows.part_bytes(cfg).items()}

    kept, device_memory.part_bytes = device_memory.part_bytes, longer
    try:
        yield
    finally:
        device_memory.part_bytes = kept


def assert_guards(comm):
    """Nothing lies behind a window."""
    sizes = windows.part_bytes(comm.cfg)
    for memory in comm.memories:
        for part in windows.PARTS[1:]:
            behind = memory.window(part)[sizes[part] :]
            assert len(behind) == GUARD
            assert not behind.any(), f"rank {memory.rank}: bytes behind {part}"


def set_word(memory, index, value):
    """Overwrite a word of `atomic_counters`; returns what it was."""
    counters = memory.counters
    kept = int(counters[index])
    counters[index] = value
    memory.write("counters", counters)
    memory.device.synchronize()
    return kept
