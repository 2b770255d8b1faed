"""Token formats: what a token looks like on the wire and in the output of dispatch.

Sizes here and in `kernels/ep_mojo/formats/` must agree; a test compares them. H is the hidden size in elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .errors import ConfigError

BLOCK_SIZE = 128
"""Channels that share one fp8 scale."""
MESSAGE_ALIGNMENT = 16
"""Messages are multiples of this many bytes."""

DTYPE_BYTES = {
    "bfloat16": 2,
    "float32": 4,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
}
"""Element types that a format may have, by MAX's names, and their bytes."""

SCALES_LAYOUTS = ("row", "column")


def align_up(n: int, to: int) -> int:
    """The least multiple of `to` that is not less than `n` (n >= 0, to >= 1)."""
    return -(-n // to) * to


class TokenFormat:
    """Base of the formats. Subclasses are frozen dataclasses.

    Attributes:
        token_dtype: Element type of `Handle.tokens`, a key of `DTYPE_BYTES`.
        scale_dtype: Element type of `Handle.scales`, or None where the format has no scales.
        scales_layout: "row": scales [rows, S]; "column": scales [S, rows], with the "expert_padded" layout [G*S, M].
        hidden_multiple: H must be a multiple of this.
    """

    token_dtype: str
    scale_dtype: str | None
    scales_layout: str
    hidden_multiple: ClassVar[int] = 8

    def token_elements(self, hidden_size: int) -> int:
        """Elements of one output row."""
        return hidden_size

    def token_bytes(self, hidden_size: int) -> int:
        """Payload bytes of one token, without scales."""
        return self.token_elements(hidden_size) * DTYPE_BYTES[self.token_dtype]

    def scales_per_token(self, hidden_size: int) -> int:
        """S: elements of `scale_dtype` that go with one row, 0 without scales."""
        return 0

    def message_bytes(self, hidden_size: int) -> int:
        """Bytes of one message: payload, then scales, rounded up to `MESSAGE_ALIGNMENT`."""
        scales = self.scales_per_token(hidden_size) * (DTYPE_BYTES[self.scale_dtype] if self.scale_dtype else 0)
        return align_up(self.token_bytes(hidden_size) + scales, MESSAGE_ALIGNMENT)

    def key(self) -> str:
        """Name and options as one string. Ranks with different keys do not fit together."""
        raise NotImplementedError


@dataclass(frozen=True)
class BF16(TokenFormat):
    """Tokens travel as bfloat16, bytes unchanged. 2 H bytes a token, no scales."""

    token_dtype: ClassVar[str] = "bfloat16"
    scale_dtype: ClassVar[None] = None
    scales_layout: ClassVar[str] = "row"
    hidden_multiple: ClassVar[int] = 8

    def key(self) -> str:
        """Always "bf16"."""
        return "bf16"


@dataclass(frozen=True)
class BlockwiseFP8(TokenFormat):
    """Tokens travel as float8_e4m3fn with one scale for each 128 channels. H must be a multiple of 128.

    Per block, in float32: amax = max(1e-4, largest |x|, NaN ignored).

    Args:
        scale: "float32": s = amax / 448, q = round(x * (448 / amax)). "power_of_two": s = 2^ceil(log2(amax / 448)),
            q = round(x / s), s stored as float32. "ue8m0": the same s stored as its exponent byte, four to an int32.
            Rounding is to nearest even and saturates at +-448; NaN becomes 0x7F.
        scales_layout: "row": scales [rows, S]; "column": scales [S, rows], with the "expert_padded" layout [G*S, M].

    Raises:
        ConfigError: An option has another value.
    """

    scale: str = "float32"
    scales_layout: str = "row"

    token_dtype: ClassVar[str] = "float8_e4m3fn"
    hidden_multiple: ClassVar[int] = BLOCK_SIZE
    SCALES: ClassVar[tuple[str, ...]] = ("float32", "power_of_two", "ue8m0")

    def __post_init__(self):
        check_choice("dispatch_format.scale", self.scale, self.SCALES)
        check_choice("dispatch_format.scales_layout", self.scales_layout, SCALES_LAYOUTS)

    @property
    def scale_dtype(self) -> str:  # type: ignore[override]
        """Either "float32", or "int32" for packed ue8m0 exponents."""
        return "int32" if self.scale == "ue8m0" else "float32"

    def scales_per_token(self, hidden_size: int) -> int:
        """H / 128, or ceil(H / 512) packed int32 for ue8m0."""
        blocks = hidden_size // BLOCK_SIZE
        return -(-blocks // 4) if self.scale == "ue8m0" else blocks

    def key(self) -> str:
        """For example "blockwise_fp8/float32/row"."""
        return f"blockwise_fp8/{self.scale}/{self.scales_layout}"


@dataclass(frozen=True)
class CustomFormat(TokenFormat):
    """A format of your own: a Mojo struct that conforms to the `TokenFormat` trait. See docs/formats.md.

    Args:
        struct: Name of the struct as the ops see it, such as "my_formats.Int8Rows".
        token_dtype: Element type of an output row, a key of `DTYPE_BYTES`.
        message_size: Bytes of one message, a positive multiple of 16. At least payload plus scales.
        token_size: Elements of an output row; None = hidden_size.
        scale_dtype: "float32", "int32" or None (no scales).
        scale_count: S, scales of one row; positive exactly where `scale_dtype` is given.
        scales_layout: "row": scales [rows, S]; "column": scales [S, rows], with the "expert_padded" layout [G*S, M].
        encode: For the NumPy reference only: takes float32 [T, H] (the tokens times the input scale) and returns
            (tokens [T, token_size], scales [T, S]) in the NumPy types that stand for the dtypes above (bfloat16: uint16
            bits,
            float8: uint8 bits). Without it the reference raises `UnsupportedError`.
        decode: The inverse, float32 [rows, H] from (tokens, scales). Used by `reference.dequantize`.

    Raises:
        ConfigError: A field is out of range.
    """

    struct: str
    token_dtype: str
    message_size: int
    token_size: int | None = None
    scale_dtype: str | None = None
    scale_count: int = 0
    scales_layout: str = "row"
    encode: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    decode: Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        prefix = "dispatch_format."
        if not isinstance(self.struct, str) or not all(p.isidentifier() for p in self.struct.split(".")):
            raise ConfigError(
                field=prefix + "struct",
                value=self.struct,
                allowed="a dotted name of a Mojo struct",
                remedy='name it as the ops import it, for example "my_formats.Int8Rows"',
            )
        check_choice(prefix + "token_dtype", self.token_dtype, tuple(DTYPE_BYTES))
        check_choice(prefix + "scale_dtype", self.scale_dtype, (None, "float32", "int32"))
        check_choice(prefix + "scales_layout", self.scales_layout, SCALES_LAYOUTS)
        set_ = object.__setattr__
        set_(self, "message_size", check_int(prefix + "message_size", self.message_size, 16, 1 << 20))
        set_(self, "scale_count", check_int(prefix + "scale_count", self.scale_count, 0, 1 << 16))
        if self.token_size is not None:
            set_(self, "token_size", check_int(prefix + "token_size", self.token_size, 1, 1 << 20))
        if self.message_size % MESSAGE_ALIGNMENT:
            raise ConfigError(
                field=prefix + "message_size",
                value=self.message_size,
                allowed="a multiple of 16",
                remedy=f"use {align_up(self.message_size, MESSAGE_ALIGNMENT)}",
            )
        if (self.scale_dtype is None) != (self.scale_count == 0):
            raise ConfigError(
                field=prefix + "scale_count",
                value=self.scale_count,
                allowed="0 without scale_dtype, positive with it",
                remedy="give both or neither",
            )
        for name in ("encode", "decode"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(
                    field=prefix + name,
                    value=getattr(self, name),
                    allowed="a function or None",
                    remedy="pass a function",
                )

    def token_elements(self, hidden_size: int) -> int:
        """`token_size`, or H."""
        return hidden_size if self.token_size is None else self.token_size

    def scales_per_token(self, hidden_size: int) -> int:
        """`scale_count`."""
        return self.scale_count

    def message_bytes(self, hidden_size: int) -> int:
        """`message_size`."""
        return self.message_size

    def key(self) -> str:
        """Struct name and sizes; `encode` and `decode` do not count."""
        size = "H" if self.token_size is None else self.token_size
        return (
            f"custom/{self.struct}/{self.token_dtype}/{size}/{self.scale_dtype}/{self.scale_count}"
            f"/{self.message_size}/{self.scales_layout}"
        )


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed` (strings and None)."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ConfigError(field=name, value=value, allowed=f"one of {choices}", remedy="choose one of these")


def check_int(name: str, value: Any, low: int, high: int, remedy: str = "") -> int:
    """`value` as an int in [low, high]. Python and NumPy integers pass, everything else is a `ConfigError`."""
    if type(value) is int and low <= value <= high:  # what a call of every step mostly has
        return value
    allowed = f"an integer from {low} to {high}"
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") or not hasattr(value, "__index__"):
        raise ConfigError(
            f"{type(value).__name__} is not an integer", field=name, value=value, allowed=allowed, remedy="pass an int"
        )
    try:
        number = value.__index__()
    except TypeError:  # an array that is not a scalar
        raise ConfigError("not an integer", field=name, value=value, allowed=allowed, remedy="pass an int") from None
    if not low <= number <= high:
        raise ConfigError(field=name, value=number, allowed=allowed, remedy=remedy or f"choose {name} in that range")
    return number
