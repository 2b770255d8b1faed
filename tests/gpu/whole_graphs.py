"""Whole rounds of several GPUs as graphs: every format, layout, reduce mode; split, fused, and beside other work."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from graph.stages import COMBINE_TYPES, FORMATS, LAYOUTS, REDUCE_MODES, hidden_of

import ep_mojo as ep
from ep_mojo.handle import HANDLE_TENSORS

FORMAT_NAMES = ("bf16", "fp8-float32-row", "fp8-ue8m0-column")
# A third mode, "beside", is not in the matrix: split, each op with a budget of its own, while another queue of the
# device doubles the tokens; that goes into combine as bias0.
MODES = ("split", "fused")
FEW, MANY, MOST = 13, 150, 513
"""Tokens that travel as cells, so many that only tables and combine's rows do, and that none do (`EPConfig.table_room`,
`rows_in_cells`)."""


@dataclass(frozen=True)
class Variant:
    """What a graph is compiled for."""

    fmt: str
    layout: str
    reduce: str
    mode: str
    slots: str = "rank"
    tokens: int = FEW

    @property
    def name(self) -> str:
        """Name of its graph."""
        return "_".join((self.fmt, self.layout, self.reduce, self.mode, self.slots, str(self.tokens))).replace("-", "_")

    def config(self, n_ranks: int, **fields) -> ep.EPConfig:
        """A config of it; `fields` are of run time."""
        fmt = FORMATS[self.fmt]
        types = COMBINE_TYPES[hidden_of(fmt)]
        sizes = {"top_k": 4, "n_experts": 3 * n_ranks, "max_tokens_per_rank": self.tokens, "timeout_s": 10}
        if self.layout == "expert" and self.slots == "rank":
            sizes |= {"alignment": 8, "shared_expert": True}
        return ep.EPConfig(
            hidden_size=hidden_of(fmt),
            n_ranks=n_ranks,
            dispatch_format=fmt,
            output_layout=self.layout,
            reduce=self.reduce,
            slots=self.slots,
            combine_dtype=types[0],
            output_dtype=types[1],
            **sizes | fields,
        )


VARIANTS = [
    Variant(f, y, r, m, tokens=(FEW, MANY, MOST)[(i + REDUCE_MODES.index(r) + MODES.index(m)) % 3])
    for i, f in enumerate(FORMAT_NAMES)
    for y in LAYOUTS
    for r in REDUCE_MODES
    for m in MODES
]
"""Each layout with each number of tokens, in each mode."""
VARIANTS += [Variant(f, y, "source", "split", "expert") for f in ("bf16", "fp8-ue8m0-row") for y in LAYOUTS[:2]]


def add_graph(module, variant: Variant, comm, name: str | None = None, rounds: int = 1, ranks_in_it=None):
    """A round: x, ids, weights, num_tokens and expert rows of all ranks in; handles and sums of all ranks out.

    With several `rounds` the same one again and again; the outputs are the last one's. `ranks_in_it`: ranks that take
    part (default: all).
    """
    from max.dtype import DType
    from max.graph import Graph, TensorType

    cfg, refs = comm.cfg, comm.device_refs()
    R = cfg.n_ranks
    rows = [cfg.rows_capacity]
    if variant.layout == "expert_padded":
        rows = [cfg.n_groups, R * cfg.max_tokens_per_rank]

    def per_rank(dtype, shape):
        return [TensorType(getattr(DType, dtype), shape(r), refs[r]) for r in range(R)]

    own = [
        *per_rank("bfloat16", lambda r: [f"T{r}", cfg.hidden_size]),
        *per_rank("int32", lambda r: [f"T{r}", cfg.top_k]),
        *per_rank("float32", lambda r: [f"T{r}", cfg.top_k]),
        *per_rank("int32", lambda r: [1]),
        *per_rank(cfg.combine_dtype, lambda r: [*rows, cfg.hidden_size]),
    ]
    with Graph(
        name or variant.name,
        input_types=[*own, *comm.input_types()],
        custom_extensions=[ep.kernel_library()],
        module=module,
    ) as graph:
        chosen = list(range(R)) if ranks_in_it is None else ranks_in_it
        ranks = [comm.bind(graph.inputs[-comm.num_inputs :])[r] for r in chosen]
        values = [v.tensor for v in graph.inputs[: 5 * R]]
        x, ids, weights, num_tokens, ys = ([values[i * R + r] for r in chosen] for i in range(5))
        for _ in range(rounds):
            given = {"weights": weights, "num_tokens": num_tokens}
            if variant.mode == "beside":
                doubled = ep.beside(ranks, x, lambda *xs: [v + v for v in xs], result_types=[v.type for v in x])
                pending = ep.dispatch_async(ranks, x, ids, **given, n_sms=2)
                handles = ep.dispatch_wait(ranks, pending, n_sms=3)
                sums = ep.combine_wait(ranks, ep.combine_async(ranks, ys, handles, n_sms=2), bias0=doubled, n_sms=1)
            elif variant.mode == "split":
                handles = ep.dispatch_wait(ranks, ep.dispatch_async(ranks, x, ids, **given))
                sums = ep.combine_wait(ranks, ep.combine_async(ranks, ys, handles))
            else:
                handles = ep.dispatch(ranks, x, ids, **given)
                sums = ep.combine(ranks, ys, handles)
        graph.output(*(t for h in handles for t in h.flat()[:-1]), *sums)
    return graph


def arguments(rnd) -> list[np.ndarray]:
    """The inputs of `add_graph` for a round."""
    case = rnd.case
    counts = [np.array([n], np.int32) for n in case.counts]
    return [*case.xs, *case.topk_ids, *case.weights, *counts, *rnd.ys]


def handle_of(outputs, rank: int) -> SimpleNamespace:
    """A rank's handle from the outputs of `add_graph`."""
    n = len(HANDLE_TENSORS)
    return SimpleNamespace(**dict(zip(HANDLE_TENSORS, outputs[rank * n : (rank + 1) * n], strict=True)))


def differences(cfg: ep.EPConfig, rnd, outputs) -> list[str]:
    """What differs from the reference, bit for bit."""
    found = []
    for r in range(cfg.n_ranks):
        found += ep.reference.handle_differences(cfg, rnd.handles[r], handle_of(outputs, r))
        y = outputs[cfg.n_ranks * len(HANDLE_TENSORS) + r]
        difference = ep.reference.output_difference(f"rank {r} y", rnd.outputs[r], y)
        found += [difference] if difference else []
    return found


@dataclass
class Machine:
    """The GPUs of a test run: communicators and compiled graphs, made once.

    Attributes:
        n_ranks: R.
        comms, graphs: By name.
    """

    n_ranks: int
    comms: dict = field(default_factory=dict)
    graphs: dict = field(default_factory=dict)
