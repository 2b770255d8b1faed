"""BF16: H bfloat16 values, bytes unchanged, NaN and Inf included."""

from ..peers import Bytes
from ..team import Team, copy_bytes
from .token_format import TokenFormat


struct BF16[hidden: Int](TokenFormat):
    """Tokens as they are.

    Parameters:
        hidden: H, a multiple of 8.
    """

    comptime hidden_size = Self.hidden
    """H."""
    comptime input_dtype = DType.bfloat16
    """Tokens are bfloat16."""
    comptime token_dtype = DType.bfloat16
    """And stay so."""
    comptime token_bytes = 2 * Self.hidden
    """Two bytes a channel."""
    comptime scale_dtype = DType.float32
    """Not used."""
    comptime scales_per_token = 0
    """No scales."""
    comptime scales_by_column = False
    """Not used."""
    comptime message_bytes = 2 * Self.hidden
    """The token alone."""
    comptime verbatim = True
    """As it is."""

    @staticmethod
    def key() -> String:
        """Name the format; see `TokenFormat.key`.

        Returns:
            The same string as in Python.
        """
        return "bf16"

    @staticmethod
    @always_inline
    def encode[T: Team](token: Bytes, factor: Float32, message: Bytes):
        """Copy the token; see `TokenFormat.encode`.

        Parameters:
            T: Who works on it.

        Args:
            token: H bfloat16 values.
            factor: Not applied: nothing is quantised.
            message: Where to.
        """
        comptime assert (
            Self.hidden % 8 == 0
        ), "BF16: hidden must be a multiple of 8"
        copy_bytes[T](token, message, Self.token_bytes)

    @staticmethod
    @always_inline
    def pack[T: Team](token: Bytes, scales: Bytes, message: Bytes):
        """The same as `encode`.

        Parameters:
            T: Who works on it.

        Args:
            token: H bfloat16 values.
            scales: Not used.
            message: Where to.
        """
        copy_bytes[T](token, message, Self.token_bytes)

    @staticmethod
    @always_inline
    def unpack[
        T: Team
    ](message: Bytes, token: Bytes, scales: Bytes, stride: Int):
        """Copy the message to a row.

        Parameters:
            T: Who works on it.

        Args:
            message: The message.
            token: The row.
            scales: Not used.
            stride: Not used.
        """
        copy_bytes[T](message, token, Self.token_bytes)
