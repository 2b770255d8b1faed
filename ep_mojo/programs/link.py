"""What the links of GPUs can do: the bytes of a round pushed to all peers at once, by the moves that the stages use.

A push of n rows sends n of them to each peer. `round_rows` says how many make the bytes of a round's messages and sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..comm import Communicator
from ..config import EPConfig
from ..graph_ops import add_op
from ..kernels import kernel_library
from .gpu_round import REPLAYS, replay_times
from .hold import Hold
from .report import largest_sum, pairs


def round_rows(cfg: EPConfig, topk_ids: Sequence[np.ndarray]) -> int:
    """Rows to each peer that come to as many bytes as the busiest rank sends or receives in dispatch; at least 1."""
    most = largest_sum(pairs(cfg, topk_ids))
    return min(cfg.max_tokens_per_rank, max(1, -(-most // max(1, cfg.n_ranks - 1))))


def add_pushes(comm: Communicator, name: str, rows: int, module: Any = None) -> Any:
    """A graph that pushes `rows` messages and then `rows` combine rows of each rank to each peer.

    Inputs: uint8 [rows, message bytes] of all ranks, then uint8 [rows, combine row bytes].

    Args:
        comm: The ranks, each on a GPU of its own. No round may be under way when it runs: it writes their windows.
        name: The graph's name.
        rows: n, up to Tmax.
        module: Where to put the graph.
    """
    from max.dtype import DType
    from max.graph import Graph, TensorType

    cfg, refs = comm.cfg, comm.device_refs()
    sides = {"dispatch": cfg.dispatch_message_bytes, "combine": cfg.combine_row_bytes}
    types = [TensorType(DType.uint8, [rows, size], ref) for size in sides.values() for ref in refs]
    inputs = [*types, *comm.input_types()]
    with Graph(name, input_types=inputs, custom_extensions=[kernel_library()], module=module) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        values = iter(graph.inputs)
        for side, size in sides.items():
            for rank in ranks:
                add_op("push", rank, side, [next(values)], [], {"size": size, "side": side}, 0)
        graph.output()
    return graph


def push_times(comm: Communicator, model: Any, rows: int, hold: Hold, replays: int = REPLAYS) -> dict[str, float]:
    """Microseconds of both pushes by graph replay, see `replay_times`.

    Args:
        comm: The ranks.
        model: The loaded model of `add_pushes`.
        rows: Its n.
        hold: Of the ranks' GPUs.
        replays: How many.
    """
    from max.driver import Buffer

    cfg, rng = comm.cfg, np.random.default_rng(0)
    sizes = (cfg.dispatch_message_bytes, cfg.combine_row_bytes)
    given = [
        Buffer.from_numpy(rng.integers(0, 256, (rows, size), np.uint8)).to(d) for size in sizes for d in comm.devices
    ]
    return replay_times(model, [*given, *comm.inputs()], hold, replays)
