"""Command-line options that take several values with commas between them, for argparse's `type`."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def words(*allowed: str) -> Callable[[str], list[str]]:
    """Reads some of these words, with commas between them."""

    def read(text: str) -> list[str]:
        given = text.split(",")
        if not set(given) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}. Allowed: {', '.join(allowed)}, or several with commas")
        return given

    return read


def numbers(text: str) -> list[int]:
    """Reads whole numbers with commas between them."""
    given = text.split(",")
    if not all(n.isdecimal() and int(n) for n in given):
        raise argparse.ArgumentTypeError(f"{text!r}. Allowed: whole numbers from 1 with commas, as in 128,4096")
    return [int(n) for n in given]
