"""A shared expert beside dispatch: sending needs few SMs, a dense FFN runs on the others, the layer takes less time.

    overlap_shared_expert.py run          on a machine with GPUs: checks, times, draws
    overlap_shared_expert.py compile      anywhere: compiles the same graphs for sm_90a without a GPU

The layer: tokens go to their experts (the identity here) and back, and a shared expert, a SwiGLU FFN of MAX's own ops,
works on the rank's own tokens; combine adds what it gives (`bias0`). `ep.beside` puts its ops on a second queue of each
device, and MAX lets the first one wait before combine. The sends get a budget of SMs (`n_sms`), which leaves the others
to the matmuls. Written as in a model:

    shared = ep.beside(ranks, x, experts, ...)               the second queue
    pending = ep.dispatch_async(ranks, x, ids, w, n_sms=24)  the first queue, at the same time
    handles = ep.dispatch_wait(ranks, pending)
    ys = ep.combine(ranks, experts, handles, bias0=shared)  waits for both

First every layer's result is compared: one after the other and overlapped must agree bit for bit, also when replayed.
Then they are timed, launched one by one and by graph replay. Launched, the sends' precedence counts. A replayed graph
starts both queues at once, and CUDA heeds the precedence of its nodes only where the graph was instantiated to do so,
which MAX 26.7 does not: there the matmuls may take all SMs first, unless the second queue begins with a pause
(`--head-start-us`; one layer is timed without it). Prints a table last; exit status 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ep_mojo.programs.gpu_round import Round, draw, error_of, gpus_to_use, on_devices, plan_gpus, replay_times
from ep_mojo.programs.hold import Hold
from ep_mojo.programs.measures import git_commit
from ep_mojo.programs.options import status_of
from ep_mojo.programs.plot import require_matplotlib

TIMELINE = Path(__file__).resolve().parent / "timeline"
"""A Mojo package with two ops that note the time."""
MARKS = 8
"""Words of a device's `times`, of which five are used: see `EP_BARS`."""
EP_BARS = {"send": (0, 1), "wait": (1, 2), "dispatch": (0, 2), "combine": (3, 4)}
"""Begin and end of the EP kernels, as indices of marks."""
EXPERT_BARS = ("gate and up", "SwiGLU", "down")
"""The shared expert's kernels; each ends where the next begins."""
WAYS = {"eager_us": "launched one by one", "median_us": "replayed"}
"""How a layer is timed, by the figure's name: mean of calls by the host's clock, median of replays on the device."""
LIMIT = 2e-2
"""Largest relative error that is put down to bfloat16, which every step rounds to."""


@dataclass(frozen=True)
class Layer:
    """One graph.

    Attributes:
        round: "" none, "fused" or "split" (dispatch).
        expert: "" none, "after" on the same queue, or "beside" on the second one.
        sms: Budget of dispatch, or of dispatch_async where it is split; 0 = all.
        head_start: µs that the second queue gives to the first.
        marked: Whether it notes times; such a graph is not timed.
    """

    round: str
    expert: str = ""
    sms: int = 0
    head_start: int = 0
    marked: bool = False

    @property
    def name(self) -> str:
        """Name of the graph."""
        numbers = [f"{name}{n}" for name, n in (("sms", self.sms), ("head", self.head_start)) if n]
        return "_".join([p for p in (self.round, self.expert) if p] + numbers + ["marked"] * self.marked)

    @property
    def title(self) -> str:
        """What the table calls it."""
        send = {"fused": "dispatch", "split": "dispatch_async"}.get(self.round, "")
        budget = f", {send} on {self.sms or 'all'} SMs"
        if not self.expert:
            return f"round alone, {self.round} dispatch"
        if not self.round:
            return "shared expert alone"
        if self.expert == "after":
            return "one after the other"
        return f"overlapped{budget}{'' if self.head_start else ', no head start'}"


