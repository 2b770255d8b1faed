"""Rounds of dispatch and combine in worker processes, compared with the reference bit by bit: helpers of the tests."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.dtypes import float32_to_bfloat16_bits
from ep_mojo.handle import HANDLE_TENSORS, handle_types

CFG = ep.EPConfig(
    hidden_size=16, top_k=3, n_experts=12, max_tokens_per_rank=6, n_ranks=4, tokens_per_signal=2, timeout_s=60
)
"""What all tests use, so that MAX finds their graphs in its cache."""
SMALLER = CFG.replace(n_ranks=3)
_TWO = {"n_ranks": 2, "timeout_s": 60}
_CACHED = {"top_k": 3, "n_experts": 4, "max_tokens_per_rank": 800, "max_rows": 2400, "reduce": "expert", **_TWO}
LARGE = {
    "whole_lines": ep.EPConfig(hidden_size=2880, **_CACHED),
    "part_of_a_line": ep.EPConfig(hidden_size=2888, **_CACHED),
    "fp8_and_source_sums": ep.EPConfig(
        hidden_size=512,
        top_k=4,
        n_experts=8,
        max_tokens_per_rank=120,
        tokens_per_signal=3,
        dispatch_format=ep.BlockwiseFP8(),
        reduce="source",
        **_TWO,
    ),
}
"""More payload than the caches hold, or at least than one thread takes. Here since one compilation serves all tests."""
STAGES = ("send", "receive", "send_back", "receive_back")
GRAPHS = (*STAGES, "dispatch", "combine", "round")


def build(comm):
    """Compile one graph for each stage, all in one module: the four halves, the two fused ops, a whole round.

    And "round_of_3", a whole round for three of the four ranks, and one for each config of `LARGE`, for two.
    """
    from max.graph import Module

    module = Module()
    graphs = {stage: _graph(comm, stage, module) for stage in GRAPHS}
    with ep.Communicator.processes(SMALLER) as three:
        graphs["round_of_3"] = _graph(three, "round", module, "round_of_3")
    for name, cfg in LARGE.items():
        with ep.Communicator.processes(cfg) as two:
            graphs[name] = _graph(two, "round", module, name)
    return dict(zip(graphs, comm.compile_all(list(graphs.values())), strict=True))


def _graph(comm, stage, module, name=None):
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    cfg, host = comm.cfg, DeviceRef.CPU()
    x = TensorType(DType.bfloat16, ["T", cfg.hidden_size], host)
    ids = TensorType(DType.int32, ["T", cfg.top_k], host)
    weights = TensorType(DType.float32, ["T", cfg.top_k], host)
    handle = [*handle_types(cfg), ids]
    types = {
        "send": [x, ids, weights],
        "receive": [ids, weights],
        "send_back": [*handle, weights],
        "receive_back": [*handle, weights],
        "dispatch": [x, ids, weights],
        "combine": [*handle, weights],
        "round": [x, ids, weights],
    }[stage]
    if cfg.dispatch_format != ep.BF16():
        types.append(TensorType(getattr(DType, cfg.combine_dtype), [cfg.rows_capacity, cfg.hidden_size], host))
    inputs = [*types, *comm.input_types()]
    with Graph(name or stage, input_types=inputs, custom_extensions=[ep.kernel_library()], module=module) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        given = [v.tensor for v in graph.inputs[: len(types)]]
        graph.output(*_OUTPUTS[stage](cfg, ranks, given))
    return graph


def _send(cfg, ranks, given):
    ep.dispatch_async(ranks, *([v] for v in given))
    return given[1:2]


def _receive(cfg, ranks, given):
    (h,) = ep.dispatch_wait(ranks, [ep.graph.PendingDispatch(*given, None)])
    return h.flat()


def _handle(cfg, given):
    return ep.Handle.from_flat(cfg, given[:-1], weights=given[-1])


def _send_back(cfg, ranks, given):
    h = _handle(cfg, given)
    (pending,) = ep.combine_async(ranks, [h.tokens], [h])
    return [pending.shared]


def _receive_back(cfg, ranks, given):
    from max.driver import Buffer
    from max.dtype import DType
    from max.graph import DeviceRef, ops

    h = _handle(cfg, given)
    shared = ops.constant(Buffer.zeros([0, 0], getattr(DType, cfg.combine_dtype)), device=DeviceRef.CPU())
    return ep.combine_wait(ranks, [ep.graph.PendingCombine(h, cfg.reduce or "expert", shared)])


def _dispatch(cfg, ranks, given):
    (h,) = ep.dispatch(ranks, *([v] for v in given))
    return h.flat()


def _combine(cfg, ranks, given):
    h = _handle(cfg, given)
    return ep.combine(ranks, [h.tokens], [h])


def _round(cfg, ranks, given):
    (h,) = ep.dispatch(ranks, *([v] for v in given[:3]))
    return [*h.flat(), *ep.combine(ranks, given[3:] or [h.tokens], [h])]


_OUTPUTS = {
    "send": _send,
    "receive": _receive,
    "send_back": _send_back,
    "receive_back": _receive_back,
    "dispatch": _dispatch,
    "combine": _combine,
    "round": _round,
}


@dataclass
class Step:
    """One rank's part of a round: what goes in, and what the reference gives. No `rows`: the tokens are the rows."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    handle: reference.ReferenceHandle
    y: np.ndarray
    rows: np.ndarray | None = None

    @property
    def inputs(self):
        """Arguments of "dispatch", "send" and "round"."""
        return (self.x, self.ids, self.weights) + (() if self.rows is None else (self.rows,))


