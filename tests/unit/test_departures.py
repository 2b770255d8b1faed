"""Ranks that go: what is said in their place and what is left alone, and who notices that a process is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ep_mojo import layout
from ep_mojo.comm import shm, windows
from ep_mojo.comm.causes import raise_first
from ep_mojo.comm.watch import DIED, LEFT, PeerWatch
from ep_mojo.config import EPConfig
from ep_mojo.errors import CapacityError, ConfigError, PeerTimeoutError

CFG = EPConfig(hidden_size=8, top_k=2, n_experts=6, max_tokens_per_rank=4, n_ranks=3, num_buffers=3)
BY_EXPERT = EPConfig(hidden_size=8, top_k=2, n_experts=6, max_tokens_per_rank=4, n_ranks=3, slots="expert")
ME, PEER = 0, 2
FAILED = layout.word(windows.LAST_EPOCH, layout.FAILED)


def memory_at(cfg, dispatch_waited, combine_waited):
    memory = windows.allocate(cfg, ME)
    layout.put_u64(memory.counters, layout.HEAD_DISPATCH_WAITED, dispatch_waited)
    layout.put_u64(memory.counters, layout.HEAD_COMBINE_WAITED, combine_waited)
    return memory


def failed_buffers(memory, peer=PEER):
    """Of dispatch and of combine: the buffers in which `peer` says FAILED."""
    dispatch, combine = layout.DispatchWindow(CFG), layout.CombineWindow(CFG)
    sides = (memory.dispatch_count, dispatch), (memory.combine_count, combine)
    return [
        {b for b in range(CFG.num_buffers) if int(count.view(np.uint64)[window.header(b, peer) // 8]) == FAILED}
        for count, window in sides
    ]


CASES = {
    "nothing_on_its_way": ((7, 7), (7, 7), [{0, 1, 2}, {0, 1, 2}], True),
    "one_dispatch": ((7, 7), (8, 7), [{0, 1}, {0, 1, 2}], False),
    "one_combine": ((7, 7), (7, 8), [{0, 1, 2}, {0, 1}], False),
    "all_buffers": ((7, 7), (10, 7), [set(), {0, 1, 2}], False),
    "it_aborted": ((7, 7), (11, 11), [{0, 1, 2}, {0, 1, 2}], True),
    "behind": ((7, 7), (6, 6), [{0, 1, 2}, {0, 1, 2}], True),
}


@pytest.mark.parametrize(("waited", "sent", "failed", "complete"), CASES.values(), ids=CASES)
def test_what_a_peer_has_sent_is_left_alone(waited, sent, failed, complete):
    memory = memory_at(CFG, *waited)
    assert memory.publish_departure(PEER, (sent[0], 0, sent[1], 0)) is complete
    assert failed_buffers(memory) == failed
    assert failed_buffers(memory, peer=1) == [set(), set()]
    memory.publish_failure(PEER)
    assert failed_buffers(memory) == [{0, 1, 2}, {0, 1, 2}]


@pytest.mark.parametrize("sent", [3, 4])
def test_with_a_message_for_each_expert_there_is_one_buffer(sent):
    memory = memory_at(BY_EXPERT, 3, 3)
    window = layout.DispatchWindow(BY_EXPERT)
    assert memory.publish_departure(PEER, (sent, 0, 3, 0)) is (sent == 3)
    words = memory.dispatch_count.view(np.uint64)
    found = {int(words[window.expert_count(e, PEER) // 8]) for e in range(BY_EXPERT.n_local_experts)}
    assert found == ({FAILED} if sent == 3 else {0})
    assert FAILED in memory.combine_count.view(np.uint64)


# The watch


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def watching(pids):
    """A watch of rank 0 over blocks of this process, as if they were shared."""
    memories = windows.allocate_all(CFG)
    watch = PeerWatch(pids, ME)
    watch.start(memories, ME)
    return watch, memories


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfds")
def test_a_process_that_dies_is_noticed_by_all_and_spoken_for_here(sleeper):
    watch, memories = watching([os.getpid(), os.getpid(), sleeper.pid])
    try:
        assert watch.gone() == set()
        layout.put_u64(memories[PEER].counters, layout.HEAD_DISPATCH_SENT, 1)  # a round that is on its way
        sleeper.kill()
        until(lambda: failed_buffers(memories[ME]) == [{0, 2}, {0, 1, 2}])
        assert watch.gone() == {PEER}
        assert [shm.lost_flags(m).tolist() for m in memories] == [[0, 0, DIED]] * 3
        assert failed_buffers(memories[1]) == [set(), set()], "others speak for themselves"
        layout.put_u64(memories[ME].counters, layout.HEAD_DISPATCH_WAITED, 1)
        until(lambda: failed_buffers(memories[ME]) == [{0, 1, 2}, {0, 1, 2}])
    finally:
        watch.stop()


@pytest.mark.parametrize("pidfds", [True, False])
def test_a_rank_that_left_is_spoken_for(sleeper, monkeypatch, pidfds):
    if not pidfds:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    watch, memories = watching([os.getpid(), os.getpid(), sleeper.pid])
    try:
        shm.lost_flags(memories[ME])[PEER] = LEFT
        until(lambda: failed_buffers(memories[ME]) == [{0, 1, 2}, {0, 1, 2}])
        assert shm.lost_flags(memories[ME]).tolist() == [0, 0, LEFT]
        assert watch.gone() == set()
    finally:
        watch.stop()


def test_a_watch_leaves_nothing(sleeper):
    before = len(os.listdir("/dev/fd")), threading.active_count()
    for _ in range(20):
        watch, _ = watching([os.getpid(), os.getpid(), sleeper.pid])
        watch.stop()
        watch.stop()
        assert watch.gone() == set()
    assert (len(os.listdir("/dev/fd")), threading.active_count()) == before


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfds")
def test_a_process_that_was_gone_before(sleeper):
    sleeper.kill()
    sleeper.wait()
    watch = PeerWatch([os.getpid(), os.getpid(), sleeper.pid], ME)
    assert watch.gone() == {PEER}
    watch.stop()


# Causes


def test_the_error_that_explains_most_is_raised():
    late, failed = PeerTimeoutError("late"), PeerTimeoutError("failed")
    failed.peer_failed = True
    few, many = CapacityError("few"), CapacityError("many")
    few.rows, many.rows = 3, 9
    for errors, raised in (
        ({0: failed, 1: late}, late),
        ({0: late, 2: few}, few),
        ({0: few, 2: many}, many),
        ({3: ConfigError("b"), 1: ConfigError("a")}, None),
    ):
        with pytest.raises(Exception) as caught:
            raise_first(errors)
        assert caught.value is (raised or errors[1])
        assert caught.value.by_rank == errors
    raise_first({})
