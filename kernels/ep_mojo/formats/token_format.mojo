"""How a token travels: the `TokenFormat` trait.

A message is `message_bytes` long: the encoded channels first, then the scales. Everything is known at compile time, so
that a stage compiled for a format holds no branch on it. All functions work for one host thread and for one GPU warp
alike (`Team`).
"""

from std.sys import size_of

from ..peers import Bytes, typed
from ..team import Team


comptime CUSTOM_KEY = "custom"
"""The key of a format that has none of its own."""


trait TokenFormat:
    """Encodes a token into a message, and copies a message into output rows."""

    comptime hidden_size: Int
    """H: channels of a token."""
    comptime input_dtype: DType
    """Element type of the tokens to dispatch."""
    comptime token_dtype: DType
    """Element type of the `tokens` output."""
    comptime token_bytes: Int
    """Bytes of one row of the `tokens` output."""
    comptime scale_dtype: DType
    """Element type of the `scales` output."""
    comptime scales_per_token: Int
    """Scales of one row, 0 = none."""
    comptime scales_by_column: Bool
    """Whether scales of neighbouring rows stand together: [scales_per_token, rows], or that for each padded group."""
    comptime message_bytes: Int
    """Bytes of one message, a multiple of 16."""

    comptime verbatim: Bool = False
    """Whether a message is the token's own bytes and no more, so that nothing need be encoded."""
    comptime encode_parts: Int = 1
    """Parts of a message that several GPU warps may write at the same time, with `encode_part`."""

    @staticmethod
    def key() -> String:
        """Name and options as one string, that of the Python format's `key()`; ranks compare its hash.

        Returns:
            A name; "custom" unless the format says otherwise.
        """
        return CUSTOM_KEY

    @staticmethod
    def encode[T: Team](token: Bytes, factor: Float32, message: Bytes):
        """Write one token's message.

        Parameters:
            T: Who works on it.

        Args:
            token: H values of `input_dtype`.
            factor: Multiplies the channels before they are quantised; 1 leaves them unchanged.
            message: `message_bytes` bytes, aligned to 16.
        """
        ...

    @staticmethod
    def encode_part[
        T: Team
    ](token: Bytes, factor: Float32, message: Bytes, part: Int):
        """Write one part of one token's message; with all parts written, in any order, it is as `encode` writes it.

        Parameters:
            T: Who works on it.

        Args:
            token: H values of `input_dtype`.
            factor: As for `encode`.
            message: `message_bytes` bytes, aligned to 16.
            part: 0 to `encode_parts` - 1.
        """
        Self.encode[T](token, factor, message)

    @staticmethod
    def pack[T: Team](token: Bytes, scales: Bytes, message: Bytes):
        """Write the message of a token that is encoded already.

        Parameters:
            T: Who works on it.

        Args:
            token: `token_bytes` bytes.
            scales: `scales_per_token` scales, one after another.
            message: `message_bytes` bytes, aligned to 16.
        """
        ...

    @staticmethod
    def unpack[
        T: Team
    ](message: Bytes, token: Bytes, scales: Bytes, stride: Int):
        """Copy a message to an output row.

        Parameters:
            T: Who works on it; on GPUs its `copy_bytes` takes only parts of the message as a source.

        Args:
            message: The message.
            token: `token_bytes` bytes of the `tokens` output.
            scales: The row's first scale in the `scales` output.
            stride: Elements between two scales of the row.
        """
        ...


@always_inline
def spread_scales[
    T: Team, dtype: DType, count: Int
](source: Bytes, target: Bytes, stride: Int):
    """Copy a row's scales from a message to where the output wants them.

    Parameters:
        T: Who copies.
        dtype: Element type.
        count: Number of scales.

    Args:
        source: The first scale in the message.
        target: The row's first scale in the output.
        stride: Elements between two of them in the output.
    """
    comptime size = size_of[Scalar[dtype]]()
    for i in range(T.lane(), count, T.lanes):
        typed[dtype](target, i * stride * size).unsafe_store(
            0, typed[dtype](source, i * size).unsafe_load[invariant=False](0)
        )


def format_tag[F: TokenFormat]() -> Int:
    """The settings' `format_tag`.

    Parameters:
        F: The format.

    Returns:
        FNV-1a of `F.key()`, without its lowest bit.
    """
    var h: UInt64 = 0xCBF29CE484222325
    for byte in F.key().as_bytes():
        h = (h ^ UInt64(byte)) * 0x100000001B3
    return Int(h >> 1)
