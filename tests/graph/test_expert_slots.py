"""ExpertSlots through MAX graphs on virtual ranks, and in processes, against the reference, bit by bit.

Wrong orders of the stages, deadlines and failures of single stages are in tests/mojo/test_api.mojo.
"""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from graph import rounds, together

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.dtypes import float32_to_bfloat16_bits
from ep_mojo.errors import CapacityError, PeerLostError, PeerTimeoutError, ShapeError
from ep_mojo.handle import HANDLE_TENSORS

TMAX, K = 20, 4
SIZES = {"top_k": K, "n_experts": 12, "max_tokens_per_rank": TMAX, "slots": "expert"}
BF16 = ep.EPConfig(hidden_size=72, dispatch_format=ep.BF16(), n_ranks=3, **SIZES)
FP8 = ep.EPConfig(
    hidden_size=256,
    dispatch_format=ep.BlockwiseFP8(scales_layout="column"),
    n_ranks=2,
    output_layout="expert_padded",
    combine_dtype="float32",
    output_dtype="float32",
    **SIZES,
)


def graph(comm, body, inputs, name="g", module=None):
    """A graph with `inputs` (lists of (dtype, shape) over ranks, kind by kind) and the communicator's."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    host = DeviceRef.CPU()
    types = [TensorType(getattr(DType, dtype), shape, host) for dtype, shape in inputs]
    library = [ep.kernel_library()]
    with Graph(name, input_types=[*types, *comm.input_types()], custom_extensions=library, module=module) as g:
        ranks = comm.bind(g.inputs[-comm.num_inputs :])
        g.output(*body(ranks, [v.tensor for v in g.inputs[: len(types)]]))
    return g


def by_kind(handles):
    return [h[i] for i in range(len(HANDLE_TENSORS)) for h in (h.flat() for h in handles)]


@together.needed
def _add_bf16(module):
    """A whole round: x, ids, weights and bias in, handle and sums out."""
    cfg, R = BF16, BF16.n_ranks

    def body(ranks, v):
        xs, ids, weights, n, bias = (v[i : i + R] for i in range(0, 5 * R, R))
        hs = ep.dispatch(ranks, xs, ids, weights, num_tokens=n)
        return [*by_kind(hs), *ep.combine(ranks, [h.tokens for h in hs], hs, bias0=bias)]

    kinds = [
        ("bfloat16", cfg.hidden_size),
        ("int64", K),
        ("float32", K),
        ("int32", None),
        ("float32", cfg.hidden_size),
    ]
    inputs = [(d, [1] if w is None else [f"T{r}", w]) for d, w in kinds for r in range(R)]
    comm = ep.Communicator.cpu(cfg)
    return comm, {"expert_slots_bf16": graph(comm, body, inputs, "expert_slots_bf16", module)}


@together.needed
def _add_fp8(module):
    """Dispatch in fp8, then combine of other rows, with weights at combine."""
    cfg, R = FP8, FP8.n_ranks

    def body(ranks, v):
        xs, ids, weights, ys = (v[i : i + R] for i in range(0, 4 * R, R))
        hs = ep.dispatch(ranks, xs, ids)
        return [*by_kind(hs), *ep.combine(ranks, ys, hs, weights=weights)]

    kinds = [("bfloat16", cfg.hidden_size), ("int32", K), ("float32", K)]
    inputs = [(d, [f"T{r}", w]) for d, w in kinds for r in range(R)]
    rows = [cfg.n_groups, R * TMAX, cfg.hidden_size]
    comm = ep.Communicator.cpu(cfg)
    given = [*inputs, *[("float32", rows)] * R]
    return comm, {"expert_slots_fp8": graph(comm, body, given, "expert_slots_fp8", module)}


@pytest.fixture
def bf16(together):
    """The round in bfloat16."""
    return together["expert_slots_bf16"]


def draw(cfg, rng, sizes, ids=None):
    xs = [float32_to_bfloat16_bits(rng.standard_normal((t, cfg.hidden_size), np.float32)) for t in sizes]
    if ids is None:
        ids = [rng.integers(-1, cfg.n_experts + 1, (t, K)) for t in sizes]
    weights = [rng.random((t, K), np.float32) for t in sizes]
    return xs, ids, weights


def check_handles(cfg, wanted, out):
    for r, want in enumerate(wanted):
        got = SimpleNamespace(**{name: out[i * cfg.n_ranks + r] for i, name in enumerate(HANDLE_TENSORS)})
        assert reference.handle_differences(cfg, want, got) == []


def check_round(comm, model, xs, ids, weights, num_tokens, rng):
    cfg = comm.cfg
    bias = [rng.standard_normal(x.shape, np.float32) for x in xs]
    counts = [np.array([n], np.int32) for n in num_tokens]
    out = comm.execute(model, *xs, *ids, *weights, *counts, *bias)
    handles = reference.dispatch(cfg, xs, ids, weights, counts)
    check_handles(cfg, handles, out)
    ys = reference.combine(cfg, [h.tokens for h in handles], handles, bias0=bias)
    for want, got in zip(ys, out[len(HANDLE_TENSORS) * cfg.n_ranks :], strict=True):
        assert reference.output_difference("y", want, got) is None


@pytest.mark.parametrize("sizes", [(20, 0, 7), (0, 0, 0), (20, 20, 20), (1, 13, 2)])
def test_rounds(bf16, sizes):
    rng = np.random.default_rng(sum(sizes))
    for _ in range(3):
        xs, ids, weights = draw(BF16, rng, sizes)
        check_round(*bf16, xs, ids, weights, [int(rng.integers(0, t + 1)) for t in sizes], rng)


@pytest.mark.parametrize("ids", [[5, 5, 5, 5], [-1, 12, -1, 99], [0, 11, 0, 11], [2**40, -(2**40), 3, 3]])
def test_duplicates_and_ids_out_of_range(bf16, ids):
    rng = np.random.default_rng(0)
    sizes = (20, 20, 3)
    tables = [np.tile(np.array(ids), (t, 1)) for t in sizes]
    check_round(*bf16, *draw(BF16, rng, sizes, tables), sizes, rng)


def test_nan_and_inf_pass_unchanged(bf16):
    rng = np.random.default_rng(1)
    xs, ids, weights = draw(BF16, rng, (9, 9, 9))
    for x in xs:
        x[rng.random(x.shape) < 0.1] = 0x7FC1
        x[rng.random(x.shape) < 0.1] = 0xFF80
    check_round(*bf16, xs, ids, weights, (9, 9, 9), rng)


def test_bad_num_tokens_then_reset(bf16):
    comm, model = bf16
    R = BF16.n_ranks
    rng = np.random.default_rng(2)
    xs, ids, weights = draw(BF16, rng, (4, 4, 4))
    counts = [np.array([n], np.int32) for n in (4, 5, 4)]
    bias = [np.zeros(x.shape, np.float32) for x in xs]
    out = comm.execute(model, *xs, *ids, *weights, *counts, *bias, check=False)
    assert not any(out[HANDLE_TENSORS.index("counts") * R + r].any() for r in range(R))
    assert not any(y.any() for y in out[-R:])
    with pytest.raises(ShapeError, match="num_tokens"):
        comm.check()
    comm.reset()
    check_round(comm, model, xs, ids, weights, (4, 4, 4), rng)


def test_fp8_padded(together):
    """The padded layout, and the overflow of a group of it."""
    cfg, R = FP8, FP8.n_ranks
    comm, model = together["expert_slots_fp8"]
    rng = np.random.default_rng(3)
    for sizes in ((20, 0), (7, 20), (20, 20)):
        xs, ids, weights = draw(cfg, rng, sizes)
        ids = [np.sort(i, axis=1).astype(np.int32) for i in ids]
        for i in ids:  # a padded group has no room for a token's second copy when all ranks are full
            i[:, 1:][i[:, 1:] == i[:, :-1]] = -1
        ys = [rng.standard_normal((cfg.n_groups, R * TMAX, cfg.hidden_size), np.float32) for _ in range(R)]
        out = comm.execute(model, *xs, *ids, *weights, *ys)
        handles = reference.dispatch(cfg, xs, ids)
        check_handles(cfg, handles, out)
        want = reference.combine(cfg, ys, handles, weights=weights)
        for r in range(R):
            assert reference.output_difference("y", want[r], out[len(HANDLE_TENSORS) * R + r]) is None

    xs, _, weights = draw(cfg, rng, (20, 20))
    ids = [np.full((20, K), 7, np.int32) for _ in range(R)]
    with pytest.raises(CapacityError, match="160"):
        comm.execute(model, *xs, *ids, *weights, *ys)
    comm.reset()


def whole_round(comm):
    """One rank's round: x, ids and weights in, handle and sums out."""

    def body(ranks, v):
        (h,) = ep.dispatch(ranks, *([t] for t in v))
        return [*h.flat(), *ep.combine(ranks, [h.tokens], [h])]

    inputs = [("bfloat16", ["T", BF16.hidden_size]), ("int32", ["T", K]), ("float32", ["T", K])]
    return comm.compile(graph(comm, body, inputs))


