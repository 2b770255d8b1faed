"""A complete MoE layer as a MAX graph on several GPUs. Read `moe_layer` first: it is all that a model needs.

    python python/examples/moe_layer.py               on all GPUs; --help shows the sizes

Rank r is GPU r. It has tokens of its own, a copy of the router, and the weights of the experts r*L to (r+1)*L - 1:

    x [T, H] -> router -> ids, weights [T, K] -> dispatch -> rows for its experts
             -> matmul -> SwiGLU -> matmul -> combine -> y [T, H]

The experts come in two ways, which differ in the layout of their rows:

  grouped    layout "expert": MAX's grouped matmul over the rows that came, without padding
  batched    layout "expert_padded": MAX's batched matmul over room for every token at every expert

On Hopper (H100, H200) use batched: MAX 26.7's grouped matmul for it does not compile, and its generic one is slow. It
also reads its bounds back from the GPU and waits for them there, so a graph with it cannot be captured: grouped is
timed eagerly, batched by graph replay. GPUs only: the host has no grouped matmul, and its batched one sums in bfloat16.

Checked first, on the tokens that are then timed:
  routing    one GPU routes the tokens of each rank again: the same op on the same data, so every id must be the same
  dispatch   every tensor of every handle against the NumPy reference, bit for bit
  y          against one GPU that computes every expert for every token, within `TOLERANCE`

Exit status 1 where a result is wrong, 2 where nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from max.driver import CPU, Accelerator, Buffer, Device, DeviceEvent, accelerator_architecture_name, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from max.nn.comm.ep.ep_kernels import fused_silu
from max.nn.kernels import grouped_matmul_ragged

import ep_mojo as ep
from ep_mojo.dtypes import bfloat16_bits_to_float32, float32_to_bfloat16_bits, to_buffer, to_numpy
from ep_mojo.handle import HANDLE_TENSORS
from ep_mojo.programs.experts import SwiGLU

TOLERANCE = 2.0**-6
"""Largest error of a token, norm(y - dense) / norm(dense) over its H channels. Both sides round to bfloat16 (2^-8 of a
value at most) after the first matmul, SwiGLU and the second; ours also rounds each rank's partial sum, and y. By NumPy
such roundings put either side 0.4 % off the exact result, so the two 0.2 to 0.6 % apart; a wrong expert, about 20 %."""

Values = Sequence[TensorValue]


def moe_layer(ranks: list, xs: Values, w_router: Values, w_gate_up: Values, w_down: Values) -> tuple[Values, list]:
    """The layer: y bfloat16 [T, H] of each rank, and the handles, which only the check needs.

    `ranks` is what `comm.bind` gave; the others have one value for each rank, on its GPU.
    """
    cfg = ranks[0].cfg
    ids, weights = zip(*(route(x, w, cfg.top_k) for x, w in zip(xs, w_router, strict=True)), strict=True)
    handles = ep.dispatch(ranks, xs, ids, weights)
    experts = grouped_experts if cfg.output_layout == "expert" else batched_experts
    rows = [experts(*each) for each in zip(handles, w_gate_up, w_down, strict=True)]
    return ep.combine(ranks, rows, handles), handles


def route(x: TensorValue, w_router: TensorValue, top_k: int) -> tuple[TensorValue, TensorValue]:
    """Choose experts: ids int64 [T, K] and weights float32 [T, K] that sum to 1, from x [T, H] and w_router [E, H]."""
    probabilities = ops.softmax((x @ w_router.T).cast(DType.float32))
    best, ids = ops.top_k(probabilities, top_k)
    return ids, best / ops.sum(best)


def grouped_experts(h: ep.Handle, w_gate_up: TensorValue, w_down: TensorValue) -> TensorValue:
    """The rank's experts, w_gate_up [L, 2F, H] and w_down [L, H, F], on the rows that came, of [N, H]."""
    cfg, gpu = h.cfg, h.tokens.device
    local_ids = ops.constant(np.arange(cfg.n_local_experts, dtype=np.int32), device=gpu)  # h.expert_ids are global
    local_ids = ops.rebind(local_ids, [w_gate_up.shape[0]])
    most = np.array([cfg.n_ranks * cfg.max_tokens_per_rank, cfg.n_local_experts], np.uint32)  # rows of one, and experts
    bounds = ops.constant(most, device=DeviceRef.CPU())
    gate_up = grouped_matmul_ragged(h.tokens, w_gate_up, h.row_offsets, local_ids, bounds)
    return grouped_matmul_ragged(fused_silu(gate_up, h.row_offsets), w_down, h.row_offsets, local_ids, bounds)


