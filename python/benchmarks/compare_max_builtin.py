"""Time one round, dispatch and combine with identity experts, against MAX's own `ep.*` ops: same GPUs, inputs and run.

    compare_max_builtin.py run                        on a machine with GPUs
    compare_max_builtin.py compile --mefs DIR         anywhere: compiles the graphs for sm_90a without a GPU
    compare_max_builtin.py run --mefs DIR             runs what was compiled

Each case is checked first (bfloat16: against the exact result; fp8: against the tokens within its precision), then
timed by graph replay with events on every device: medians and 99th percentiles over all replays and all ranks. All
queues are held until the host has enqueued a batch, so "median_us" is the devices' time for both systems;
"host_paced_us" is the median without that, which for small rounds is what the host needs to launch R graphs. With fp8
both sides cast to bfloat16 between their phases; the summed time of the EP kernels alone, from torch's profiler where
torch is installed, leaves that out. Exit status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep_mojo.programs import options, report
from ep_mojo.programs.gpu_round import (
    ERROR_LIMIT,
    Round,
    add_round,
    draw,
    error_of,
    gpus_to_use,
    on_devices,
    plan_gpus,
    replay_times,
)
from ep_mojo.programs.hold import Hold, hold_graph, hold_name
from ep_mojo.programs.measures import git_commit


@dataclass(frozen=True)
class Case(Round):
    """One round's shape, and who runs it."""

    system: str = "ours"

    @property
    def name(self) -> str:
        """Name of its graph."""
        return f"{self.system}_{super().name}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["run", "compile"])
    parser.add_argument("--mefs", help="folder of compiled graphs; what it lacks is compiled")
    options.add_rounds(parser, ranks="all; compile: 8")
    parser.add_argument(
        "--modes", type=options.words("fused", "split"), default="fused", help="of fused, split (default: %(default)s)"
    )
    parser.add_argument(
        "--systems", type=options.words("ours", "max"), default="ours,max", help="of ours, max (default: %(default)s)"
    )
    parser.add_argument("--sms", type=int, default=0, help="SM budget of our ops (default: all)")
    parser.add_argument("--no-profile", action="store_true", help="do not time the kernels by themselves")
    parser.add_argument("--output", help="write the JSON here")
    opts = parser.parse_args(argv)
    if opts.phase == "compile" and not opts.mefs:
        parser.error("compile writes its graphs to a folder and needs --mefs DIR; run --mefs DIR takes them from there")
    return opts


def builtin_config(case: Case) -> Any:
    """MAX's config of a case."""
    from max.dtype import DType
    from max.nn.comm.ep import EPConfig

    quant, dtype = None, DType.bfloat16
    if case.fmt == "fp8":
        from max.nn import quant_config as q

        block = q.ScaleGranularity.BLOCK
        quant = q.QuantConfig(
            input_scale=q.InputScaleSpec(
                granularity=block, origin=q.ScaleOrigin.DYNAMIC, dtype=DType.float32, block_size=(1, 128)
            ),
            weight_scale=q.WeightScaleSpec(granularity=block, dtype=DType.float32, block_size=(128, 128)),
            mlp_quantized_layers={0},
            attn_quantized_layers={0},
            format=q.QuantFormat.BLOCKSCALED_FP8,
        )
        dtype = DType.float8_e4m3fn
    return EPConfig(
        dispatch_dtype=dtype,
        combine_dtype=DType.bfloat16,
        hidden_size=case.hidden,
        top_k=case.top_k,
        n_experts=case.experts,
        max_tokens_per_rank=case.tokens,
        n_gpus_per_node=case.ranks,
        n_nodes=1,
        dispatch_quant_config=quant,
    )


def builtin_init(case: Case, cfg: Any, session: Any, planned: bool) -> Any:
    """MAX's buffers; where GPUs are only planned, its set-up graph is compiled from the shapes alone."""
    from max.nn.comm.ep import EPCommInitializer, ep_manager

    if not planned:
        init = EPCommInitializer(cfg)
        init.ep_init(session)
        return init
    init = EPCommInitializer.__new__(EPCommInitializer)
    init.config = cfg
    n_words = ep_manager._ep_counter_words(case.experts, case.ranks, False, 0)
    init.atomic_counters = [type("Shape", (), {"shape": [n_words]})() for _ in range(2 * case.ranks)]
    session.load(init._build_ep_init_graph(False))
    cfg.node_id = 0
    return init


