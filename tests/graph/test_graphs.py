"""Whole graphs by the public functions, lists over virtual ranks in and out, against the reference bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from graph import together
from graph.virtual import Round, drop_repeats, random_rows
from unit.cases import make_case

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.handle import HANDLE_TENSORS, graph_dtype, handle_types

SIZES = {"top_k": 3, "n_experts": 6, "max_tokens_per_rank": 6, "n_ranks": 2}


@dataclass
class Setup:
    """A config, and which optional tensors a graph takes."""

    cfg: ep.EPConfig
    reduce: str | None = None
    ids: str = "int32"
    weights: bool = False
    num_tokens: bool = False
    encoded: bool = False
    input_scale: bool = False
    combine_weights: bool = False
    biases: dict = field(default_factory=dict)
    n_sms: int | None = None

    def kinds(self):
        """Names, element types and shapes of a rank's inputs."""
        cfg = self.cfg
        fmt, rows = cfg.dispatch_format, (cfg.rows_capacity,)
        if cfg.output_layout == "expert_padded":
            rows = (cfg.n_groups, cfg.rows_capacity // cfg.n_groups)
        kinds = {"x": (graph_dtype(fmt.token_dtype) if self.encoded else "bfloat16", ["T", cfg.hidden_size])}
        kinds["ids"] = (self.ids, ["T", cfg.top_k])
        if self.weights:
            kinds["weights"] = ("float32", ["T", cfg.top_k])
        if self.num_tokens:
            kinds["num_tokens"] = ("int32", [1])
        if self.encoded:
            kinds["x_scales"] = (fmt.scale_dtype, ["T", cfg.scales_per_token])
        if self.input_scale:
            kinds["input_scale"] = ("float32", [1])
        kinds["y"] = (cfg.combine_dtype, [*rows, cfg.hidden_size])
        if self.combine_weights:
            kinds["combine_weights"] = ("float32", ["T", cfg.top_k])
        for name, dtype in self.biases.items():
            kinds[name] = (dtype, ["T", cfg.hidden_size])
        return kinds

    def round(self, seed) -> Round:
        """Random inputs and what the reference gives."""
        cfg, rng = self.cfg, np.random.default_rng(seed)
        case = make_case(cfg, seed, weights=self.weights)
        case.topk_ids = [i.astype(self.ids) for i in case.topk_ids]
        case.num_tokens = [np.array([len(x) // 2], np.int32) for x in case.xs] if self.num_tokens else None
        if cfg.output_layout == "expert_padded":
            drop_repeats(case)
        rnd = Round(case, self.reduce or "expert", input_scale=2.5 if self.input_scale else None)
        if self.encoded:
            encoded = [reference.encode(cfg, x, None) for x in case.xs]
            case.xs, rnd.x_scales = [e[0] for e in encoded], [e[1] for e in encoded]
        if self.combine_weights:
            rnd.weights = [rng.random(i.shape, np.float32) for i in case.topk_ids]
        for name, dtype in self.biases.items():
            setattr(rnd, name, [random_rows(rng, x.shape, dtype) for x in case.xs])
        return rnd.solve()

    def args(self, rnd):
        """Arguments of the graph, kind by kind over all ranks."""
        case = rnd.case
        values = {
            "x": case.xs,
            "ids": case.topk_ids,
            "weights": case.weights,
            "num_tokens": case.num_tokens,
            "x_scales": rnd.x_scales,
            "input_scale": [np.array([rnd.input_scale], np.float32)] * self.cfg.n_ranks,
            "y": rnd.ys,
            "combine_weights": rnd.weights,
            "bias0": rnd.bias0,
            "bias1": rnd.bias1,
        }
        return [v for name in self.kinds() for v in values[name]]


ALONE = SIZES | {"n_ranks": 1}
"""One rank: half the ops to compile, where several ranks show nothing more."""
FP8 = {"hidden_size": 256, "combine_dtype": "float32"}
SETUPS = {
    "shared expert, alignment, biases, num_tokens": Setup(
        ep.EPConfig(hidden_size=16, shared_expert=True, alignment=4, max_rows=40, **SIZES),
        weights=True,
        num_tokens=True,
        biases={"bias0": "bfloat16", "bias1": "bfloat16"},
    ),
    "weights at combine, int64 ids, float32 throughout": Setup(
        ep.EPConfig(output_dtype="float32", dispatch_format=ep.BlockwiseFP8("float32", "column"), **FP8, **SIZES),
        reduce="source",
        ids="int64",
        input_scale=True,
        combine_weights=True,
        biases={"bias1": "float32"},
    ),
    "one row a token and rank": Setup(
        ep.EPConfig(hidden_size=24, output_layout="rank", output_dtype="float32", reduce="expert", **ALONE),
        weights=True,
        biases={"bias0": "float32"},
        n_sms=1,
    ),
    "padded experts, tokens quantised already": Setup(
        ep.EPConfig(output_layout="expert_padded", dispatch_format=ep.BlockwiseFP8("ue8m0"), **FP8, **ALONE),
        reduce="source",
        encoded=True,
    ),
}


def _tensor(dtype, shape, rank):
    from max.dtype import DType
    from max.graph import DeviceRef, TensorType

    shape = [f"{d}{rank}" if isinstance(d, str) else d for d in shape]
    return TensorType(getattr(DType, dtype), shape, DeviceRef.CPU())


def _graph(name, module, comm, kinds, body):
    """A graph whose inputs are `kinds` of every rank; `body(ranks, values by name)` gives the outputs."""
    from max.graph import Graph

    own = [_tensor(dtype, shape, rank) for dtype, shape in kinds.values() for rank in range(comm.cfg.n_ranks)]
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        given = [v.tensor for v in graph.inputs[: len(own)]]
        R = comm.cfg.n_ranks
        values = {name: given[i * R : (i + 1) * R] for i, name in enumerate(kinds)}
        graph.output(*body(comm.bind(graph.inputs[len(own) :]), values))
    return graph


def _whole(setup):
    def body(ranks, values):
        options = {n: values[n] for n in ("weights", "num_tokens", "x_scales", "input_scale") if n in values}
        handles = ep.dispatch(ranks, values["x"], values["ids"], **options, n_sms=setup.n_sms)
        options = {n: values[n] for n in ("bias0", "bias1") if n in values} | {"n_sms": setup.n_sms}
        if setup.combine_weights:
            options["weights"] = values["combine_weights"]
        ys = ep.combine(ranks, values["y"], handles, reduce=setup.reduce, **options)
        flats = [h.flat() for h in handles]
        return [f[i] for i in range(len(HANDLE_TENSORS)) for f in flats] + ys

    return body


CACHED = Setup(ep.EPConfig(hidden_size=8, **SIZES), weights=True)


def _first(ranks, values):
    flats = [h.flat() for h in ep.dispatch(ranks, values["x"], values["ids"], values["weights"])]
    return [f[i] for i in range(len(HANDLE_TENSORS) + 1) for f in flats]


def _again(ranks, values):
    """A later round's dispatch, and combine with the earlier round's handle."""
    later = ep.dispatch(ranks, values["x"], values["ids"], values["weights"])
    handles = [
        ep.Handle.from_flat(
            CACHED.cfg, [values[n][r] for n in (*HANDLE_TENSORS, "old_ids")], weights=values["old_w"][r]
        )
        for r in range(len(ranks))
    ]
    ys = ep.combine(ranks, values["y"], handles)
    return [*(h.tokens for h in later), *(h.tokens for h in handles), *ys]


def _again_kinds():
    kinds = {k: v for k, v in CACHED.kinds().items() if k != "y"}
    flat = {
        n: (t.dtype.name, [int(d) for d in t.shape])
        for n, t in zip(HANDLE_TENSORS, handle_types(CACHED.cfg), strict=True)
    }
    old = {"old_ids": ("int32", ["T", 3]), "old_w": ("float32", ["T", 3])}
    kinds = {k: (d, ["later" if n == "T" else n for n in s]) for k, (d, s) in kinds.items()}
    return kinds | flat | old | {"y": CACHED.kinds()["y"]}


def _add_whole(setup):
    """One graph of a whole round, named as its setup."""

    def add(module):
        comm = ep.Communicator.cpu(setup.cfg)
        i = list(SETUPS.values()).index(setup)
        return comm, {f"whole_{i}": _graph(f"whole_{i}", module, comm, setup.kinds(), _whole(setup))}

    return add


for _setup in SETUPS.values():
    together.needed(_add_whole(_setup))


@together.needed
def _add_cached(module):
    comm = ep.Communicator.cpu(CACHED.cfg)
    kinds = {k: v for k, v in CACHED.kinds().items() if k != "y"}
    return comm, {
        "first": _graph("first", module, comm, kinds, _first),
        "again": _graph("again", module, comm, _again_kinds(), _again),
    }


def test_absent_tensors_are_constants_of_their_own_dtype():
    """MAX would compile a graph of its own to fold a cast of a constant, and take twice as long."""
    plain = Setup(ep.EPConfig(hidden_size=8, **ALONE))
    comm = ep.Communicator.cpu(plain.cfg)
    text = str(_graph("plain", None, comm, plain.kinds(), _whole(plain)))
    assert text.count("mo.constant") >= 6
    assert "mo.cast" not in text
    comm.destroy()


@pytest.mark.parametrize("name", SETUPS)
def test_round(together, name):
    setup, (comm, model) = SETUPS[name], together[f"whole_{list(SETUPS).index(name)}"]
    R = setup.cfg.n_ranks
    for seed in range(5):
        rnd = setup.round(seed)
        outputs = comm.execute(model, *setup.args(rnd))
        *tensors, ys = [outputs[i : i + R] for i in range(0, len(outputs), R)]
        differences = []
        for rank, want in enumerate(rnd.handles):
            got = SimpleNamespace(**{n: t[rank] for n, t in zip(HANDLE_TENSORS, tensors, strict=True)})
            differences += reference.handle_differences(setup.cfg, want, got)
            differences.append(reference.output_difference(f"rank {rank} y", rnd.outputs[rank], ys[rank]))
        assert not any(differences), differences


def test_cached_handle(together):
    """A handle that left its graph serves later ones, while other rounds run."""
    cfg, R = CACHED.cfg, CACHED.cfg.n_ranks
    comm, first = together["first"]
    _, again = together["again"]
    old = CACHED.round(0)
    flat = [np.array(o) for o in comm.execute(first, *CACHED.args(old)[: 3 * R])]
    for seed in (1, 2, 3):
        later = CACHED.round(seed)
        args = [*CACHED.args(later)[: 3 * R], *flat, *old.case.weights, *old.ys]
        outputs = comm.execute(again, *args)
        for rank in range(R):
            rows = reference.defined_rows(cfg, later.handles[rank])
            np.testing.assert_array_equal(outputs[rank][rows], later.handles[rank].tokens[rows])
            rows = reference.defined_rows(cfg, old.handles[rank])
            np.testing.assert_array_equal(outputs[R + rank][rows], old.handles[rank].tokens[rows])
            assert not reference.output_difference("y", old.outputs[rank], outputs[2 * R + rank])
