"""Groups and Buffers that calls in the processes of a pool share, and the graphs that all of them use."""

from __future__ import annotations

import torch
import torch.distributed as dist

import ep_mojo as ep
import ep_mojo.torch as ept
from ep_mojo.torch import graphs, library, rounds, sizes
from tests.torch import plain
from tests.torch.launch import kept

HIDDEN, TOP_K, LOCAL, TMAX = 256, 3, 4, 40
"""H, K, L and (in both modes) Tmax."""
SIZES = {2: [(5, 12), (40, 1), (0, 7), (0, 0), (40, 40)], 4: [(3, 0, 40, 11), (0, 0, 0, 5), (40, 40, 40, 40), (0,) * 4]}
"""T of each rank, some of them none."""
PATIENCE_S = 4.0
"""The deadline of Buffers that go on without who is late."""
FP8 = [ep.BlockwiseFP8("float32"), ep.BlockwiseFP8("ue8m0")]
PADDED = [ep.BF16(), *(ep.BlockwiseFP8(scale, "column") for scale in ep.BlockwiseFP8.SCALES)]


CONFIGS = {
    "expert": {},
    "aligned": {"alignment": 8, "output_dtype": "float32"},
    "source": {"reduce": "source", "output_layout": "expert_padded"},
    "rank": {"output_layout": "rank"},
    "fp8": {"dispatch_format": ep.BlockwiseFP8("power_of_two", "column")},
}
"""Configs of the package's own interface, by name."""


def api_config(n: int, name: str) -> ep.EPConfig:
    """One of `CONFIGS` over n ranks."""
    sizes = {"hidden_size": HIDDEN, "top_k": TOP_K, "n_experts": LOCAL * n, "max_tokens_per_rank": TMAX, "n_ranks": n}
    return ep.EPConfig(**sizes, **CONFIGS[name])


def prepare() -> None:
    """Compile everything once, in one module; make the groups."""
    n = dist.get_world_size()
    kept["group", n] = dist.group.WORLD
    if n > 2:
        kept["group", 2] = dist.new_group([0, 1])
    cfg = ep.EPConfig(hidden_size=HIDDEN, top_k=1, n_experts=n, max_tokens_per_rank=1, n_ranks=n)
    found = [s for fmt in (ep.BF16(), *FP8) for s in graphs.normal(cfg.replace(dispatch_format=fmt))]
    found += [s for fmt in PADDED for s in graphs.low_latency(cfg.replace(dispatch_format=fmt))]
    found += graphs.sums(cfg.replace(hidden_size=8))
    for each in CONFIGS:
        other = api_config(n, each)
        found += [library.dispatch_set(other, False, "int64"), library.combine_set(other, "int64")]
    expert = api_config(n, "expert")
    found += [library.dispatch_set(expert, False, "int32"), library.combine_set(expert, "int32")]
    with ep.Communicator.process_group(cfg, dist.group.WORLD, device=torch.get_default_device()) as comm:
        rounds.compile_sets(comm, list(dict.fromkeys(found)))


def bytes_of(n: int, tokens: int = TMAX) -> dict[str, int]:
    """Arguments of a Buffer over n ranks with room for so many tokens in both modes."""
    return {
        "num_nvl_bytes": sizes.bytes_for(tokens, 2 * HIDDEN, n),
        "num_rdma_bytes": ept.Buffer.get_low_latency_rdma_size_hint(tokens, HIDDEN, n, LOCAL * n),
        "low_latency_mode": True,
    }


def shared(n: int) -> ept.Buffer | None:
    """The Buffer over the first n ranks; None where this process is none of them."""
    if dist.get_rank() >= n:
        return None
    if ("buffer", n) not in kept:
        kept["buffer", n] = ept.Buffer(kept["group", n], **bytes_of(n))
    return kept["buffer", n]


def shrinking(n: int) -> ept.Buffer | None:
    """Another one, whose low-latency rounds leave out ranks that are masked or late, by more than `PATIENCE_S`."""
    if dist.get_rank() >= n:
        return None
    if ("shrinking", n) not in kept:
        kept["shrinking", n] = patient(kept["group", n], PATIENCE_S)
    return kept["shrinking", n]


def patient(group, timeout_s: float) -> ept.Buffer:
    """A Buffer with enable_shrink whose rounds wait no longer than that."""
    before, ept.Buffer.timeout_s = ept.Buffer.timeout_s, timeout_s
    try:
        return ept.Buffer(group, **bytes_of(group.size()), enable_shrink=True)
    finally:
        ept.Buffer.timeout_s = before


def step(n: int, seed: int, tokens=None, kind: str = "mixed") -> plain.Step:
    """Inputs of a round of n ranks; `tokens`: T of each, None: something in between."""
    tokens = [(seed * 7 + 11 * r) % TMAX + 1 for r in range(n)] if tokens is None else list(tokens)
    return plain.draw(seed, tokens, HIDDEN, TOP_K, LOCAL * n, kind)


def dispatch(b: ept.Buffer, s: plain.Step, x=None, **more):
    """The dispatch of a step in normal mode; x: other tokens."""
    me = b.rank
    x = s.x[me] if x is None else x
    return b.dispatch(x, topk_idx=s.ids[me], topk_weights=s.weights[me], **plain.layout(b, s), **more)
