"""The NumPy reference: what every kernel must give, bit for bit. Slow and obvious; lists over ranks in and out.

bfloat16 arrays are uint16 bit patterns and float8_e4m3fn arrays uint8 bit patterns (see `ep_mojo.dtypes`).
"""

from .arithmetic import fma
from .combine import cast_rows, combine, reduce_mode
from .compare import array_difference, defined_rows, handle_differences, output_difference
from .dispatch import ReferenceHandle, dequantize, dispatch, encode, scales_by_row
from .fp8 import quantize

__all__ = [
    "ReferenceHandle",
    "array_difference",
    "cast_rows",
    "combine",
    "defined_rows",
    "dequantize",
    "dispatch",
    "encode",
    "fma",
    "handle_differences",
    "output_difference",
    "quantize",
    "reduce_mode",
    "scales_by_row",
]
