"""The ranks of a gathered round of the stress run: every token of every rank must be there, in order and without gaps.

Each multiplies the rows by a small number of its own (`Law.share`), so that a row that is missing from a sum, or is
another rank's, or another round's, is seen in it.
"""

from .jobs import DISPATCHES, ROWS, Job, Worker, count, report
from .law import Law, Words
from .rows import Rows
from .work import (
    WRONG_CHOICE,
    WRONG_COUNT,
    WRONG_NOBODY,
    WRONG_OFFSET,
    WRONG_ROW_WEIGHT,
    WRONG_SOURCE,
    WRONG_TOKENS,
    Array1,
)


struct Gathered[fp8: Bool](Job):
    """Check an all-gather-v, and work on its rows.

    Parameters:
        fp8: Whether rows are float8_e4m3fn with a float32 scale for 128 channels; else bfloat16.
    """

    var info: Words
    """The round."""
    var findings: Words
    """What was found."""
    var rows: Rows[Self.fp8]
    """What the rows hold, and those for reduce-scatter-v."""
    var row_offsets: Array1[DType.uint32]
    """[R + 1]."""
    var counts: Array1[DType.int32]
    """[R]."""
    var src_info: Array1[DType.int32]
    """[N, 2]."""
    var all_ids: Array1[DType.int32]
    """[N, K]."""
    var all_weights: Array1[DType.float32]
    """[N, K]."""
    var recv_num_tokens: Array1[DType.int32]
    """[R]."""

    def __init__(
        out self,
        info: Words,
        findings: Words,
        rows: Rows[Self.fp8],
        row_offsets: Array1[DType.uint32],
        counts: Array1[DType.int32],
        src_info: Array1[DType.int32],
        all_ids: Array1[DType.int32],
        all_weights: Array1[DType.float32],
        recv_num_tokens: Array1[DType.int32],
    ):
        """Name the tensors.

        Args:
            info: The round.
            findings: What was found.
            rows: What the rows hold.
            row_offsets: From the handle.
            counts: From the handle.
            src_info: From the handle.
            all_ids: From the handle.
            all_weights: From the handle.
            recv_num_tokens: From the handle.
        """
        self.info = info
        self.findings = findings
        self.rows = rows
        self.row_offsets = row_offsets
        self.counts = counts
        self.src_info = src_info
        self.all_ids = all_ids
        self.all_weights = all_weights
        self.recv_num_tokens = recv_num_tokens

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        var law = Law(self.info)
        var rows = self.src_info.size // 2
        var H = self.rows.y.size // rows
        var first = 0
        for s in range(law.n_ranks):
            var T = law.tokens(s)
            if w.is_first():
                self._source(law, s, first, T)
            for t in range(w.team, T, w.teams):
                self._route(law, w, first + t, s, t, True)
                self.rows.content(
                    law, w, first + t, s, t, law.share(s, t, law.me), H
                )
                if w.lane == 0:
                    _ = count(self.findings, ROWS)
            first += T
        for row in range(first + w.team, rows, w.teams):
            self._route(law, w, row, 0, 0, False)
            self.rows.poison(w, row, H)
        if w.is_first():
            self._check(
                law,
                WRONG_OFFSET,
                law.n_ranks,
                0,
                first,
                Int(self.row_offsets[law.n_ranks]),
            )
            _ = count(self.findings, DISPATCHES)

    def _check(self, law: Law, kind: Int, i: Int, j: Int, want: Int, got: Int):
        if want != got:
            report(self.findings, kind, law.round, i, j, want, got)

    def _source(self, law: Law, s: Int, first: Int, T: Int):
        """Where a source's rows begin, and how many they are."""
        var begin = Int(self.row_offsets[s])
        var came = Int(self.recv_num_tokens[s])
        self._check(law, WRONG_OFFSET, s, 0, first, begin)
        self._check(law, WRONG_COUNT, s, 0, T, Int(self.counts[s]))
        self._check(law, WRONG_TOKENS, s, 0, T, came)

    def _route(
        self, law: Law, w: Worker, row: Int, s: Int, t: Int, there: Bool
    ):
        """Where a row comes from, and what its token has chosen; -1 and 0 where there is none."""
        if w.lane == 0:
            var kind = WRONG_SOURCE if there else WRONG_NOBODY
            var source = s * law.max_tokens + t if there else -1
            self._check(law, kind, row, 0, source, Int(self.src_info[2 * row]))
            self._check(law, kind, row, 1, -1, Int(self.src_info[2 * row + 1]))
        for k in range(w.lane, law.top_k, w.lanes):
            var at = row * law.top_k + k
            var chosen = law.expert(s, t, k) if there else -1
            if not law.is_expert(chosen):
                chosen = -1
            var weight = Float32(law.weight(s, t, k)) if there else Float32(0)
            self._check(
                law, WRONG_CHOICE, row, k, chosen, Int(self.all_ids[at])
            )
            if self.all_weights[at] != weight:
                report(
                    self.findings,
                    WRONG_ROW_WEIGHT,
                    law.round,
                    row,
                    k,
                    Int(weight),
                    Int(self.all_weights[at]),
                )
