"""What a round of the stress run holds: tokens, routing, weights and delays, each a function of (seed, round, rank).

Nothing is random but the seed, so that whoever checks a row knows what it must hold. Mirrored by `stress_law.py`.
All channels are whole numbers from -7 to 7, the first of each 128 is 7 or -7: so bfloat16 holds them, fp8 with its
scale 7 / 448 does, and every sum of a token's rows is exact in any order.
"""

comptime Words = Pointer[Int64, MutUntrackedOrigin]
"""Words in the memory of a device."""

# Words of the law.
comptime ROUND = 0
"""The next round; in a round's own copy that round."""
comptime SEED = 1
"""Of everything."""
comptime RANK = 2
"""Whose copy this is."""
comptime MAX_DELAY_NS = 3
"""The longest delay."""
comptime N_RANKS = 4
"""R."""
comptime N_EXPERTS = 5
"""E."""
comptime TOP_K = 6
"""K."""
comptime MAX_TOKENS = 7
"""Tmax."""
comptime ALIGNMENT = 8
"""Of the groups' first rows; 0 with layout "expert_padded"."""
comptime GATHERED = 9
"""Whether every token goes to every rank, whatever it has chosen: layout "gathered"."""
comptime LAW_WORDS = 16
"""Length."""

comptime DELAY_CAP_NS = 2_000_000
"""No delay is longer, whatever the law says."""

# What a hash is for.
comptime FOR_TOKENS = 1
"""T."""
comptime FOR_MODE = 2
"""How a rank chooses experts."""
comptime FOR_IDS = 3
"""Its choices."""
comptime FOR_WEIGHTS = 4
"""Their weights."""
comptime FOR_VALUES = 5
"""Channels."""
comptime FOR_DELAY = 6
"""Delays."""
comptime FOR_ALL = 7
"""What all ranks have in common."""


@always_inline
def mix(z: UInt64, v: Int) -> UInt64:
    """Hash one more number.

    Args:
        z: The hash so far.
        v: The number.

    Returns:
        The hash.
    """
    var h = z ^ (UInt64(v) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019)
    h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD
    h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53
    return h ^ (h >> 33)