def make_steps(cfg, n, seed=0, sizes=None):
    """`n` different rounds, as lists of steps by rank.

    T differs by rank and round, and is 0 at times, unless `sizes` gives each round's. Tokens of a quantised format
    cannot be the experts' rows: then these are drawn.
    """
    rng = np.random.default_rng(seed)
    by_rank = [[] for _ in range(cfg.n_ranks)]
    for i in range(n):
        tokens = [int(t) for t in rng.integers(0, cfg.max_tokens_per_rank + 1, cfg.n_ranks)]
        tokens = tokens if sizes is None else sizes[i]
        xs = [float32_to_bfloat16_bits(rng.standard_normal((t, cfg.hidden_size), np.float32)) for t in tokens]
        ids = [rng.integers(-1, cfg.n_experts, (t, cfg.top_k)).astype(np.int32) for t in tokens]
        weights = [rng.random((t, cfg.top_k), np.float32) for t in tokens]
        handles = reference.dispatch(cfg, xs, ids, weights)
        rows = [None] * cfg.n_ranks
        if cfg.dispatch_format != ep.BF16():
            shape = cfg.rows_capacity, cfg.hidden_size
            rows = [reference.cast_rows(cfg, rng.standard_normal(shape, np.float32)) for _ in handles]
        given = [h.tokens if r is None else r for h, r in zip(handles, rows, strict=True)]
        ys = reference.combine(cfg, given, handles)
        for rank, parts in enumerate(zip(xs, ids, weights, handles, ys, rows, strict=True)):
            by_rank[rank].append(Step(*parts))
    return by_rank


def compare(cfg, step, flat=None, y=None):
    """What differs from the reference, as text."""
    found = []
    if flat is not None:
        fields = dict(zip(HANDLE_TENSORS, flat, strict=False))
        found += reference.handle_differences(cfg, step.handle, SimpleNamespace(**fields))
    if y is not None:
        found.append(reference.output_difference(f"rank {step.handle.rank} y", step.y, y))
    return [f for f in found if f]


def make_schedule(n_rounds, num_buffers, seed):
    """A random order of the four stages of `n_rounds` rounds, with up to `num_buffers` of each kind in flight."""
    rng = np.random.default_rng(seed)
    done = dict.fromkeys(STAGES, 0)
    order = []
    while done["receive_back"] < n_rounds:
        sent, received, sent_back, received_back = done.values()
        ready = {
            "send": sent < n_rounds and sent - received < num_buffers,
            "receive": received < sent,
            "send_back": sent_back < received and sent_back - received_back < num_buffers,
            "receive_back": received_back < sent_back,
        }
        possible = [stage for stage in STAGES if ready[stage]]
        stage = possible[rng.integers(len(possible))]
        order.append((stage, done[stage]))
        done[stage] += 1
    return order


class Delays:
    """Random sleeps, other ones on every rank."""

    def __init__(self, seed, rank, share, seconds):
        self.rng = np.random.default_rng([seed, rank])
        self.share, self.seconds = share, seconds

    def maybe(self):
        """Sleep now and then."""
        if self.rng.random() < self.share:
            time.sleep(self.rng.random() * self.seconds)


class Digest:
    """A hash of all results that are specified."""

    def __init__(self):
        self.sha = hashlib.sha256()

    def add(self, flat, y):
        """Count one round in."""
        fields = dict(zip(HANDLE_TENSORS, flat, strict=False))
        rows = int(fields["row_offsets"][-1])
        for array in (fields["tokens"][:rows], *(fields[f] for f in HANDLE_TENSORS[2:]), y):
            self.sha.update(np.ascontiguousarray(array).tobytes())


# What workers run


def play_fused(comm, model, rounds, delays, steps):
    """`rounds` whole rounds of one graph. Returns differences and a digest."""
    delay, found, digest = Delays(*delays), [], Digest()
    for i in range(rounds):
        step = steps[i % len(steps)]
        delay.maybe()
        *flat, y = comm.execute_local(model, *step.inputs)
        found += [f"round {i}: {text}" for text in compare(comm.cfg, step, flat, y)]
        digest.add(flat, y)
    return found[:5], digest.sha.hexdigest()


def play_split(comm, models, schedule, delays, steps):
    """The stages of `schedule`, one graph each. Returns differences and a digest."""
    delay, found, digest, handles = Delays(*delays), [], Digest(), {}
    for stage, i in schedule:
        step = steps[i % len(steps)]
        delay.maybe()
        if stage == "send":
            comm.execute_local(models["send"], *step.inputs)
        elif stage == "receive":
            handles[i] = comm.execute_local(models["receive"], step.ids, step.weights)
            found += [f"round {i}: {text}" for text in compare(comm.cfg, step, handles[i])]
        elif stage == "send_back":
            comm.execute_local(models["send_back"], *handles[i], step.weights)
        else:
            flat = handles.pop(i)
            (y,) = comm.execute_local(models["receive_back"], *flat, step.weights)
            found += [f"round {i}: {text}" for text in compare(comm.cfg, step, None, y)]
            digest.add(flat, y)
    return found[:5], digest.sha.hexdigest()
