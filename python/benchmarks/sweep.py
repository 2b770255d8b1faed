"""Rounds of many sizes, SM budgets and routings, ours, MAX's built-in, and what the links need: tables, plots, JSON.

    sweep.py --output FOLDER            on a machine with GPUs; --help has sizes that take less long

    1. tokens    a round of T tokens a rank for each T, ours and MAX's, and the links alone (`ep_mojo/programs/link.py`)
    2. SMs       our round of the most tokens of `--large` with budgets of SMs: GB/s a GPU sends on average in it
    3. routing   ours and MAX's with every routing of `--routings`, at `--small` and `--large`

Every result is checked before it is timed, by graph replay, medians over all replays and ranks. GPUs' queues are held
until all replays of a batch are enqueued, so times are the devices'; "host-paced" are medians of replays that begin as
soon as the host has launched them: in small rounds the host's time. Plots are of the former. With fp8 both sides cast
to bfloat16 between their phases, so the kernels' own times are given too where torch is installed. Graphs are compiled
first, several at a time. Exit status 1 where a result of ours is wrong, 2 without GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import compare_max_builtin as compare
from compare_max_builtin import Case

from ep_mojo.errors import KernelBuildError
from ep_mojo.programs import link, options, report
from ep_mojo.programs.gpu_round import ERROR_LIMIT, ROUTINGS, draw, gpus_to_use
from ep_mojo.programs.hold import Hold
from ep_mojo.programs.measures import git_commit
from ep_mojo.programs.plot import require_matplotlib

COLORS = {"ours": "C0", "max": "C1", "links": "C7"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the JSON and the plots go")
    options.add_rounds(parser, tokens="1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192", formats="bf16")
    parser.add_argument(
        "--sms", type=options.numbers, default="4,8,16,24,32,48,64,96,132", help="budgets (default: %(default)s)"
    )
    parser.add_argument("--small", type=int, default=128, help="tokens of the routings (default: %(default)s)")
    parser.add_argument("--large", type=int, default=4096, help="and of the budgets (default: %(default)s)")
    parser.add_argument(
        "--routings", type=options.words(*ROUTINGS), default=",".join(ROUTINGS), help="default: %(default)s"
    )
    parser.add_argument("--systems", type=options.words("ours", "max"), default="ours,max", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="compilations at a time")
    parser.add_argument("--mefs", metavar="FOLDER", help="keeps compiled graphs, and takes what is there")
    parser.add_argument("--no-profile", action="store_true", help="do not time the kernels by themselves")
    return parser.parse_args(argv)


class Bench:
    """The GPUs and the compiled graphs.

    Attributes:
        rows: What was measured, a dict each: "part", "case", "routing", "sms", times.
    """

    def __init__(self, opts: argparse.Namespace, ranks: int, mefs: Path):
        """Nothing is compiled yet."""
        from max.driver import Accelerator

        self.opts, self.ranks, self.mefs = opts, ranks, mefs
        self.devices = [Accelerator(i) for i in range(ranks)]
        self.rows: list[dict[str, Any]] = []

    def case(self, tokens: int, fmt: str, system: str) -> Case:
        """A round of the sizes asked for."""
        o = self.opts
        return Case(self.ranks, tokens, fmt, True, o.hidden, o.experts, o.top_k, system)

    def compile(self, cases: list[Case]) -> None:
        """Compile what the folder lacks, each in a process of its own."""
        o = self.opts

        def one(case: Case) -> str:
            sizes = {"ranks": self.ranks, "tokens": case.tokens, "formats": case.fmt, "systems": case.system}
            sizes |= {"hidden": o.hidden, "experts": o.experts, "top-k": o.top_k, "mefs": self.mefs}
            asked = [f"--{name}={value}" for name, value in sizes.items()]
            done = subprocess.run(
                [sys.executable, compare.__file__, "compile", *asked], capture_output=True, text=True, check=False
            )
            return "" if done.returncode == 0 else f"{case.name}: {done.stderr[-2000:]}"

        wanted = [case for case in dict.fromkeys(cases) if not compare.is_compiled(self.mefs, case)]
        with ThreadPoolExecutor(o.jobs) as pool:
            failed = [text for text in pool.map(one, wanted) if text]
        if failed:
            raise KernelBuildError("not compiled: " + "\n".join(failed))

    def measure(self, part: str, case: Case, routings: list[str], sms: int = 0) -> None:
        """Load a round, and time it with each routing."""
        from max.driver import CPU
        from max.engine import InferenceSession

        session = InferenceSession(devices=[CPU(), *self.devices], precompiled_mefs=self.mefs / case.name)
        loaded = compare.load(case, session, self.devices, sms)
        for routing in routings:
            found = compare.measure(case, loaded, self.devices, routing=routing, profile=not self.opts.no_profile)
            found.pop("kernels_us", None)
            self.rows.append({"part": part, "routing": routing, "sms": sms} | found)
            print(json.dumps(self.rows[-1]), file=sys.stderr, flush=True)
        if loaded.comm is not None:
            loaded.comm.destroy()

    def measure_links(self, cases: list[Case]) -> None:
        """Time the pushes of all sizes, compiled together."""
        from max.graph import Module

        import ep_mojo as ep

        module, made = Module(), []
        for case in cases:
            comm = ep.Communicator.gpus(case.config(), range(case.ranks))
            n = link.round_rows(comm.cfg, draw(case)[self.ranks : 2 * self.ranks])
            made.append((case, comm, n, link.add_pushes(comm, f"{case.name}_links", n, module)))
        compiled = made[0][1].compile_all([graph for *_, graph in made])
        hold = Hold(made[0][1].session, self.devices)
        for (case, comm, n, _), graph in zip(made, compiled, strict=True):
            times = link.push_times(comm, graph.model, n, hold)
            comm.check()
            shape = vars(case) | {"name": case.name, "system": "links"}
            self.rows.append({"part": "tokens", "case": shape, "routing": "uniform", "sms": 0, "rows": n} | times)
            comm.destroy()


def run(bench: Bench) -> None:
    """Compile and measure everything."""
    o = bench.opts
    sizes = [bench.case(t, f, s) for f in o.formats for t in o.tokens for s in o.systems]
    routed = [bench.case(t, f, s) for f in o.formats for t in (o.small, o.large) for s in o.systems]
    budgets = [bench.case(o.large, f, "ours") for f in o.formats] if o.sms else []
    bench.compile([*sizes, *routed, *budgets])
    for case in sizes:
        bench.measure("tokens", case, ["uniform"])
    bench.measure_links([case for case in sizes if case.system == o.systems[0]])
    for case in budgets:
        for sms in o.sms:
            bench.measure("SMs", case, ["uniform"], sms)
    for case in routed:
        bench.measure("routing", case, o.routings)


SYSTEM_HEAD = ["p99", "host-paced", "kernels"]
HEAD = ["ours us", *SYSTEM_HEAD, "MAX us", *SYSTEM_HEAD, "MAX / ours", "links us"]


def tables(rows: list[dict[str, Any]]) -> str:
    """What was measured, a table for each part and format."""
    parts = []
    for fmt in dict.fromkeys(r["case"]["fmt"] for r in rows):
        mine = [r for r in rows if r["case"]["fmt"] == fmt]
        for part in ("tokens", "routing"):
            found: dict[str, dict[str, dict]] = {}
            for r in mine:
                if r["part"] == part:
                    name = str(r["case"]["tokens"]) + (f" {r['routing']}" if part == "routing" else "")
                    found.setdefault(name, {})[r["case"]["system"]] = r
            if found:
                lines = [[name, *figures(by)] for name, by in found.items()]
                parts.append(report.table([f"{fmt}: {part}", *HEAD], lines))
        lines = [
            [r["sms"], f"{r['median_us']:.1f}", f"{r.get('ep_kernels_us', 0):.1f}", f"{r['gb_s']:.0f}"]
            for r in mine
            if r["part"] == "SMs"
        ]
        if lines:
            parts.append(report.table([f"{fmt}: SMs", "us a round", "kernels", "GB/s a GPU"], lines))
    wrong = [r["case"]["name"] for r in rows if is_wrong(r)]
    return "\n\n".join([*parts, *(f"WRONG: {name}" for name in wrong)])


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a result was wrong, NaN included; pushes have none."""
    return not row.get("error", 0) < ERROR_LIMIT


