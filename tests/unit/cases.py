"""Routing cases for the tests of the reference: random, with everything that users get wrong or push to the edge."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ep_mojo.config import EPConfig
from ep_mojo.dtypes import float32_to_bfloat16_bits


@dataclass
class Case:
    """Inputs of dispatch for all ranks."""

    cfg: EPConfig
    xs: list
    topk_ids: list
    weights: list | None
    num_tokens: list | None

    @property
    def counts(self) -> list[int]:
        """Tokens that count on each rank."""
        if self.num_tokens is None:
            return [x.shape[0] for x in self.xs]
        return [n if isinstance(n, int) else int(n[0]) for n in self.num_tokens]

    def pairs(self):
        """(source, token, k, expert) of every valid choice, in order."""
        for s, ids in enumerate(self.topk_ids):
            for t in range(self.counts[s]):
                for k in range(self.cfg.top_k):
                    if 0 <= ids[t, k] < self.cfg.n_experts:
                        yield s, t, k, int(ids[t, k])


def make_case(cfg: EPConfig, seed: int, routing: str = "mixed", weights: bool = True, ragged: bool = True) -> Case:
    """Random inputs.

    Args:
        cfg: The config.
        seed: Of the generator.
        routing: "mixed" (ids in and out of range, repeats), "uniform", "one" (all tokens to one expert), "none".
        weights: Whether there are any.
        ragged: Different T on each rank, and num_tokens below it.
    """
    rng = np.random.default_rng(seed)
    tmax, top_k, n_experts = cfg.max_tokens_per_rank, cfg.top_k, cfg.n_experts
    sizes = [int(rng.integers(0, tmax + 1)) if ragged else tmax for _ in range(cfg.n_ranks)]
    ids = []
    for t in sizes:
        if routing == "one":
            table = np.full((t, top_k), n_experts - 1)
        elif routing == "none":
            table = np.full((t, top_k), -1)
        elif routing == "uniform":
            table = rng.integers(0, n_experts, (t, top_k))
        else:
            table = rng.integers(-2, n_experts + 2, (t, top_k))
            table[rng.random((t, top_k)) < 0.02] = 2**31 - 1
            table[rng.random((t, top_k)) < 0.02] = -(2**31)
        ids.append(table.astype(rng.choice([np.int32, np.int64])))
    num_tokens = None
    if ragged and rng.random() < 0.5:
        num_tokens = [np.array([rng.integers(0, t + 1)], np.int32) for t in sizes]
    return Case(
        cfg,
        xs=[float32_to_bfloat16_bits(rng.normal(size=(t, cfg.hidden_size)).astype(np.float32)) for t in sizes],
        topk_ids=ids,
        weights=[rng.random((t, top_k), np.float32) for t in sizes] if weights else None,
        num_tokens=num_tokens,
    )


@st.composite
def cases(draw, layouts=("expert", "expert_padded", "rank", "gathered"), **fixed):
    """Cases over all shapes that matter. Capacity suffices: with "expert_padded" no token chooses an expert twice."""
    n_ranks = draw(st.integers(1, 8))
    layout = draw(st.sampled_from(layouts))
    routing = draw(st.sampled_from(["mixed", "uniform", "one", "none"]))
    top_k = draw(st.one_of(st.integers(int(layout != "gathered"), 4), st.integers(1, 32)))
    fields = {
        "hidden_size": 8,
        "top_k": top_k,
        "n_experts": n_ranks * draw(st.integers(1, 5)),
        "max_tokens_per_rank": draw(st.integers(1, 9)),
        "n_ranks": n_ranks,
        "output_layout": layout,
    }
    if layout == "expert":
        fields["alignment"] = draw(st.sampled_from([1, 1, 4, 7]))
        fields["shared_expert"] = draw(st.booleans())
    cfg = EPConfig(**fields | fixed)
    case = make_case(cfg, draw(st.integers(0, 2**32)), routing, draw(st.booleans()), draw(st.booleans()))
    if layout == "expert_padded":
        for ids in case.topk_ids:
            for k in range(1, top_k):
                ids[(ids[:, :k] == ids[:, k : k + 1]).any(axis=1), k] = -1
    return case
