"""How many rows travel back, as sender and receiver count them: every choice once, by whichever lane."""

from ep_mojo.gpu.few_counts import rows_awaited, rows_sent
from ep_mojo.peers import View
from ep_mojo.routing import NO_ROW
from ep_mojo.settings import Settings
from std.random import random_si64, seed
from std.testing import TestSuite, assert_equal

comptime LANES = 32
comptime RANKS = 4
comptime LOCAL = 3
"""Experts of a rank."""


def settings(top_k: Int, tokens: Int) -> Settings:
    return Settings(
        n_ranks=RANKS,
        n_experts=RANKS * LOCAL,
        top_k=top_k,
        max_tokens=max(1, tokens),
        hidden_size=8,
        message_bytes=16,
        row_bytes=16,
        format_tag=0,
    )


def check[by_row: Bool](top_k: Int, T: Int) raises:
    """Both count what is drawn for a peer, a plain loop included: ids out of range and -1 name no expert."""
    var ids = List[Int32]()
    for _ in range(top_k * max(1, T)):
        ids.append(Int32(random_si64(-1, RANKS * LOCAL)))
    for peer in range(RANKS):
        var rows = List[Int32]()
        var want = 0
        for t in range(T):
            var found = 0
            for k in range(top_k):
                var here = Int(ids[t * top_k + k]) // LOCAL == peer
                rows.append(Int32(7 * t) if here else NO_ROW)
                found += Int(here)
            want += found if by_row else min(found, 1)
        rows.append(NO_ROW)
        var sent = 0
        var awaited = 0
        for lane in range(LANES):
            sent += rows_sent[by_row](
                View[DType.int32](Int(rows.unsafe_ptr()), top_k * T),
                T,
                top_k,
                lane,
                LANES,
            )
            awaited += rows_awaited[DType.int32, by_row](
                settings(top_k, T),
                View[DType.int32](Int(ids.unsafe_ptr()), top_k * T),
                T,
                peer,
                lane,
                LANES,
            )
        assert_equal(sent, want)
        assert_equal(awaited, want)
        _ = rows^
    _ = ids^


def test_both_count_what_travels() raises:
    seed(7)
    for top_k in [1, 3, 8, 9, 17, 32]:
        for tokens in [0, 1, 31, 33, 100]:
            check[True](top_k, tokens)
            check[False](top_k, tokens)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
