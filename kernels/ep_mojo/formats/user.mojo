"""Formats that a user brings: `ep_mojo.kernel_library(extra_sources=...)` writes this file anew with theirs."""

from .bf16 import BF16
from .token_format import TokenFormat

comptime UserFormat[name: StaticString, hidden: Int]: TokenFormat = BF16[hidden]
"""The user's struct for a name; there is none here, and no name is known.

Parameters:
    name: The op's `format` parameter.
    hidden: H.
"""


def known[name: StaticString]() -> Bool:
    """Whether a user's format has this name.

    Parameters:
        name: The op's `format` parameter.

    Returns:
        False: this package was built without extra sources.
    """
    return False
