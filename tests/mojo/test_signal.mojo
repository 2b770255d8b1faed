"""Signal words, the failure record, and waits that end."""

from std.testing import TestSuite, assert_equal, assert_false, assert_true

from ep_mojo import Bytes, View
from ep_mojo.layout import (
    CHUNK_CREDIT,
    HEAD_DEADLINE_NS,
    HEAD_MY_RANK,
    HEAD_WORDS,
    KIND_CAPACITY,
    KIND_ORDER,
    KIND_PEER_FAILED,
    KIND_TIMEOUT,
    REC_CHUNK,
    REC_EXPECTED,
    REC_KIND,
    REC_LIMIT,
    REC_PEER,
    REC_RANK,
    REC_SEEN,
    REC_STAGE,
    REC_VALUE,
    STAGE_COMBINE_WAIT,
    STAGE_DISPATCH_WAIT,
)
from ep_mojo.patience import clock_ns
from ep_mojo.signal import (
    FAILED,
    NO_SIGNAL,
    Head,
    Waiter,
    epoch_of,
    poll,
    publish,
    value_of,
    word,
)

comptime LAST_EPOCH = (1 << 40) - 1


struct Memory(Movable):
    """A head of rank 3 and a window of 8 words."""

    var head_words: List[Int32]
    var window_words: List[UInt64]

    def __init__(out self, deadline_ns: Int = 0):
        self.head_words = List[Int32](length=HEAD_WORDS, fill=0)
        self.window_words = List[UInt64](length=8, fill=0)
        self.head().set_i32(HEAD_MY_RANK, 3)
        self.head().set_u64(HEAD_DEADLINE_NS, UInt64(deadline_ns))

    def head(mut self) -> Head:
        return Head(
            View[DType.int32](Int(self.head_words.unsafe_ptr()), 1).bytes()
        )

    def window(mut self) -> Bytes:
        return View[DType.uint64](
            Int(self.window_words.unsafe_ptr()), 1
        ).bytes()

    def await_word[
        at_least: Bool = False
    ](mut self, epoch: Int, virtual: Bool = False) -> Int:
        """Await word 0 of peer 5; word 1 is its header."""
        var waiter = Waiter(self.head(), STAGE_DISPATCH_WAIT, virtual)
        return waiter.reach[at_least=at_least](
            self.window(), 0, UInt64(epoch), peer=5, chunk=7, header=8
        )

    def check_record(mut self, kind: Int32, expected: Int, seen: Int) raises:
        var head = self.head()
        assert_true(head.failed())
        assert_equal(head.i32(REC_KIND), kind)
        assert_equal(head.i32(REC_STAGE), STAGE_DISPATCH_WAIT)
        assert_equal(head.i32(REC_RANK), 3)
        assert_equal(head.i32(REC_PEER), 5)
        assert_equal(head.i32(REC_CHUNK), 7)
        assert_equal(head.u64(REC_EXPECTED), UInt64(expected))
        assert_equal(head.u64(REC_SEEN), UInt64(seen))


def test_words() raises:
    for epoch in [0, 1, 77, 1 << 32, LAST_EPOCH]:
        for value in [0, 1, 255, FAILED - 1, FAILED]:
            var w = word(UInt64(epoch), value)
            assert_equal(w, UInt64(epoch) * UInt64(1 << 24) + UInt64(value))
            assert_equal(epoch_of(w), UInt64(epoch))
            assert_equal(value_of(w), value)
    assert_equal(FAILED, 0xFFFFFF)


def test_publish_and_poll() raises:
    var m = Memory()
    publish(m.window(), 24, word(9, 4))
    assert_equal(poll(m.window(), 24), word(9, 4))
    assert_equal(poll(m.window(), 16), 0)
    assert_equal(poll(m.window(), 32), 0)
    assert_equal(m.window_words[3], word(9, 4))


