"""The jobs of the stress run: make a round's inputs, check a dispatch and play its experts, check a combine.

A dispatch is right if every row of a group names, in ascending order, a choice of that group's expert, and every such
choice's entry of the row map names a row of the group that names it: then rows and choices are the same, in the
contract's order. All bytes of these rows are compared with the law; padding must be zero, other rows nobody's.
"""

from std.memory import bitcast

from .jobs import COMBINES, FAULT, TOKENS, Job, Worker, count, now_ns, report
from .law import LAW_WORDS, ROUND, Law, Words, channel, factor

# Kinds of mismatches; `stress_law.KINDS` has their names in this order.
comptime WRONG_OFFSET = 1
"""Where a group begins."""
comptime WRONG_GROUP = 2
"""Which expert a group is."""
comptime WRONG_TOKENS = 3
"""A source's T."""
comptime WRONG_ROW_MAP = 4
"""The row of a choice."""
comptime WRONG_WEIGHT = 5
"""The weight of a choice."""
comptime WRONG_SOURCE = 6
"""What a row comes from."""
comptime WRONG_ORDER = 7
"""A row comes too late."""
comptime WRONG_NOBODY = 8
"""A row that nobody sent has a source."""
comptime WRONG_PADDING = 9
"""A byte between two groups."""
comptime WRONG_ROW = 10
"""A channel of a row."""
comptime WRONG_SCALE = 11
"""A scale of a row."""
comptime WRONG_SUM = 12
"""A channel of a sum."""
comptime WRONG_COUNT = 13
"""A group's number of rows."""
comptime WRONG_CHOICE = 14
"""What the token of a gathered row has chosen."""
comptime WRONG_ROW_WEIGHT = 15
"""With which weight."""

comptime SCALE_BITS = 0x3C800000
"""7 / 448 as float32."""
comptime BF16_NAN: UInt16 = 0x7FC0
"""What is in rows that combine must not read."""


struct Array1[dtype: DType](TrivialRegisterPassable):
    """A tensor's elements.

    Parameters:
        dtype: Their type.
    """

    var ptr: Pointer[Scalar[Self.dtype], MutUntrackedOrigin]
    """The first one."""
    var size: Int
    """How many."""

    def __init__(out self, address: Int, size: Int):
        """View them.

        Args:
            address: Of the first one.
            size: How many.
        """
        self.ptr = Pointer[Scalar[Self.dtype], MutUntrackedOrigin](
            unsafe_from_address=address if address != 0 else 64
        )
        self.size = size

    @always_inline
    def __getitem__(self, i: Int) -> Scalar[Self.dtype]:
        """Load one.

        Args:
            i: Its index.

        Returns:
            The element.
        """
        return self.ptr.unsafe_load[invariant=False](i)

    @always_inline
    def __setitem__(self, i: Int, value: Scalar[Self.dtype]):
        """Store one.

        Args:
            i: Its index.
            value: The element.
        """
        self.ptr.unsafe_store(i, value)


@always_inline
def bf16_bits(value: Int) -> UInt16:
    """A whole number as bfloat16.

    Args:
        value: -256 to 256.

    Returns:
        Its bits.
    """
    return (bitcast[DType.uint32](Float32(value)) >> 16).cast[DType.uint16]()


@always_inline
def bf16_value(bits: UInt16) -> Float32:
    """A bfloat16 as float32.

    Args:
        bits: Its bits.

    Returns:
        The value.
    """
    return bitcast[DType.float32](bits.cast[DType.uint32]() << 16)


@always_inline
def e4m3_bits(value: Int) -> UInt8:
    """64 times a whole number as float8_e4m3fn.

    Args:
        value: -7 to 7.

    Returns:
        Its bits.
    """
    var a = abs(value)
    if a == 0:
        return 0
    var e = 2 if a >= 4 else (1 if a >= 2 else 0)
    var sign = 128 if value < 0 else 0
    return UInt8(sign | ((e + 13) << 3) | ((a << (3 - e)) & 7))


@always_inline
def e4m3_value(bits: UInt8) -> Float32:
    """A 64th of a float8_e4m3fn that `e4m3_bits` gives.

    Args:
        bits: Its bits.

    Returns:
        The value.
    """
    var exponent = Int((bits >> 3) & 15)
    var m = Float32(8 + Int(bits & 7))
    for _ in range(exponent, 16):
        m *= 0.5
    var v = m if exponent != 0 else Float32(0)
    return -v if bits >= 128 else v


