"""Shapes of models, bit for bit: eight virtual ranks on one GPU with split stages, a rank on each GPU with fused ones.

The largest messages, the most experts and choices that models have, with 128 tokens a rank: so many rows of such a size
that every warp has several of them, and shared memory holds fewer than 8 warps' rows. And small rows of so many tokens
that some warps only send, and others only sum.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from gpu.whole_graphs import add_graph, arguments, differences
from graph.virtual import Round, random_rows
from unit.cases import make_case

import ep_mojo as ep

TOKENS = 128
ROUTING = ("uniform", "mixed")


@dataclass(frozen=True)
class Shape:
    """A model's shape in a format, and how its stages run. E is rounded up to a multiple of R."""

    experts: int
    top_k: int
    hidden: int
    fmt: ep.TokenFormat
    tokens: int = TOKENS
    mode: str = "split"

    layout = "expert"

    @property
    def name(self) -> str:
        """Name of its graph."""
        kind = "bf16" if self.fmt == ep.BF16() else "fp8"
        return f"e{self.experts}_k{self.top_k}_h{self.hidden}_t{self.tokens}_{kind}_{self.mode}"

    def config(self, n_ranks: int) -> ep.EPConfig:
        """Room for a quarter more rows than there are on average: the worst case would be R times as many."""
        return ep.EPConfig(
            hidden_size=self.hidden,
            top_k=self.top_k,
            n_experts=-(-self.experts // n_ranks) * n_ranks,
            max_tokens_per_rank=self.tokens,
            tokens_per_signal=1 if self.tokens > TOKENS else 8,
            n_ranks=n_ranks,
            dispatch_format=self.fmt,
            reduce="expert" if self.fmt == ep.BF16() else "source",
            max_rows=self.tokens * self.top_k * 5 // 4,
            timeout_s=20,
        )


BF16, FP8 = ep.BF16(), ep.BlockwiseFP8()
SIZES = [
    (896, 16, 3584, BF16),
    (896, 16, 3584, FP8),
    (128, 4, 2880, BF16),  # fp8 has blocks of 128 channels, of which 2880 is no multiple
    (256, 8, 7168, BF16),
    (256, 8, 7168, FP8),
    (64, 4, 512, BF16, 1500),
]


def compile_shapes(mode, make):
    """Communicators and compiled graphs by shape: one module, one compilation."""
    from max.graph import Module

    module, comms, graphs = Module(), {}, {}
    for size in SIZES:
        shape = Shape(*size, mode=mode)
        comms[size] = make(shape)
        graphs[size] = add_graph(module, shape, comms[size])
    models = dict(zip(graphs, comms[SIZES[0]].compile_all(list(graphs.values())), strict=True))
    return {size: (comms[size], models[size]) for size in SIZES}


@pytest.fixture(scope="module")
def one_gpu():
    made = compile_shapes("split", lambda shape: ep.Communicator.one_gpu(shape.config(8)))
    yield made
    for comm, _ in made.values():
        comm.destroy()


@pytest.fixture(scope="module")
def all_gpus():
    from max.driver import accelerator_count

    n = min(8, accelerator_count())
    if n < 2:
        pytest.skip("needs two GPUs")
    made = compile_shapes("fused", lambda shape: ep.Communicator.gpus(shape.config(n)))
    yield made
    for comm, _ in made.values():
        comm.destroy()


def draw(cfg, routing) -> Round:
    """A round: all tokens of all ranks, or ids in and out of range and another T on every rank."""
    case = make_case(cfg, 1, routing, ragged=routing == "mixed")
    case.topk_ids = [ids.astype(np.int32) for ids in case.topk_ids]
    pool = random_rows(np.random.default_rng(2), (251, cfg.hidden_size))
    rows = np.arange(cfg.max_rows)
    return Round(case, cfg.reduce, ys=[pool[(rows * 7 + r) % 251] for r in range(cfg.n_ranks)]).solve()


def check(made, size, routing):
    comm, model = made[size]
    rnd = draw(comm.cfg, routing)
    for _ in range(3):  # both buffers, and one of them again
        wrong = differences(comm.cfg, rnd, comm.execute(model, *arguments(rnd)))
        assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: Shape(*size).name)
def test_virtual_ranks(one_gpu, size, routing):
    check(one_gpu, size, routing)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: Shape(*size, "fused").name)
def test_a_rank_on_each_gpu(all_gpus, size, routing):
    check(all_gpus, size, routing)