def test_a_word_that_is_there() raises:
    var m = Memory()
    publish(m.window(), 0, word(12, 345))
    assert_equal(m.await_word(12), 345)
    assert_equal(m.await_word[at_least=True](11), 345)
    assert_equal(m.await_word(12, virtual=True), 345)
    assert_false(m.head().failed())


def test_deadline() raises:
    var m = Memory(deadline_ns=5_000_000)
    publish(m.window(), 0, word(11, 0))
    var start = clock_ns()
    assert_equal(m.await_word(12), NO_SIGNAL)
    assert_true(clock_ns() - start >= 5_000_000)
    m.check_record(KIND_TIMEOUT, 12, 11)
    start = clock_ns()
    for _ in range(100):  # sticky: later waits end at once
        assert_equal(m.await_word(13), NO_SIGNAL)
    assert_true(clock_ns() - start < 400_000_000)
    m.check_record(KIND_TIMEOUT, 12, 11)


def test_virtual_ranks_do_not_wait() raises:
    var m = Memory()
    publish(m.window(), 0, word(4, 1))
    assert_equal(m.await_word(5, virtual=True), NO_SIGNAL)
    m.check_record(KIND_ORDER, 5, 4)


def test_failed_in_the_word() raises:
    var m = Memory()
    publish(m.window(), 0, word(6, FAILED))
    assert_equal(m.await_word(6), NO_SIGNAL)
    m.check_record(KIND_PEER_FAILED, 6, 6)
    var credit = Memory()
    publish(credit.window(), 0, word(2, FAILED))
    assert_equal(credit.await_word[at_least=True](6), NO_SIGNAL)
    credit.check_record(KIND_PEER_FAILED, 6, 2)


def test_failed_in_the_header() raises:
    """Of this epoch or a later one; a stale FAILED of an earlier epoch says nothing."""
    for epoch in [6, 7, LAST_EPOCH]:
        var m = Memory()
        publish(m.window(), 8, word(UInt64(epoch), FAILED))
        assert_equal(m.await_word(6), NO_SIGNAL)
        m.check_record(KIND_PEER_FAILED, 6, epoch)
    var m = Memory(deadline_ns=1_000_000)
    publish(m.window(), 8, word(5, FAILED))
    assert_equal(m.await_word(6), NO_SIGNAL)
    m.check_record(KIND_TIMEOUT, 6, 0)


def test_a_signal_of_an_earlier_epoch_with_the_value_failed() raises:
    """FAILED of another epoch is not the awaited word."""
    var m = Memory(deadline_ns=1_000_000)
    publish(m.window(), 0, word(5, FAILED))
    assert_equal(m.await_word(6), NO_SIGNAL)
    m.check_record(KIND_TIMEOUT, 6, 5)


def test_the_first_failure_is_kept() raises:
    var m = Memory()
    var head = m.head()
    assert_false(head.failed())
    head.fail(
        KIND_CAPACITY,
        STAGE_COMBINE_WAIT,
        peer=2,
        chunk=CHUNK_CREDIT,
        expected=UInt64(LAST_EPOCH),
        seen=1,
        value=-5,
        limit=1 << 40,
    )
    head.fail(KIND_TIMEOUT, STAGE_DISPATCH_WAIT, peer=1, expected=9)
    assert_true(head.failed())
    assert_equal(head.i32(REC_KIND), KIND_CAPACITY)
    assert_equal(head.i32(REC_STAGE), STAGE_COMBINE_WAIT)
    assert_equal(head.i32(REC_RANK), 3)
    assert_equal(head.i32(REC_PEER), 2)
    assert_equal(head.i32(REC_CHUNK), CHUNK_CREDIT)
    assert_equal(head.u64(REC_EXPECTED), UInt64(LAST_EPOCH))
    assert_equal(head.u64(REC_SEEN), 1)
    assert_equal(Int(head.u64(REC_VALUE)), -5)
    assert_equal(Int(head.u64(REC_LIMIT)), 1 << 40)
    assert_equal(m.head_words[HEAD_MY_RANK], 3)


def main() raises:
    TestSuite.discover_tests[__functions_in_module()]().run()