@pytest.fixture(scope="module")
def processes():
    """A process for each of three ranks, a whole round in one graph, and twelve rounds with different T."""
    cfg = BF16.replace(timeout_s=5.0)
    with ep.Communicator.processes(cfg) as comm:
        yield comm, whole_round(comm), rounds.make_steps(cfg, 12, seed=1)


def play(processes, n):
    comm, model, steps = processes
    arguments = [[(7, rank, 0.2, 0.003), mine] for rank, mine in enumerate(steps)]
    results = comm.run(rounds.play_fused, model, n, per_rank=arguments)
    assert [differences for differences, _ in results] == [[]] * comm.cfg.n_ranks
    return [digest for _, digest in results]


def test_processes_with_random_delays(processes):
    """Dispatch and combine alternate without a credit: 500 rounds, the ranks out of step as far as they can be."""
    play(processes, 500)
    assert play(processes, 50) == play(processes, 50)


def test_processes_with_a_missing_peer(processes):
    comm, model, steps = processes
    inputs = [getattr(s[0], name) for name in ("x", "ids", "weights") for s in steps]
    with pytest.raises(PeerTimeoutError, match="dispatch_wait.* from rank 1 within 5 s") as caught:
        comm.execute(model, *inputs, ranks=[0, 2])
    assert sorted(caught.value.by_rank) == [0, 2]
    comm.reset()
    play(processes, 12)


def test_a_process_killed_in_the_middle_is_named_at_once():
    """Nobody waits for the deadline, which is a minute away."""
    cfg = BF16.replace(timeout_s=60.0)
    steps = rounds.make_steps(cfg, 3, seed=2)
    with ep.Communicator.processes(cfg) as comm:
        model = whole_round(comm)
        arguments = [[(8, rank, 0.0, 0.0), mine] for rank, mine in enumerate(steps)]
        killer = threading.Timer(0.5, os.kill, [comm.pids[1], signal.SIGKILL])
        killer.start()
        begin = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1") as caught:
            comm.run(rounds.play_fused, model, 10**6, per_rank=arguments)
        assert time.monotonic() - begin < 20
        killer.join()
        assert sorted(caught.value.by_rank) == [0, 1, 2]
        for rank, error in caught.value.by_rank.items():
            assert isinstance(error, PeerLostError)
            assert f"rank {rank}" in str(error)
            assert "rank 1" in str(error)
        for call in (comm.check, comm.reset):
            with pytest.raises(PeerLostError, match="rank 1.*SIGKILL"):
                call()