ROUND, EXPERT, SEQUENCE = (Layer("fused"), Layer("", "after"), Layer("fused", "after"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["run", "compile"])
    parser.add_argument("--ranks", type=int, default=0, help="GPUs to use (default: all; compile: 2)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a rank (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048, help="of the shared expert (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument(
        "--sms", default="8,16,24,32,0", help="budgets of dispatch_async, 0 = all (default: %(default)s)"
    )
    parser.add_argument("--fused-sms", default="32,64,96", help="budgets of a fused dispatch (default: %(default)s)")
    parser.add_argument("--head-start-us", type=int, default=20, help="of the first queue (default: %(default)s)")
    parser.add_argument("--timeline", metavar="FILE.png", default="overlap_timeline.png", help="default: %(default)s")
    parser.add_argument("--timeline-sms", type=int, default=24, help="budget in the timeline (default: %(default)s)")
    parser.add_argument("--gpu", type=int, default=0, help="whose timeline (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE.json", help="write the figures here")
    return parser.parse_args(argv)


def layers(opts: argparse.Namespace) -> list[Layer]:
    """All graphs: what is timed, then what is drawn."""
    timed = [ROUND, Layer("split"), EXPERT, SEQUENCE]
    for kind, budgets in (("split", opts.sms), ("fused", opts.fused_sms)):
        timed += [Layer(kind, "beside", int(n), opts.head_start_us) for n in budgets.split(",") if n]
    timed.append(Layer(timed[-1].round, timed[-1].expert, timed[-1].sms))
    return [*dict.fromkeys(timed), *drawn(opts)]


def drawn(opts: argparse.Namespace) -> list[Layer]:
    """The graphs of the picture."""
    beside = Layer("split", "beside", opts.timeline_sms, opts.head_start_us, marked=True)
    return [Layer("fused", "after", marked=True), beside]


def shape(opts: argparse.Namespace) -> Round:
    """The round of every layer; budgets are the ops' own."""
    return Round(opts.ranks, opts.tokens, "bf16", True, opts.hidden, opts.experts, opts.top_k)


# Graphs


def shared_expert(x: Any, up: Any, down: Any, now: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
    """A SwiGLU FFN with gate and up in one matrix [2 * I, H]; and the times at which each step was done."""
    from max.graph import ops

    times = [now(x)]
    both = x @ ops.transpose(up, 0, 1)
    times.append(now(both))
    gate, linear = ops.split(both, [both.shape[1] // 2] * 2, axis=1)
    inner = ops.silu(gate) * linear
    times.append(now(inner))
    out = inner @ ops.transpose(down, 0, 1)
    return out, [*times, now(out)]


def add_graph(module: Any, comm: Any, opts: argparse.Namespace, layer: Layer) -> Any:
    """A layer over all ranks: x, ids, weights and the FFN's two matrices of every rank in; y of every rank out.

    A marked layer also takes `times` of every rank, and gives the FFN's times [1], step by step and rank by rank.
    """
    from max.dtype import DType
    from max.graph import BufferType, Graph, TensorType, ops

    import ep_mojo as ep

    R, refs = comm.cfg.n_ranks, comm.device_refs()
    own = [
        TensorType(dtype, shape, ref)
        for dtype, shape in (
            (DType.bfloat16, [opts.tokens, opts.hidden]),
            (DType.int32, [opts.tokens, opts.top_k]),
            (DType.float32, [opts.tokens, opts.top_k]),
            (DType.bfloat16, [2 * opts.intermediate, opts.hidden]),
            (DType.bfloat16, [opts.hidden, opts.intermediate]),
        )
        for ref in refs
    ]
    times = [BufferType(DType.int64, [MARKS], ref) for ref in refs if layer.marked]
    types = [*own, *times, *comm.input_types()]
    libraries = [ep.kernel_library(), *([TIMELINE] if layer.marked else [])]
    with Graph(layer.name, input_types=types, custom_extensions=libraries, module=module) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        values = [v.tensor for v in graph.inputs[: 5 * R]]
        x, ids, weights, up, down = (values[i * R : (i + 1) * R] for i in range(5))
        buffers = [v.buffer for v in graph.inputs[5 * R : 5 * R + len(times)]]

        def now(after: Any) -> list[Any]:
            if not layer.marked:
                return []
            return ops.custom("timeline_now", after.device, [after], [TensorType(DType.int64, [1], after.device)])

        def mark(index: int, after: Sequence[Any]) -> None:
            for rank, buffer, value in zip(ranks, buffers, after, strict=False):
                ops.inplace_custom(
                    "timeline_mark", rank.device, [rank.order, buffer, value], parameters={"index": index}
                )

        def experts(*given: Any) -> list[Any]:
            found = [shared_expert(given[r], given[R + r], given[2 * R + r], now) for r in range(R)]
            return [*(y for y, _ in found), *(t for _, steps in found for step in steps for t in step)]

        given, shared = [*x, *up, *down], []
        if layer.expert == "beside":
            n_times = R * (len(EXPERT_BARS) + 1) if layer.marked else 0
            kinds = [TensorType(DType.int64, [1], refs[i * R // n_times]) for i in range(n_times)]
            types = [*(v.type for v in x), *kinds]
            shared = ep.beside(ranks, given, experts, result_types=types, head_start_us=layer.head_start)
        elif layer.expert:
            shared = experts(*given)
        if layer.round:
            mark(0, x)
            if layer.round == "split":
                pending = ep.dispatch_async(ranks, x, ids, weights, n_sms=layer.sms or None)
                mark(1, x)
                handles = ep.dispatch_wait(ranks, pending)
            else:
                handles = ep.dispatch(ranks, x, ids, weights, n_sms=layer.sms or None)
            mark(2, x)
            mark(3, shared[:R])
            ys = ep.combine(ranks, [h.tokens for h in handles], handles, bias0=shared[:R] or None)
            mark(4, ys)
        else:
            ys = shared[:R]
        graph.output(*ys, *shared[R:])
    return graph


def compile_only(opts: argparse.Namespace) -> int:
    """Compile all graphs for GPUs that are not there."""
    import tempfile

    from max.driver import CPU, Accelerator
    from max.engine import InferenceSession
    from max.graph import Module

    import ep_mojo as ep

    module, comm = Module(), ep.Communicator.planned(shape(opts).config())
    for layer in layers(opts):
        add_graph(module, comm, opts, layer)
    session = InferenceSession(devices=[CPU(), *(Accelerator(r) for r in range(opts.ranks))])
    compiled = session.compile(module, custom_extensions=[ep.kernel_library(), TIMELINE])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graphs.mef"
        compiled.export_mef(path)
        print(f"compiled {len(layers(opts))} graphs for {opts.ranks} GPUs, {path.stat().st_size} bytes")
    return 0


# Runs


class Machine:
    """The GPUs, the compiled layers, and one set of inputs."""

    def __init__(self, opts: argparse.Namespace):
        """Compile everything, and put the inputs on the devices."""
        from max.graph import Module

        import ep_mojo as ep

        self.opts, self.R = opts, opts.ranks
        self.comm = ep.Communicator.gpus(shape(opts).config(), range(self.R))
        self.devices = self.comm.devices
        module, all_layers = Module(), layers(opts)
        graphs = [add_graph(module, self.comm, opts, layer) for layer in all_layers]
        self.models = {layer: c.model for layer, c in zip(all_layers, self.comm.compile_all(graphs), strict=True)}
        self.hold = Hold(self.comm.session, self.devices)
        self.given, self.matrices = draw(shape(opts)), matrices(opts)
        arrays = [*self.given, *(m for m in self.matrices for _ in range(self.R))]
        self.buffers = on_devices(arrays, self.devices)
        self.times = on_devices([np.zeros(MARKS, np.int64)] * self.R, self.devices)

    def inputs(self, layer: Layer) -> list[Any]:
        """What its graph takes."""
        return [*self.buffers, *(self.times if layer.marked else []), *self.comm.inputs()]

    def arrays(self, outputs: Sequence[Any]) -> list[np.ndarray]:
        """Outputs in host memory, once everything has run without a failure on record."""
        from ep_mojo.dtypes import to_numpy

        self.comm.check()
        return [to_numpy(o).copy() for o in outputs]

    def run(self, layer: Layer) -> list[np.ndarray]:
        """One run."""
        return self.arrays(self.models[layer].execute(*self.inputs(layer)))

    def replay(self, layer: Layer, times: int = 3) -> list[np.ndarray]:
        """Capture it, replay it, and give what the last replay left."""
        model, inputs = self.models[layer], self.inputs(layer)
        outputs = model.capture(2, *inputs)
        for _ in range(times):
            model.replay(2, *inputs)
        found = self.arrays(outputs)
        del outputs
        model.release_captured_graph(2)
        return found

    def measure(self, layer: Layer) -> dict[str, float]:
        """Microseconds of a replay; see `replay_times`."""
        found = replay_times(self.models[layer], self.inputs(layer), self.hold)
        self.comm.check()
        self.models[layer].release_captured_graph(1)
        return found


def matrices(opts: argparse.Namespace) -> list[np.ndarray]:
    """The FFN's matrices as bfloat16 bits, [2 * I, H] and [H, I], the same on every rank."""
    from ep_mojo.dtypes import float32_to_bfloat16_bits

    rng = np.random.default_rng(1)
    shapes = (2 * opts.intermediate, opts.hidden), (opts.hidden, opts.intermediate)
    return [float32_to_bfloat16_bits(rng.standard_normal(s, np.float32) / np.sqrt(s[1])) for s in shapes]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference by the norm of what is wanted."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def expert_error(machine: Machine, outputs: Sequence[np.ndarray], rows: int = 16) -> float:
    """The shared expert against float32 arithmetic, on a few rows of every rank: the largest relative error."""
    from ep_mojo.dtypes import bfloat16_bits_to_float32 as floats

    up, down = (floats(m) for m in machine.matrices)
    worst = 0.0
    for x, got in zip(machine.given, outputs, strict=False):
        gate, linear = np.split(floats(x[:rows]) @ up.T, 2, axis=1)
        want = (gate / (1 + np.exp(-gate)) * linear) @ down.T
        worst = max(worst, relative_error(floats(got[:rows]), want))
    return worst


def check(machine: Machine) -> dict[str, Any]:
    """Compare all results. Every value of "differing" counts elements that differ from one after the other."""
    from ep_mojo.dtypes import bfloat16_bits_to_float32 as floats
    from ep_mojo.dtypes import to_buffer

    R, found = machine.R, {}
    rounds, expert, want = (machine.run(layer) for layer in (ROUND, EXPERT, SEQUENCE))
    found["round error"] = error_of(shape(machine.opts), [to_buffer(y) for y in rounds], machine.given)
    found["expert error"] = expert_error(machine, expert)
    sums = [floats(y) + floats(s) for y, s in zip(rounds, expert, strict=True)]
    found["sum error"] = max(relative_error(floats(y), s) for y, s in zip(want, sums, strict=True))
    differing = {}
    for layer in machine.models:
        expected = {"": rounds}.get(layer.expert, want if layer.round else expert)
        for how, outputs in (("run", machine.run(layer)), ("replayed", machine.replay(layer))):
            pairs = zip(outputs[:R], expected, strict=True)
            differing[f"{layer.name}, {how}"] = sum(int(np.count_nonzero(a != b)) for a, b in pairs)
    found["differing"] = differing
    errors = [found[f"{what} error"] for what in ("round", "expert", "sum")]
    found["right"] = all(e < LIMIT for e in errors) and not any(differing.values())
    return found


# Timeline


def timeline(machine: Machine, layer: Layer) -> list[dict[str, Any]]:
    """When each kernel ran on one GPU, in the last of three replays: queue, name, begin and end in µs."""
    outputs = machine.replay(layer)
    gpu, steps = machine.opts.gpu, len(EXPERT_BARS) + 1
    marks = machine.arrays([machine.times[gpu]])[0]
    ends = [int(t[0]) for t in outputs[machine.R + gpu * steps : machine.R + (gpu + 1) * steps]]
    names = ("dispatch", "combine") if layer.round == "fused" else ("send", "wait", "combine")
    bars = [("EP", n, int(marks[EP_BARS[n][0]]), int(marks[EP_BARS[n][1]])) for n in names]
    bars += [("shared expert", n, a, b) for n, a, b in zip(EXPERT_BARS, ends, ends[1:], strict=False)]
    start = min(begin for _, _, begin, _ in bars)
    return [
        {"queue": queue, "kernel": name, "begin_us": (begin - start) / 1e3, "end_us": (end - start) / 1e3}
        for queue, name, begin, end in bars
    ]


def draw_timelines(found: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Draw them above one another, to one scale."""
    from matplotlib.figure import Figure

    colours = {"EP": "#1f77b4", "shared expert": "#ff7f0e"}
    figure = Figure(figsize=(11, 1.0 + 1.6 * len(found)), layout="constrained")
    panes = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    width = max(bar["end_us"] for bars in found.values() for bar in bars)
    for axes, (name, bars) in zip(panes, found.items(), strict=True):
        for bar in bars:
            length = bar["end_us"] - bar["begin_us"]
            axes.barh(bar["queue"], length, left=bar["begin_us"], color=colours[bar["queue"]], edgecolor="white")
            if length > width / 25:
                label = f"{bar['kernel']}\n{length:.0f}"
                axes.text(bar["begin_us"] + length / 2, bar["queue"], label, ha="center", va="center", fontsize=7)
        axes.set_title(f"{name}: {max(bar['end_us'] for bar in bars):.0f} µs", fontsize=9, loc="left")
        axes.invert_yaxis()
    panes[-1].set_xlabel("µs, by the GPU's clock")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


# Report


def show(times: dict[Layer, dict[str, float]], checks: dict[str, Any], title: str) -> dict[str, Any]:
    """Print checks and table. Returns what is said of the fastest overlapped layer."""
    print(f"\n{title}")
    print(", ".join(f"{what} {checks[what]:.1e}" for what in checks if what.endswith("error")))
    wrong = {name: n for name, n in checks["differing"].items() if n}
    print(
        f"WRONG: {wrong or 'an error above ' + str(LIMIT)}" if not checks["right"] else "all results agree bit for bit"
    )
    print(f"\n{'':<44} {'launched':>9} {'':>15} {'replayed':>9}")
    print(f"{'layer':<44} {'mean µs':>9} {'of in sequence':>15} {'median µs':>9} {'p99 µs':>9} {'of in sequence':>15}")
    for layer, t in times.items():
        shares = [""] * 2
        if layer.round and layer.expert:
            shares = [f"{t[us] / times[SEQUENCE][us]:.0%}" for us in ("eager_us", "median_us")]
        print(
            f"{layer.title:<44} {t['eager_us']:>9.1f} {shares[0]:>15} "
            f"{t['median_us']:>9.1f} {t['p99_us']:>9.1f} {shares[1]:>15}"
        )
    after = min(times[SEQUENCE][us] for us in ("eager_us", "median_us"))
    both = times[ROUND]["median_us"] + times[EXPERT]["median_us"]
    beside = [(t[us], how, layer) for layer, t in times.items() if layer.expert == "beside" for us, how in WAYS.items()]
    us, how, best = min(beside, key=lambda found: found[0])
    less = f"{after - us:.0f} µs less than one after the other, {both - us:.0f} less than the two alone"
    print(f"fastest: {best.title}, {how}: {us:.0f} µs, {less}")
    return {"layer": best.name, "how": how, "us": us, "faster": bool(us < after and us < both)}


def main(argv: list[str] | None = None) -> int:
    opts = arguments(argv)
    return status_of(lambda: measure_all(opts) if opts.phase == "run" else plan(opts))


def plan(opts: argparse.Namespace) -> int:
    """Name the GPUs that are not there, then compile."""
    opts.ranks = opts.ranks or 2
    plan_gpus(opts.ranks)
    return compile_only(opts)


def measure_all(opts: argparse.Namespace) -> int:
    """Check, time and draw; 1 where a result is wrong."""
    opts.ranks = gpus_to_use(opts.ranks)
    require_matplotlib("the time line")
    machine = Machine(opts)
    model_name = machine.devices[0].model_name
    title = (
        f"{opts.ranks} x {model_name}: T={opts.tokens} H={opts.hidden} E={opts.experts} K={opts.top_k} bf16, "
        f"shared expert {opts.hidden} -> {opts.intermediate}"
    )
    checks = check(machine)
    print(json.dumps(checks), file=sys.stderr, flush=True)
    times = {}
    for layer in machine.models:
        if not layer.marked:
            times[layer] = machine.measure(layer)
            print(layer.name, json.dumps(times[layer]), file=sys.stderr, flush=True)
    lines = {layer.title: timeline(machine, layer) for layer in drawn(opts)}
    draw_timelines(lines, Path(opts.timeline), f"{title}, GPU {opts.gpu}")
    best = show(times, checks, title)
    if opts.output:
        report = {
            "gpu": model_name,
            "options": vars(opts),
            "commit": git_commit(),
            "checks": checks,
            "layers": [vars(layer) | {"name": layer.name} | t for layer, t in times.items()],
            "fastest": best,
            "timelines": lines,
        }
        Path(opts.output).write_text(json.dumps(report, indent=1) + "\n")
    machine.comm.destroy()
    return 0 if checks["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