def batched_experts(h: ep.Handle, w_gate_up: TensorValue, w_down: TensorValue) -> TensorValue:
    """The rank's experts, w_gate_up [L, H, 2F] and w_down [L, F, H], on [L, R*Tmax, H], padding included."""
    return swiglu(h.tokens @ w_gate_up, w_down.shape[1]) @ w_down


def swiglu(gate_up: TensorValue, width: Any) -> TensorValue:
    """silu(gate) * up of [..., 2F] = (gate, up), rounded once."""
    gate, up = ops.split(gate_up.cast(DType.float32), [width, width], axis=-1)
    return (ops.silu(gate) * up).cast(DType.bfloat16)


def layer_graph(comm: ep.Communicator, width: int) -> Graph:
    """The layer of all ranks. Inputs, kind by kind: x, w_router, w_gate_up, w_down; outputs: y, weights, handles."""
    cfg, refs, R = comm.cfg, comm.device_refs(), comm.cfg.n_ranks
    H, L = cfg.hidden_size, cfg.n_local_experts
    shapes = [lambda r: [f"tokens{r}", H], lambda r: [cfg.n_experts, H]]
    if cfg.output_layout == "expert_padded":
        shapes += [lambda r: [L, H, 2 * width], lambda r: [L, width, H]]
    elif not accelerator_architecture_name().startswith("sm_90"):
        shapes += [lambda r: [L, 2 * width, H], lambda r: [L, H, width]]
    else:  # with L fixed MAX 26.7 takes a kernel that does not compile for sm_90a, whatever the sizes
        shapes += [lambda r: [f"experts{r}", 2 * width, H], lambda r: [f"experts{r}", H, width]]
    types = [TensorType(DType.bfloat16, shape(r), ref) for shape in shapes for r, ref in enumerate(refs)]
    inputs = [*types, *comm.input_types()]
    with Graph(f"moe_{cfg.output_layout}", input_types=inputs, custom_extensions=[ep.kernel_library()]) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        own = [v.tensor for v in graph.inputs[: len(types)]]
        ys, handles = moe_layer(ranks, *(own[i : i + R] for i in range(0, len(own), R)))
        graph.output(*ys, *(h.weights for h in handles), *(t for h in handles for t in h.flat()))
    return graph


# The check: the same layer on one GPU, without ranks, expert by expert


def routing_graph(cfg: ep.EPConfig) -> Graph:
    """`route` on GPU 0. Inputs x [T, H], w_router [E, H]; outputs ids, weights [T, K]."""
    shapes = (["tokens", cfg.hidden_size], [cfg.n_experts, cfg.hidden_size])
    with Graph("route", input_types=[TensorType(DType.bfloat16, s, DeviceRef.GPU(0)) for s in shapes]) as graph:
        x, w_router = (v.tensor for v in graph.inputs)
        graph.output(*route(x, w_router, cfg.top_k))
    return graph


def dense_graph(cfg: ep.EPConfig, width: int) -> Graph:
    """One expert for every token, on GPU 0: `total` float32 [N, H] plus what the expert adds to it."""
    H, K, bf16, f32, i64 = cfg.hidden_size, cfg.top_k, DType.bfloat16, DType.float32, DType.int64
    per_token = [(bf16, H), (i64, K), (f32, K), (f32, H)]  # x, ids, weights, total
    weights_of_one = [(bf16, [2 * width, H]), (bf16, [H, width])]
    shapes = [*((d, ["tokens", n]) for d, n in per_token), (i64, [1]), *weights_of_one]
    with Graph("dense", input_types=[TensorType(d, s, DeviceRef.GPU(0)) for d, s in shapes]) as graph:
        x, ids, weights, total, expert, w_gate_up, w_down = (v.tensor for v in graph.inputs)
        share = ops.sum(ops.equal(ids, expert).cast(f32) * weights)  # [N, 1], mostly 0
        graph.output(total + share * (swiglu(x @ w_gate_up.T, width) @ w_down.T).cast(f32))
    return graph