struct Law(TrivialRegisterPassable):
    """One round."""

    var round: Int
    """Its number."""
    var me: Int
    """The rank that reads it."""
    var max_delay: Int
    """Nanoseconds."""
    var n_ranks: Int
    """R."""
    var n_experts: Int
    """E."""
    var top_k: Int
    """K."""
    var max_tokens: Int
    """Tmax."""
    var alignment: Int
    """Of the groups' first rows; 0 with layout "expert_padded"."""
    var gathered: Bool
    """Whether every token goes to every rank."""
    var base: UInt64
    """Hash of seed and round."""
    var common: UInt64
    """The same for all ranks."""

    @always_inline
    def __init__(out self, words: Words):
        """Read it.

        Args:
            words: Int64 [LAW_WORDS].
        """
        self.round = Int(words.unsafe_load[invariant=False](ROUND))
        self.me = Int(words.unsafe_load[invariant=False](RANK))
        self.max_delay = Int(words.unsafe_load[invariant=False](MAX_DELAY_NS))
        self.n_ranks = Int(words.unsafe_load[invariant=False](N_RANKS))
        self.n_experts = Int(words.unsafe_load[invariant=False](N_EXPERTS))
        self.top_k = Int(words.unsafe_load[invariant=False](TOP_K))
        self.max_tokens = Int(words.unsafe_load[invariant=False](MAX_TOKENS))
        self.alignment = Int(words.unsafe_load[invariant=False](ALIGNMENT))
        self.gathered = words.unsafe_load[invariant=False](GATHERED) != 0
        var seed = UInt64(words.unsafe_load[invariant=False](SEED))
        self.base = mix(seed, self.round)
        self.common = mix(self.base, FOR_ALL)

    @always_inline
    def n_local(self) -> Int:
        """Experts of a rank.

        Returns:
            L.
        """
        return self.n_experts // self.n_ranks

    def tokens(self, rank: Int) -> Int:
        """T of a rank: none, all, one, or any number.

        Args:
            rank: The rank.

        Returns:
            0 to Tmax.
        """
        var h = mix(mix(self.base, FOR_TOKENS), rank)
        var choice = Int(h % 8)
        if choice == 0:
            return 0
        if choice == 1:
            return self.max_tokens
        if choice == 2:
            return 1
        return Int((h >> 8) % UInt64(self.max_tokens + 1))

    def mode(self, rank: Int) -> Int:
        """How a rank's tokens choose experts; in half of the rounds all ranks do alike.

        Args:
            rank: The rank.

        Returns:
            0 to 7, see `expert`.
        """
        if self.common & 1 == 0:
            return Int((self.common >> 8) % 8)
        return Int(mix(mix(self.base, FOR_MODE), rank) % 8)

    def expert(self, rank: Int, token: Int, k: Int) -> Int:
        """What a choice names: uniform, skewed, one expert, one rank's, in and out of range, or hardly any.

        Args:
            rank: The source.
            token: Its token.
            k: The choice.

        Returns:
            The id, which may be no expert.
        """
        var mode = self.mode(rank)
        var h = mix(mix(mix(self.base, FOR_IDS), rank), token * self.top_k + k)
        var low = h & 0xFFFFFFFF
        var high = h >> 32
        var E = UInt64(self.n_experts)
        if mode == 3:
            return Int((((low * high) >> 32) * E) >> 32)
        if mode == 4:
            return Int((self.common >> 16) % E)
        if mode == 5:
            var L = UInt64(self.n_local())
            var hot = (self.common >> 16) % UInt64(self.n_ranks)
            return Int(hot * L + ((low * L) >> 32))
        if mode == 6:
            return Int((low * (E + 4)) >> 32) - 2
        if mode == 7 and high % 8 != 0:
            return -1
        return Int((low * E) >> 32)

    @always_inline
    def is_expert(self, id: Int) -> Bool:
        """Whether an id names an expert.

        Args:
            id: The id.

        Returns:
            False where the choice is to be skipped.
        """
        return 0 <= id < self.n_experts

    def weight(self, rank: Int, token: Int, k: Int) -> Int:
        """The router's weight of a choice.

        Args:
            rank: The source.
            token: Its token.
            k: The choice.

        Returns:
            0, 1 or 2.
        """
        var h = mix(
            mix(mix(self.base, FOR_WEIGHTS), rank), token * self.top_k + k
        )
        return Int((h >> 8) % 3)

    def share(self, rank: Int, token: Int, by: Int) -> Int:
        """What a rank multiplies a gathered token by: what its experts would, with the weights, and the rank's own.

        Args:
            rank: The token's source.
            token: The token.
            by: The rank.

        Returns:
            The number; with K <= 6 and R <= 8 sums over all ranks are up to 36, so that sums are exact.
        """
        var n = factor(by)
        for k in range(self.top_k):
            var e = self.expert(rank, token, k)
            if self.is_expert(e) and e // self.n_local() == by:
                n += self.weight(rank, token, k) * factor(e)
        return n

    @always_inline
    def block(self, rank: Int, token: Int, block: Int) -> UInt64:
        """Eight channels of a token as one word, for `channel`.

        Args:
            rank: The source.
            token: Its token.
            block: Channel / 8.

        Returns:
            The word.
        """
        var row = rank * self.max_tokens + token
        return mix(mix(mix(self.base, FOR_VALUES), row), block)

    def delay(self, stage: Int) -> Int:
        """How long this rank stops before a stage: half of the time not at all, seldom long.

        Args:
            stage: Its place in the round.

        Returns:
            Nanoseconds.
        """
        var h = mix(mix(mix(self.base, FOR_DELAY), self.me), stage)
        var choice = Int(h % 64)
        if choice < 32:
            return 0
        var most = self.max_delay if choice == 63 else self.max_delay // 16
        return min(DELAY_CAP_NS, Int((h >> 8) % UInt64(most + 1)))


@always_inline
def channel(word: UInt64, column: Int) -> Int:
    """One channel of a token.

    Args:
        word: From `Law.block`, for column / 8.
        column: Its index in the token.

    Returns:
        -7 to 7.
    """
    var byte = Int((word >> UInt64(8 * (column % 8))) & 255)
    if column % 128 == 0:
        return 7 if byte >= 128 else -7
    return ((byte * 15) >> 8) - 7


@always_inline
def factor(expert: Int) -> Int:
    """What an expert multiplies its rows by.

    Args:
        expert: The expert.

    Returns:
        1, 2 or -1.
    """
    var kind = expert % 3
    return kind + 1 if kind < 2 else -1
