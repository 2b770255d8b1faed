"""What a row of a dispatch holds, compared with the law, and what becomes of it: a row for combine."""

from std.memory import bitcast

from .jobs import Worker, report
from .law import Law, Words, channel
from .work import (
    BF16_NAN,
    SCALE_BITS,
    WRONG_PADDING,
    WRONG_ROW,
    WRONG_SCALE,
    Array1,
    bf16_bits,
    bf16_value,
    e4m3_bits,
    e4m3_value,
)


struct Rows[fp8: Bool](TrivialRegisterPassable):
    """The rows of a rank.

    Parameters:
        fp8: Whether rows are float8_e4m3fn with a float32 scale for 128 channels; else bfloat16.
    """

    var findings: Words
    """What was found."""
    var tokens: Array1[DType.uint8]
    """[N, H] as bytes."""
    var scales: Array1[DType.float32]
    """[N, H / 128] with fp8."""
    var y: Array1[DType.uint16]
    """[N, H], out: bfloat16."""

    def __init__(
        out self,
        findings: Words,
        tokens: Array1[DType.uint8],
        scales: Array1[DType.float32],
        y: Array1[DType.uint16],
    ):
        """Name the tensors.

        Args:
            findings: What was found.
            tokens: From the handle, as bytes.
            scales: From the handle.
            y: Out.
        """
        self.findings = findings
        self.tokens = tokens
        self.scales = scales
        self.y = y

    def content(
        self, law: Law, w: Worker, row: Int, s: Int, t: Int, f: Int, H: Int
    ):
        """Compare a row, and multiply what is there.

        Args:
            law: The round.
            w: The worker.
            row: The row.
            s: The rank that its token comes from.
            t: The token.
            f: What to multiply by: products are whole numbers up to 256.
            H: Channels.
        """
        for b in range(w.lane, H // 8, w.lanes):
            var word = law.block(s, t, b)
            for c in range(8 * b, 8 * b + 8):
                var at = row * H + c
                var want = channel(word, c)
                var want_bits: Int
                var got_bits: Int
                var value: Float32
                comptime if Self.fp8:
                    var got = self.tokens[at]
                    want_bits = Int(e4m3_bits(want))
                    got_bits = Int(got)
                    value = e4m3_value(got)
                else:
                    var low = self.tokens[2 * at].cast[DType.uint16]()
                    var high = self.tokens[2 * at + 1].cast[DType.uint16]()
                    var got = (high << 8) | low
                    want_bits = Int(bf16_bits(want))
                    got_bits = Int(got)
                    value = bf16_value(got)
                if got_bits != want_bits:
                    report(
                        self.findings,
                        WRONG_ROW,
                        law.round,
                        row,
                        c,
                        want_bits,
                        got_bits,
                    )
                var bits = bitcast[DType.uint32](value * Float32(f))
                self.y[at] = (bits >> 16).cast[DType.uint16]()
        comptime if Self.fp8:
            for b in range(w.lane, H // 128, w.lanes):
                var got = Int(
                    bitcast[DType.uint32](self.scales[row * (H // 128) + b])
                )
                if got != SCALE_BITS:
                    report(
                        self.findings,
                        WRONG_SCALE,
                        law.round,
                        row,
                        b,
                        SCALE_BITS,
                        got,
                    )

    def padding(self, law: Law, w: Worker, row: Int, H: Int):
        """Rows between two groups are zero.

        Args:
            law: The round.
            w: The worker.
            row: The row.
            H: Channels.
        """
        var size = H if Self.fp8 else 2 * H
        for i in range(w.lane, size, w.lanes):
            var got = Int(self.tokens[row * size + i])
            if got != 0:
                report(self.findings, WRONG_PADDING, law.round, row, i, 0, got)
        comptime if Self.fp8:
            for b in range(w.lane, H // 128, w.lanes):
                var got = self.scales[row * (H // 128) + b]
                if got != 0:
                    report(
                        self.findings,
                        WRONG_PADDING,
                        law.round,
                        row,
                        -1 - b,
                        0,
                        Int(got),
                    )

    def poison(self, w: Worker, row: Int, H: Int):
        """Combine must not read this.

        Args:
            w: The worker.
            row: The row.
            H: Channels.
        """
        for c in range(w.lane, H, w.lanes):
            self.y[row * H + c] = BF16_NAN