def draw(cfg: ep.EPConfig, width: int, seed: int) -> SimpleNamespace:
    """bfloat16 bits of all tokens and weights: xs [T, H], w_router [E, H], w_gate_up [E, 2F, H], w_down [E, H, F]."""
    rng, H, bits = np.random.default_rng(seed), cfg.hidden_size, float32_to_bfloat16_bits
    ffn = SwiGLU.random(seed, cfg.n_experts, H, width)
    return SimpleNamespace(
        xs=[bits(rng.standard_normal((cfg.max_tokens_per_rank, H), np.float32)) for _ in range(cfg.n_ranks)],
        w_router=bits(rng.standard_normal((cfg.n_experts, H), np.float32) / np.float32(H**0.5)),
        w_gate_up=np.stack([bits(np.concatenate(pair)) for pair in zip(ffn.w_gate, ffn.w_up, strict=True)]),
        w_down=np.stack([bits(w) for w in ffn.w_down]),
    )


def put(array: np.ndarray, device: Device) -> Buffer:
    """An array in a GPU's memory; uint16 are the bits of bfloat16."""
    return to_buffer(array, "bfloat16" if array.dtype == np.uint16 else None).to(device)


def dense_layer(cfg: ep.EPConfig, given: SimpleNamespace) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """The layer on GPU 0: ids and weights [T, K] of each rank, and y float32 [R*T, H]."""
    gpu = Accelerator(0)
    session = InferenceSession(devices=[CPU(), gpu])
    routing, dense = session.load(routing_graph(cfg)), session.load(dense_graph(cfg, given.w_down.shape[2]))

    w_router, x = put(given.w_router, gpu), np.concatenate(given.xs)
    routed = [[to_numpy(o) for o in routing.execute(put(rows, gpu), w_router)] for rows in given.xs]
    ids, weights = map(list, zip(*routed, strict=True))
    fixed = [put(a, gpu) for a in (x, np.concatenate(ids), np.concatenate(weights))]
    total = put(np.zeros(x.shape, np.float32), gpu)
    for e in range(cfg.n_experts):
        one = [put(a, gpu) for a in (np.array([e]), given.w_gate_up[e], given.w_down[e])]
        (total,) = dense.execute(*fixed, total, *one)
    return ids, weights, to_numpy(total)


def check(cfg: ep.EPConfig, given: SimpleNamespace, outputs: list[np.ndarray], dense: tuple) -> dict[str, Any]:
    """Compare the outputs of `layer_graph` with `dense_layer`, and its handles with the NumPy reference."""
    R, n = cfg.n_ranks, len(HANDLE_TENSORS) + 1
    ys, weights, flat = outputs[:R], outputs[R : 2 * R], outputs[2 * R :]
    handles = [flat[r * n : (r + 1) * n] for r in range(R)]
    ids, (want_ids, want_weights, want) = [h[-1] for h in handles], dense
    differences = []
    for reference, h in zip(ep.reference.dispatch(cfg, given.xs, ids, weights), handles, strict=True):
        got = SimpleNamespace(**dict(zip(HANDLE_TENSORS, h, strict=False)))
        differences += ep.reference.handle_differences(cfg, reference, got)
    if differences:
        print(*differences[:20], sep="\n", file=sys.stderr)
    y = bfloat16_bits_to_float32(np.concatenate(ys))
    errors = np.linalg.norm(y - want, axis=1) / np.linalg.norm(want, axis=1)
    found = {
        "ids_that_differ": int(np.sum(np.stack(ids) != np.stack(want_ids))),
        "weights_that_differ": int(np.sum(np.stack(weights) != np.stack(want_weights))),
        "tensors_that_differ": len(differences),
        "mean_error": float(errors.mean()),
        "max_error": float(errors.max()),  # NaN stays
    }
    exact = not (found["ids_that_differ"] or found["weights_that_differ"] or differences)
    return {"ok": exact and found["max_error"] <= TOLERANCE} | found


def call_times(model: Any, args: list[Buffer], devices: Sequence[Device], replay: bool, calls: int) -> np.ndarray:
    """Microseconds of each call on each GPU [R, calls], by events on its queue; five calls before do not count."""
    if replay:
        model.capture(1, *args)
    marks = [[DeviceEvent(d, enable_timing=True) for _ in range(calls + 1)] for d in devices]
    for i in range(-5, calls + 1):
        for d, events in zip(devices, marks, strict=True):
            if i >= 0:
                d.default_queue.record_event(events[i])
        if i < calls:
            model.replay(1, *args) if replay else model.execute(*args)
    for d in devices:
        d.synchronize()
    return np.array([[a.elapsed_time(b) * 1e3 for a, b in zip(e, e[1:], strict=False)] for e in marks])


