"""What every rank agrees on: the settings tensor by name, and its hash."""

from std.utils import StaticTuple

from .numeric import quotient
from .peers import View

comptime SETTINGS_WORDS = 17
"""Words (int64) of the settings tensor."""

comptime REDUCE_ANY = 0
"""Each combine chooses."""
comptime REDUCE_EXPERT = 1
"""Partial sums at the expert's rank."""
comptime REDUCE_SOURCE = 2
"""The whole sum at the source."""

comptime WAITS_VIRTUAL = 1
"""Bit of word 12: ranks share one queue."""
comptime WAITS_SHRINK = 2
"""Bit of word 12: a peer that does not come is masked."""

comptime SLOTS_RANK = 0
"""A message for each rank that owns one of a token's experts."""
comptime SLOTS_EXPERT = 1
"""A message for each expert."""
comptime SLOTS_EVERYWHERE = 2
"""A message for every rank."""

comptime FEW_CHOICES = 1024
"""R * Tmax * K, at most, where there are few tokens; layout "gathered" counts as K = 8."""
comptime CELL_CHOICES = 2048
"""Tmax * K, at most, where routing tables and combine's rows travel as cells; "gathered" as above."""
comptime NARROW_TOKENS = 64
"""R * Tmax, at most, where combine cuts rows that travel as cells into small pieces."""
comptime GATHERED_CHOICES = 8
"""Choices that a token counts as which goes to all ranks."""

# Sets of words that a hash leaves out, one bit a word.
comptime CONFIG_UNHASHED: UInt32 = 0x1800
"""Words 11 and 12: what ranks may choose for themselves."""
comptime DISPATCH_UNHASHED: UInt32 = 0x11E44
"""Also K, G, the reduce mode and what describes combine rows: the seed-named dispatch functions do not know them."""
comptime COMBINE_UNHASHED: UInt32 = 0x9940
"""Also G and what describes messages: the seed-named combine functions do not know them."""


