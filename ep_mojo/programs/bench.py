"""`ep-mojo bench`: one round against NumPy and a plain copy, fp8 encoding against ml_dtypes, window memory.

Times are those of one call each of `Communicator.execute` for dispatch and for combine, on MAX buffers made before:
checks of the arguments, the run of the graph (it allocates its outputs) and the check of the error records are
included. The experts are not: their rows are made beforehand. The candidates of a format take turns, so that a
disturbance of the machine hits all of them alike; the formats follow one another, so that neither finds the other's
output in the memory that it gets for its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, reference
from ..cli import BENCH_SHAPE, fill_bench_defaults
from ..comm import Communicator
from ..config import EPConfig
from ..dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits, to_buffer, to_numpy
from ..errors import EPError
from ..formats import BF16, BlockwiseFP8, check_int
from . import files, measures, plot, report
from .baselines import NumPyRound, PlainCopy, has_ml_dtypes, quantize_ml_dtypes
from .experts import expert_outputs, identity
from .layer import Encoder, GraphSet, MoELayer
from .one_round import config_json
from .progress import Progress

GOALS = {
    "bf16 round, times NumPy's speed": 5.0,
    "fp8 round, times NumPy's speed": 5.0,
    "bf16 round, times the speed of a plain copy": 0.5,
    "fp8 round, times the speed of a plain copy": 0.5,
    "fp8 encoding, times the speed of ml_dtypes": 4.0,
}
NUMPY_TOLERANCE = 2.0**-6
"""NumPy rounds to bfloat16 once, a rank's partial sums are rounded too: 2 * 2^-9 of the terms, and room for float32."""


@dataclass
class Inputs:
    """Random tokens and routing of all ranks: bfloat16 bits [T, H], int32 [T, K] without repeats, float32 [T, K]."""

    xs: list[np.ndarray]
    topk_ids: list[np.ndarray]
    weights: list[np.ndarray]

    @staticmethod
    def random(cfg: EPConfig, tokens: int, seed: int) -> Inputs:
        """Uniform routing, K distinct experts a token; weights that sum to 1."""
        rng = np.random.default_rng(seed)
        made = Inputs([], [], [])
        for _ in range(cfg.n_ranks):
            made.xs.append(float32_to_bfloat16_bits(rng.standard_normal((tokens, cfg.hidden_size), dtype=np.float32)))
            order = np.argsort(rng.random((tokens, cfg.n_experts)), axis=1)[:, : cfg.top_k]
            made.topk_ids.append(order.astype(np.int32))
            w = rng.random((tokens, cfg.top_k), dtype=np.float32) + np.float32(0.1)
            made.weights.append(w / w.sum(axis=1, keepdims=True))
        return made


@dataclass
class Candidate:
    """Something to time.

    Attributes:
        name: Its name in the report.
        call: One run.
        before: Called before each run, not timed.
        times: Seconds of every timed run.
    """

    name: str
    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    times: list[float] = field(default_factory=list)

    def run(self, keep: bool) -> None:
        """Run once; `keep` tells whether the time counts."""
        if self.before:
            self.before()
        start = time.perf_counter()
        self.call()
        if keep:
            self.times.append(time.perf_counter() - start)


