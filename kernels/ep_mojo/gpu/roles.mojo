"""Which warps of a fused launch send, and which receive meanwhile."""

from max.gpu import block_idx, grid_dim

from ..numeric import quotient
from ..settings import Settings
from .launch import warp_index, warps
from .pieces import Pieces
from .share import LATE, Share, last_warps_first

comptime AT_ONCE = 4 * 1024 * 1024
"""Bytes of messages that a launch has on their way to each destination, where there are many. Measured, as is what
follows: docs/performance.md."""
comptime SUMMERS = 4
"""One warp in so many only sums, where there are many chunks."""
comptime MANY_TURNS = 2
"""Chunks for each warp that are not many yet."""


struct DispatchRoles(TrivialRegisterPassable):
    """Who does what in a fused dispatch.

    The first R CTAs send the tables, or where these are cells all warps that send no messages. As many as there are
    pieces, these among them, map and then copy; in the others some warps send, then help to copy and mark what no row
    fills, while the rest copies. Half of them send where each CTA has one chunk of Tmax at most, otherwise as many as
    have `AT_ONCE` bytes of messages under way: with more the links are no faster, and the rows come later. With fewer
    than 2R CTAs, or one warp in each, every warp sends first and copies then.

    Where roles are apart the warps that do not send have a first chunk each to copy, otherwise all; further ones go to
    whoever comes free (`Turns`).
    """

    var apart: Bool
    """Whether roles differ between warps."""
    var pieces: Pieces
    """What CTAs map."""
    var maps: Bool
    """Whether the CTA maps pieces."""
    var sends: Bool
    """Whether the warp sends while others copy; False where roles are not apart."""
    var share: Share
    """The warp's part of its role's work."""
    var copying: Share
    """Its first chunk to copy, `LATE` where it sends, and how many warps have one."""

    @always_inline
    def __init__(out self, s: Settings):
        """Find out the calling warp's.

        Args:
            s: The settings.
        """
        var ctas = Int(grid_dim.x)
        var cta = Int(block_idx.x)
        var w = warp_index()
        self.pieces = Pieces(s, ctas)
        var mappers = self.pieces.n
        var others = ctas - mappers
        var senders = warps() // 2
        if s.n_signals(s.max_tokens) > others:
            var of_one_warp_each = max(1, others) * s.message_bytes
            var fit = quotient(AT_ONCE, of_one_warp_each)
            senders = max(1, min(senders, fit))
        self.apart = others >= mappers and warps() > 1
        self.maps = cta < mappers
        self.sends = self.apart and not self.maps and w < senders
        var copiers = (warps() - senders) * others
        var takers = copiers + warps() * mappers
        if not self.apart:
            self.share = Share()
            self.copying = self.share
        elif self.sends:
            self.share = Share(
                w * others + cta - mappers, senders * others, others
            )
            self.copying = Share(LATE, takers)
        else:
            var first = copiers + w * mappers + cta
            if not self.maps:
                first = (w - senders) * others + cta - mappers
            self.share = Share(first, takers)
            self.copying = self.share


struct CombineRoles(TrivialRegisterPassable):
    """Who does what in a fused combine.

    Every warp sends, then sums; the first ones send most and the last ones sum most, so that with few tokens those who
    sum have nothing to send, and wait for signals by the time that these come. Where the R * ceil(Tmax / G) chunks are
    more than `MANY_TURNS` for each warp, the last warps of each CTA only sum, and the others help when they have sent.
    """

    var sends: Bool
    """Whether the warp sends."""
    var sending: Share
    """Its part of what is sent."""
    var summing: Share
    """Its first chunk of its rank's tokens to sum, or `LATE`, and how many warps have one."""

    @always_inline
    def __init__(out self, s: Settings):
        """Find out the calling warp's.

        Args:
            s: The settings.
        """
        var ctas = Int(grid_dim.x)
        var cta = Int(block_idx.x)
        var w = warp_index()
        var summers = warps() // SUMMERS
        var senders = warps() - summers
        self.sends = True
        self.sending = Share()
        self.summing = last_warps_first()
        if (
            summers > 0
            and s.n_ranks * s.n_signals(s.max_tokens)
            > MANY_TURNS * ctas * warps()
        ):
            self.sends = w < senders
            self.sending = Share(w * ctas + cta, senders * ctas, ctas)
            self.summing = Share(
                LATE if self.sends else (w - senders) * ctas + cta,
                summers * ctas,
            )
