"""`ep-mojo bench --backend gpus`: one round on the GPUs of this machine, beside what their links need for its bytes.

A round is dispatch and combine, replayed from a captured graph. The experts are the identity; where tokens travel as
fp8, the rows that combine gets are cast to bfloat16 before, not in the timed graph. Every result is checked first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..comm import Communicator
from ..config import MAX_SMS, EPConfig
from ..errors import ConfigError
from ..formats import check_int
from . import files, link, measures, report
from .gpu_round import ERROR_LIMIT, REPLAYS, Round, add_round, draw, error_of, gpus_to_use, on_devices, replay_times
from .hold import Hold
from .options import FORMATS, words
from .progress import Progress

FORMULA = """\
Bytes over the links in a round: P (token, other rank that owns an expert of it) pairs, M = message, Y = row of combine
  bytes = P M + R (R - 1) T K (2 + 4) + P Y     messages, routing tables (ids and weights), partial sums back
Signals, 8 bytes a token and rank, are left out. GB/s a GPU = bytes / R / median. "links" is a replay of two launches
that only push rows, as many as the busiest rank sends or receives, shared evenly between its peers."""


def main(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        0, or 1 where a result is wrong (its case is not timed).

    Raises:
        DeviceError: Fewer than two GPUs, or fewer than --ranks.
        EPError: An argument does not fit.
    """
    if args.plot:
        raise ConfigError(
            field="--plot", value=args.plot, allowed="--plot with --backend cpu", remedy="leave it out; use --output"
        )
    replays = REPLAYS if args.repeats is None else check_int("repeats", args.repeats, 1, 10_000)
    check_int("seed", args.seed, 0, 2**32 - 1)
    if args.output:
        files.check_writable(Path(args.output))
    if args.ranks is not None:
        check_int("n_ranks", args.ranks, 2, 8, "a link needs two GPUs: choose --ranks from 2 to 8")
    if args.sms is not None:
        check_int("n_sms", args.sms, 1, MAX_SMS, "choose --sms in that range, or leave it out for all")
    check_int("top_k", args.top_k, 1, args.experts, "the benchmark gives a token K different experts: use K up to E")
    formats = chosen_formats(args.formats)
    chosen_cases(args, args.ranks or 1, formats)  # what is wrong with any number of GPUs comes before the look for them
    ranks = gpus_to_use(args.ranks or 0, least=2, remedy="see `ep-mojo doctor`; use --backend cpu")
    cases, configs = chosen_cases(args, ranks, formats)
    progress, rows = Progress(), []
    for case, cfg in zip(cases, configs, strict=True):
        with progress.step(case.name, f"{case.name}: compiling, checking, timing"):
            rows.append(measure(case, cfg, args.seed, replays))
    result = {
        "version": __version__,
        "commit": measures.git_commit(),
        "machine": measures.machine() | {"gpu": gpu_name(), "gpus": ranks},
        "sms": args.sms,
        "seed": args.seed,
        "replays": replays,
        "cases": rows,
    }
    text = json.dumps(result, indent=2)
    if args.output:
        files.write_atomically(Path(args.output), text + "\n")
    print(text if args.json else report_text(result))
    return int(any(row["wrong"] for row in rows))


def chosen_cases(args: argparse.Namespace, ranks: int, formats: Sequence[str]) -> tuple[list[Round], list[EPConfig]]:
    """The rounds to time, and their configs.

    Raises:
        ConfigError: A size does not fit.
    """
    cases = [
        Round(ranks, tokens, fmt, args.mode != "split", args.hidden, args.experts, args.top_k)
        for fmt in formats
        for tokens in args.tokens
    ]
    return cases, [case.config(args.sms or 0) for case in cases]


def gpu_name() -> str:
    """What the first GPU is."""
    from max.driver import Accelerator

    return str(Accelerator(0).model_name)


def chosen_formats(text: str | None) -> list[str]:
    """The formats that --formats names, each once.

    Raises:
        ConfigError: It names something else.
    """
    try:
        return words(*FORMATS)(text or ",".join(FORMATS))
    except argparse.ArgumentTypeError:
        raise ConfigError(
            field="--formats", value=text, allowed="bf16, fp8, or bf16,fp8", remedy="leave it out for both"
        ) from None