class FormatBench:
    """The layer with one format: checked, then timed."""

    def __init__(self, cfg: EPConfig, inputs: Inputs, graphs: GraphSet):
        """Add the layer's graphs."""
        self.cfg, self.name = cfg, "fp8" if isinstance(cfg.dispatch_format, BlockwiseFP8) else "bf16"
        self.inputs = inputs
        self.layer = MoELayer(cfg, graphs, self.name)

    def check(self, progress: Progress) -> list[str]:
        """Run once, keep what the timed runs need, and compare with the reference bit by bit.

        Returns:
            What differs; empty if nothing does.
        """
        cfg, inputs = self.cfg, self.inputs
        kinds = ((inputs.xs, "bfloat16"), (inputs.topk_ids, "int32"), (inputs.weights, "float32"))
        self.args = [[to_buffer(a, dtype) for a in arrays] for arrays, dtype in kinds]
        self.buffers = self.layer.dispatch(*self.args)
        handles = self.layer.handles(self.buffers)
        rows = [expert_outputs(cfg, r, h, identity) for r, h in enumerate(handles)]
        self.ys = [to_buffer(y, "bfloat16") for y in rows]
        self.outputs = [to_numpy(b) for b in self.layer.combine(self.ys, self.buffers)]
        with progress.step(f"check {self.name}", f"Comparing {self.name} with the reference, bit by bit"):
            want = reference.dispatch(cfg, inputs.xs, inputs.topk_ids, inputs.weights)
            wrong = [d for w, h in zip(want, handles, strict=True) for d in reference.handle_differences(cfg, w, h)]
            sums = reference.combine(cfg, rows, want)
            differences = map(reference.output_difference, map("out of rank {}".format, count()), sums, self.outputs)
            wrong += [d for d in differences if d]
        self.rows_of = np.array([int(h.counts.sum()) for h in handles])
        return wrong

    def dispatch(self) -> None:
        """One dispatch; its buffers replace those of the one before."""
        self.buffers = self.layer.dispatch(*self.args)

    def rest(self) -> None:
        """Give the outputs back; the next dispatch makes new ones."""
        self.buffers = []

    def combine(self) -> None:
        """One combine of prepared rows."""
        self.layer.combine(self.ys, self.buffers)


def main(args: argparse.Namespace) -> int:
    """Run the benchmark, on the host or, by `bench_gpus`, on GPUs.

    Returns:
        0, or 1 where a result differs from the reference (then nothing is timed).

    Raises:
        EPError: An argument does not fit, or something is missing.
    """
    fill_bench_defaults(args)
    if args.backend == "gpus":
        from . import bench_gpus

        return bench_gpus.main(args)
    check_int("repeats", args.repeats, 1, 10_000)
    check_int("seed", args.seed, 0, 2**32 - 1)
    for option, path in (("output", args.output), ("plot", args.plot)):
        if path:
            files.check_writable(Path(path), option)
    if args.plot:
        plot.require_matplotlib()
    cfg = EPConfig(
        hidden_size=args.hidden,
        top_k=args.top_k,
        n_experts=args.experts,
        max_tokens_per_rank=args.tokens,
        n_ranks=args.ranks,
        dispatch_format=BF16(),
        reduce="expert",
    )
    cfg_fp8 = cfg.replace(dispatch_format=BlockwiseFP8())
    check_int("top_k", cfg.top_k, 1, cfg.n_experts, "the benchmark gives a token K different experts: use K up to E")
    progress = Progress()
    inputs = Inputs.random(cfg, args.tokens, args.seed)
    graphs = GraphSet(progress)
    benches = [FormatBench(c, inputs, graphs) for c in (cfg, cfg_fp8)]
    encoder = Encoder(cfg_fp8, np.concatenate(inputs.xs), graphs)
    graphs.compile()
    numpy_round = NumPyRound(cfg, inputs.xs, inputs.topk_ids, inputs.weights)
    wrong = [w for b in benches for w in b.check(progress)] + _check_numpy(numpy_round, benches[0])
    if wrong:
        print(
            "\n".join(["WRONG results; nothing was timed:", *wrong]) if not args.json else json.dumps({"wrong": wrong})
        )
        return 1

    moved = {b.name: measures.round_bytes(b.cfg, inputs.topk_ids) for b in benches}
    groups = [_candidates(bench, numpy_round, moved[bench.name]["copy"]) for bench in benches]
    groups.append(_encoders(encoder, numpy_round))
    candidates = [c for group in groups for c in group]
    with progress.step("timing", f"Timing: {args.repeats} rounds of {len(candidates)} candidates"):
        for group in groups:
            for i in range(args.repeats + 2):
                for candidate in group:
                    candidate.run(keep=i >= 2)
            for bench in benches:
                bench.rest()
    result = _result(cfg, benches, candidates, moved, args)
    for bench in benches:
        bench.layer.close()
    encoder.close()
    text = json.dumps(result, indent=2)
    if args.output:
        files.write_atomically(Path(args.output), text + "\n")
    if args.plot:
        plot.draw(result, Path(args.plot))
    print(text if args.json else _report(result))
    return 0