def figures(by: dict[str, dict]) -> list[str]:
    """Ours, MAX's, their ratio, and the links'."""
    found = []
    for system in ("ours", "max"):
        r = by.get(system, {})
        names = ("median_us", "p99_us", "host_paced_us", "ep_kernels_us")
        found += [f"{r[name]:.1f}" if r.get(name) else "-" for name in names]
    both = "ours" in by and "max" in by
    found.append(f"{by['max']['median_us'] / by['ours']['median_us']:.2f} x" if both else "-")
    return [*found, f"{by['links']['median_us']:.1f}" if "links" in by else "-"]


def draw_plots(rows: list[dict[str, Any]], folder: Path, title: str) -> None:
    """Microseconds against tokens, and GB/s against SMs."""
    from matplotlib.figure import Figure

    styles = {"bf16": "-", "fp8": "--"}
    for part, x, y, labels in (
        ("tokens", lambda r: r["case"]["tokens"], "median_us", ("tokens a rank", "µs a round")),
        ("SMs", lambda r: r["sms"], "gb_s", ("SMs a launch may use", "GB/s a GPU")),
    ):
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.add_subplot()
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for r in rows:
            if r["part"] == part:
                lines.setdefault((r["case"]["system"], r["case"]["fmt"]), []).append((x(r), r[y]))
        for (system, fmt), points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, styles[fmt], color=COLORS[system], marker="o", markersize=3, label=f"{system}, {fmt}")
        if part == "tokens":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(alpha=0.3)
        if lines:
            axes.legend()
        axes.set_title(title, fontsize=9)
        figure.savefig(folder / f"{part.lower()}.png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    return options.status_of(lambda: measure_all(arguments(argv)))


def measure_all(opts: argparse.Namespace) -> int:
    """Measure, draw and print; 1 where a result of ours is wrong."""
    require_matplotlib("this program")
    ranks = gpus_to_use(opts.ranks)
    Case(ranks, opts.large, "bf16", True, opts.hidden, opts.experts, opts.top_k).config()
    folder = Path(opts.output)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(opts, ranks, Path(opts.mefs or scratch))
        try:
            run(bench)
        finally:  # what there is, should a case fail
            gpu = str(bench.devices[0].model_name)
            result = {"gpu": gpu, "ranks": ranks, "commit": git_commit(), "rows": bench.rows}
            (folder / "sweep.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{ranks} x {gpu}: dispatch and combine, H={opts.hidden} E={opts.experts} K={opts.top_k}"
    draw_plots(bench.rows, folder, title)
    print(tables(bench.rows))
    return int(any(is_wrong(r) for r in bench.rows if r["case"]["system"] == "ours"))


if __name__ == "__main__":
    sys.exit(main())
