"""Every byte offset of the windows; `counters.mojo` has those of a rank's own counters. Mirrored by
`ep_mojo/layout.py`, tested equal.

A rank owns four windows that its peers write (sizes in bytes, for `RankSlots`; B buffers, R ranks, Tm tokens a rank):

    dispatch recv    [B][R][Tm] messages                       slot = (source rank, the token's own index)
    dispatch count   credits u64[R] | headers u64[B][R] | signals u64[B][R][C] | ids i16[B][R][Tm*K] | weights f32[..]
                     | with Tm*K up to 2048 cells[B][R][Tm*K]
    combine recv     [B][Tm*S] rows                            slot = (expert's rank, token), or (token, k)
    combine count    credits u64[R] | headers u64[B][R] | signals u64[B][R][C]

C = ceil(Tm / G) signals a source, one for each G tokens; S = rows a token, R or K. `recv_ptrs` holds the addresses of
the recv windows, `recv_count_ptrs` those of the count windows. Regions and per-source blocks start at multiples of
128 bytes, so that no two writers share a cache line. Tables of not too many choices have room for marked cells, too
(`Settings.table_room`; `cell.mojo`). Where there are few tokens (`Settings.few_tokens`) so has each message, twice its
bytes: GPUs that have cells use these alone, others the first half of the room, and signals. Full cells take no more
room than the row (`Settings.rows_in_cells`); between rounds all their places are zeros.

`ExpertSlots` has exactly four arrays and one buffer: recv [L][R][Tm] messages, count u64 [L][R], combine recv [Tm][K]
rows, combine count u64 [E].
"""

from .counters import *
from .settings import Settings

comptime ALIGNMENT = 128
"""Bytes that regions and blocks are rounded up to."""
comptime MAX_EXPERTS = 2048
"""The most experts of all ranks; ids travel as int16."""
comptime MAX_TOP_K = 32
"""The most choices of a token; masks of choices are 32 bits."""
comptime MAX_TOKENS = 4194304
"""The most tokens of a rank (2^22): twice as many and one bit fit a signal's value."""

comptime CELL_BYTES = 16
"""Bytes of a cell."""
comptime CELL_PAYLOAD = 8
"""Bytes of payload in a marked cell."""

comptime EXPERT_SLOTS_HEADER = 16
"""Bytes in front of an ExpertSlots message: token (i32), k mask (u32), 8 unused."""
comptime EXPERT_SLOTS_TOKEN = 0
"""Byte offset of the token's index (i32) in that header."""
comptime EXPERT_SLOTS_MASK = 4
"""Byte offset of its mask of choices (u32)."""


@always_inline
def align_up(n: Int, to: Int = ALIGNMENT) -> Int:
    """Round up.

    Args:
        n: A size, 0 or more.
        to: A positive multiple.

    Returns:
        The least multiple of `to` that is not less than `n`.
    """
    return (n + to - 1) // to * to


struct CountWindow[has_table: Bool](ImplicitlyCopyable, Movable):
    """Offsets in a count window: credits, headers, signals, and for dispatch the routing tables.

    Parameters:
        has_table: Whether ids and weights follow (dispatch) or not (combine).
    """

    var n_ranks: Int
    """R."""
    var headers: Int
    """Offset of the headers."""
    var signals: Int
    """Offset of the signals."""
    var signal_block: Int
    """Bytes of one source's signals."""
    var ids: Int
    """Offset of the ids."""
    var ids_block: Int
    """Bytes of one source's ids."""
    var weights: Int
    """Offset of the weights."""
    var weights_block: Int
    """Bytes of one source's weights."""
    var cells: Int
    """Offset of the tables' cells."""
    var cells_block: Int
    """Bytes of one source's."""
    var total: Int
    """Bytes of the window."""

    def __init__(out self, s: Settings):
        """Lay the window out.

        Args:
            s: The settings.
        """
        var blocks = s.num_buffers * s.n_ranks
        self.n_ranks = s.n_ranks
        self.headers = align_up(8 * s.n_ranks)
        self.signals = self.headers + align_up(8 * blocks)
        self.signal_block = align_up(8 * s.n_signals(s.max_tokens))
        self.ids = self.signals + blocks * self.signal_block
        self.ids_block = align_up(
            2 * s.max_tokens * s.top_k
        ) if Self.has_table else 0
        self.weights = self.ids + blocks * self.ids_block
        self.weights_block = align_up(
            4 * s.max_tokens * s.top_k
        ) if Self.has_table else 0
        self.cells = self.weights + blocks * self.weights_block
        self.cells_block = (
            align_up(CELL_BYTES * s.max_tokens * s.top_k) if Self.has_table
            and s.table_room else 0
        )
        self.total = self.cells + blocks * self.cells_block

    @always_inline
    def credit(self, reader: Int) -> Int:
        """Where `reader` says how far it has read what this window's owner sent.

        Args:
            reader: A peer.

        Returns:
            Byte offset of a u64.
        """
        return 8 * reader

    @always_inline
    def header(self, buffer: Int, source: Int) -> Int:
        """Where `source` says that a round has begun, with T as the value.

        Args:
            buffer: Epoch mod B.
            source: The sending rank.

        Returns:
            Byte offset of a u64.
        """
        return self.headers + 8 * (buffer * self.n_ranks + source)

    @always_inline
    def signal(self, buffer: Int, source: Int, chunk: Int) -> Int:
        """Where `source` says that chunk `chunk` of its tokens has arrived.

        Args:
            buffer: Epoch mod B.
            source: The sending rank.
            chunk: First token / G.

        Returns:
            Byte offset of a u64.
        """
        return (
            self.signals
            + (buffer * self.n_ranks + source) * self.signal_block
            + 8 * chunk
        )

    @always_inline
    def table_ids(self, buffer: Int, source: Int) -> Int:
        """The source's expert ids, i16 [T, K], -1 = no expert.

        Args:
            buffer: Epoch mod B.
            source: The sending rank.

        Returns:
            Byte offset.
        """
        return self.ids + (buffer * self.n_ranks + source) * self.ids_block

    @always_inline
    def table_weights(self, buffer: Int, source: Int) -> Int:
        """The source's weights, f32 [T, K], 1 where none were given.

        Args:
            buffer: Epoch mod B.
            source: The sending rank.

        Returns:
            Byte offset.
        """
        return (
            self.weights + (buffer * self.n_ranks + source) * self.weights_block
        )

    @always_inline
    def table_cell(self, buffer: Int, source: Int, choice: Int) -> Int:
        """A choice of the source's table as a cell: id (i16) and, from byte 4 on, weight (f32); the word's value is T.

        Args:
            buffer: Epoch mod B.
            source: The sending rank.
            choice: Token * K + k; -1 and 0 are behind the last one, up to Tmax * K.

        Returns:
            Byte offset.
        """
        return (
            self.cells
            + (buffer * self.n_ranks + source) * self.cells_block
            + CELL_BYTES * choice
        )


