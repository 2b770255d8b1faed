"""Offsets: nothing overlaps, everything fits its window; hashes are those of Python."""

from std.testing import TestSuite, assert_equal, assert_true

from ep_mojo import (
    BF16,
    BlockwiseFP8,
    Settings,
    combine_count_bytes,
    combine_recv_bytes,
    counters_words,
    dispatch_count_bytes,
    dispatch_recv_bytes,
    expert_slots_settings,
)
from ep_mojo.layout import (
    ALIGNMENT,
    CombineWindow,
    CountWindow,
    DispatchWindow,
    HEAD_WORDS,
    align_up,
    expert_count_offset,
    expert_signal_offset,
    expert_slot_offset,
    message_offset,
    partial_offset,
    row_offset,
)
from ep_mojo.peers import View
from ep_mojo.settings import (
    COMBINE_UNHASHED,
    CONFIG_UNHASHED,
    DISPATCH_UNHASHED,
    SETTINGS_WORDS,
)


def rank_slots(
    n_ranks: Int, max_tokens: Int, num_buffers: Int, per_signal: Int
) raises -> Settings:
    var s = expert_slots_settings[BF16[64], DType.bfloat16](
        n_ranks=n_ranks,
        n_experts=2 * n_ranks,
        top_k=3,
        max_token_per_rank=max_tokens,
    )
    s.expert_slots = False
    s.message_bytes = 128
    s.num_buffers = num_buffers
    s.tokens_per_signal = per_signal
    s.combine_slots = max(n_ranks, 3)
    var given = s.words()
    var words = List[Int64]()
    for i in range(SETTINGS_WORDS):
        words.append(given[i])
    var read = Settings(
        View[DType.int64](Int(words.unsafe_ptr()), SETTINGS_WORDS)
    )
    _ = words^
    return read


struct Marks(Movable):
    """Bytes of a window that somebody owns."""

    var owned: List[Bool]

    def __init__(out self, size: Int):
        self.owned = List[Bool](length=size, fill=False)

    def mark(mut self, offset: Int, size: Int) raises:
        assert_true(offset >= 0 and offset + size <= len(self.owned))
        for i in range(offset, offset + size):
            assert_true(not self.owned[i])
            self.owned[i] = True

    def full(self) -> Bool:
        for i in range(len(self.owned)):
            if not self.owned[i]:
                return False
        return True


def check_count_window[has_table: Bool](s: Settings) raises:
    var window = CountWindow[has_table](s)
    assert_equal(window.total % ALIGNMENT, 0)
    var marks = Marks(window.total)
    for r in range(s.n_ranks):
        marks.mark(window.credit(r), 8)
    for b in range(s.num_buffers):
        for r in range(s.n_ranks):
            marks.mark(window.header(b, r), 8)
            assert_equal(window.signal(b, r, 0) % ALIGNMENT, 0)
            for c in range(s.n_signals(s.max_tokens)):
                marks.mark(window.signal(b, r, c), 8)
            comptime if has_table:
                var n = s.max_tokens * s.top_k
                assert_equal(window.table_ids(b, r) % ALIGNMENT, 0)
                assert_equal(window.table_weights(b, r) % ALIGNMENT, 0)
                marks.mark(window.table_ids(b, r), 2 * n)
                marks.mark(window.table_weights(b, r), 4 * n)
                if s.table_room:
                    for i in range(n):
                        marks.mark(window.table_cell(b, r, i), 16)


def test_count_windows() raises:
    for s in [
        rank_slots(1, 1, 1, 1),
        rank_slots(3, 10, 2, 4),
        rank_slots(8, 33, 3, 1),
        rank_slots(8, 43, 3, 1),
        rank_slots(1, 682, 1, 4),
        rank_slots(1, 683, 1, 4),
    ]:
        assert_equal(s.few_tokens, s.n_ranks * s.max_tokens * s.top_k <= 1024)
        assert_equal(s.table_room, s.max_tokens * s.top_k <= 2048)
        assert_equal(s.tables_in_cells, s.table_room)
        assert_equal(s.in_cells, s.few_tokens)
        assert_equal(s.rows_in_cells, s.max_tokens * s.top_k <= 2048)
        check_count_window[True](s)
        check_count_window[False](s)
        assert_equal(dispatch_count_bytes(s), DispatchWindow(s).total)
        assert_equal(combine_count_bytes(s), CombineWindow(s).total)
        assert_equal(
            counters_words(s),
            HEAD_WORDS + 592 + 2 * 8 * (s.n_experts + s.n_ranks),
        )


def test_recv_windows() raises:
    check_recv_windows(rank_slots(3, 5, 2, 4))
    check_recv_windows(rank_slots(3, 200, 1, 4))


def check_recv_windows(s: Settings) raises:
    var messages = Marks(dispatch_recv_bytes(s))
    var partials = Marks(combine_recv_bytes(s))
    var rows = Marks(combine_recv_bytes(s))
    for b in range(s.num_buffers):
        for t in range(s.max_tokens):
            for r in range(s.n_ranks):
                messages.mark(message_offset(s, b, r, t), s.message_stride())
                partials.mark(partial_offset(s, b, r, t), s.row_bytes)
            for k in range(s.top_k):
                rows.mark(row_offset(s, b, t, k), s.row_bytes)
    assert_true(messages.full() and partials.full() and rows.full())


def test_expert_slots_windows_are_those_of_the_seed() raises:
    var s = expert_slots_settings[BF16[64], DType.float32](
        n_ranks=3, n_experts=6, top_k=2, max_token_per_rank=5
    )
    assert_equal(dispatch_recv_bytes(s), 2 * 3 * 5 * (128 + 16))
    assert_equal(dispatch_count_bytes(s), 2 * 3 * 8)
    assert_equal(combine_recv_bytes(s), 5 * 2 * 64 * 4)
    assert_equal(combine_count_bytes(s), 6 * 8)
    assert_equal(counters_words(s), HEAD_WORDS + 6 + 2 * 6)
    var messages = Marks(dispatch_recv_bytes(s))
    var counts = Marks(dispatch_count_bytes(s))
    var signals = Marks(combine_count_bytes(s))
    for e in range(2):
        for r in range(3):
            counts.mark(expert_count_offset(s, e, r), 8)
            for slot in range(5):
                messages.mark(expert_slot_offset(s, e, r, slot), 144)
    for e in range(6):
        signals.mark(expert_signal_offset(e), 8)
    assert_true(messages.full() and counts.full() and signals.full())


def test_hashes_are_those_of_python() raises:
    """The same numbers stand in tests/unit/test_layout.py."""
    var s = expert_slots_settings[BlockwiseFP8[256], DType.bfloat16](
        n_ranks=3, n_experts=12, top_k=4, max_token_per_rank=20
    )
    assert_equal(s.hash(CONFIG_UNHASHED), 0xBAB9379C541B6501)
    assert_equal(s.hash(DISPATCH_UNHASHED), 0x5F184D49D0F57588)
    assert_equal(s.hash(COMBINE_UNHASHED), 0x10E0B1A69EC88C98)


def test_align_up() raises:
    assert_equal(align_up(0), 0)
    assert_equal(align_up(1), 128)
    assert_equal(align_up(128), 128)
    assert_equal(align_up(17, 16), 32)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
