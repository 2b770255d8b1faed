"""The experts of the stress run: they compare what dispatch gave them with the law, and multiply it by a small number.
"""

from .jobs import DISPATCHES, ROWS, Job, Worker, count, report
from .law import Law, Words, factor
from .rows import Rows
from .work import (
    WRONG_GROUP,
    WRONG_NOBODY,
    WRONG_OFFSET,
    WRONG_ORDER,
    WRONG_ROW_MAP,
    WRONG_SOURCE,
    WRONG_TOKENS,
    WRONG_WEIGHT,
    Array1,
)


struct Experts[fp8: Bool](Job):
    """Check a dispatch, and work on its rows.

    Parameters:
        fp8: Whether rows are float8_e4m3fn with a float32 scale for 128 channels; else bfloat16.
    """

    var info: Words
    """The round."""
    var findings: Words
    """What was found."""
    var rows: Rows[Self.fp8]
    """What the rows hold, and those for combine."""
    var row_offsets: Array1[DType.uint32]
    """[G + 1]."""
    var counts: Array1[DType.int32]
    """[G]."""
    var expert_ids: Array1[DType.int32]
    """[G]."""
    var src_info: Array1[DType.int32]
    """[N, 2]."""
    var recv_weights: Array1[DType.float32]
    """[R, Tmax, K]."""
    var row_map: Array1[DType.int32]
    """[R, Tmax, K]."""
    var recv_num_tokens: Array1[DType.int32]
    """[R]."""

    def __init__(
        out self,
        info: Words,
        findings: Words,
        rows: Rows[Self.fp8],
        row_offsets: Array1[DType.uint32],
        counts: Array1[DType.int32],
        expert_ids: Array1[DType.int32],
        src_info: Array1[DType.int32],
        recv_weights: Array1[DType.float32],
        row_map: Array1[DType.int32],
        recv_num_tokens: Array1[DType.int32],
    ):
        """Name the tensors.

        Args:
            info: The round.
            findings: What was found.
            rows: What the rows hold.
            row_offsets: From the handle.
            counts: From the handle.
            expert_ids: From the handle.
            src_info: From the handle.
            recv_weights: From the handle.
            row_map: From the handle.
            recv_num_tokens: From the handle.
        """
        self.info = info
        self.findings = findings
        self.rows = rows
        self.row_offsets = row_offsets
        self.counts = counts
        self.expert_ids = expert_ids
        self.src_info = src_info
        self.recv_weights = recv_weights
        self.row_map = row_map
        self.recv_num_tokens = recv_num_tokens

    def work(self, w: Worker):
        """Do a worker's part.

        Args:
            w: The worker.
        """
        var law = Law(self.info)
        var choices = law.n_ranks * law.max_tokens * law.top_k
        for i in range(w.team * w.lanes + w.lane, choices, w.teams * w.lanes):
            self._choice(law, i)
        if w.team == 0:
            for g in range(w.lane, self.counts.size, w.lanes):
                self._group(law, g)
            for s in range(w.lane, law.n_ranks, w.lanes):
                var want = law.tokens(s)
                var got = Int(self.recv_num_tokens[s])
                if got != want:
                    self._wrong(law, WRONG_TOKENS, s, 0, want, got)
        for row in range(w.team, self.src_info.size // 2, w.teams):
            self._row(law, w, row)
        if w.is_first():
            _ = count(self.findings, DISPATCHES)

    def _wrong(
        self,
        law: Law,
        kind: Int,
        first: Int,
        second: Int,
        want: Int,
        got: Int,
    ):
        report(self.findings, kind, law.round, first, second, want, got)

    def _group(self, law: Law, g: Int):
        """Where a group begins and ends, and which expert it is."""
        var first = Int(self.row_offsets[g])
        var end = Int(self.row_offsets[g + 1])
        var n = Int(self.counts[g])
        var want = first + law.n_ranks * law.max_tokens
        if law.alignment > 0:
            var a = law.alignment
            want = (first + n + a - 1) // a * a
        if end != want:
            self._wrong(law, WRONG_OFFSET, g + 1, 0, want, end)
        if g == 0 and first != 0:
            self._wrong(law, WRONG_OFFSET, 0, 0, 0, first)
        var expert = law.me * law.n_local() + g
        if Int(self.expert_ids[g]) != expert:
            self._wrong(law, WRONG_GROUP, g, 0, expert, Int(self.expert_ids[g]))

    def _choice(self, law: Law, i: Int):
        """The weight and the row of a choice of any source."""
        var K = law.top_k
        var token = i // K
        var k = i - token * K
        var s = token // law.max_tokens
        var t = token - s * law.max_tokens
        var there = t < law.tokens(s)
        var weight = Float32(law.weight(s, t, k)) if there else Float32(0)
        if self.recv_weights[i] != weight:
            self._wrong(
                law,
                WRONG_WEIGHT,
                token,
                k,
                Int(weight),
                Int(self.recv_weights[i]),
            )
        var L = law.n_local()
        var g = law.expert(s, t, k) - law.me * L
        var row = Int(self.row_map[i])
        if not there or g < 0 or g >= L:
            if row != -1:
                self._wrong(law, WRONG_ROW_MAP, token, k, -1, row)
            return
        var first = Int(self.row_offsets[g])
        var inside = first <= row < first + Int(self.counts[g])
        if (
            not inside
            or Int(self.src_info[2 * row]) != token
            or Int(self.src_info[2 * row + 1]) != k
        ):
            self._wrong(law, WRONG_ROW_MAP, token, k, first, row)

    def _row(self, law: Law, w: Worker, row: Int):
        """What a row is, and what it holds."""
        var groups = self.counts.size
        var H = self.rows.y.size // (self.src_info.size // 2)
        var g = 0
        while g + 1 < groups and Int(self.row_offsets[g + 1]) <= row:
            g += 1
        var first = Int(self.row_offsets[g])
        var source = Int(self.src_info[2 * row])
        var k = Int(self.src_info[2 * row + 1])
        if row < first or row >= first + Int(self.counts[g]):
            if w.lane == 0 and (source != -1 or k != -1):
                self._wrong(law, WRONG_NOBODY, row, k, -1, source)
            if law.alignment > 0 and row < Int(self.row_offsets[groups]):
                self.rows.padding(law, w, row, H)
            self.rows.poison(w, row, H)
            return
        var s = source // law.max_tokens
        var t = source - s * law.max_tokens
        var known = 0 <= source < law.n_ranks * law.max_tokens
        known = known and 0 <= k < law.top_k
        known = known and t < law.tokens(s)
        var expert = law.me * law.n_local() + g
        if not known or law.expert(s, t, k) != expert:
            if w.lane == 0:
                self._wrong(law, WRONG_SOURCE, row, k, expert, source)
            self.rows.poison(w, row, H)
            return
        if w.lane == 0 and row > first:
            var before = Int(self.src_info[2 * row - 2]) * law.top_k + Int(
                self.src_info[2 * row - 1]
            )
            if before >= source * law.top_k + k:
                self._wrong(law, WRONG_ORDER, row, k, before, source)
        self.rows.content(law, w, row, s, t, factor(expert), H)
        if w.lane == 0:
            _ = count(self.findings, ROWS)
