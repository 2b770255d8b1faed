"""How a CTA maps the tokens of all sources by itself, where there are few: no CTA waits for what others have counted.

Counting and mapping a thousand choices takes less long than to learn from other CTAs what they have counted and mapped.
So each CTA that receives awaits all tables, which come as cells (`cells.mojo`), counts all rows, and gives out all of
them in its shared memory, in the order of `routing.mojo`. What is the same for all is written by the first CTA, which
notes it for those that mark what no row fills.

    SLOTS          a histogram, while rows are given out
    behind it      whether a table has not come i32 | T i32[R] | rows i32[R][Tmax][K] | ids i16[R][Tmax][K]
    behind these   the message that is being received
"""

from max.gpu import block_dim, block_idx, lane_id, thread_idx
from max.gpu.sync import barrier

from ..dispatch_tensors import DispatchOutput
from ..formats import TokenFormat
from ..launch import Endpoint
from ..layout import align_up
from ..peers import Bytes, View, window_view
from ..settings import Settings
from ..signal import Waiter
from .choices import Choices
from .headers import await_tokens
from .launch import warp_index
from .mapping import rows_fit
from .notes import note_mapped
from .routing import AHEAD_SHARED, Histogram, count_rows, map_rows
from .shared_memory import MAX_WARPS, SLOT_ALIGNMENT, SLOTS, shared_memory
from .starts import start_groups
from .tables_received import await_choices
from .timeline import (
    MARK_ALL_COUNTED,
    MARK_HEADER_SEEN,
    MARK_ROWS_COUNTED,
    MARK_ROWS_MAPPED,
    mark,
)


@always_inline
def _groups[layout: StaticString](s: Settings) -> Int:
    """Groups of `Choices` of all sources."""
    comptime if layout == "gathered":
        return 0
    elif layout == "rank":
        return s.n_ranks
    else:
        return s.n_groups()


