"""A peer that is missing, late or killed: named errors within the deadline, no hang, and the next round is right."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import numpy as np
import pytest
from graph import rounds

import ep_mojo as ep
from ep_mojo import layout
from ep_mojo.handle import HANDLE_TENSORS

DEADLINE_S = 1.0
SLACK_S = 3.0
"""Scheduling on a busy machine."""
CFG = rounds.CFG.replace(timeout_s=DEADLINE_S)
OTHERS = [0, 1, 3]


@pytest.fixture(scope="module")
def models():
    """Compiled graphs, and the communicator that the tests share while nobody dies in it."""
    with ep.Communicator.processes(CFG) as comm:
        yield comm, rounds.build(comm)


@pytest.fixture(scope="module")
def steps():
    return rounds.make_steps(CFG, 3, seed=3)


@pytest.fixture
def comm(models):
    """The shared communicator; the test leaves it as after a reset."""
    yield models[0]
    models[0].reset()


def inputs(steps, i=0):
    mine = [s[i] for s in steps]
    return *(s.x for s in mine), *(s.ids for s in mine), *(s.weights for s in mine)


def expect_right_round(comm, model, steps, i=0):
    out = comm.execute(model, *inputs(steps, i))
    for rank in range(comm.cfg.n_ranks):
        *flat, y = out[rank :: comm.cfg.n_ranks]
        assert not rounds.compare(comm.cfg, steps[rank][i], flat, y)


def expect_no_rows(flat, y=None):
    fields = dict(zip(HANDLE_TENSORS, flat, strict=False))
    for name in ("row_offsets", "counts", "recv_num_tokens"):
        assert not fields[name].any(), name
    assert (fields["row_map"] == -1).all()
    assert (fields["src_info"] == -1).all()
    assert y is None or not y.any()


def timed(call):
    begin = time.monotonic()
    return call(), time.monotonic() - begin


# What workers run


def one_round(comm, models, steps, delay=0.0):
    """A round in four graphs. Returns the errors by stage, what came out, and the seconds of each stage."""
    step = steps[0]
    time.sleep(delay)
    out, errors, seconds = {}, {}, {}

    def play(stage, *args):
        begin = time.monotonic()
        out[stage] = comm.execute_local(models[stage], *args, check=False)
        seconds[stage] = time.monotonic() - begin
        try:
            comm.check()
        except ep.EPError as e:
            errors[stage] = e

    play("send", *step.inputs)
    play("receive", step.ids, step.weights)
    handle = out["receive"]
    play("send_back", *handle, step.weights)
    play("receive_back", *handle, step.weights)
    return errors, out, seconds


def many_rounds(comm, models, split, path, steps):
    """Rounds until something happens, in one graph or in four."""
    open(f"{path}.{comm.rank}", "w").close()
    while True:
        for step in steps:
            if not split:
                comm.execute_local(models["round"], *step.inputs)
                continue
            comm.execute_local(models["send"], *step.inputs)
            handle = comm.execute_local(models["receive"], step.ids, step.weights)
            comm.execute_local(models["send_back"], *handle, step.weights)
            comm.execute_local(models["receive_back"], *handle, step.weights)


def die_between_dispatch_and_combine(comm, models, victim, steps):
    step = steps[0]
    comm.execute_local(models["send"], *step.inputs)
    handle = comm.execute_local(models["receive"], step.ids, step.weights)
    if comm.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.execute_local(models["send_back"], *handle, step.weights)
    return comm.execute_local(models["receive_back"], *handle, step.weights)


# Missing and late


def test_a_rank_that_never_dispatches(comm, models, steps):
    model = models[1]["round"]
    expect_right_round(comm, model, steps)

    def call():
        with pytest.raises(ep.PeerTimeoutError) as caught:
            comm.execute(model, *inputs(steps), ranks=OTHERS)
        return caught.value

    error, seconds = timed(call)
    assert seconds < DEADLINE_S + SLACK_S
    assert "dispatch" in str(error)
    assert "from rank 2 within 1 s" in str(error)
    assert sorted(error.by_rank) == OTHERS
    for rank, e in error.by_rank.items():
        assert isinstance(e, ep.PeerTimeoutError)
        assert str(e).startswith(f"rank {rank}, dispatch")
        assert any(f"rank {peer}" in str(e).split(":", 1)[1] for peer in range(4) if peer != rank)
    with pytest.raises(ep.PeerTimeoutError, match="from rank 2"):
        comm.check()
    out, seconds = timed(lambda: comm.execute(model, *inputs(steps), ranks=OTHERS, check=False))
    assert seconds < DEADLINE_S, "after a failure nothing waits"
    for rank in OTHERS:
        *flat, y = out[rank::4]
        expect_no_rows(flat, y)
    comm.reset()
    for i in range(3):
        expect_right_round(comm, model, steps, i)


def test_later_stages_of_a_failed_round_return_at_once(comm, models, steps):
    results = comm.run(one_round, models[1], per_rank=[[s] for s in steps], ranks=OTHERS)
    for rank in OTHERS:
        errors, out, seconds = results[rank]
        assert list(errors) == ["receive", "send_back", "receive_back"]
        assert len({str(e) for e in errors.values()}) == 1, "the first failure stays on record"
        assert f"rank {rank}, dispatch_wait: " in str(errors["receive"])
        assert seconds["receive"] < DEADLINE_S + SLACK_S
        assert seconds["send_back"] + seconds["receive_back"] < DEADLINE_S
        expect_no_rows(out["receive"], out["receive_back"][0])
    comm.reset()
    expect_right_round(comm, models[1]["round"], steps)


def test_a_late_rank_makes_nobody_fail_within_the_deadline(comm, models, steps):
    for m in comm.memories:  # the deadline is read at every launch
        layout.put_u64(m.counters, layout.HEAD_DEADLINE_NS, 60 * 10**9)
    delays = [[s, 2 * DEADLINE_S * (rank == 2)] for rank, s in enumerate(steps)]
    for rank, (errors, out, _) in enumerate(comm.run(one_round, models[1], per_rank=delays)):
        assert not errors
        assert not rounds.compare(CFG, steps[rank][0], out["receive"], out["receive_back"][0])
    for m in comm.memories:
        layout.put_u64(m.counters, layout.HEAD_DEADLINE_NS, round(DEADLINE_S * 10**9))


def test_a_rank_later_than_the_deadline_fails_too_and_at_once(comm, models, steps):
    delays = [[s, 3 * DEADLINE_S * (rank == 2)] for rank, s in enumerate(steps)]
    results = comm.run(one_round, models[1], per_rank=delays)
    for errors, out, _ in results:
        assert isinstance(errors["receive"], ep.PeerTimeoutError)
        expect_no_rows(out["receive"], out["receive_back"][0])
    late = results[2]
    assert sum(late[2].values()) < DEADLINE_S, "its peers have said that they failed"
    assert re.search("rank [013] failed", str(late[0]["receive"]))
    comm.reset()
    expect_right_round(comm, models[1]["round"], steps)


def test_reset_after_uneven_numbers_of_rounds(comm, models, steps):
    """Ranks that failed at different epochs agree again."""
    for ranks in ([0], [0, 1], [3]):
        comm.execute(models[1]["round"], *inputs(steps), ranks=ranks, check=False)
    with pytest.raises(ep.PeerTimeoutError):
        comm.check()
    comm.reset()
    for i in range(3):
        expect_right_round(comm, models[1]["round"], steps, i)


# Killed


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("timeout_s", [0, 60], ids=["no_deadline", "long_deadline"])
def test_a_rank_killed_in_the_middle(tmp_path, steps, timeout_s, split):
    """Survivors do not wait for the deadline; a communicator over them works."""
    path = str(tmp_path / "begun")
    cfg = CFG.replace(timeout_s=timeout_s)
    with ep.Communicator.processes(cfg) as comm:
        loaded = rounds.build(comm)

        def kill():
            while not all(os.path.exists(f"{path}.{r}") for r in range(4)):
                time.sleep(0.01)
            time.sleep(0.2)
            os.kill(comm.pids[2], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        begin = time.monotonic()
        with pytest.raises(ep.PeerLostError) as caught:
            comm.run(many_rounds, loaded, split, path, per_rank=[[s] for s in steps])
        assert time.monotonic() - begin < 20
        killer.join()
        assert sorted(caught.value.by_rank) == [0, 1, 2, 3]
        for rank, error in caught.value.by_rank.items():
            assert isinstance(error, ep.PeerLostError)
            assert f"rank {rank}: " in str(error)
            assert "rank 2" in str(error)
        for call in (comm.check, comm.reset, lambda: comm.execute(loaded["round"], *inputs(steps))):
            with pytest.raises(ep.PeerLostError, match="rank 2.*SIGKILL"):
                call()
        expect_survivors_to_work(comm, loaded["round_of_3"])


def expect_survivors_to_work(comm, model):
    mine = rounds.make_steps(rounds.SMALLER, 2, seed=5)
    survivors = [pid for rank, pid in enumerate(comm.pids) if rank != 2]
    with ep.Communicator.processes(rounds.SMALLER, workers_of=comm) as fresh:
        assert fresh.pids == survivors
        for i in (0, 1, 0):
            expect_right_round(fresh, model, mine, i)


def test_a_rank_killed_between_dispatch_and_combine(steps):
    with ep.Communicator.processes(CFG.replace(timeout_s=60)) as comm:
        models = rounds.build(comm)
        begin = time.monotonic()
        with pytest.raises(ep.PeerLostError, match="rank [0-3]: ") as caught:
            comm.run(die_between_dispatch_and_combine, models, 1, per_rank=[[s] for s in steps])
        assert time.monotonic() - begin < 20
        assert sorted(caught.value.by_rank) == [0, 1, 2, 3]
        assert all("rank 1" in str(e) for e in caught.value.by_rank.values())


def test_bad_sizes_at_run_time_are_named_and_the_next_round_is_right(comm, models, steps):
    """More rows than max_tokens_per_rank on one rank: its peers fail too, and say why."""
    args = list(inputs(steps))
    rows = CFG.max_tokens_per_rank + 1
    args[1] = np.zeros((rows, CFG.hidden_size), np.uint16)
    args[5] = np.zeros((rows, CFG.top_k), np.int32)
    args[9] = np.ones((rows, CFG.top_k), np.float32)
    with pytest.raises(ep.ShapeError, match="rows of x = 7") as caught:
        comm.execute(models[1]["round"], *args)
    assert isinstance(caught.value.by_rank[1], ep.ShapeError)
    assert all(isinstance(caught.value.by_rank[r], ep.PeerTimeoutError) for r in (0, 2, 3))
    comm.reset()
    expect_right_round(comm, models[1]["round"], steps)
