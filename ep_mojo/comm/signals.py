"""Put off signal handlers, so that an exception of theirs (Ctrl-C, an alarm) cannot cut a few lines in two."""

from __future__ import annotations

import _signal  # what is behind `signal`, without conversions to enums that take ten times as long
import signal
import threading
from typing import Any

DEFERRED = tuple(
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals for which programs have handlers that raise."""
_main = threading.main_thread().ident
_active = False  # only the main thread writes it


class deferred:
    """Python handlers of `DEFERRED` signals that come inside the `with` run at its end, as if the signal came then.

    What is inside must end soon and wait for nothing. It may be nested: then they run at the outermost end. Handlers
    run in the main thread only, so elsewhere this does nothing.
    """

    __slots__ = ("before", "came")

    def __enter__(self) -> None:
        global _active
        self.before: dict[int, Any] = {}
        self.came: dict[int, Any] = {}
        if _active or threading.get_ident() != _main:
            return
        try:
            for number in DEFERRED:
                handler = _signal.getsignal(number)
                if callable(handler):
                    self.before[number] = handler  # first, so that an exception of another handler just here loses none
                    _signal.signal(number, self.came.__setitem__)
            _active = bool(self.before)
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *exc: object) -> None:
        global _active
        if self.before:
            _active = False
            self._restore()
            _run([(self.before[number], number, frame) for number, frame in self.came.items()])

    def _restore(self) -> None:
        for number, handler in self.before.items():
            _signal.signal(number, handler)


def _run(calls: list[tuple[Any, int, Any]]) -> None:
    """Call all handlers, also where one raises."""
    if calls:
        (handler, number, frame), *others = calls
        try:
            handler(number, frame)
        finally:
            _run(others)
