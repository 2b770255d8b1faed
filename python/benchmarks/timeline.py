"""When the parts of a fused round happen on the GPUs of this machine: a table, JSON, and a picture.

    timeline.py --tokens 128,4096 --formats bf16,fp8 --output timeline.json --plot timeline.png

A round is dispatch and combine with identity experts; fp8 rows are cast to bfloat16 between them. It is checked,
captured, and timed without and with the marks that the kernels then write (`ep_mojo/timeline.py`): the difference is
what they cost. Then medians over rounds and ranks of when the first, the median and the last warp came by each mark, in
microseconds since the first CTA of dispatch began. Prints the tables last; exit status 1 where a result is wrong, 2
without GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ep_mojo as ep
from ep_mojo.programs import options, report
from ep_mojo.programs.gpu_round import (
    ERROR_LIMIT,
    Round,
    add_round,
    draw,
    error_of,
    gpus_to_use,
    on_devices,
    replay_times,
)
from ep_mojo.programs.hold import Hold
from ep_mojo.programs.measures import git_commit
from ep_mojo.programs.plot import require_matplotlib
from ep_mojo.timeline import Timeline, summary

REPLAYS_BETWEEN = 5
"""Replays before each look, so that the one looked at begins as most do: behind another."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_rounds(parser)
    parser.add_argument("--sms", type=int, default=0, help="SM budget of our ops (default: all)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds to look at (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE.json", help="write the JSON here")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    return parser.parse_args(argv)


def measure(case: Round, sms: int, rounds: int) -> dict[str, Any]:
    """Compile, check, time and look at one case."""
    with ep.Communicator.gpus(case.config(sms)) as comm:
        model = comm.compile(add_round(case, comm)).model
        given = draw(case)
        args = [*on_devices(given, comm.devices), *comm.inputs()]
        outputs = model.execute(*args)
        comm.check()
        row: dict[str, Any] = {"case": vars(case) | {"name": case.name}, "error": error_of(case, outputs, given)}
        if not row["error"] < ERROR_LIMIT:
            return row
        hold = Hold(comm.session, comm.devices)
        row["median_us"] = replay_times(model, args, hold)["median_us"]
        model.release_captured_graph(1)
        seen = []
        with Timeline(comm) as timeline:
            row["with_marks_us"] = replay_times(model, args, hold)["median_us"]
            for _ in range(rounds):
                for _ in range(REPLAYS_BETWEEN):
                    model.replay(1, *args)
                seen += timeline.times()
        comm.check()
        row["marks"] = summary(seen)
        del outputs, args
    return row


def text(row: dict[str, Any]) -> str:
    """A case as a table."""
    name = row["case"]["name"]
    if "marks" not in row:
        return f"{name}: WRONG: relative error {row['error']:.1e}"
    head = f"{name}: {row['median_us']:.1f} us a round, {row['with_marks_us']:.1f} with marks"
    lines = [
        [mark, *(f"{t[key]:.1f}" for key in ("first", "median", "last")), f"{t['warps']:.0f}"]
        for mark, t in row["marks"].items()
    ]
    return f"{head}\n{report.table(['us', 'first', 'median', 'last', 'warps'], lines)}"


def draw_plot(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """A bar from the first to the last warp for each mark, a line at the median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(rows), 6), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for i, (mark, t) in enumerate(row["marks"].items()):
            axis.barh(i, t["last"] - t["first"], left=t["first"], color="C1" if mark.startswith("combine") else "C0")
            axis.plot([t["median"]] * 2, [i - 0.4, i + 0.4], color="black")
        axis.set_yticks(range(len(row["marks"])), list(row["marks"]))
        axis.invert_yaxis()
        axis.set_xlabel("µs since dispatch began")
        axis.set_title(row["case"]["name"], fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    return options.status_of(lambda: measure_all(arguments(argv)))


def measure_all(args: argparse.Namespace) -> int:
    """Measure, draw and print; 1 where a result is wrong."""
    if args.plot:
        require_matplotlib()
    ranks = gpus_to_use(args.ranks)
    cases = [
        Round(ranks, tokens, fmt, True, args.hidden, args.experts, args.top_k)
        for fmt in args.formats
        for tokens in args.tokens
    ]
    for case in cases:
        case.config(args.sms)
    from max.driver import Accelerator

    rows = [measure(case, args.sms, args.rounds) for case in cases]
    gpu = str(Accelerator(0).model_name)
    result = {"gpu": gpu, "ranks": ranks, "sms": args.sms, "commit": git_commit(), "cases": rows}
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    good = [row for row in rows if "marks" in row]
    if args.plot and good:
        draw_plot(good, args.plot, f"{ranks} x {gpu}")
    print("\n\n".join(map(text, rows)))
    return int(len(good) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