def measure(case: Round, cfg: EPConfig, seed: int, replays: int) -> dict[str, Any]:
    """Compile, check and time a case."""
    from max.graph import Module

    module, fp8 = Module(), case.fmt == "fp8"
    with Communicator.gpus(cfg) as comm:
        parts = ("rows", "given rows") if fp8 else ("round",)
        given = draw(case, seed)
        topk_ids = given[case.ranks : 2 * case.ranks]
        graphs = [add_round(case, comm, part=part, module=module) for part in parts]
        rows = link.round_rows(cfg, topk_ids)
        graphs.append(link.add_pushes(comm, f"{case.name}_links", rows, module))
        *prepared, timed, pushes = comm.compile_all(graphs)
        args = on_devices(given, comm.devices)
        for graph in prepared:
            args += graph.model.execute(*args, *comm.inputs())
        args += comm.inputs()
        outputs = timed.model.execute(*args)
        comm.check()
        error = error_of(case, outputs, given)
        row: dict[str, Any] = {"case": vars(case) | {"name": case.name}, "error": error, "wrong": ""}
        if not error < ERROR_LIMIT:
            return row | {"wrong": f"relative error {error:.1e}, allowed: below {ERROR_LIMIT:.0e}"}
        hold = Hold(comm.session, comm.devices)
        row |= replay_times(timed.model, args, hold, replays)
        comm.check()
        link_us = link.push_times(comm, pushes.model, rows, hold, replays)["median_us"]
        comm.check()
        row |= on_link(cfg, topk_ids, row["median_us"], link_us)
        del outputs, args
    return row


def on_link(cfg: EPConfig, topk_ids: Sequence[np.ndarray], median_us: float, link_us: float) -> dict[str, Any]:
    """Bytes over the links by `FORMULA`, the rate that they come to, and the links' share of a round.

    Args:
        cfg: The config.
        topk_ids: int32 [T, K] of each rank.
        median_us: Microseconds of a round.
        link_us: Microseconds of the same bytes alone.

    Returns:
        "bytes": {"dispatch", "combine", "total"} of all ranks; "busiest": the most that one rank sends or receives;
        "gb_s": of a GPU on average; "link_us"; "share": link_us / median_us.
    """
    moved = report.bytes_moved(cfg, topk_ids)["ours"]
    return {
        "bytes": moved,
        "busiest": report.busiest(cfg, topk_ids),
        "gb_s": report.sent_gb_s(cfg, moved["total"], median_us),
        "link_us": link_us,
        "share": link_us / median_us,
    }


def report_text(result: dict[str, Any]) -> str:
    """The result as a table."""
    machine, rows = result["machine"], []
    for row in result["cases"]:
        if row["wrong"]:
            rows.append([row["case"]["name"], *["-"] * 8, f"WRONG: {row['wrong']}"])
            continue
        figures = [f"{row[f'{name}_us']:.1f}" for name in ("median", "p99", "host_paced", "wall", "eager")]
        rows.append(
            [
                row["case"]["name"],
                *figures,
                report.size(row["bytes"]["total"]),
                f"{row['gb_s']:.0f}",
                f"{row['link_us']:.1f}",
                f"{row['share']:.0%}",
            ]
        )
    header = ["us a round", "median", "p99", "host-paced", "wall", "eager", "bytes", "GB/s a GPU", "links", "share"]
    budget = f", at most {result['sms']} SMs a launch" if result["sms"] else ""
    lines = [
        f"{machine['gpus']} x {machine['gpu']}, MAX {machine['max']}{budget}: dispatch and combine, identity experts",
        "",
        report.table(header, rows),
        "",
        f"Median and 99th percentile of {result['replays']} replays on all ranks, back to back: queues are held until",
        "all are enqueued. Host-paced: the median as fast as the host launches them. Wall, eager: by the host's clock.",
        FORMULA,
    ]
    return "\n".join(lines)
