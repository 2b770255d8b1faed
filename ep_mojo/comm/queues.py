"""Launches on other queues of a GPU than MAX's: who makes them says here how MAX's gets its turn, for `execute`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

_turns: dict[int, Callable[[], AbstractContextManager[None]]] = {}
"""By number of the GPU."""


def launches_elsewhere(gpu: int, turn: Callable[[], AbstractContextManager[None]]) -> None:
    """Launches of this process on `gpu` may be on any queue; within `turn()` nobody else launches, and what MAX's queue
    gets runs after all launches so far."""
    _turns[gpu] = turn


def turn_of_max(gpu: int) -> AbstractContextManager[None]:
    """Around launches on MAX's queue of `gpu`: they have their place among those on other queues."""
    return _turns[gpu]() if gpu in _turns else nullcontext()
