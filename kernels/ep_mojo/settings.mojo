"""What every rank agrees on: the settings tensor by name, and its hash."""

from .peers import View

comptime SETTINGS_WORDS = 16
"""Words (int64) of the settings tensor."""


struct Settings(ImplicitlyCopyable, Movable):
    """What is the same on all ranks and known on the host at launch: the settings tensor (int64 [16]) by name."""

    var n_ranks: Int
    """R."""
    var n_experts: Int
    """E."""
    var top_k: Int
    """K."""
    var max_tokens: Int
    """Tm: the most tokens of a rank."""
    var num_buffers: Int
    """B: rounds that may be in flight."""
    var alignment: Int
    """Row starts of the expert layout are multiples of this."""
    var tokens_per_signal: Int
    """G."""
    var hidden_size: Int
    """H."""
    var message_bytes: Int
    """Bytes of one dispatch message."""
    var row_bytes: Int
    """Bytes of one combine row."""
    var combine_slots: Int
    """S: combine rows a token."""
    var n_sms: Int
    """SM (or worker) budget of a launch, 0 = all."""
    var virtual: Bool
    """Ranks share one queue: a wait that finds its signal missing fails at once."""
    var expert_slots: Bool
    """Slot policy ExpertSlots."""
    var shared_expert: Bool
    """Group 0 holds the rank's own tokens."""
    var format_tag: Int
    """Hash of the format's name and options."""

    def __init__(out self, words: View[DType.int64]):
        """Read the settings tensor.

        Args:
            words: Int64 [16], on the host.
        """
        self.n_ranks = Int(words[0])
        self.n_experts = Int(words[1])
        self.top_k = Int(words[2])
        self.max_tokens = Int(words[3])
        self.num_buffers = Int(words[4])
        self.alignment = Int(words[5])
        self.tokens_per_signal = Int(words[6])
        self.hidden_size = Int(words[7])
        self.message_bytes = Int(words[8])
        self.row_bytes = Int(words[9])
        self.combine_slots = Int(words[10])
        self.n_sms = Int(words[11])
        self.virtual = words[12] != 0
        self.expert_slots = words[13] != 0
        self.shared_expert = words[14] != 0
        self.format_tag = Int(words[15])

    @always_inline
    def n_local_experts(self) -> Int:
        """Experts of one rank.

        Returns:
            L = E / R.
        """
        return self.n_experts // self.n_ranks

    @always_inline
    def n_groups(self) -> Int:
        """Groups of rows of the expert layouts.

        Returns:
            L, and one more with a shared expert.
        """
        return self.n_local_experts() + Int(self.shared_expert)

    @always_inline
    def n_signals(self, tokens: Int) -> Int:
        """Signals that cover a source's tokens.

        Args:
            tokens: Number of tokens.

        Returns:
            Ceil(tokens / G).
        """
        return (tokens + self.tokens_per_signal - 1) // self.tokens_per_signal


def config_hash(words: View[DType.int64]) -> UInt64:
    """FNV-1a over the settings as little-endian bytes; the words that may differ by rank (11, 12) count as 0.

    Args:
        words: The settings tensor.

    Returns:
        The hash that every rank's head must hold.
    """
    var h: UInt64 = 0xCBF29CE484222325
    for i in range(SETTINGS_WORDS):
        var word = UInt64(0) if i == 11 or i == 12 else UInt64(words[i])
        for b in range(8):
            h = (h ^ ((word >> UInt64(8 * b)) & 0xFF)) * 0x100000001B3
    return h
