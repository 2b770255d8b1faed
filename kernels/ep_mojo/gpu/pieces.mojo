"""How the sources' tokens are divided among the CTAs that map them.

Piece v = r * P + p is the p-th of source r: its tokens [p * each, (p + 1) * each), where `each` is a multiple of G, so
that a chunk lies in one piece. All warps of a launch work out the same pieces. They follow from Tmax and not from T, so
a warp that copies knows the piece of a chunk before it knows the source's T.
"""

from ..counters import MAX_PIECES, MAX_SOURCE_PIECES
from ..numeric import quotient
from ..settings import Settings

comptime LEAST_CHOICES = 1024
"""Choices of a piece, at least, where a source has several: fewer are not worth another CTA."""
comptime CTAS_A_PIECE = 4
"""CTAs of the launch for each piece, at least, where a source has several: most are to send and to copy."""


struct Piece(TrivialRegisterPassable):
    """Consecutive tokens of a source."""

    var source: Int
    """The source."""
    var begin: Int
    """The first token."""
    var limit: Int
    """The token behind those that there can be; of the last piece Tmax."""

    @always_inline
    def __init__(out self, source: Int, begin: Int, limit: Int):
        """Name the tokens.

        Args:
            source: The source.
            begin: The first token.
            limit: The token behind the last one.
        """
        self.source = source
        self.begin = begin
        self.limit = limit

    @always_inline
    def end(self, tokens: Int) -> Int:
        """The token behind those that there are.

        Args:
            tokens: The source's T.

        Returns:
            `begin` to `limit`.
        """
        return max(self.begin, min(tokens, self.limit))


struct Pieces(TrivialRegisterPassable):
    """All pieces of a launch."""

    var n: Int
    """R * P, at most `MAX_PIECES`: no more than lanes of a warp, and than CTAs where P > 1."""
    var of_source: Int
    """P, at most `MAX_SOURCE_PIECES`."""
    var chunks: Int
    """Chunks of a piece."""

    @always_inline
    def __init__(out self, s: Settings, ctas: Int):
        """Divide the sources.

        Args:
            s: The settings.
            ctas: CTAs of the launch.
        """
        self.of_source = 1
        self.chunks = s.max_tokens
        # Few tokens do without divisions.
        var most = min(
            MAX_SOURCE_PIECES, s.max_tokens * s.top_k // LEAST_CHOICES
        )
        if s.everywhere:
            most = 1  # nothing is mapped
        if most > 1:
            var all = min(MAX_PIECES, ctas // CTAS_A_PIECE)
            most = min(most, quotient(all, s.n_ranks))
        if most > 1:
            var chunks = s.n_signals(s.max_tokens)
            self.chunks = quotient(chunks + most - 1, most)
            self.of_source = quotient(chunks + self.chunks - 1, self.chunks)
        self.n = s.n_ranks * self.of_source

    @always_inline
    def source(self, v: Int) -> Int:
        """Whose tokens a piece has.

        Args:
            v: The piece.

        Returns:
            The source.
        """
        return quotient(v, self.of_source)

    @always_inline
    def of(self, source: Int, chunk: Int) -> Int:
        """The piece that a chunk lies in.

        Args:
            source: The source.
            chunk: Its chunk.

        Returns:
            The piece.
        """
        return source * self.of_source + quotient(chunk, self.chunks)

    @always_inline
    def piece(self, s: Settings, v: Int) -> Piece:
        """A piece's tokens.

        Args:
            s: The settings.
            v: The piece.

        Returns:
            Them.
        """
        var source = self.source(v)
        var each = self.chunks * s.tokens_per_signal
        var begin = (v - source * self.of_source) * each
        return Piece(source, begin, min(begin + each, s.max_tokens))