struct Fill(Job):
    """Make the inputs of the next round; rows past T are filled too, and must not matter."""

    var law: Words
    """The rank's law, which `Advance` changes afterwards."""
    var info: Words
    """Out: the law of this round."""
    var x: Array1[DType.uint16]
    """[Tmax, H], out: bfloat16."""
    var ids: Array1[DType.int32]
    """[Tmax, K], out."""
    var weights: Array1[DType.float32]
    """[Tmax, K], out."""
    var num_tokens: Array1[DType.int32]
    """[1], out."""

    def __init__(
        out self,
        law: Words,
        info: Words,
        x: Array1[DType.uint16],
        ids: Array1[DType.int32],
        weights: Array1[DType.float32],
        num_tokens: Array1[DType.int32],
    ):
        """Name the tensors.

        Args:
            law: The rank's law.
            info: Out.
            x: Out.
            ids: Out.
            weights: Out.
            num_tokens: Out.
        """
        self.law = law
        self.info = info
        self.x = x
        self.ids = ids
        self.weights = weights
        self.num_tokens = num_tokens

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        var law = Law(self.law)
        var H = self.x.size // law.max_tokens
        var K = law.top_k
        for t in range(w.team, law.max_tokens, w.teams):
            for b in range(w.lane, H // 8, w.lanes):
                var word = law.block(law.me, t, b)
                for c in range(8 * b, 8 * b + 8):
                    self.x[t * H + c] = bf16_bits(channel(word, c))
            for k in range(w.lane, K, w.lanes):
                self.ids[t * K + k] = Int32(law.expert(law.me, t, k))
                self.weights[t * K + k] = Float32(law.weight(law.me, t, k))
        if w.is_first():
            self.num_tokens[0] = Int32(law.tokens(law.me))
            for i in range(LAW_WORDS):
                self.info.unsafe_store(
                    i, self.law.unsafe_load[invariant=False](i)
                )


struct Advance(Job):
    """Go on to the next round."""

    var law: Words
    """The rank's law."""

    def __init__(out self, law: Words):
        """Name it.

        Args:
            law: The rank's law.
        """
        self.law = law

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        if w.is_first():
            self.law.unsafe_store(
                ROUND, self.law.unsafe_load[invariant=False](ROUND) + 1
            )


struct Delay(Job):
    """Stop for a while, so that ranks come to a stage at different times."""

    var info: Words
    """The round."""
    var stage: Int
    """Which place of it."""

    def __init__(out self, info: Words, stage: Int):
        """Name the place.

        Args:
            info: The round.
            stage: Which place of it.
        """
        self.info = info
        self.stage = stage

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        if w.is_first():
            var until = now_ns() + Law(self.info).delay(self.stage)
            while now_ns() < until:
                pass


struct Fault(Job):
    """Spoil a byte, if the findings ask for it in this round and place."""

    var info: Words
    """The round."""
    var findings: Words
    """With the wish."""
    var bytes: Array1[DType.uint8]
    """What can be spoilt."""
    var place: Int
    """Which place this is."""

    def __init__(
        out self,
        info: Words,
        findings: Words,
        bytes: Array1[DType.uint8],
        place: Int,
    ):
        """Name it.

        Args:
            info: The round.
            findings: With the wish.
            bytes: What can be spoilt.
            place: Which place this is.
        """
        self.info = info
        self.findings = findings
        self.bytes = bytes
        self.place = place

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        if not w.is_first():
            return
        var wish = self.findings.unsafe_offset(FAULT)
        var round = wish.unsafe_load[invariant=False](0)
        var place = wish.unsafe_load[invariant=False](1)
        if Int(place) == self.place and Int(round) == Law(self.info).round:
            var i = Int(wish.unsafe_load[invariant=False](2))
            var mask = wish.unsafe_load[invariant=False](3)
            self.bytes[i] = self.bytes[i] ^ mask.cast[DType.uint8]()


struct Sums(Job):
    """Check a combine."""

    var info: Words
    """The round."""
    var findings: Words
    """What was found."""
    var y: Array1[DType.uint16]
    """[Tmax, H]: bfloat16."""

    def __init__(
        out self, info: Words, findings: Words, y: Array1[DType.uint16]
    ):
        """Name the tensors.

        Args:
            info: The round.
            findings: What was found.
            y: The sums.
        """
        self.info = info
        self.findings = findings
        self.y = y

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        var law = Law(self.info)
        var H = self.y.size // law.max_tokens
        var T = law.tokens(law.me)
        for t in range(w.team, law.max_tokens, w.teams):
            var n = 0
            for k in range(law.top_k if t < T else 0):
                var e = law.expert(law.me, t, k)
                if law.is_expert(e):
                    n += law.weight(law.me, t, k) * factor(e)
            for r in range(law.n_ranks if law.gathered and t < T else 0):
                n += factor(r)
            for b in range(w.lane, H // 8, w.lanes):
                var word = law.block(law.me, t, b)
                for c in range(8 * b, 8 * b + 8):
                    var want = bf16_bits(channel(word, c) * n)
                    var got = self.y[t * H + c]
                    if got != want:
                        report(
                            self.findings,
                            WRONG_SUM,
                            law.round,
                            t,
                            c,
                            Int(want),
                            Int(got),
                        )
            if w.lane == 0:
                _ = count(self.findings, TOKENS)
        if w.is_first():
            _ = count(self.findings, COMBINES)
