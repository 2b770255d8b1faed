"""How the sources' tokens are divided among the CTAs that map them: every token once, no chunk in two pieces."""

from ep_mojo.counters import (
    MAX_PIECES,
    MAX_SOURCE_PIECES,
    WORK_COUNTED,
    WORK_COUNTS,
    WORK_MAPPED,
    NOTE_COPIES,
    WORK_TABLED,
    counters_words,
)
from ep_mojo.gpu.pieces import CTAS_A_PIECE, LEAST_CHOICES, Pieces
from ep_mojo.peers import MAX_RANKS
from ep_mojo.settings import Settings
from std.testing import TestSuite, assert_equal, assert_true


def settings(
    n_ranks: Int, max_tokens: Int, top_k: Int = 8, per_signal: Int = 8
) -> Settings:
    var s = Settings(
        n_ranks=n_ranks,
        n_experts=n_ranks,
        top_k=top_k,
        max_tokens=max_tokens,
        hidden_size=8,
        message_bytes=16,
        row_bytes=16,
        format_tag=0,
    )
    s.expert_slots = False
    s.tokens_per_signal = per_signal
    return s


def check(s: Settings, ctas: Int) raises:
    var pieces = Pieces(s, ctas)
    assert_equal(pieces.n, s.n_ranks * pieces.of_source)
    assert_true(1 <= pieces.of_source <= MAX_SOURCE_PIECES)
    assert_true(pieces.n <= MAX_PIECES)
    if pieces.of_source > 1:
        assert_true(CTAS_A_PIECE * pieces.n <= ctas)
    var next = 0  # token
    for v in range(pieces.n):
        var piece = pieces.piece(s, v)
        assert_equal(piece.source, v // pieces.of_source)
        if v % pieces.of_source == 0:
            next = 0
        assert_equal(piece.begin, next)
        assert_true(piece.begin < piece.limit)
        next = piece.limit
        if v % pieces.of_source == pieces.of_source - 1:
            assert_equal(next, s.max_tokens)
        for t in range(piece.begin, piece.limit):
            assert_equal(pieces.of(piece.source, t // s.tokens_per_signal), v)


def check_tokens(s: Settings, ctas: Int, tokens: Int) raises:
    """The tokens that there are, and behind them those that there are not, each once."""
    var pieces = Pieces(s, ctas)
    var there = 0
    var rest = 0
    for p in range(pieces.of_source):
        var piece = pieces.piece(s, p)
        var end = piece.end(tokens)
        assert_true(piece.begin <= end <= piece.limit)
        assert_true(end == piece.begin or end <= tokens)
        assert_true(end == piece.limit or end >= tokens)
        there += end - piece.begin
        rest += piece.limit - end
    assert_equal(there, tokens)
    assert_equal(rest, s.max_tokens - tokens)


def test_every_token_is_in_one_piece() raises:
    for n_ranks in range(1, MAX_RANKS + 1):
        for max_tokens in [1, 7, 511, 513, 1030, 4096]:
            for per_signal in [1, 5, 8, 600, 5000]:
                for ctas in [1, 2, 3, 8, 24, 47, 64, 132, 304]:
                    check(
                        settings(n_ranks, max_tokens, 8, per_signal),
                        ctas,
                    )


def test_tokens_that_are_there() raises:
    for n_ranks in [1, 3, 8]:
        for per_signal in [1, 5, 5000]:
            var s = settings(n_ranks, 1030, 8, per_signal)
            for tokens in [0, 1, 3, 260, 261, 517, 1029, 1030]:
                check_tokens(s, 132, tokens)


def test_how_many() raises:
    """So many that they pay, and that most CTAs are left to send and copy."""
    assert_equal(Pieces(settings(8, 128), 132).of_source, 1)
    assert_equal(Pieces(settings(2, 2 * LEAST_CHOICES // 8 - 1), 132).n, 2)
    assert_equal(Pieces(settings(2, 2 * LEAST_CHOICES // 8), 132).n, 4)
    assert_equal(Pieces(settings(1, 4096), 132).of_source, 8)
    assert_equal(Pieces(settings(2, 4096), 132).of_source, 8)
    assert_equal(Pieces(settings(4, 4096), 132).of_source, 8)
    assert_equal(Pieces(settings(8, 4096), 132).of_source, 4)
    assert_equal(Pieces(settings(8, 4096), 24).of_source, 1)
    assert_equal(Pieces(settings(2, 4096), 24).of_source, 3)
    assert_equal(Pieces(settings(3, 1030, 8, 5), 132).of_source, 8)
    assert_equal(Pieces(settings(3, 1030, 8, 5), 30).of_source, 2)
    assert_equal(Pieces(settings(2, 4096, 8, 1500), 132).of_source, 3)
    assert_equal(Pieces(settings(2, 4096, 8, 5000), 132).of_source, 1)


def test_words_of_all_pieces_fit() raises:
    """Notes of 2 words each, and as many for each piece's groups, a shared expert's included."""
    assert_equal(WORK_MAPPED - WORK_COUNTED, 2 * MAX_PIECES)
    assert_equal(WORK_TABLED - WORK_MAPPED, 2 * MAX_PIECES * NOTE_COPIES)
    assert_true(WORK_COUNTS - WORK_TABLED >= 2 * MAX_RANKS)
    for n_ranks in range(1, MAX_RANKS + 1):
        for max_tokens in [1, 4096]:
            var s = settings(n_ranks, max_tokens)
            s.shared_expert = True
            var pieces = Pieces(s, 304)
            assert_true(
                WORK_COUNTS + 2 * pieces.n * s.n_groups() <= counters_words(s)
            )


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
