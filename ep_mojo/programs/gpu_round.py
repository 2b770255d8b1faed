"""One round on GPUs to be timed: dispatch and combine with identity experts, by replays of a captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..comm import Communicator
from ..comm.gpu import synchronize
from ..config import EPConfig
from ..dtypes import (
    bfloat16_bits_to_float32,
    e4m3_bits_to_float32,
    float32_to_bfloat16_bits,
    to_buffer,
    to_numpy,
)
from ..errors import ConfigError, DeviceError
from ..formats import BF16, BlockwiseFP8, check_int
from ..gate import default_groups, gate
from ..graph import combine, combine_async, combine_wait, dispatch, dispatch_async, dispatch_wait
from ..handle import HANDLE_TENSORS
from ..kernels import kernel_library
from ..reference.fp8 import quantize
from .hold import Hold, held_times
from .report import number_of

ROUTINGS = ("uniform", "grouped", "zipf", "one")
"""See `choose`."""
REPLAYS = 50
MANY_TOKENS = 1024
"""From so many on a launch on few SMs has several for each warp."""
WARM_UP = 10
ERROR_LIMIT = 5e-3
"""Largest relative error of a rank: bfloat16 keeps 8 bits, so one rounding is 2e-3."""


@dataclass(frozen=True)
class Round:
    """One round's shape.

    Attributes:
        ranks, tokens, hidden, experts, top_k: R, T, H, E, K.
        fmt: "bf16" or "fp8": how tokens travel; sums travel as bfloat16.
        fused: Whether dispatch and combine are one launch each, or two.
    """

    ranks: int
    tokens: int
    fmt: str
    fused: bool
    hidden: int
    experts: int
    top_k: int

    @property
    def name(self) -> str:
        """Name of its graph."""
        mode = "fused" if self.fused else "split"
        return f"{self.fmt}_{mode}_r{self.ranks}_t{self.tokens}_h{self.hidden}_e{self.experts}_k{self.top_k}"

    def config(self, sms: int = 0) -> EPConfig:
        """Its config; `sms`: the most SMs of a launch, 0 = all."""
        return EPConfig(
            hidden_size=self.hidden,
            top_k=self.top_k,
            n_experts=self.experts,
            max_tokens_per_rank=self.tokens,
            n_ranks=self.ranks,
            dispatch_format=BF16() if self.fmt == "bf16" else BlockwiseFP8(),
            reduce="expert",
            tokens_per_signal=signal_tokens(self.tokens, sms),
            n_sms=sms or None,
        )


def signal_tokens(tokens: int, sms: int) -> int:
    """Tokens of a signal with which a round is quickest: docs/performance.md, "Tokens of a signal".

    Args:
        tokens: T.
        sms: The most SMs of a launch, 0 = all.
    """
    if tokens < MANY_TOKENS or sms == 0 or sms > 96:
        return 1
    return 2 if sms > 48 else 4


def gpus_to_use(asked: int = 0, least: int = 1, remedy: str = "see `python -m ep_mojo.doctor`") -> int:
    """How many GPUs a program uses: as many as asked for, or with 0 all that there are, 8 at most.

    Args:
        asked: The option --ranks.
        least: How few will do.
        remedy: What to do where there are fewer.

    Raises:
        DeviceError: There are fewer than asked for, or than will do.
        ConfigError: Fewer than 0, or more than 8, are asked for.
    """
    from max.driver import accelerator_count

    there = accelerator_count()
    check_int("--ranks", asked, 0, 8, "choose --ranks from 1 to 8, or leave it out for all")
    if there < max(asked, least):
        raise DeviceError(
            f"MAX sees {number_of(there, 'GPU')} here",
            field="--ranks",
            value=asked or "all",
            allowed=f"up to {there}" if there >= least else f"a machine with {number_of(least, 'GPU')} or more",
            remedy=remedy + ("; ask for fewer --ranks" if there >= least else ""),
        )
    return asked or min(there, 8)


def plan_gpus(count: int, target: str = "sm_90a") -> None:
    """Let MAX compile for GPUs that are not there; to be called before anything looks for devices, once a process.

    Args:
        count: How many.
        target: Their architecture, as in sm_90a or gfx942.
    """
    from max import driver

    driver.set_virtual_device_count(count)
    driver.set_virtual_device_api("hip" if target.startswith("gfx") else "cuda")
    driver.set_virtual_device_target_arch(target)


def add_round(case: Round, comm: Communicator, *, part: str = "round", module: Any = None) -> Any:
    """A graph of a round: x, ids and weights of all ranks in.

    Args:
        case: The shape.
        comm: Where the ranks are.
        part: "round": y of all ranks out; fp8 rows are cast to bfloat16 on their way to combine. "rows": the rows that
            combine would get out, and no combine. "given rows": these rows are inputs too, so that nothing is cast.
            "all": what dispatch gave, `HANDLE_TENSORS` of all ranks, and then y.
        module: Where to put the graph.
    """
    from max.dtype import DType
    from max.graph import Graph, TensorType

    refs, R, cfg = comm.device_refs(), case.ranks, comm.cfg
    sizes = ((DType.bfloat16, case.hidden), (DType.int32, case.top_k), (DType.float32, case.top_k))
    own = [TensorType(d, [case.tokens, n], refs[r]) for d, n in sizes for r in range(R)]
    if part == "given rows":
        own += [TensorType(DType.bfloat16, [cfg.rows_capacity, case.hidden], refs[r]) for r in range(R)]
    name = case.name if part == "round" else f"{case.name}_{part.replace(' ', '_')}"
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[kernel_library()], module=module) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        values = [v.tensor for v in graph.inputs[: len(own)]]
        x, ids, weights, *given = (values[i : i + R] for i in range(0, len(values), R))
        if case.fused:
            handles = dispatch(ranks, x, ids, weights)
        else:
            handles = dispatch_wait(ranks, dispatch_async(ranks, x, ids, weights))
        rows = (
            given[0] if given else [h.tokens if case.fmt == "bf16" else h.tokens.cast(DType.bfloat16) for h in handles]
        )
        kept = [getattr(h, name) for h in handles for name in HANDLE_TENSORS] if part == "all" else []
        if part == "rows":
            graph.output(*rows)
        elif case.fused:
            graph.output(*kept, *combine(ranks, rows, handles))
        else:
            graph.output(*kept, *combine_wait(ranks, combine_async(ranks, rows, handles)))
    return graph


def draw(case: Round, seed: int = 0, routing: str = "uniform") -> list[np.ndarray]:
    """Tokens (bfloat16 bits), choices without repeats (see `choose`), and weights, rank by rank: 3 R arrays."""
    rng = np.random.default_rng(seed)
    shape = (case.tokens, case.hidden)
    xs = [float32_to_bfloat16_bits(rng.standard_normal(shape, np.float32)) for _ in range(case.ranks)]
    popularity = rng.permutation(case.experts)
    ids = [choose(case, rng, routing, popularity) for _ in range(case.ranks)]
    weights = [rng.random((case.tokens, case.top_k), np.float32) for _ in range(case.ranks)]
    return [*xs, *ids, *weights]


def choose(case: Round, rng: np.random.Generator, routing: str, popularity: np.ndarray) -> np.ndarray:
    """Choices of one rank's tokens, int32 [T, K], without repeats.

    Args:
        case: The shape.
        rng: Where they are drawn from.
        routing: "uniform"; "grouped": DeepSeek-V3's gate on random scores, which takes all from the best half of the
            groups of experts; "zipf": an expert is as likely as 1 over its place in `popularity`; "one": experts of
            rank 0 only.
        popularity: int [E], each expert's place, 0 first; the same for all ranks.

    Raises:
        ConfigError: No such routing, or fewer experts than it needs.
    """
    scores = rng.random((case.tokens, case.experts), np.float32)
    if routing == "grouped":
        groups, best = default_groups(case.experts, case.top_k)
        same = np.eye(case.experts, dtype=np.float32)
        return gate(scores, same, top_k=case.top_k, n_groups=groups, top_groups=best)[0]
    if routing == "zipf":  # the K largest of log p + Gumbel are K draws without repeats
        scores = -np.log(popularity + 1.0) - np.log(-np.log(np.maximum(scores, 1e-30)))
    elif routing == "one":
        check_int("top_k", case.top_k, 1, case.experts // case.ranks, "one rank's experts are not as many: use fewer")
        scores[:, case.experts // case.ranks :] = -1
    elif routing != "uniform":
        raise ConfigError(field="routing", value=routing, allowed=", ".join(ROUTINGS), remedy="choose one of these")
    return np.argsort(-scores, axis=1, kind="stable")[:, : case.top_k].astype(np.int32)


def on_devices(arrays: Sequence[np.ndarray], devices: Sequence[Any]) -> list[Any]:
    """MAX buffers of arrays that come rank by rank; uint16 holds bfloat16."""
    return [
        to_buffer(a, "bfloat16" if a.dtype == np.uint16 else None).to(devices[i % len(devices)])
        for i, a in enumerate(arrays)
    ]


def error_of(case: Round, outputs: Sequence[Any], given: Sequence[np.ndarray]) -> float:
    """The largest relative error of a rank: identity experts give each token times the sum of its weights.

    With fp8 the experts see the quantised values, without their scales.
    """
    worst = 0.0
    for r in range(case.ranks):
        got = bfloat16_bits_to_float32(to_numpy(outputs[r]))
        sums = given[2 * case.ranks + r].sum(axis=1, keepdims=True)
        x = bfloat16_bits_to_float32(given[r])
        want = (x if case.fmt == "bf16" else e4m3_bits_to_float32(quantize(x)[0])) * sums
        found = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        worst = found if found != found else max(worst, found)  # NaN stays
    return worst


def replay_times(model: Any, args: Sequence[Any], hold: Hold, replays: int = REPLAYS) -> dict[str, float]:
    """Microseconds of a replayed round, over all replays and ranks; and of an eager one, by the host's clock.

    Args:
        model: The round.
        args: Its arguments.
        hold: Holds back the queues of the GPUs that it runs on.
        replays: How many.

    Returns:
        Between two events on a rank's own queue: "median_us" and "p99_us", the devices' time, all replays enqueued
        before the first begins (NaN where the host is too slow for that: see `held_times`); "host_paced_us", a median
        too, of replays that begin as soon as the host has launched them, which for small rounds is the host's time.
        By the host's clock "wall_us", of a replay in a row of them, and "eager_us".
    """
    from max.driver import DeviceEvent

    devices = hold.devices

    def wall(call: Callable[[], Any], n: int) -> float:
        for _ in range(WARM_UP):
            call()
        synchronize(devices)
        start = time.perf_counter()
        for _ in range(n):
            call()
        synchronize(devices)
        return (time.perf_counter() - start) / n * 1e6

    eager = wall(lambda: model.execute(*args), 20)
    model.capture(1, *args)
    wall_us = min(wall(lambda: model.replay(1, *args), replays) for _ in range(3))
    marks = [[DeviceEvent(d, enable_timing=True) for _ in range(replays + 1)] for d in devices]
    synchronize(devices)
    for i in range(replays + 1):
        for d, events in zip(devices, marks, strict=True):
            d.default_queue.record_event(events[i])
        if i < replays:
            model.replay(1, *args)
    synchronize(devices)
    paced = np.array([[a.elapsed_time(b) * 1e3 for a, b in zip(e, e[1:], strict=False)] for e in marks])
    times = held_times(model, args, hold, replays)
    return {
        "median_us": float(np.median(times)),
        "p99_us": float(np.percentile(times, 99)),
        "host_paced_us": float(np.median(paced)),
        "wall_us": wall_us,
        "eager_us": eager,
    }