def builtin_graph(case: Case, cfg: Any) -> Any:
    """MAX's round as a graph of the same signature."""
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType
    from max.nn.comm.ep import EPBatchManager

    manager, ids = EPBatchManager(cfg), list(range(case.ranks))
    sizes = ((DType.bfloat16, case.hidden), (DType.int32, case.top_k), (DType.float32, case.top_k))
    own = [TensorType(d, [case.tokens, n], DeviceRef.GPU(r)) for d, n in sizes for r in ids]
    with Graph(case.name, input_types=[*own, *manager.input_types()]) as graph:
        values = list(graph.inputs)
        x, topk, weights = ([v.tensor for v in values[j * case.ranks : (j + 1) * case.ranks]] for j in range(3))
        manager.fetch_buffers(values[3 * case.ranks :])

        def rows(out: Any) -> Any:
            return out[0] if out[0].dtype == DType.bfloat16 else out[0].cast(DType.bfloat16)

        if case.fused:
            received = manager.ep_dispatch_all(x, topk, ids)
            ys = manager.ep_combine_all([rows(o) for o in received], weights, ids)
        else:
            for i in ids:
                manager.ep_dispatch_async(x[i], topk[i], i)
            outs = [manager.ep_dispatch_wait(i) for i in ids]
            for i in ids:
                manager.ep_combine_async(rows(outs[i]), i)
            ys = [manager.ep_combine_wait(weights[i], i) for i in ids]
        graph.output(*ys)
    return graph


def kernel_times(model: Any, args: list[Any], devices: list[Any]) -> dict[str, float]:
    """Median microseconds of each kernel, by name, over 10 eager rounds; empty without torch."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ModuleNotFoundError:
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(10):
            model.execute(*args)
        for d in devices:
            d.synchronize()
    found = collections.defaultdict(list)
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:48]].append(event.device_time_total)
    return {name: float(np.median(t)) for name, t in found.items() if len(t) >= 10}


def is_ep_kernel(name: str) -> bool:
    """Whether a kernel belongs to dispatch or combine, and not to a cast between them."""
    return "ep_mojo" in name or "dispatch" in name or "combine" in name


@dataclass
class Loaded:
    """A case's graph on the GPUs.

    Attributes:
        model: The graph.
        extra: Its arguments after tokens, choices and weights.
        hold: What holds back the GPUs' queues.
        comm: Our communicator, or None.
        builtin: MAX's buffers, or None; `extra` has only their addresses.
    """

    model: Any
    extra: list[Any]
    hold: Any
    comm: Any = None
    builtin: Any = None


def load(case: Case, session: Any, devices: list[Any], sms: int = 0) -> Loaded:
    """Make what a case needs and load its graph; `sms`: the most SMs of a launch of ours, 0 = all."""
    import ep_mojo as ep

    hold = Hold(session, devices)
    if case.system == "ours":
        comm = ep.Communicator.gpus(case.config(sms), range(case.ranks))
        return Loaded(session.load(add_round(case, comm)), comm.inputs(), hold, comm=comm)
    cfg = builtin_config(case)
    init = builtin_init(case, cfg, session, planned=False)
    return Loaded(session.load(builtin_graph(case, cfg)), init.model_inputs(), hold, builtin=init)


def measure(
    case: Case, loaded: Loaded, devices: list[Any], *, routing: str = "uniform", profile: bool = True
) -> dict[str, Any]:
    """Draw tokens with a routing, check, and time.

    Returns:
        "case", "error", times; of ours "gb_s", what a GPU sends on average; with `profile` the kernels' times.
    """
    model, comm = loaded.model, loaded.comm

    def check() -> None:
        for d in devices:
            d.synchronize()
        if comm is not None:
            comm.check()

    given = draw(case, routing=routing)
    args = [*on_devices(given, devices), *loaded.extra]
    outputs = model.execute(*args)
    check()
    result: dict[str, Any] = {"case": vars(case) | {"name": case.name}, "error": error_of(case, outputs, given)}
    result |= replay_times(model, args, loaded.hold)
    model.release_captured_graph(1)
    check()
    if comm is not None:
        moved = report.bytes_moved(comm.cfg, given[case.ranks : 2 * case.ranks])["ours"]["total"]
        result["gb_s"] = report.sent_gb_s(comm.cfg, moved, result["median_us"])
    if profile:
        result["kernels_us"] = kernel_times(model, args, devices)
        result["ep_kernels_us"] = sum(t for n, t in result["kernels_us"].items() if is_ep_kernel(n))
    return result


def is_compiled(mefs: str | Path, case: Case) -> bool:
    """Whether a folder of compiled graphs has a case's, and what holds queues; one that failed left some out."""
    return all(any((Path(mefs) / case.name).glob(f"{name}-*.mef")) for name in (case.name, hold_name(case.ranks)))


