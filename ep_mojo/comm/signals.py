"""Put off signal handlers, so that an exception of theirs (Ctrl-C, an alarm) cannot cut a few lines in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEFERRED = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals for which programs have handlers that raise."""


@contextmanager
def deferred() -> Iterator[None]:
    """Python handlers of `DEFERRED` signals that come meanwhile run at the end, as if the signal came then.

    What is inside must end soon and wait for nothing. It may be nested. Handlers run in the main thread only, so
    elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, Any] = {}
    before: dict[int, Any] = {}
    try:
        for number in DEFERRED:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler  # first, so that an exception of another handler just here loses none
                signal.signal(number, came.__setitem__)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _run([(before[number], number, frame) for number, frame in came.items()])


def _run(calls: list[tuple[Any, int, Any]]) -> None:
    """Call all handlers, also where one raises."""
    if calls:
        (handler, number, frame), *others = calls
        try:
            handler(number, frame)
        finally:
            _run(others)