struct FewTokens[layout: StaticString](TrivialRegisterPassable):
    """The tokens of all sources, in shared memory of one CTA.

    Parameters:
        layout: Output layout; with "gathered" there are no choices to map.
    """

    var failed: View[DType.int32]
    """[1]: whether something has not come."""
    var tokens: View[DType.int32]
    """[R]: T of each source."""
    var rows: View[DType.int32]
    """[R, Tmax, K]: the row of each choice."""
    var ids: View[DType.int16]
    """[R, Tmax, K]: the tables."""
    var message: Bytes
    """What is behind."""

    @staticmethod
    def bytes(s: Settings) -> Int:
        """Shared memory that it needs, at the place of the slots.

        Args:
            s: The settings.

        Returns:
            Bytes, a multiple of `SLOT_ALIGNMENT`.
        """
        var choices = Self._choices(s)
        return align_up(
            Histogram.bytes(_groups[Self.layout](s), MAX_WARPS)
            + 4 * (1 + s.n_ranks + choices)
            + 2 * choices,
            SLOT_ALIGNMENT,
        )

    @staticmethod
    @always_inline
    def _choices(s: Settings) -> Int:
        comptime if Self.layout == "gathered":
            return 0
        else:
            return s.n_ranks * s.max_tokens * s.top_k

    @always_inline
    def __init__(out self, s: Settings):
        """Take the shared memory; what was there is not needed any more.

        Args:
            s: The settings.
        """
        var at = Histogram.bytes(_groups[Self.layout](s), MAX_WARPS)
        var choices = Self._choices(s)
        var base = shared_memory(SLOTS)
        var words = window_view[DType.int32](base, at, 1 + s.n_ranks + choices)
        self.failed = words.part(0, 1)
        self.tokens = words.part(1, s.n_ranks)
        self.rows = words.part(1 + s.n_ranks, choices)
        self.ids = window_view[DType.int16](
            base, at + 4 * (1 + s.n_ranks + choices), choices
        )
        self.message = shared_memory(SLOTS + Self.bytes(s))

    @always_inline
    def come(
        self,
        ep: Endpoint[True],
        epoch: UInt64,
        waiter: Waiter,
        out_: DispatchOutput,
    ) -> Bool:
        """Await all tables, or with "gathered" how many tokens there are; the whole CTA calls this.

        Args:
            ep: The rank.
            epoch: The launch's epoch.
            waiter: The launch's waiter.
            out_: `recv_weights` and `recv_num_tokens` are written by the first CTA.

        Returns:
            The same to all threads: False when the rank has failed.
        """
        if thread_idx.x == 0:
            self.failed[0] = 0
        comptime if Self.layout != "gathered":
            Histogram(_groups[Self.layout](ep.s)).clear()
        barrier()
        var came: Bool
        comptime if Self.layout == "gathered":
            came = True
            if warp_index() == 0:
                var awaited = await_tokens(ep, epoch, waiter)
                if Int(lane_id()) < ep.s.n_ranks:
                    self.tokens[Int(lane_id())] = awaited[0]
                came = awaited[1]
        else:
            came = await_choices[one_source=False](
                ep,
                waiter,
                epoch,
                0,
                0,
                self.ids.size,
                self.ids,
                out_.recv_weights if block_idx.x
                == 0 else View[DType.float32](),
                self.tokens,
            )
        if not came:
            self.failed[0] = 1
        barrier()
        mark[MARK_HEADER_SEEN](ep)
        if self.failed[0] != 0:
            return False
        var r = Int(thread_idx.x)
        if block_idx.x == 0 and r < ep.s.n_ranks:
            out_.recv_num_tokens[r] = self.tokens[r]
        return True

    @always_inline
    def before(self, source: Int) -> Int:
        """Tokens of all sources before one.

        Args:
            source: The source; R for all tokens.

        Returns:
            Their sum.
        """
        var sum: Int32 = 0
        for r in range(source):
            sum += self.tokens[r]
        return Int(sum)

    @always_inline
    def give_rows[
        F: TokenFormat
    ](
        self,
        ep: Endpoint[True],
        epoch: UInt64,
        out_: DispatchOutput,
        stage: Int32,
    ) -> Bool:
        """Give every choice its row; the whole CTA calls this.

        Parameters:
            F: The format.

        Args:
            ep: The rank.
            epoch: The launch's epoch.
            out_: `row_offsets` and `counts` are written by the first CTA.
            stage: `STAGE_*`, for the failure record.

        Returns:
            The same to all threads: False where there are more rows than the output has.
        """
        var first = block_idx.x == 0
        comptime if Self.layout == "gathered":
            return self._gather[F](ep, out_, stage)
        var hist = Histogram(_groups[Self.layout](ep.s))
        var choices = Choices(ep, self.ids, self.tokens)
        count_rows[Self.layout, AHEAD_SHARED](choices, hist)
        mark[MARK_ROWS_COUNTED](ep)
        for g in range(Int(thread_idx.x), hist.groups, Int(block_dim.x)):
            hist.firsts[g] = 0
        var needed = start_groups[Self.layout](
            ep.s,
            hist,
            out_.row_offsets if first else View[DType.uint32](),
            out_.counts,
        )
        if not rows_fit[F, Self.layout](ep, out_, needed, stage):
            return False
        mark[MARK_ALL_COUNTED](ep)
        map_rows[Self.layout, AHEAD_SHARED](choices, hist, self.rows)
        barrier()
        if first:
            note_mapped(ep, epoch, 0, 0)
        mark[MARK_ROWS_MAPPED](ep)
        return True

    @always_inline
    def _gather[
        F: TokenFormat
    ](self, ep: Endpoint[True], out_: DispatchOutput, stage: Int32) -> Bool:
        """`give_rows` for "gathered"."""
        var total = self.before(ep.s.n_ranks)
        if not rows_fit[F, Self.layout](ep, out_, total, stage):
            return False
        var r = Int(thread_idx.x)
        if block_idx.x == 0 and r <= ep.s.n_ranks:
            out_.row_offsets[r] = UInt32(self.before(r))
            if r < ep.s.n_ranks:
                out_.counts[r] = self.tokens[r]
        return True
