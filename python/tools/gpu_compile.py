"""Compile the GPU's stages without a GPU: `./task gpu-compile [--all] [--target ARCH]`.

For each architecture MAX graphs for virtual devices, split and fused: one case of each stage, format and slot policy,
or with --all every variant; and the pushes that measure the links. For sm_90a also the graph of docs/gpus.md, graphs
behind `ep_mojo.torch`, and the program tests/mojo/gpu_api.mojo, which calls the seed-named functions. Exit status 0
only if everything compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from page_programs import load_layer

from ep_mojo.errors import EPError
from ep_mojo.kernels import compiler_report, find_compiler

ROOT = Path(__file__).resolve().parents[2]
PAGE_TARGET = "sm_90a"
PROGRAM = ROOT / "tests" / "mojo" / "gpu_api.mojo"
TARGETS = ("sm_90a", "sm_100a", "gfx942")
TIMEOUT_S = 1800
MAX_JOBS = 4
"""Compilations at a time; each takes one core and 2 GiB."""
SCALES = ("float32", "power_of_two", "ue8m0")


def variants(every: bool) -> list[tuple[Any, str, str, str]]:
    """(format, output layout, reduce mode, slot policy) of each graph."""
    import ep_mojo as ep

    fp8 = [ep.BlockwiseFP8(scale, layout) for scale in SCALES for layout in ("row", "column")]
    if every:
        formats, layouts = [ep.BF16(), *fp8], ("expert", "expert_padded", "rank", "gathered")
        found = itertools.product(formats, layouts, ("expert", "source"), ("rank",))
        return [*found, *itertools.product(formats, layouts[:2], ("source",), ("expert",))]
    return [
        (ep.BF16(), "expert", "expert", "rank"),
        (ep.BlockwiseFP8(), "expert_padded", "source", "rank"),
        (ep.BlockwiseFP8("power_of_two"), "rank", "expert", "rank"),
        (ep.BlockwiseFP8("ue8m0", "column"), "expert", "expert", "rank"),
        (ep.BF16(), "gathered", "expert", "rank"),
        (ep.BF16(), "expert", "source", "expert"),
        (ep.BlockwiseFP8(), "expert_padded", "source", "expert"),
    ]


def add_round(module: Any, fmt: Any, layout: str, reduce: str, slots: str, split: bool, name: str) -> Any:
    """Add one round of two ranks to a module."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    import ep_mojo as ep

    cfg = ep.EPConfig(
        hidden_size=1024,
        top_k=4,
        n_experts=8,
        max_tokens_per_rank=16,
        n_ranks=2,
        dispatch_format=fmt,
        output_layout=layout,
        reduce=reduce,
        slots=slots,
    )
    comm = ep.Communicator.planned(cfg, virtual=split)
    refs = comm.device_refs()
    sizes = ((DType.bfloat16, 1024), (DType.int32, 4), (DType.float32, 4))
    own = [TensorType(d, [f"T{r}", n], ref) for d, n in sizes for r, ref in enumerate(refs)]
    types = [*own, *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        x0, x1, i0, i1, w0, w1 = (v.tensor for v in graph.inputs[:6])
        handles = ep.dispatch(ranks, [x0, x1], [i0, i1], [w0, w1])
        rows = [h.tokens if isinstance(fmt, ep.BF16) else h.tokens.cast(DType.bfloat16) for h in handles]
        graph.output(*ep.combine(ranks, rows, handles))
    return graph


def add_page(module: Any) -> None:
    """Add the graph of docs/gpus.md, for two GPUs."""
    import ep_mojo as ep

    layer = load_layer(module)
    layer.graph(ep.Communicator.planned(layer.config(2)))


def add_pushes(module: Any) -> None:
    """Add the pushes that measure the links, between two GPUs, and what holds their queues meanwhile."""
    import ep_mojo as ep
    from ep_mojo.programs import hold, link

    cfg = ep.EPConfig(hidden_size=1024, top_k=4, n_experts=8, max_tokens_per_rank=16, n_ranks=2)
    link.add_pushes(ep.Communicator.planned(cfg), "push", 4, module)
    hold.hold_graph(2, module)


def add_torch(module: Any) -> int:
    """Add graphs behind `ep_mojo.torch`, for one rank on GPU 0; returns how many. Their sizes are open."""
    import ep_mojo as ep
    from ep_mojo.torch import gathering, graphs

    cfg = ep.EPConfig(hidden_size=1024, top_k=4, n_experts=8, max_tokens_per_rank=16, n_ranks=1)
    builder = graphs.Builder(ep.Communicator.planned(cfg), module)
    column = ep.BlockwiseFP8("ue8m0", "column")
    sets = [*graphs.normal(cfg), *graphs.low_latency(cfg.replace(dispatch_format=column))]
    for each in (*sets, gathering.gather_graph(1024), gathering.reduce_graph(1024, "bfloat16")):
        each.add(builder)
    return len(builder.graphs)


def compile_graphs(target: str, every: bool) -> dict[str, int]:
    """Compile in this process, which must not have used MAX before. Returns the bytes of the artefact, and graphs."""
    from ep_mojo.programs.gpu_round import plan_gpus

    plan_gpus(2, target)
    from max.driver import CPU, Accelerator
    from max.engine import InferenceSession
    from max.graph import Module

    import ep_mojo as ep

    module, n = Module(), 2
    add_pushes(module)
    if every or target == PAGE_TARGET:
        add_page(module)
        n += 1 + add_torch(module)
    for fmt, layout, reduce, slots in variants(every):
        for split in (True,) if slots == "expert" else (True, False):
            add_round(module, fmt, layout, reduce, slots, split, f"round_{n}")
            n += 1
    session = InferenceSession(devices=[CPU(), Accelerator(0), Accelerator(1)])
    compiled = session.compile(module, custom_extensions=[ep.kernel_library()])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.mef"
        compiled.export_mef(path)
        return {"graphs": n, "bytes": path.stat().st_size}


def compile_program(target: str, every: bool) -> dict[str, int]:
    """Compile gpu_api.mojo for an architecture. Returns the bytes of the program, and 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu_api"
        places = [arg for place in ("kernels", "tests/mojo") for arg in ("-I", ROOT / place)]
        done = find_compiler().run(
            "build", *places, "--target-accelerator", target, PROGRAM, "-o", path, cwd=ROOT, timeout=TIMEOUT_S
        )
        if done.returncode != 0 or not path.exists():
            raise RuntimeError(compiler_report(done))
        return {"graphs": 1, "bytes": path.stat().st_size}


def in_a_process(target: str, every: bool) -> dict[str, int]:
    """`compile_graphs` in a process of its own: virtual devices are set once."""
    command = [sys.executable, __file__, "--graphs-of", target, *(["--all"] if every else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not answers:
        raise RuntimeError(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}")
    return json.loads(answers[-1])


def timed(target: str, what: str, job: Callable[[str, bool], dict[str, int]], every: bool) -> dict | Exception:
    """What a job gives, with its seconds; or why it failed."""
    started = time.monotonic()
    try:
        return job(target, every) | {"seconds": time.monotonic() - started}
    except (EPError, RuntimeError, subprocess.TimeoutExpired) as error:
        return error


def main(argv: list[str] | None = None) -> int:
    """Print a row for each architecture and kind."""
    parser = argparse.ArgumentParser(
        prog="./task gpu-compile", description="Compile the GPU's stages. Needs no GPU.", allow_abbrev=False
    )
    parser.add_argument("--all", action="store_true", help="every format, output layout and reduce mode")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this architecture (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--graphs-of", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.graphs_of:
        print(json.dumps(compile_graphs(args.graphs_of, args.all)), flush=True)
        return 0
    rows, failed = [], []
    if not args.json:
        print(f"{'target':<8} {'what':<14} {'number':>7} {'bytes':>10} {'seconds':>8}")
    jobs = [(target, "stage graphs", in_a_process) for target in dict.fromkeys(args.target or TARGETS)]
    jobs += [(target, "Mojo program", compile_program) for target, _, _ in jobs if target == "sm_90a"]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_JOBS)) as pool:
        for (target, what, _), answer in zip(jobs, pool.map(lambda job: timed(*job, args.all), jobs), strict=True):
            if isinstance(answer, Exception):
                failed.append(target)
                print(f"{answer}\n{target}, {what}: FAILED", file=sys.stderr, flush=True)
                continue
            rows.append({"target": target, "what": what} | answer)
            if not args.json:
                sizes = f"{answer['graphs']:>7} {answer['bytes']:>10} {answer['seconds']:>8.1f}"
                print(f"{target:<8} {what:<14} {sizes}", flush=True)
    if args.json:
        print(json.dumps({"ok": not failed, "rows": rows}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