struct Settings(TrivialRegisterPassable):
    """What is the same on all ranks and known on the host at launch: the settings tensor (int64 [17]) by name."""

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
    var queue: Int
    """What the driver knows the launch's queue by, 0 = the device's own of MAX. Not a word of the tensor."""
    var virtual: Bool
    """Ranks share one queue: a wait that finds its signal missing fails at once."""
    var shrinks: Bool
    """Peers may be masked, and one that does not come is: with layout "expert_padded" and reduce "source"."""
    var expert_slots: Bool
    """Slot policy ExpertSlots."""
    var everywhere: Bool
    """Every token goes to all ranks, whatever it has chosen: layout "gathered"."""
    var shared_expert: Bool
    """Group 0 holds the rank's own tokens."""
    var format_tag: Int
    """Hash of the format's name and options."""
    var n_local: Int
    """L = E / R, experts of one rank. Not a word of its own: divisions are slow on a GPU."""
    var reduce: Int
    """`REDUCE_*`: the reduce mode of every combine, or that it may be either."""
    var few_tokens: Bool
    """`FEW_CHOICES` at most, with RankSlots: dispatch's recv windows have room for cells, twice the bytes."""
    var table_room: Bool
    """Dispatch's count windows have room for the cells of tables: few tokens, or `CELL_CHOICES` at most, not gathered.
    """
    var in_cells: Bool
    """Messages and tables travel as cells (`cell.mojo`), on targets that have them. Not where peers may be masked."""
    var tables_in_cells: Bool
    """Tables do, whether or not messages do too."""
    var rows_in_cells: Bool
    """So do combine's rows: `CELL_CHOICES` at most."""

    def __init__(out self, words: View[DType.int64]):
        """Read the settings tensor.

        Args:
            words: Int64 [17], on the host.
        """
        self.n_ranks = Int(words[0])
        self.n_experts = Int(words[1])
        self.n_local = self.n_experts // max(1, self.n_ranks)
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
        self.queue = 0
        self.virtual = Int(words[12]) & WAITS_VIRTUAL != 0
        self.shrinks = Int(words[12]) & WAITS_SHRINK != 0
        self.expert_slots = words[13] == SLOTS_EXPERT
        self.everywhere = words[13] == SLOTS_EVERYWHERE
        self.shared_expert = words[14] != 0
        self.format_tag = Int(words[15])
        self.reduce = Int(words[16])
        var choices = GATHERED_CHOICES if self.everywhere else self.top_k
        choices *= self.max_tokens
        self.few_tokens = (
            not self.expert_slots and self.n_ranks * choices <= FEW_CHOICES
        )
        self.table_room = self.few_tokens or (
            not self.expert_slots
            and not self.everywhere
            and choices <= CELL_CHOICES
        )
        self.in_cells = self.few_tokens and not self.shrinks
        self.tables_in_cells = self.table_room and not self.shrinks
        self.rows_in_cells = (
            not self.expert_slots
            and not self.shrinks
            and choices <= CELL_CHOICES
        )

    def __init__(
        out self,
        *,
        n_ranks: Int,
        n_experts: Int,
        top_k: Int,
        max_tokens: Int,
        hidden_size: Int,
        message_bytes: Int,
        row_bytes: Int,
        format_tag: Int,
    ):
        """Settings of ExpertSlots: one buffer, no alignment, no shared expert, reduce "source".

        Args:
            n_ranks: R.
            n_experts: E.
            top_k: K.
            max_tokens: Tm.
            hidden_size: H.
            message_bytes: Bytes of one dispatch message, its header included.
            row_bytes: Bytes of one combine row.
            format_tag: Hash of the format's name and options.
        """
        self.n_ranks = n_ranks
        self.n_experts = n_experts
        self.n_local = n_experts // n_ranks
        self.top_k = top_k
        self.max_tokens = max_tokens
        self.num_buffers = 1
        self.alignment = 1
        self.tokens_per_signal = 1
        self.hidden_size = hidden_size
        self.message_bytes = message_bytes
        self.row_bytes = row_bytes
        self.combine_slots = top_k
        self.n_sms = 0
        self.queue = 0
        self.virtual = False
        self.shrinks = False
        self.expert_slots = True
        self.everywhere = False
        self.shared_expert = False
        self.format_tag = format_tag
        self.reduce = REDUCE_SOURCE
        self.few_tokens = False
        self.table_room = False
        self.in_cells = False
        self.tables_in_cells = False
        self.rows_in_cells = False

    def words(self) -> StaticTuple[Int64, SETTINGS_WORDS]:
        """The settings as the words of a settings tensor.

        Returns:
            What `Settings(words)` reads.
        """
        return StaticTuple[Int64, SETTINGS_WORDS](
            Int64(self.n_ranks),
            Int64(self.n_experts),
            Int64(self.top_k),
            Int64(self.max_tokens),
            Int64(self.num_buffers),
            Int64(self.alignment),
            Int64(self.tokens_per_signal),
            Int64(self.hidden_size),
            Int64(self.message_bytes),
            Int64(self.row_bytes),
            Int64(self.combine_slots),
            Int64(self.n_sms),
            Int64(
                WAITS_VIRTUAL * Int(self.virtual)
                + WAITS_SHRINK * Int(self.shrinks)
            ),
            Int64(
                SLOTS_EXPERT if self.expert_slots else SLOTS_EVERYWHERE if self.everywhere else SLOTS_RANK
            ),
            Int64(Int(self.shared_expert)),
            Int64(self.format_tag),
            Int64(self.reduce),
        )

    def hash(self, unhashed: UInt32) -> UInt64:
        """FNV-1a over the settings as little-endian bytes.

        Args:
            unhashed: Words that count as 0, `*_UNHASHED`.

        Returns:
            The hash.
        """
        return settings_hash(self.words(), unhashed)

    @always_inline
    def n_local_experts(self) -> Int:
        """Experts of one rank.

        Returns:
            L = E / R.
        """
        return self.n_local

    @always_inline
    def n_groups(self) -> Int:
        """Groups of rows of the expert layouts.

        Returns:
            L, and one more with a shared expert.
        """
        return self.n_local_experts() + Int(self.shared_expert)

    @always_inline
    def message_stride(self) -> Int:
        """From one message to the next in a window of RankSlots.

        Returns:
            Bytes: of a message, or of its cells where there are few tokens.
        """
        return (1 + Int(self.few_tokens)) * self.message_bytes

    @always_inline
    def narrow(self) -> Bool:
        """Whether combine cuts rows that travel as cells into small pieces.

        Returns:
            True up to `NARROW_TOKENS`.
        """
        return self.n_ranks * self.max_tokens <= NARROW_TOKENS

    @always_inline
    def n_signals(self, tokens: Int) -> Int:
        """Signals that cover a source's tokens.

        Args:
            tokens: Number of tokens.

        Returns:
            Ceil(tokens / G).
        """
        return quotient(
            tokens + self.tokens_per_signal - 1, self.tokens_per_signal
        )


def settings_hash(
    words: StaticTuple[Int64, SETTINGS_WORDS], unhashed: UInt32
) -> UInt64:
    """FNV-1a over the settings as little-endian bytes.

    Args:
        words: The settings tensor.
        unhashed: Words that count as 0, `*_UNHASHED`.

    Returns:
        The hash.
    """
    var h: UInt64 = 0xCBF29CE484222325
    for i in range(SETTINGS_WORDS):
        var skip = (unhashed >> UInt32(i)) & 1 == 1
        var word = UInt64(0) if skip else UInt64(words[i])
        for b in range(8):
            h = (h ^ ((word >> UInt64(8 * b)) & 0xFF)) * 0x100000001B3
    return h


def config_hash(words: View[DType.int64]) -> UInt64:
    """FNV-1a over the settings that all ranks share.

    Args:
        words: The settings tensor.

    Returns:
        The hash that every rank's head must hold.
    """
    var given = StaticTuple[Int64, SETTINGS_WORDS](fill=0)
    for i in range(SETTINGS_WORDS):
        given[i] = words[i]
    return settings_hash(given, CONFIG_UNHASHED)
