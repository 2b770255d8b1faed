"""What the command lines of several programs have in common. Needs nothing but the standard library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

from ..errors import EPError

T = TypeVar("T")
FORMATS = ("bf16", "fp8")


def separated(text: str, read: Callable[[str], T], allowed: str) -> list[T]:
    """Values with commas between them, each once.

    Args:
        text: What was typed.
        read: Reads one; raises ValueError.
        allowed: What is allowed, in words.

    Raises:
        ArgumentTypeError: `read` takes one of them not.
    """
    try:
        return list(dict.fromkeys(map(read, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}. Allowed: {allowed}") from None


def words(*allowed: str) -> Callable[[str], list[str]]:
    """For argparse's `type`: some of these words, with commas between them."""
    text = f"{', '.join(allowed)}, or several with commas"
    return lambda typed: separated(typed, lambda word: allowed[allowed.index(word)], text)


def numbers(typed: str) -> list[int]:
    """For argparse's `type`: whole numbers from 1, with commas between them."""
    return separated(typed, _from_one, "whole numbers from 1 with commas, as in 128,4096")


def _from_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_rounds(
    parser: argparse.ArgumentParser, *, tokens: str = "128,4096", formats: str = "bf16,fp8", ranks: str = "all"
) -> None:
    """Add the options that say which rounds to time: --ranks, --tokens, --formats, --hidden, --experts, --top-k.

    Args:
        parser: Where to.
        tokens, formats: Defaults, as they are typed.
        ranks: The default in words; its value is 0.
    """
    parser.add_argument("--ranks", type=int, default=0, help=f"GPUs to use (default: {ranks})")
    parser.add_argument("--tokens", type=numbers, default=tokens, help="tokens a rank (default: %(default)s)")
    parser.add_argument(
        "--formats", type=words(*FORMATS), default=formats, help=f"of {', '.join(FORMATS)} (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a token (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="in all (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=8, help="experts of a token (default: %(default)s)")


def status_of(program: Callable[[], int]) -> int:
    """Run a program: its exit status, or one message on stderr and 2 where it raises a named error."""
    try:
        return program()
    except EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
