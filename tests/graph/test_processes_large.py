"""Rounds in processes with more payload than one thread takes, and than the caches hold; equal to the reference.

Above `SMALL_BYTES` a launch has several workers, so threads of MAX's pool publish and await across processes. Above
`CACHED_BYTES` rows are stored past the caches: 64 bytes at a time where a row's address allows it.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from graph import rounds

import ep_mojo as ep

ROOT = Path(__file__).resolve().parents[2]
DELAYS = 0.3, 0.005
"""Share of the rounds before which a rank sleeps, and the longest sleep in seconds."""
CONFIGS = rounds.LARGE
STREAMING = [(800, 800), (770, 740)]
"""T of both ranks in rounds where all stages store past the caches."""
MIXED = [(800, 5), (20, 790)]
"""T of both ranks in rounds where one rank's dispatch_async does and nothing else."""


def constant(name):
    """A constant of the host's stages."""
    text = (ROOT / "kernels" / "ep_mojo" / "cpu" / "workers.mojo").read_text()
    (shift,) = re.findall(rf"^comptime {name} = 1 << (\d+)$", text, re.MULTILINE)
    return 1 << int(shift)


class Workers:
    """Worker processes and a graph for each config; the communicator over two of them changes from test to test."""

    def __init__(self):
        self.comm = ep.Communicator.processes(rounds.CFG)
        self.models = rounds.build(self.comm)

    def play(self, name, steps, n, seed):
        """`n` rounds with random delays; what differs from the reference."""
        self.comm = ep.Communicator.processes(CONFIGS[name], workers_of=self.comm)
        arguments = [[(seed, rank, *DELAYS), mine] for rank, mine in enumerate(steps)]
        results = self.comm.run(rounds.play_fused, self.models[name], n, per_rank=arguments)
        self.comm.check()
        return [text for differences, _ in results for text in differences]


@pytest.fixture(scope="module")
def workers():
    made = Workers()
    yield made
    made.comm.destroy()


@pytest.mark.parametrize("name", ["whole_lines", "part_of_a_line"])
def test_rows_that_are_stored_past_the_caches(workers, name):
    cfg, limit = CONFIGS[name], constant("CACHED_BYTES")
    row_bytes = cfg.dispatch_message_bytes
    assert (row_bytes % 64 == 0) == (name == "whole_lines")
    steps = rounds.make_steps(cfg, 4, seed=11, sizes=[*STREAMING, *MIXED])
    for mine in steps:
        for i, step in enumerate(mine):
            streams = i < len(STREAMING)
            assert (int(step.handle.recv_num_tokens.sum()) * row_bytes > limit) == streams, "combine_async"
            assert (int(step.handle.row_offsets[-1]) * row_bytes > limit) == streams, "dispatch_wait"
            assert (len(step.x) * row_bytes * cfg.n_ranks > limit) == (len(step.x) > 730), "dispatch_async"
            assert not streams or len(step.x) > 730
    found = workers.play(name, steps, 36, seed=11)
    assert not found, "\n".join(found)


def test_threads_of_the_pool_publish_and_await(workers):
    name = "fp8_and_source_sums"
    cfg, most = CONFIGS[name], CONFIGS[name].max_tokens_per_rank
    sizes = [(most, most), (most - 7, 75), (0, most), (most, 1), (90, most - 1), (100, 80)]
    steps = rounds.make_steps(cfg, len(sizes), seed=12, sizes=sizes)
    limit = constant("SMALL_BYTES")
    assert np.mean([t * cfg.dispatch_message_bytes > limit for pair in sizes for t in pair]) > 0.7
    found = workers.play(name, steps, 300, seed=12)
    assert not found, "\n".join(found)
