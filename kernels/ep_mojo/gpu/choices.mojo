"""Choices that a CTA gives rows to, in the order of their rows: those of a piece, or all of all sources.

A choice is an entry of a routing table: token * K + k.
"""

from ..launch import Endpoint
from ..numeric import quotient
from ..peers import View
from ..routing import local_group
from ..settings import Settings
from .pieces import Piece


@always_inline
def group_of[
    layout: StaticString
](s: Settings, ids: View[DType.int16], i: Int, rank: Int) -> Int:
    """The group that a choice adds a row to.

    Parameters:
        layout: Output layout; with "rank" only a token's first local choice has a row, in group 0.

    Args:
        s: The settings.
        ids: The source's table.
        i: Token * K + k.
        rank: The rank whose output it is.

    Returns:
        The group, or -1.
    """
    var group = local_group(s, ids[i], rank)
    comptime if layout == "rank":
        if group < 0:
            return -1
        for j in range(quotient(i, s.top_k) * s.top_k, i):
            if local_group(s, ids[j], rank) >= 0:
                return -1
        return 0
    else:
        return group


struct Choices[of_all: Bool](TrivialRegisterPassable):
    """Consecutive choices, and the group of each.

    Parameters:
        of_all: Whether they are those of all sources, Tmax tokens each: token r * Tmax + t is t of source r, and with
            layout "rank" the groups are the sources. Otherwise they are those of a piece.
    """

    var s: Settings
    """The settings."""
    var rank: Int
    """The rank whose output it is."""
    var ids: View[DType.int16]
    """Of a piece: its source's table, or that piece of it. Of all: [R, Tmax, K], in shared memory."""
    var tokens: View[DType.int32]
    """Of all: T of each source, in shared memory."""
    var begin: Int
    """The first token."""
    var end: Int
    """The token behind those that there are."""
    var limit: Int
    """The token behind those that there can be."""
    var own: Int
    """The rank's own tokens among them."""

    @always_inline
    def __init__(
        out self: Choices[False],
        ep: Endpoint[True],
        ids: View[DType.int16],
        piece: Piece,
        tokens: Int,
    ):
        """The choices of a piece.

        Args:
            ep: The rank.
            ids: Int16 [Tmax, K]: its source's table, or the piece of it.
            piece: The piece.
            tokens: The source's T.
        """
        self.s = ep.s
        self.rank = ep.me
        self.ids = ids
        self.tokens = View[DType.int32]()
        self.begin = piece.begin
        self.end = piece.end(tokens)
        self.limit = piece.limit
        self.own = self.end - self.begin if piece.source == ep.me else 0

    @always_inline
    def __init__(
        out self: Choices[True],
        ep: Endpoint[True],
        ids: View[DType.int16],
        tokens: View[DType.int32],
    ):
        """The choices of all sources.

        Args:
            ep: The rank.
            ids: Int16 [R, Tmax, K]: their tables, in shared memory.
            tokens: Int32 [R]: T of each source, in shared memory.
        """
        self.s = ep.s
        self.rank = ep.me
        self.ids = ids
        self.tokens = tokens
        self.begin = 0
        self.end = ep.s.n_ranks * ep.s.max_tokens
        self.limit = self.end
        self.own = Int(tokens[ep.me])

    @always_inline
    def group[layout: StaticString](self, i: Int) -> Int:
        """The group that a choice adds a row to.

        Parameters:
            layout: Output layout.

        Args:
            i: Token * K + k.

        Returns:
            The group, or -1.
        """
        comptime if Self.of_all:
            var size = self.s.max_tokens * self.s.top_k
            var source = quotient(i, size)
            var j = i - source * size
            if j >= Int(self.tokens[source]) * self.s.top_k:
                return -1
            var ids = self.ids.part(source * size, size)
            var group = group_of[layout](self.s, ids, j, self.rank)
            comptime if layout == "rank":
                return source if group >= 0 else -1
            return group
        else:
            return group_of[layout](self.s, self.ids, i, self.rank)