comptime DispatchWindow = CountWindow[True]
"""The dispatch count window."""
comptime CombineWindow = CountWindow[False]
"""The combine count window."""


@always_inline
def message_offset(s: Settings, buffer: Int, source: Int, token: Int) -> Int:
    """A token's message in the dispatch recv window (RankSlots).

    Args:
        s: The settings.
        buffer: Epoch mod B.
        source: The sending rank.
        token: The token's index on its own rank.

    Returns:
        Byte offset.
    """
    return (
        (buffer * s.n_ranks + source) * s.max_tokens + token
    ) * s.message_stride()


@always_inline
def partial_offset(s: Settings, buffer: Int, rank: Int, token: Int) -> Int:
    """A token's partial sum in the combine recv window, with reduce="expert".

    Args:
        s: The settings.
        buffer: Epoch mod B.
        rank: The rank of the experts that it comes from.
        token: The token's index on its own rank.

    Returns:
        Byte offset.
    """
    return (
        buffer * s.combine_slots * s.max_tokens + rank * s.max_tokens + token
    ) * s.row_bytes


@always_inline
def row_offset(s: Settings, buffer: Int, token: Int, k: Int) -> Int:
    """An expert's row in the combine recv window, with reduce="source".

    Args:
        s: The settings.
        buffer: Epoch mod B.
        token: The token's index on its own rank.
        k: The place of the expert among the token's choices.

    Returns:
        Byte offset.
    """
    return (
        buffer * s.combine_slots * s.max_tokens + token * s.top_k + k
    ) * s.row_bytes


@always_inline
def combine_header(tokens: Int, by_row: Bool) -> Int:
    """The value of a combine header: what the receiver compares with its own launch.

    Args:
        tokens: T of the receiver, up to `MAX_TOKENS`.
        by_row: Whether a row for each choice comes, and not a partial sum for each token.

    Returns:
        2 T, and 1 more with `by_row`.
    """
    return 2 * tokens + Int(by_row)


@always_inline
def expert_slot_offset(s: Settings, expert: Int, source: Int, slot: Int) -> Int:
    """A message in the dispatch recv window of ExpertSlots.

    Args:
        s: The settings.
        expert: Local expert.
        source: The sending rank.
        slot: Number of the message among those from `source` to `expert`.

    Returns:
        Byte offset.
    """
    return (
        (expert * s.n_ranks + source) * s.max_tokens + slot
    ) * s.message_bytes


@always_inline
def expert_count_offset(s: Settings, expert: Int, source: Int) -> Int:
    """A word in the dispatch count window of ExpertSlots: messages from a source to an expert.

    Args:
        s: The settings.
        expert: Local expert of the window's owner.
        source: The sending rank.

    Returns:
        Byte offset of a u64.
    """
    return 8 * (expert * s.n_ranks + source)


@always_inline
def expert_signal_offset(expert: Int) -> Int:
    """A word in the combine count window of ExpertSlots: an expert's rows have arrived.

    Args:
        expert: Global expert.

    Returns:
        Byte offset of a u64.
    """
    return 8 * expert
