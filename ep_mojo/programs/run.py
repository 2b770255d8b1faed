"""`ep-mojo run`: one expert-parallel layer on the user's own tokens and routing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ..config import EPConfig
from ..dtypes import float32_to_bfloat16_bits
from . import files
from .experts import SwiGLU, identity
from .layer import FORMATS, GraphSet, MoELayer
from .one_round import failures, report_text, run_round
from .progress import Progress


def main(args: argparse.Namespace) -> int:
    """Run the layer on a file.

    Returns:
        0, or 1 where the result is off by more than rounding (then nothing is written).

    Raises:
        InputFileError: A file cannot be read or written, or lacks an array.
        ShapeError, DTypeError, ConfigError: An array does not fit.
    """
    output = Path(args.output)
    files.check_writable(output)
    progress = Progress()
    with progress.step("input", f"Reading {args.input}"):
        job = files.read_job(Path(args.input))
    n_ranks, tokens, hidden = job.x.shape
    is_bits = job.x.dtype == np.uint16
    cfg = EPConfig(
        hidden_size=hidden,
        top_k=job.topk_ids.shape[2],
        n_experts=job.n_experts,
        max_tokens_per_rank=max(tokens, 1),
        n_ranks=n_ranks,
        dispatch_format=FORMATS[args.format],
        output_layout=args.layout,
        reduce="expert",
        output_dtype="bfloat16" if is_bits else "float32",
    )
    counts = job.num_tokens
    xs = [x[:n] if is_bits else _to_bfloat16(x[:n]) for x, n in zip(job.x, counts, strict=True)]
    ids = [i[:n] for i, n in zip(job.topk_ids, counts, strict=True)]
    weights = [w[:n] for w, n in zip(job.topk_weights, counts, strict=True)]
    ffn = identity if job.w_gate is None else SwiGLU(job.w_gate, job.w_up, job.w_down)
    graphs = GraphSet(progress)
    with MoELayer(cfg, graphs) as layer:
        graphs.compile()
        result = run_round(layer, xs, ids, weights, ffn, progress, warm_up=False)

    # What fp8 does to the user's tokens is reported; only an error beyond rounding is this program's failure.
    off = failures(result.errors, ("rounding",))
    if not off:
        out = np.zeros(job.x.shape, np.float32)
        for r, n in enumerate(counts):
            out[r, :n] = result.outputs[r]
        if is_bits:
            out = float32_to_bfloat16_bits(out)
        with progress.step("output", f"Writing {output}"):
            files.write_atomically(
                output, {"out": out, "traffic": result.traffic, "rows_per_expert": result.expert_rows}
            )
    if args.json:
        print(json.dumps({"ok": not off, "output": str(output)} | result.as_json(cfg), indent=2))
    else:
        print(report_text(cfg, result))
        print("\nOFF: the error is over its limit; nothing was written" if off else f"\nWritten: {output}")
    return 1 if off else 0


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    return float32_to_bfloat16_bits(x.astype(np.float32))
