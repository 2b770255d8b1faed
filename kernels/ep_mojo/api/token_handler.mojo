"""Where dispatch_wait puts tokens and scales, with the format that says what they are."""

from layout import TileTensor
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from ..formats import TokenFormat
from ..peers import View
from ..setup import tile_bytes


struct TokenHandler[
    token_fmt_type: TokenFormat,
    tokens_origin: Origin[mut=True],
    scales_origin: Origin[mut=True] = tokens_origin,
](DevicePassable, TrivialRegisterPassable):
    """A format together with the tensors that dispatch_wait writes for it: `TokenHandler[Format](tokens, scales)`.

    Parameters:
        token_fmt_type: The format.
        tokens_origin: Where the tokens live; inferred.
        scales_origin: Where the scales live; inferred.
    """

    comptime device_type: AnyType = Self
    """The same on both sides."""

    var tokens: View[DType.uint8]
    """Output rows as bytes."""
    var scales: View[DType.uint8]
    """Their scales as bytes; size 0 without scales."""

    def __init__(
        out self, tokens: View[DType.uint8], scales: View[DType.uint8]
    ):
        """Wrap memory whose shapes have been checked.

        Args:
            tokens: Output rows as bytes.
            scales: Their scales as bytes; size 0 without scales.
        """
        self.tokens = tokens
        self.scales = scales

    def __init__(
        out self,
        output_tokens: TileTensor[mut=True, _, _, Self.tokens_origin, ...],
    ):
        """Wrap the output of a format without scales.

        Args:
            output_tokens: [rows, H] in the format's token dtype.
        """
        comptime F = Self.token_fmt_type
        comptime assert F.scales_per_token == 0, "this format has scales"
        comptime assert output_tokens.dtype == F.token_dtype, "tokens: dtype"
        self.tokens = tile_bytes(output_tokens)
        self.scales = View[DType.uint8]()

    def __init__(
        out self,
        output_tokens: TileTensor[mut=True, _, _, Self.tokens_origin, ...],
        output_scales: TileTensor[mut=True, _, _, Self.scales_origin, ...],
    ):
        """Wrap the outputs of a format with scales.

        Args:
            output_tokens: [rows, H] in the format's token dtype.
            output_scales: [rows, S]; if the format says so [S, rows], with "expert_padded" [L * S, rows / L].
        """
        comptime F = Self.token_fmt_type
        comptime assert output_tokens.dtype == F.token_dtype, "tokens: dtype"
        comptime assert output_scales.dtype == F.scale_dtype, "scales: dtype"
        self.tokens = tile_bytes(output_tokens)
        self.scales = tile_bytes(output_scales)

    def _to_device_type(
        self,
        mut encoder: Some[DeviceTypeEncoder],
        target: MutOpaquePointer[_],
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        """Name the type in messages.

        Returns:
            A name.
        """
        return "ep_mojo.TokenHandler"