def main(argv: list[str] | None = None) -> int:
    opts = arguments(argv)
    return options.status_of(lambda: run(opts, planned=opts.phase == "compile"))


def run(opts: argparse.Namespace, planned: bool) -> int:
    """Compile all cases for GPUs that are planned, or measure them and print the table."""
    if planned:
        plan_gpus(opts.ranks or 8)
    from max.driver import CPU, Accelerator
    from max.engine import InferenceSession

    import ep_mojo as ep

    ranks = (opts.ranks or 8) if planned else gpus_to_use(opts.ranks)
    devices = [Accelerator(i) for i in range(ranks)]
    cases = [
        Case(ranks, tokens, fmt, mode == "fused", opts.hidden, opts.experts, opts.top_k, system)
        for fmt in opts.formats
        for tokens in opts.tokens
        for mode in opts.modes
        for system in opts.systems
    ]
    results = []
    for case in cases:
        store = {}
        if opts.mefs:
            folder = Path(opts.mefs) / case.name
            if planned:
                folder.mkdir(parents=True, exist_ok=True)
                store = {"export_mefs": folder}
            elif is_compiled(opts.mefs, case):
                store = {"precompiled_mefs": folder}
        session = InferenceSession(devices=[CPU(), *devices], **store)
        print(case.name, file=sys.stderr, flush=True)
        if planned:
            session.load(hold_graph(ranks))
        if planned and case.system == "ours":
            session.load(add_round(case, ep.Communicator.planned(case.config())))
        elif planned:
            cfg = builtin_config(case)
            builtin_init(case, cfg, session, planned=True)
            session.load(builtin_graph(case, cfg))
        else:
            loaded = load(case, session, devices, opts.sms)
            results.append(measure(case, loaded, devices, profile=not opts.no_profile))
            if loaded.comm is not None:
                loaded.comm.destroy()
            del loaded  # MAX's buffers go before the next case makes its own
            print(json.dumps(results[-1] | {"kernels_us": None}), file=sys.stderr, flush=True)
    if planned:
        return 0
    figures = {"gpu": devices[0].model_name, "results": results, "commit": git_commit()}
    if opts.output:
        Path(opts.output).write_text(json.dumps(figures, indent=1) + "\n")
    return show(results)


def show(results: list[dict[str, Any]]) -> int:
    """Print the table; 1 where a result is wrong."""
    peers = {r["case"]["name"].partition("_")[2]: r for r in results if r["case"]["system"] == "max"}
    names = ("median", "p99", "host-paced", "wall", "eager", "kernels", "error")
    print(f"{'case':44s} {' '.join(f'{name:>10s}' for name in names)}  vs MAX")
    wrong = False
    for r in results:
        good = r["error"] < ERROR_LIMIT
        wrong |= not good and r["case"]["system"] == "ours"
        peer = peers.get(r["case"]["name"].partition("_")[2])
        ratio = f"{peer['median_us'] / r['median_us']:.2f}x" if peer and r["case"]["system"] == "ours" else ""
        note = ratio if good else f"{ratio} WRONG"
        times = [r[f"{name}_us"] for name in ("median", "p99", "host_paced", "wall", "eager")]
        figures = " ".join(f"{us:10.1f}" for us in [*times, r.get("ep_kernels_us", 0)])
        print(f"{r['case']['name']:44s} {figures} {r['error']:10.1e}  {note}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
