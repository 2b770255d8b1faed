"""Token formats: the trait and one file for each format."""

from .token_format import CUSTOM_KEY, TokenFormat, format_tag, spread_scales
from .bf16 import BF16
from .blockwise_fp8 import BlockwiseFP8
from .user import UserFormat, known

comptime FormatOf[
    name: StaticString, hidden: Int, scale: StaticString, by_column: Bool
]: TokenFormat = BF16[hidden] if name == "bf16" else BlockwiseFP8[
    hidden, scale, by_column
] if name == "blockwise_fp8" else UserFormat[
    name, hidden
]
"""The format that an op's string parameters name.

Parameters:
    name: The op's `format` parameter.
    hidden: H.
    scale: Scale rule of BlockwiseFP8.
    by_column: Scales layout of BlockwiseFP8.
"""


def check_format[name: StaticString]():
    """Refuse, at compile time, a name that is no format's.

    Parameters:
        name: The op's `format` parameter.
    """
    comptime assert (
        name == "bf16" or name == "blockwise_fp8" or known[name]()
    ), "unknown format: build the kernel library with extra_sources=[...] that holds it"
