"""Routed or gathered: the estimate against drawn routings, and what it chooses."""

from __future__ import annotations

import numpy as np
import pytest

import ep_mojo as ep

DECODE = ep.EPConfig(hidden_size=7168, top_k=8, n_experts=256, max_tokens_per_rank=4096, n_ranks=8)


@pytest.mark.parametrize("experts", [8, 16, 256])
def test_ranks_that_tokens_go_to(experts):
    cfg = DECODE.replace(n_experts=experts)
    rng = np.random.default_rng(0)
    chosen = rng.random((4000, experts)).argsort(1)[:, :8] // cfg.n_local_experts
    drawn = np.mean([len(set(ranks)) for ranks in chosen.tolist()])
    choice = ep.Communicator.choose(cfg, 100)
    assert choice.routed.ranks == pytest.approx(drawn, rel=0.02)
    assert choice.gathered.ranks == 8


def test_bytes_and_rows():
    choice = ep.Communicator.choose(DECODE.replace(dispatch_format=ep.BlockwiseFP8(), combine_dtype="float32"), 10)
    assert choice.gathered.bytes == 10 * 7 * (7168 + 4 * 56 + 4 * 7168)
    assert (choice.gathered.rows, choice.routed.rows) == (80, 80)
    assert choice.routed.bytes == pytest.approx(choice.gathered.bytes * choice.routed.ranks / 8)


def test_few_tokens_are_gathered_and_many_routed():
    assert ep.Communicator.choose(DECODE, 1).layout == "gathered"
    assert ep.Communicator.choose(DECODE).layout == "routed"
    assert ep.Communicator.choose(DECODE).tokens == 4096
    one = DECODE.replace(n_ranks=1)
    assert ep.Communicator.choose(one).gathered.bytes == 0
    layouts = [ep.Communicator.choose(DECODE, t).layout for t in range(0, 4097, 16)]
    assert layouts == sorted(layouts), "one break-even"


def test_more_choices_than_experts():
    assert ep.Communicator.choose(DECODE.replace(n_experts=8, top_k=9), 5).routed.ranks == 8


def test_rows_that_travel_by_themselves():
    by_source = ep.Communicator.choose(DECODE.replace(reduce="source"), 16).routed
    assert by_source.bytes == pytest.approx(16 * 7 / 8 * (by_source.ranks + 8) * 2 * 7168)
    by_expert = ep.Communicator.choose(DECODE.replace(slots="expert"), 16).routed
    assert by_expert.bytes == 16 * 7 / 8 * (8 + 8) * 2 * 7168


def test_tokens_without_choices_are_gathered():
    assert ep.Communicator.choose(DECODE.replace(output_layout="gathered", top_k=0)).layout == "gathered"


@pytest.mark.parametrize("tokens", [-1, 4097, 1.5])
def test_bad_tokens(tokens):
    with pytest.raises(ep.ConfigError, match="tokens"):
        ep.Communicator.choose(DECODE, tokens)