def _check_numpy(numpy_round: NumPyRound, bench: FormatBench) -> list[str]:
    """That both sides of the comparison compute the same."""
    got = bfloat16_bits_to_float32(numpy_round.combine(*numpy_round.dispatch()))
    want = bfloat16_bits_to_float32(np.concatenate(bench.outputs))
    size = np.abs(bfloat16_bits_to_float32(numpy_round.x)) * np.abs(numpy_round.weights).sum(axis=1, keepdims=True)
    worst = float(np.max(np.abs(got - want) / np.maximum(size, np.float32(1e-30)), initial=0.0))
    return [] if worst <= NUMPY_TOLERANCE else [f"NumPy and this package differ by {worst:.4f} of the terms"]


def _candidates(bench: FormatBench, numpy_round: NumPyRound, copied: int) -> list[Candidate]:
    """A format's round, the same in NumPy, and a copy of as many bytes."""
    rows, positions = (a.copy() for a in numpy_round.dispatch())
    name, copy = bench.name, PlainCopy(copied)
    found = [
        Candidate(f"{name} dispatch", bench.dispatch),
        Candidate(f"{name} combine", bench.combine),
        Candidate(f"{name} plain copy, one thread", copy.one_thread),
        Candidate(f"{name} plain copy, all cores", copy.all_cores),
        Candidate(f"{name} NumPy combine", lambda: numpy_round.combine(rows, positions)),
    ]
    if name == "bf16":
        found.append(Candidate("bf16 NumPy dispatch", numpy_round.dispatch))
    elif has_ml_dtypes():
        found.append(Candidate("fp8 NumPy dispatch", numpy_round.dispatch_fp8))
    return found


def _encoders(encoder: Encoder, numpy_round: NumPyRound) -> list[Candidate]:
    """fp8 encoding alone."""
    found = [Candidate("fp8 encoding", encoder.run, encoder.reset)]
    if has_ml_dtypes():
        found.append(Candidate("fp8 encoding with ml_dtypes", lambda: quantize_ml_dtypes(numpy_round.x)))
    return found


