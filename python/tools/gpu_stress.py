"""Many rounds on GPUs, each checked on the device: `python python/tools/gpu_stress.py --rounds 10000`.

Inputs are made on the device, a function of (seed, round, rank): tokens, routing from uniform to all for one expert, T
from 0 to Tmax. Every rank stops for a random while before every stage. Its experts compare all that dispatch gave
them with what it must be, bit by bit, multiply the rows by a small number, and the sums that combine gives are compared
too (`stress_ops`). Rounds of several formats, sizes and buffers, routed and gathered (all-gather-v, reduce-scatter-v),
fused and split; split ones overlap: `num_buffers` dispatches and combines are under way at once. A share
of the rounds are replays of a captured graph. The host waits only now and then, reads what was found, and compares some
whole rounds with the NumPy reference.

First the checker is put to the test: spoilt bytes must be found. Exit status 1 where anything was wrong.

Most of the time of a short run goes into its graphs. `--compile-only --gpus 2 --artefact FILE`, where there is no GPU,
compiles those of all cases, and `--gpus 2 --artefact FILE` runs what is there.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import stress_law as law_of
from stress_graphs import CASES, DRAWN, OPS, SELF_TESTS, Case, add_graph

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.comm import CompiledGraph
from ep_mojo.comm.models import export, load_artefact, run_model
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits, to_buffer, to_numpy
from ep_mojo.handle import HANDLE_TENSORS
from ep_mojo.programs.gpu_round import plan_gpus

NAN = 0x7FC0
"""bfloat16, in rows that combine must not read."""


class Run:
    """A case's communicator, graph and buffers.

    Attributes:
        laws, findings: A buffer for each rank.
        outputs: Of the last graph that ran.
    """

    def __init__(self, case: Case, comm: Any, seed: int, max_delay_ns: int):
        """Put the law at round 0."""
        self.case, self.comm, self.cfg = case, comm, comm.cfg
        self.law = law_of.Law(seed, self.cfg, max_delay_ns)
        self.model: Any = None
        self.outputs: list[Any] = []
        self.start(0)

    def start(self, number: int, wishes: dict[int, list[int]] | None = None) -> None:
        """Go on with a round, findings empty; `wishes`: rank -> [round, place, byte, mask] to be spoilt."""
        R = self.cfg.n_ranks
        devices = getattr(self.comm, "devices", [None] * R)
        self.laws, self.findings = [], []
        for r in range(R):
            words, found = self.law.words(r), np.zeros(law_of.FINDINGS_WORDS, np.int64)
            words[law_of.ROUND] = number
            found[law_of.FAULT : law_of.FAULT + 4] = (wishes or {}).get(r, [-1, -1, 0, 0])
            for array, place in ((words, self.laws), (found, self.findings)):
                place.append(to_buffer(array) if devices[r] is None else to_buffer(array).to(devices[r]))

    def execute(self) -> None:
        """Run the graph once, without waiting."""
        given = [*self.laws, *self.findings]
        if isinstance(self.model, CompiledGraph):
            self.outputs = self.comm.execute(self.model, *given, check=False, as_buffers=True)
        else:
            self.outputs = run_model(self.model, [*given, *self.comm.inputs()])

    def eager(self, rounds: int, every: int) -> None:
        """At least so many rounds; a look at what was found after every so many."""
        graphs, at_once = -(-rounds // self.case.per_graph), max(1, every // self.case.per_graph)
        for i in range(graphs):
            self.execute()
            if i % at_once == at_once - 1 or i == graphs - 1:
                self.check()

    def replays(self, rounds: int, every: int) -> int:
        """The same by replays of a captured graph; how many rounds they were."""
        model, given = self.loaded, [*self.laws, *self.findings, *self.comm.inputs()]
        self.outputs = model.capture(1, *given)
        self.check()
        before = self.done()
        graphs, at_once = -(-rounds // self.case.per_graph), max(1, every // self.case.per_graph)
        for i in range(graphs):
            model.replay(1, *given)
            if i % at_once == at_once - 1 or i == graphs - 1:
                self.check()
        return self.done() - before

    @property
    def loaded(self) -> Any:
        """The model of MAX."""
        return self.model.model if isinstance(self.model, CompiledGraph) else self.model

    def done(self) -> int:
        """Rounds so far."""
        rounds = {int(to_numpy(b)[law_of.ROUND]) for b in self.laws}
        if len(rounds) != 1:
            raise RuntimeError(f"{self.case.name}: ranks are in different rounds {sorted(rounds)}")
        return rounds.pop()

    def found(self) -> list[np.ndarray]:
        """Every rank's findings."""
        return [to_numpy(b) for b in self.findings]

    def check(self) -> None:
        """Wait, and raise what a rank recorded, or the first mismatch."""
        try:
            self.comm.check()
        except ep.EPError as error:
            by_rank = "\n".join(f"  rank {r}: {e}" for r, e in getattr(error, "by_rank", {}).items())
            raise RuntimeError(f"{self.case.name}: {error}\n{by_rank}") from error
        said = [f"rank {r}: {text}" for r, f in enumerate(self.found()) if (text := law_of.first_mismatch(f))]
        if said:
            raise RuntimeError(f"{self.case.name}: " + "; ".join(said))

    def totals(self) -> dict[str, int]:
        """What was compared on the device; raises unless that is every row of every round."""
        found, n, R = self.found(), self.done(), self.cfg.n_ranks
        want = self.law.rows(range(n))
        for r, f in enumerate(found):
            expected = [n, n, int(want[r]), n * self.cfg.max_tokens_per_rank]
            if f[: law_of.WRONG].tolist() != expected:
                raise RuntimeError(
                    f"{self.case.name}, rank {r}: dispatches, combines, rows and sums compared are "
                    f"{f[: law_of.WRONG].tolist()}, not {expected}"
                )
        return {"rounds": n, "rows": int(want.sum()), "sums": n * R * self.cfg.max_tokens_per_rank}

    def compare(self) -> None:
        """Compare the last round's outputs with the reference, all bits."""
        cfg, R = self.cfg, self.cfg.n_ranks
        arrays = [to_numpy(o) for o in self.outputs]
        each = len(DRAWN) + len(HANDLE_TENSORS) + 1
        by_rank = [arrays[r * each : (r + 1) * each] for r in range(R)]
        number = int(by_rank[0][DRAWN.index("info")][law_of.ROUND])
        routing = self.law.routing(number)
        xs = float32_to_bfloat16_bits(self.law.values(number).astype(np.float32))
        counts = [np.array([n], np.int32) for n in routing.tokens]
        wrong = []
        for r in range(R):
            for name, want, got in zip(
                DRAWN, (xs[r], routing.ids[r], routing.weights[r], counts[r]), by_rank[r], strict=False
            ):
                wrong.append(reference.array_difference(f"rank {r} {name}", want, got))
        handles = reference.dispatch(cfg, list(xs), list(routing.ids), list(routing.weights), counts)
        ys = [self._expert_rows(h) for h in handles]
        sums = reference.combine(cfg, ys, handles, reduce=cfg.reduce)
        for r in range(R):
            got = dict(zip(HANDLE_TENSORS, by_rank[r][len(DRAWN) : -1], strict=True))
            wrong += reference.handle_differences(cfg, handles[r], SimpleNamespace(**got))
            wrong.append(reference.output_difference(f"rank {r} y", sums[r], by_rank[r][-1]))
        wrong = [text for text in wrong if text]
        if wrong:
            raise RuntimeError(f"{self.case.name}, round {number} against the reference: " + "; ".join(wrong[:20]))

    def _expert_rows(self, handle: Any) -> np.ndarray:
        """What the experts make of a handle of the reference."""
        cfg = self.cfg
        tokens = handle.tokens.reshape(-1, cfg.hidden_size)
        rows = np.full(tokens.shape, NAN, np.uint16)
        groups = cfg.n_ranks if cfg.output_layout == "gathered" else cfg.n_groups
        for g in range(groups):
            first = int(handle.row_offsets[g])
            part = slice(first, first + int(handle.counts[g]))
            if isinstance(cfg.dispatch_format, ep.BF16):
                values = bfloat16_bits_to_float32(tokens[part])
            else:
                values = reference.dequantize(cfg, tokens[part], handle.scales[part])
            rows[part] = float32_to_bfloat16_bits(values * self._factors(handle, g, part))
        return rows.reshape(handle.tokens.shape)

    def _factors(self, handle: Any, group: int, part: slice) -> np.ndarray:
        """What the rows of a group are multiplied by, float32 [rows, 1] or one for all: `factor`, or `Law.share`."""
        if self.cfg.output_layout != "gathered":
            return np.float32(law_of.FACTORS[int(handle.expert_ids[group]) % 3])
        ids = handle.local_ids[part]
        here = (ids >= 0) & (ids // self.cfg.n_local_experts == handle.rank)
        of_experts = np.where(here, handle.local_weights[part] * law_of.FACTORS[ids % 3], 0).sum(axis=1)
        return (of_experts + law_of.FACTORS[handle.rank % 3]).astype(np.float32)[:, None]


def self_test(run: Run) -> list[dict[str, Any]]:
    """Spoil a byte of everything that is checked, on each rank in turn; every one must be found, and nothing else.

    What a rank's experts make of a spoilt row goes back to the row's source, so sums of other ranks may be wrong too.
    """
    R, results = run.cfg.n_ranks, []
    full = [n for n in range(400) if (run.law.rows(range(n, n + 1)) > 0).all()]
    for i, (name, (byte, mask, kinds)) in enumerate(run.case.faults.items()):
        victim, number = i % R, full[i]
        for wishes in ({}, {victim: [number, i, byte, mask]}):
            run.start(number, wishes)
            run.execute()
            run.comm.check()
            found = run.found()
            texts = [law_of.first_mismatch(f) for f in found]
            good = not any(texts)
            if wishes:
                elsewhere = [] if name == "y" else ["sum of a token"]  # y is spoilt when all sums are there
                named = {r: kinds if r == victim else elsewhere for r in range(R) if texts[r]}
                good = victim in named and all(
                    any(f"in round {number}: {kind} [" in texts[r] for kind in words) for r, words in named.items()
                )
            if not good:
                raise RuntimeError(
                    f"the checker is blind: {name} of rank {victim} {'spoilt' if wishes else 'sound'}, found: {texts}"
                )
        results.append({"case": run.case.name, "spoilt": name, "rank": victim, "said": texts[victim]})
        run.comm.reset()
    return results


def measure(run: Run, rounds: int, replayed: int, every: int) -> dict[str, Any]:
    """All rounds of a case."""
    start = time.monotonic()
    row: dict[str, Any] = {"case": run.case.name, "wrong": ""}
    try:
        run.eager(max(rounds - replayed, 1), every)
        run.compare()
        row["replayed"] = 0
        if replayed:
            row["replayed"] = run.replays(replayed, every)
            run.compare()
            run.loaded.release_captured_graph(1)
        row |= run.totals()
    except RuntimeError as error:
        row["wrong"] = str(error)
        print(f"FAILED {error}", file=sys.stderr, flush=True)
    return row | {"seconds": round(time.monotonic() - start, 1)}


def communicator(cfg: ep.EPConfig, where: str) -> Any:
    """Ranks on GPUs, on one GPU, or on the host; "planned": on GPUs that are not there."""
    return {
        "gpus": ep.Communicator.gpus,
        "one-gpu": ep.Communicator.one_gpu,
        "cpu": ep.Communicator.cpu,
        "planned": ep.Communicator.planned,
    }[where](cfg)


def compile_planned(n_ranks: int, artefact: str | None) -> int:
    """Compile all graphs for sm_90a, without a GPU; write what that gave to a file."""
    plan_gpus(n_ranks)
    from max.driver import CPU, Accelerator
    from max.engine import InferenceSession
    from max.graph import Module

    module = Module()
    for i, case in enumerate((*SELF_TESTS, *CASES)):
        add_graph(module, case, communicator(case.config(n_ranks), "planned"), f"stress_{i}", case in SELF_TESTS)
    session = InferenceSession(devices=[CPU(), *map(Accelerator, range(n_ranks))])
    compiled = session.compile(module, custom_extensions=[ep.kernel_library(), OPS])
    if artefact:
        Path(artefact).write_bytes(export(compiled))
    print(f"{len(CASES) + len(SELF_TESTS)} graphs of {n_ranks} ranks compiled for sm_90a")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10_000, help="in all, over the cases (default: %(default)s)")
    parser.add_argument("--replayed", type=int, help="of them, by graph replay (default: a fifth; on the host none)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs, with a rank on each (default: all)")
    parser.add_argument("--on", choices=["gpus", "one-gpu", "cpu"], default="gpus", help="where (default: gpus)")
    parser.add_argument("--ranks", type=int, default=4, help="virtual ranks with --on one-gpu or cpu (default: 4)")
    parser.add_argument("--only", action="append", help="only cases whose name contains this (may be repeated)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument("--max-delay-us", type=int, default=1000, help="longest delay, up to 2000 (default: 1000)")
    parser.add_argument("--check-every", type=int, default=400, help="rounds between two looks (default: 400)")
    parser.add_argument("--limit-s", type=int, default=900, help="give up after this many seconds (default: 900)")
    parser.add_argument("--self-test", action="store_true", help="only put the checker to the test")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90a; needs no GPU")
    parser.add_argument("--artefact", metavar="FILE", help="of graphs compiled ahead, for --on gpus without --only")
    parser.add_argument("--output", metavar="FILE.json", help="write the results here")
    args = parser.parse_args(argv)
    least = {"rounds": 1, "gpus": 0, "ranks": 1, "seed": 0, "max_delay_us": 0, "check_every": 1, "limit_s": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} = {getattr(args, name)}; allowed: {low} and more")
    if args.max_delay_us > 2000:
        parser.error(f"--max-delay-us = {args.max_delay_us}; allowed: up to 2000")
    if args.replayed is None:
        args.replayed = 0 if args.on == "cpu" else args.rounds // 5
    if not 0 <= args.replayed <= args.rounds or (args.on == "cpu" and args.replayed):
        parser.error(f"--replayed = {args.replayed}; allowed: up to --rounds, and none on the host")
    if args.artefact and (args.on != "gpus" or args.only or args.self_test):
        parser.error("--artefact holds the graphs of all cases on GPUs; leave --on, --only and --self-test out")
    names = [c.name for c in CASES]
    for word in args.only or []:
        if not any(word in name for name in names):
            parser.error(f"--only = {word!r}: no case has that in its name. Cases: {'; '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Compile, put the checker to the test, run, and print the table."""
    args = arguments(argv)
    faulthandler.dump_traceback_later(args.limit_s, exit=True)
    if args.compile_only:
        return compile_planned(args.gpus or args.ranks, args.artefact)
    from max.driver import accelerator_count
    from max.graph import Module

    n_ranks = args.ranks if args.on != "gpus" else args.gpus or accelerator_count()
    if n_ranks == 0:
        print("MAX sees no GPU here; --on cpu runs on the host", file=sys.stderr)
        return 2
    delay_ns = 1000 * args.max_delay_us if args.on == "gpus" else 0
    chosen = [] if args.self_test else [c for c in CASES if not args.only or any(o in c.name for o in args.only)]
    try:
        cases = (*SELF_TESTS, *chosen)
        runs = [Run(c, communicator(c.config(n_ranks), args.on), args.seed, delay_ns) for c in cases]
    except ep.EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    module = Module()
    graphs = [add_graph(module, r.case, r.comm, f"stress_{i}", r.case in SELF_TESTS) for i, r in enumerate(runs)]
    if args.artefact:
        session = runs[0].comm.session
        models = load_artefact(session, Path(args.artefact).read_bytes(), [graph.name for graph in graphs])
    else:
        models = runs[0].comm.compile_all(graphs)
    for run, model in zip(runs, models, strict=True):
        run.model = model
    compiled_s = round(time.monotonic() - start, 1)
    print(f"{len(runs)} graphs of {n_ranks} ranks compiled in {compiled_s} s", file=sys.stderr, flush=True)
    try:
        spoilt = [line for run in runs[: len(SELF_TESTS)] for line in self_test(run)]
    except (RuntimeError, ep.EPError) as error:
        print(f"FAILED self-test: {error}", file=sys.stderr, flush=True)
        return 1
    for line in spoilt:
        print(f"{line['case']}: spoilt {line['spoilt']} of rank {line['rank']}: {line['said']}", file=sys.stderr)
    rows = []
    for run in runs[len(SELF_TESTS) :]:
        share = -(-args.rounds // len(chosen))
        rows.append(measure(run, share, -(-args.replayed // len(chosen)), args.check_every))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    report = {"on": args.on, "ranks": n_ranks, "seed": args.seed, "max_delay_us": delay_ns // 1000}
    report |= {"compiled_s": compiled_s, "self_test": spoilt, "cases": rows}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    faulthandler.cancel_dump_traceback_later()
    return show(rows, len(spoilt))


def columns(counts: list[int]) -> list[str]:
    """Numbers under their headings."""
    return [f"{n:{width}d}" for n, width in zip(counts, (8, 8, 11, 11), strict=True)]


def show(rows: list[dict[str, Any]], spoilt: int) -> int:
    """Print the table; 1 where something was wrong."""
    print(f"the checker found {spoilt} of {spoilt} spoilt bytes")
    print(f"{'case':28s} {'rounds':>8s} {'replayed':>8s} {'rows':>11s} {'sums':>11s} {'seconds':>8s}  result")
    names = ("rounds", "replayed", "rows", "sums")
    for row in rows:
        counts = [row.get(name, 0) for name in names]
        result = "WRONG" if row["wrong"] else "all equal"
        print(f"{row['case']:28s}", *columns(counts), f"{row['seconds']:8.1f}  {result}")
    total = [sum(row.get(name, 0) for row in rows) for name in names]
    print(f"{'all':28s}", *columns(total))
    wrong = sum(bool(row["wrong"]) for row in rows)
    said = f"{wrong} cases WRONG" if wrong else "all equal"
    print(f"{total[0]} rounds of {len(rows)} cases, {total[1]} replayed: {said}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
