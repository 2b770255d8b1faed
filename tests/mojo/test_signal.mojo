"""Signal words, the failure record, and waits that end."""

from std.testing import TestSuite, assert_equal, assert_false, assert_true

from ep_mojo import Bytes, View
from ep_mojo.head import Head
from ep_mojo.layout import (
    CHUNK_CREDIT,
    HEAD_DEADLINE_NS,
    HEAD_MASKS,
    HEAD_MASKS_CHECK,
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
    MASKED,
    NO_SIGNAL,
    Waiter,
    epoch_of,
    poll,
    publish,
    value_of,
    word,
)

comptime LAST_EPOCH = (1 << 40) - 1


struct Memory(Movable):
    """A head of rank 3, masks of 8 ranks, and a window of 8 words."""

    var head_words: List[Int32]
    var masks: List[Int32]
    var window_words: List[UInt64]

    def __init__(out self, deadline_ns: Int = 0):
        self.head_words = List[Int32](length=HEAD_WORDS, fill=0)
        self.masks = List[Int32](length=8, fill=0)
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

    def name_masks(mut self):
        var at = UInt64(Int(self.masks.unsafe_ptr()))
        self.head().set_u64(HEAD_MASKS, at)
        self.head().set_u64(HEAD_MASKS_CHECK, ~at)

    def await_word[
        at_least: Bool = False
    ](
        mut self,
        epoch: Int,
        virtual: Bool = False,
        shrinks: Bool = False,
        peer: Int = 5,
    ) -> Int:
        """Await word 0 of a peer; word 1 is its header."""
        var waiter = Waiter(self.head(), STAGE_DISPATCH_WAIT, virtual, shrinks)
        return waiter.reach[at_least=at_least](
            self.window(), 0, UInt64(epoch), peer=peer, chunk=7, header=8
        )

    def check_masks(self, masked: List[Int]) raises:
        for peer in range(8):
            assert_equal(self.masks[peer], Int32(Int(peer in masked)))

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


def test_a_late_peer_is_masked() raises:
    """By the deadline, once; then nothing is awaited of it. What is there is seen all the same."""
    var m = Memory(deadline_ns=5_000_000)
    m.name_masks()
    assert_false(m.head().masked(5))
    var start = clock_ns()
    assert_equal(m.await_word(12, shrinks=True), MASKED)
    assert_true(clock_ns() - start >= 5_000_000)
    assert_true(m.head().masked(5))
    m.check_masks([5])
    start = clock_ns()
    for _ in range(100):
        assert_equal(m.await_word(12, shrinks=True), MASKED)
    assert_true(clock_ns() - start < 400_000_000)
    assert_false(m.head().failed())
    publish(m.window(), 0, word(12, 3))
    assert_equal(m.await_word(12, shrinks=True), 3)


def test_each_wait_that_masks_has_its_own_deadline() raises:
    """What one lost peer has taken is not missing where another one is awaited."""
    var m = Memory(deadline_ns=20_000_000)
    m.name_masks()
    var waiter = Waiter(m.head(), STAGE_DISPATCH_WAIT, False, True)
    for peer in [4, 5]:
        var start = clock_ns()
        assert_equal(
            waiter.reach(m.window(), 0, 12, peer=peer, chunk=7, header=8),
            MASKED,
        )
        assert_true(clock_ns() - start >= 20_000_000)
    m.check_masks([4, 5])


def test_a_peer_that_has_failed_is_masked() raises:
    var m = Memory()
    m.name_masks()
    publish(m.window(), 0, word(6, FAILED))
    assert_equal(m.await_word(6, shrinks=True), MASKED)
    m.check_masks([5])
    var header = Memory()
    header.name_masks()
    publish(header.window(), 8, word(7, FAILED))
    assert_equal(header.await_word(6, shrinks=True, peer=2), MASKED)
    header.check_masks([2])
    assert_false(m.head().failed() or header.head().failed())


def test_what_cannot_be_masked_fails() raises:
    """The rank itself; any peer where the head names no masks, or not properly."""
    var own = Memory(deadline_ns=5_000_000)
    own.name_masks()
    assert_equal(own.await_word(12, shrinks=True, peer=3), NO_SIGNAL)
    assert_true(own.head().failed())
    own.check_masks([])
    var none = Memory(deadline_ns=5_000_000)
    assert_equal(none.await_word(12, shrinks=True), NO_SIGNAL)
    none.check_record(KIND_TIMEOUT, 12, 0)
    var half = Memory(deadline_ns=5_000_000)
    half.name_masks()
    half.head().set_u64(HEAD_MASKS_CHECK, 0)
    assert_equal(half.await_word(12, shrinks=True), NO_SIGNAL)
    half.check_masks([])


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