def _result(
    cfg: EPConfig,
    benches: list[FormatBench],
    candidates: list[Candidate],
    moved: dict[str, dict[str, int]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    samples = {c.name: np.array(c.times) for c in candidates}
    for name in ("bf16", "fp8"):
        samples[f"{name} round"] = samples[f"{name} dispatch"] + samples[f"{name} combine"]
        if f"{name} NumPy dispatch" in samples:
            samples[f"{name} NumPy round"] = samples[f"{name} NumPy dispatch"] + samples[f"{name} NumPy combine"]
    median = {name: float(np.median(values)) for name, values in samples.items()}
    values = {}
    for name in ("bf16", "fp8"):
        if f"{name} NumPy round" in median:
            values[f"{name} round, times NumPy's speed"] = median[f"{name} NumPy round"] / median[f"{name} round"]
        copies = [median[f"{name} plain copy, {who}"] for who in ("one thread", "all cores")]
        values[f"{name} round, times the speed of a plain copy"] = min(copies) / median[f"{name} round"]
    if "fp8 encoding with ml_dtypes" in median:
        values["fp8 encoding, times the speed of ml_dtypes"] = (
            median["fp8 encoding with ml_dtypes"] / median["fp8 encoding"]
        )
    rows = benches[0].rows_of
    # The goals are for the default shape; no other one meets or misses them.
    default = all(getattr(args, name) == value for name, value in BENCH_SHAPE.items())
    return {
        "version": __version__,
        "commit": measures.git_commit(),
        "machine": measures.machine(),
        "config": config_json(cfg) | {"tokens": args.tokens, "seed": args.seed, "repeats": args.repeats},
        "imbalance": float(rows.max() / rows.mean()),
        "equal_to_reference": True,
        "seconds": {name: measures.statistics(s) for name, s in samples.items()},
        "default_shape": default,
        "ratios": goals(values, default),
        "bytes": moved,
        "windows": _windows(cfg, benches[0].layer.comm),
    }


def goals(values: dict[str, float], default_shape: bool) -> list[dict[str, Any]]:
    """The ratios against `GOALS`. "met" is None where one was not measured, or at another shape than the goal's."""
    return [
        {
            "name": n,
            "value": values.get(n),
            "goal": goal,
            "met": values[n] >= goal if n in values and default_shape else None,
        }
        for n, goal in GOALS.items()
    ]


def goals_text(ratios: list[dict[str, Any]], default_shape: bool) -> str:
    """The same as a table."""
    rows = []
    for ratio in ratios:
        value, verdict = ratio["value"], {True: "met", False: "NOT MET", None: ""}[ratio["met"]]
        if value is None:
            verdict = "not measured: needs ml_dtypes"
        rows.append([ratio["name"], "-" if value is None else f"{value:.2f}", f"{ratio['goal']:.1f}", verdict])
    text = report.table(["ratio of medians", "value", "goal", ""], rows)
    shape = ", ".join(f"{name}={value}" for name, value in BENCH_SHAPE.items())
    return text if default_shape else f"{text}\n  The goals are for the default shape: {shape}"


def _windows(cfg: EPConfig, comm: Communicator) -> dict[str, Any]:
    """Window bytes of a rank, as allocated and by the formula, for both slot policies."""
    found = {"rank": measures.window_bytes(cfg) | {"allocated": measures.allocated_bytes(comm)}}
    other = cfg.replace(slots="expert")
    found["expert"] = measures.window_bytes(other)
    try:
        with Communicator.cpu(other) as expert_comm:
            found["expert"]["allocated"] = measures.allocated_bytes(expert_comm)
    except EPError:  # not enough memory for these
        found["expert"]["allocated"] = None
    return found


def _report(result: dict[str, Any]) -> str:
    c, m = result["config"], result["machine"]
    lines = [
        "",
        f"ep-mojo {result['version']} ({result['commit'] or 'no commit known'}), MAX {m['max']}, NumPy {m['numpy']}",
        f"{m['cpu']}, {m['cores']} cores, {m['platform']}",
        f"R={c['n_ranks']} T={c['tokens']} H={c['hidden_size']} E={c['n_experts']} K={c['top_k']}, uniform routing, "
        f"fullest rank {result['imbalance']:.2f} x the mean; results equal to the reference bit for bit",
        "",
    ]
    ms = [[n, *(f"{s[k] * 1e3:.2f}" for k in ("median", "p10", "p90"))] for n, s in sorted(result["seconds"].items())]
    lines += [report.table([f"ms, {c['repeats']} runs", "median", "p10", "p90"], ms), ""]
    lines.append(goals_text(result["ratios"], result["default_shape"]))
    lines += ["", measures.FORMULA]
    rows = [[n, *(report.size(b[k]) for k in ("read", "written", "copy"))] for n, b in result["bytes"].items()]
    lines += [report.table(["bytes of a round", "read", "written", "copy"], rows), ""]
    rows = []
    for slots, w in result["windows"].items():
        same = "-" if w["allocated"] is None else "yes" if w["allocated"] == w["total"] else "NO"
        rows.append([slots, *(report.size(w[k]) for k in ("dispatch_payload", "combine_payload", "total")), same])
    header = ["windows of a rank, slots", "dispatch payload", "combine payload", "total", "allocated = formula"]
    lines += [report.table(header, rows), measures.WINDOW_FORMULA]
    return "\n".join(lines)
