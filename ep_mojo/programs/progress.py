"""Progress on stderr: one line a step, with its seconds; a dot every few seconds while a step runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

DOT_EVERY_S = 3.0


class Progress:
    """Shows steps as they happen and remembers how long each took.

    Attributes:
        seconds: Seconds by step name; a name that is used again adds up.
    """

    def __init__(self, stream: TextIO | None = None):
        """Write to `stream`, stderr by default."""
        self.stream = sys.stderr if stream is None else stream
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, text: str = "") -> Iterator[None]:
        """Announce a step (`text`, else its name), run the body, then show its seconds.

        A body that raises is neither timed nor ended with its seconds; the error speaks for itself.
        """
        self._write(f"{text or name} ...")
        done = threading.Event()
        dots = threading.Thread(target=self._dots, args=(done,), daemon=True)
        dots.start()
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            done.set()
            dots.join()
            self._write("\n")
            raise
        seconds = time.perf_counter() - start
        done.set()
        dots.join()
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._write(f" {format_seconds(seconds)}\n")

    def _dots(self, done: threading.Event) -> None:
        while not done.wait(DOT_EVERY_S):
            self._write(".")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def format_seconds(seconds: float) -> str:
    """For people: "12.3 s", "45.6 ms" or "78 us"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
