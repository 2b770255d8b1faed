"""`ep-mojo demo`: one expert-parallel layer on random tokens, checked."""

from __future__ import annotations

import argparse
import json

import numpy as np

from .. import __version__
from ..config import EPConfig
from ..dtypes import float32_to_bfloat16_bits
from ..formats import check_int
from ..gate import check_groups, default_groups, gate
from .experts import SwiGLU
from .layer import FORMATS, GraphSet, MoELayer
from .one_round import failures, report_text, run_round
from .progress import Progress, format_seconds
from .report import number_of

WIDTH = 16
"""Width of each expert's FFN."""
ROUTED_SCALING_FACTOR = 2.5
"""As in the published DeepSeek-V3."""


def main(args: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        0, or 1 where the result is off.

    Raises:
        EPError: An argument does not fit, or something is missing.
    """
    check_int("seed", args.seed, 0, 2**32 - 1)
    cfg = EPConfig(
        hidden_size=args.hidden,
        top_k=args.top_k,
        n_experts=args.experts,
        max_tokens_per_rank=args.tokens,
        n_ranks=args.ranks,
        dispatch_format=FORMATS[args.format],
        output_layout=args.layout,
        reduce="expert",
    )
    n_groups, top_groups = default_groups(cfg.n_experts, cfg.top_k)
    check_groups(cfg.n_experts, cfg.top_k, n_groups, top_groups)

    progress = Progress()
    if not args.json:
        ranks, tokens = number_of(cfg.n_ranks, "rank"), number_of(args.tokens, "token")
        print(
            f"ep-mojo {__version__}: {ranks} x {tokens}, hidden {cfg.hidden_size}, "
            f"{number_of(cfg.n_experts, 'expert')}, top {cfg.top_k}, {args.format} dispatch, {cfg.combine_dtype} "
            "combine, all on this CPU",
            flush=True,
        )
    with progress.step("inputs", f"Random tokens, and {number_of(cfg.n_experts, 'SwiGLU expert')} of width {WIDTH}"):
        ffn = SwiGLU.random(args.seed, cfg.n_experts, cfg.hidden_size, WIDTH)
        rng = np.random.default_rng([args.seed, cfg.n_experts])
        shape = (cfg.n_ranks, args.tokens, cfg.hidden_size)
        x = rng.standard_normal(shape, dtype=np.float32)
        router = rng.standard_normal((cfg.n_experts, cfg.hidden_size), dtype=np.float32) * cfg.hidden_size**-0.5
        bias = rng.standard_normal(cfg.n_experts, dtype=np.float32) * np.float32(0.05)
    with progress.step("gate", f"Router: best {top_groups} of {n_groups} groups of experts, then the top {cfg.top_k}"):
        choices = [
            gate(
                tokens,
                router.astype(np.float32),
                bias,
                top_k=cfg.top_k,
                n_groups=n_groups,
                top_groups=top_groups,
                routed_scaling_factor=ROUTED_SCALING_FACTOR,
            )
            for tokens in x
        ]
    topk_ids, weights = ([choice[i] for choice in choices] for i in (0, 1))
    xs = [float32_to_bfloat16_bits(tokens) for tokens in x]
    graphs = GraphSet(progress)
    with MoELayer(cfg, graphs) as layer:
        graphs.compile()
        result = run_round(layer, xs, topk_ids, weights, ffn, progress)

    off = failures(result.errors)
    if args.json:
        print(json.dumps({"ok": not off} | result.as_json(cfg) | {"all_seconds": progress.seconds}, indent=2))
    else:
        print(report_text(cfg, result))
        print(f"\n{'OFF: the error is over its limit' if off else 'All right'}; {_total(progress)} in all")
    return 1 if off else 0


def _total(progress: Progress) -> str:
    return format_seconds(sum(progress.seconds.values()))
