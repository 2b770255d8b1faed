"""Device memory of a round and of gathering steps on the GPUs of this machine, against what the formulas allow.

    gpu_memory.py              a round of 4096 tokens a rank; steps of `AllGatherVDispatcher` of 512, a process a GPU

Bytes in use are the driver's, of the whole GPU: run nothing else there. "before" is with CUDA's contexts alone, for the
gather with torch and NCCL at work; "made" with the communicator or the dispatcher's buffers; "peak" is the most that a
thread saw while rounds ran, all their outputs being kept. Allowed is `before` + the formula + 64 MiB.

    round      windows (docs/protocol.md, 1) + inputs + what dispatch gives + y; its rows go to combine as they are
    gather     windows (docs/torch.md) + gathered rows, routes, sources and rows to be reduced + a step's own tensors

MAX keeps a pool of device memory that may be most of a GPU, so that the driver sees no more of it than its size. Here
the pool is as large as the formula says, and 32 MiB, and MAX may take no other memory: where that is too little, its
error says so, and the result is "over"; where MAX takes its pool at once, "peak" is no less than that. MAX 26.7 rounds
a pool up to pieces of 256 MiB, which alone may be "over": take a number of tokens whose inputs and outputs end shortly
below such a piece. With torch, buffers are torch's; MAX's pool is 16 MiB, and may be passed.
Rounds are eager: a captured graph keeps what its capture took. Exit status 1 where more was used, 2 without GPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from driver_memory import Gpus

from ep_mojo.errors import DeviceError
from ep_mojo.programs import measures, options, report
from ep_mojo.programs.gpu_round import Round, add_round, draw, gpus_to_use, on_devices

MIB = 1 << 20
SLACK = 64 * MIB
POOL_SLACK, TORCH_POOL = 32 * MIB, 16 * MIB
LOOK_S = 0.01
"""How long outputs stay for the thread to see them."""
POOL = "MODULAR_DEVICE_CONTEXT_MEMORY_MANAGER_"


def rows_of(what: str, first: int, formula: dict[str, int], before: Any, made: Any, peak: Any) -> list[dict[str, Any]]:
    """A row for each GPU, from `first` on."""
    allowed = sum(formula.values()) + SLACK
    return [
        {"what": what, "gpu": first + i, "before": int(b), "made": int(m - b), "peak": int(p - b), "formula": formula}
        | {"allowed": allowed, "over": bool(p - b > allowed), "said": ""}
        for i, (b, m, p) in enumerate(zip(before, made, peak, strict=True))
    ]


def measure_round(case: Round, rounds: int) -> list[dict[str, Any]]:
    """In a process of its own: a communicator of all GPUs, and its rounds."""
    gpus = Gpus(range(case.ranks))
    before = made = gpus.used()
    import ep_mojo as ep

    formula = measures.round_memory(case.config())
    try:
        with ep.Communicator.gpus(case.config(), range(case.ranks)) as comm:
            comm.inputs()
            made = gpus.used()
            model = comm.compile(add_round(case, comm, part="all")).model
            args = [*on_devices(draw(case), comm.devices), *comm.inputs()]
            with gpus.watched() as most:
                for _ in range(rounds):
                    outputs = model.execute(*args)
                    comm.check()
                    time.sleep(LOOK_S)
                    del outputs
            return rows_of("round", 0, formula, before, made, most[0])
    except (ep.EPError, ValueError, RuntimeError) as error:  # MAX's own for memory are of these kinds
        if "emory" not in str(error):
            raise
        found = rows_of("round", 0, formula, before, made, gpus.used())
        return [row | {"over": True, "said": str(error)[:500]} for row in found]


def measure_gather(rank: int, ranks: int, tokens: int, hidden: int, top_k: int, steps: int, store: str) -> list[dict]:
    """In a process for each rank: the dispatcher's buffers, and steps."""
    import torch
    import torch.distributed as dist

    from ep_mojo.torch import AllGatherVDispatcher as Dispatcher

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks)
    dist.all_reduce(torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    gpus = Gpus([rank])
    before = gpus.used()
    Dispatcher.allocate_buffers(tokens, top_k, hidden, dist.group.WORLD)
    made = gpus.used()
    d = Dispatcher(1, [rank])
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(ranks, (tokens, top_k), device="cuda")
    probs = torch.rand(tokens, top_k, device="cuda")
    with gpus.watched() as most:
        for _ in range(steps):
            rows, _ = d.token_dispatch(*d.dispatch_preprocess(x, ids, probs))
            d.combine_postprocess(d.token_combine(rows))
            Dispatcher.check()
    dist.barrier()
    Dispatcher._delete_buffers()
    dist.destroy_process_group()
    return rows_of("gather", rank, measures.gather_memory(ranks, tokens, hidden, top_k), before, made, most[0])


def in_processes(measure: Callable[..., list[dict]], calls: Sequence[tuple], pool: dict[str, str]) -> list[dict]:
    """What a function finds in new processes, one for each call, all at the same time, with MAX's pool as told."""
    os.environ.pop(POOL + "SIZE_PERCENT", None)
    os.environ.update({POOL + name: value for name, value in pool.items()})
    with ProcessPoolExecutor(len(calls), mp_context=multiprocessing.get_context("spawn")) as processes:
        return [row for found in [processes.submit(measure, *call) for call in calls] for row in found.result()]


def run(opts: argparse.Namespace) -> int:
    """Measure, print; 1 where more was used than is allowed."""
    ranks, rows = gpus_to_use(opts.ranks), []
    case = Round(ranks, opts.tokens, "bf16", True, opts.hidden, opts.experts, opts.top_k)
    pool = sum(measures.round_memory(case.config()).values()) + POOL_SLACK
    if "gather" in opts.parts:
        import torch

        if torch.cuda.device_count() < ranks:
            raise DeviceError(
                field="GPUs that torch sees", value=torch.cuda.device_count(), allowed=ranks, remedy="use --parts round"
            )
    if "round" in opts.parts:
        only = {"SIZE": str(pool), "CHUNK_PERCENT": "100", "ONLY": "true"}
        rows += in_processes(measure_round, [(case, opts.rounds)], only)
    if "gather" in opts.parts:
        with tempfile.TemporaryDirectory() as folder:
            sizes = opts.gather_tokens, opts.hidden, opts.top_k, opts.rounds, f"{folder}/store"
            little = {"SIZE": str(TORCH_POOL), "CHUNK_PERCENT": "100", "ONLY": "false"}
            rows += in_processes(measure_gather, [(rank, ranks, *sizes) for rank in range(ranks)], little)
    if opts.output:
        found = {"commit": measures.git_commit(), "ranks": ranks, "sizes": vars(opts), "rows": rows}
        Path(opts.output).write_text(json.dumps(found, indent=1) + "\n")
    print(text_of(rows))
    return int(any(row["over"] for row in rows))


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """The table; beside "before" all figures are without it."""
    head = ["MiB on a GPU", "before", "made", "peak", "formula", "allowed", "result"]
    lines = [
        [f"{r['what']}, GPU {r['gpu']}"]
        + [f"{n / MIB:.1f}" for n in (r["before"], r["made"], r["peak"], sum(r["formula"].values()), r["allowed"])]
        + ["OVER" if r["over"] else "within"]
        for r in rows
    ]
    formulas = {r["what"]: r["formula"] for r in rows}
    parts = [f"{what}: " + ", ".join(f"{k} {n / MIB:.1f}" for k, n in f.items()) for what, f in formulas.items()]
    return "\n".join([*(r["said"] for r in rows if r["said"]), report.table(head, lines), *parts])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=options.words("round", "gather"), default="round,gather", help="which to measure"
    )
    parser.add_argument("--ranks", type=int, default=0, help="GPUs to use (default: all)")
    for name, value in {"tokens": 4096, "gather-tokens": 512, "hidden": 7168, "experts": 256, "top-k": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, and steps (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE.json", help="write the figures here")
    opts = parser.parse_args(argv)
    return options.status_of(lambda: run(opts))


if __name__ == "__main__":
    sys.exit(main())
