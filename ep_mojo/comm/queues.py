"""Launches on other queues of a GPU than MAX's: who makes them says here how MAX's waits for them, for `execute`."""

from __future__ import annotations

from collections.abc import Callable

_rejoin: dict[int, Callable[[], None]] = {}
"""By number of the GPU."""


def launches_elsewhere(gpu: int, rejoin: Callable[[], None]) -> None:
    """Launches of this process on `gpu` may be on any queue; after `rejoin()` MAX's waits for all so far."""
    _rejoin[gpu] = rejoin


def rejoin(gpu: int) -> None:
    """Let what MAX's queue of `gpu` gets next run after all launches so far."""
    if gpu in _rejoin:
        _rejoin[gpu]()
