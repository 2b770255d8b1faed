"""An op that raises in the middle of a run: everybody learns of it at once, and after reset the next round is right."""

from __future__ import annotations

import time

import numpy as np
import pytest
from graph import together
from graph.raising import CFG, arguments, bad_arguments, whole_round

import ep_mojo as ep
from ep_mojo import layout, reference

SLOTS = ("rank", "expert")
AT_ONCE_S = 10.0
"""Far below the deadline, with slack for a busy machine."""


def _add_round(slots):
    def add(module):
        comm = ep.Communicator.cpu(CFG.replace(slots=slots, n_ranks=2))
        name = f"aborted_{slots}"
        return comm, {name: whole_round(comm, module, name)}

    return add


for _slots in SLOTS:
    together.needed(_add_round(_slots))


@pytest.fixture(scope="module")
def processes():
    """Communicators and graphs for both slot policies, compiled together."""
    from max.graph import Module

    module = Module()
    comms = [ep.Communicator.processes(CFG.replace(slots=slots)) for slots in SLOTS]
    graphs = [whole_round(comm, module, f"round_{slots}") for comm, slots in zip(comms, SLOTS, strict=True)]
    models = [comm.compile(graph) for comm, graph in zip(comms, graphs, strict=True)]
    yield dict(zip(SLOTS, zip(comms, models, strict=True), strict=True))
    for comm in comms:
        comm.destroy()


def expect_right_round(comm, model, seed):
    xs, ids, bias = arguments(seed, comm.cfg)
    ys = comm.execute(model, *xs, *ids, *bias)
    handles = reference.dispatch(comm.cfg, xs, ids)
    expected = reference.combine(comm.cfg, [h.tokens for h in handles], handles, bias0=bias)
    for rank, (y, want) in enumerate(zip(ys, expected, strict=True)):
        np.testing.assert_array_equal(y, want, err_msg=f"rank {rank}")


def expect_refusal_until_reset(comm, model):
    good = [v for values in arguments(0, comm.cfg) for v in values]
    for call in (comm.check, lambda: comm.execute(model, *good)):
        with pytest.raises(ep.OrderError, match=r"rank \d: an op .*raised in the middle of a run.*comm.reset\(\)"):
            call()
    comm.reset()
    comm.check()
    for seed in range(3):
        expect_right_round(comm, model, seed)


def expect_no_refusal_before_any_has_begun(comm, model):
    """The first op of the run raises."""
    epochs = [m.epochs() for m in comm.memories]
    with pytest.raises(ep.ShapeError, match=BAD["ids"]):
        comm.execute(model, *bad_arguments("ids", 0, comm.cfg))
    assert [m.epochs() for m in comm.memories] == epochs
    comm.check()
    expect_right_round(comm, model, 8)


BAD = {"ids": "topk_ids: elements", "bias": "bias0: bytes"}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("slots", SLOTS)
def test_virtual_ranks(together, slots, what):
    comm, model = together[f"aborted_{slots}"]
    expect_right_round(comm, model, 7)
    with pytest.raises(ep.ShapeError, match=BAD[what]):
        comm.execute(model, *bad_arguments(what, 1, comm.cfg))
    expect_refusal_until_reset(comm, model)


@pytest.mark.parametrize("slots", SLOTS)
def test_virtual_ranks_that_have_not_begun_go_on(together, slots):
    expect_no_refusal_before_any_has_begun(*together[f"aborted_{slots}"])


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("timeout_s", [60, 0], ids=["long_deadline", "no_deadline"])
@pytest.mark.parametrize("slots", SLOTS)
def test_processes(processes, slots, timeout_s, what):
    """Peers that wait for the rank that raised fail at once, by name."""
    comm, model = processes[slots]
    for m in comm.memories:  # the deadline is read at every launch
        layout.put_u64(m.counters, layout.HEAD_DEADLINE_NS, timeout_s * 10**9)
    expect_right_round(comm, model, 7)
    begin = time.monotonic()
    with pytest.raises(ep.ShapeError, match=BAD[what]) as caught:
        comm.execute(model, *bad_arguments(what, 1))
    assert time.monotonic() - begin < AT_ONCE_S
    errors = dict(caught.value.by_rank)
    assert isinstance(errors.pop(1), ep.ShapeError)
    if (slots, what) != ("expert", "bias"):  # there rank 1 has sent all that its peers wait for
        assert sorted(errors) == [0, 2]
    for rank, error in errors.items():
        assert isinstance(error, ep.PeerTimeoutError)
        assert f"rank {rank}, " in str(error)
        assert " failed, as its " in str(error)
    expect_refusal_until_reset(comm, model)


def test_processes_one_of_which_raises_alone(processes):
    """Its peers, which were idle, learn of it in their next round and not at their deadline."""
    comm, model = processes["rank"]
    with pytest.raises(ep.ShapeError, match=BAD["ids"]):
        comm.execute(model, *bad_arguments("ids", 1), ranks=[1])
    begin = time.monotonic()
    good = [v for values in arguments(0) for v in values]
    with pytest.raises(ep.PeerTimeoutError, match="rank 1 failed"):
        comm.execute(model, *good, ranks=[0])
    assert time.monotonic() - begin < AT_ONCE_S
    expect_refusal_until_reset(comm, model)