def run_way(cfg: ep.EPConfig, opts: argparse.Namespace, given: SimpleNamespace, dense: tuple) -> dict[str, Any]:
    """Check one way, then time it. If it fails, what was found until then, and why: the other way can still run."""
    found, replay = {}, cfg.output_layout == "expert_padded"
    calls = opts.calls if replay else min(opts.calls, 10)
    w_gate_up, w_down = (np.split(w, cfg.n_ranks) for w in (given.w_gate_up, given.w_down))  # each rank's experts
    if replay:
        w_gate_up, w_down = ([w.swapaxes(1, 2) for w in kind] for kind in (w_gate_up, w_down))
    kinds = (given.xs, [given.w_router] * cfg.n_ranks, w_gate_up, w_down)
    try:
        with ep.Communicator.gpus(cfg) as comm:
            layer = comm.compile(layer_graph(comm, opts.width))
            args = [put(a, d) for kind in kinds for a, d in zip(kind, comm.devices, strict=True)]
            found |= check(cfg, given, comm.execute(layer, *args), dense)
            times = call_times(layer.model, [*args, *comm.inputs()], comm.devices, replay, calls)
            comm.check()
    except (ep.EPError, RuntimeError, ValueError) as error:
        return found | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    median, p99 = (float(np.percentile(times, p)) for p in (50, 99))
    found |= {"launch": "replay" if replay else "eager", "calls": calls, "median_us": median, "p99_us": p99}
    return found | {"tokens_per_s": cfg.n_ranks * opts.tokens / median * 1e6}


WAYS = {"batched": "expert_padded", "grouped": "expert"}
SIZES = {
    "ranks": (0, "GPUs to use, 0 = all, 8 at most"),
    "tokens": (512, "T, tokens of a rank"),
    "hidden": (2048, "H, channels of a token, a multiple of 8"),
    "width": (1024, "F, width of an expert, a multiple of 8"),
    "experts": (64, "E, a multiple of the ranks"),
    "top_k": (8, "K, experts of a token"),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in (SIZES | {"seed": (0, ""), "calls": (200, "timed calls, eager 10 at most")}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--way", action="append", choices=[*WAYS], help="only this one (default: both)")
    parser.add_argument("--output", metavar="FILE.json", help="write the results here")
    opts = parser.parse_args(argv)
    if opts.width < 8 or opts.width % 8 or opts.top_k > opts.experts or opts.calls < 1 or opts.seed < 0:
        parser.error("allowed: --width 8, 16, ..., --top-k up to --experts, --calls from 1, --seed from 0")
    return opts


def run(opts: argparse.Namespace) -> dict[str, Any]:
    """All ways on the same tokens and weights."""
    ranks = opts.ranks or min(accelerator_count(), 8) or 1
    cfg = ep.EPConfig(opts.hidden, opts.top_k, opts.experts, max_tokens_per_rank=opts.tokens, n_ranks=ranks)
    ep.Communicator.gpus(cfg).destroy()  # raises if the GPUs are not there
    given = draw(cfg, opts.width, opts.seed)
    dense, names = dense_layer(cfg, given), dict.fromkeys(opts.way or WAYS)
    ways = {n: run_way(cfg.replace(output_layout=WAYS[n]), opts, given, dense) for n in names}
    sizes = {name: getattr(opts, name) for name in SIZES} | {"ranks": ranks}
    return {"gpu": Accelerator(0).model_name} | sizes | {"tolerance": TOLERANCE, "ways": ways}


def main(argv: list[str] | None = None) -> int:
    """Run, print a table, write the JSON."""
    opts = arguments(argv)
    try:
        report = run(opts)
    except ep.EPError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    ways = report["ways"]
    print(", ".join(f"{k}={v}" for k, v in report.items() if k != "ways"))
    for key in dict.fromkeys(["", *(key for w in ways.values() for key in w)]):
        cells = [w.get(key, "-") if key else name for name, w in ways.items()]
        print(f"{key:20}", *(f"{c:>10.4g}" if isinstance(c, float) else f"{c!s:>10}" for c in cells))
    if opts.output:
        Path(opts.output).write_text(json.dumps(report, indent=1) + "\n")
    return int(not all(w["ok"] for w in ways.values()))


if __name__ == "__main__":
    sys.exit(main())
