"""One checked round of the layer: dispatch, experts, combine, and the errors against the dense reference."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import __version__
from ..config import EPConfig
from ..dtypes import bfloat16_bits_to_float32, to_numpy
from ..formats import BF16
from . import report
from .experts import dense_moe, expert_outputs
from .layer import MoELayer, float_tokens
from .progress import Progress, format_seconds

ROUNDING_LIMIT = 2.0**-7
"""Largest error of a token against the reference on the same dispatched values, in units of sum |w| norm(ffn(x)).

bfloat16 rounds to within 2^-9 of a value. A row is rounded when the expert writes it, as a rank's partial sum and as
the output: together at most 3 * 2^-9, and 2^-7 leaves a quarter for float32 sums in another order. One row that is
lost, added twice or weighted wrongly is an error of its whole weight, about 1 / top_k."""
FORMAT_LIMIT = 2.0**-4
"""Likewise against the reference on the tokens before fp8: e4m3 keeps 3 bits of mantissa, so that no value moves by
more than 2^-4 of itself; an expert's projections average over many values, and stay well below. Not used with bfloat16,
where nothing is rounded on the way."""


@dataclass
class RoundResult:
    """What one round gave.

    Attributes:
        outputs: For each rank float32 [T, H].
        traffic: int64 [R, R], tokens from rank (row) to rank (column).
        expert_rows: int64 [E].
        bytes: See `report.bytes_moved`.
        errors: "rounding" and "format": {"largest", "rms", "limit"} over tokens; and "skipped_tokens", those whose
            reference is not finite.
        seconds: By stage.
    """

    outputs: list[np.ndarray]
    traffic: np.ndarray
    expert_rows: np.ndarray
    bytes: dict[str, dict[str, int]]
    errors: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    def as_json(self, cfg: EPConfig) -> dict[str, Any]:
        """Everything but the outputs, for --json."""
        return {
            "version": __version__,
            "machine": platform.machine(),
            "config": config_json(cfg),
            "seconds": self.seconds,
            "traffic_tokens": self.traffic.tolist(),
            "rows_per_expert": self.expert_rows.tolist(),
            "bytes": self.bytes,
            "error": self.errors,
        }


def config_json(cfg: EPConfig) -> dict[str, Any]:
    """The main fields of a config."""
    names = ("n_ranks", "n_experts", "top_k", "hidden_size", "max_tokens_per_rank", "output_layout", "combine_dtype")
    return {"dispatch_format": cfg.dispatch_format.key()} | {name: getattr(cfg, name) for name in names}


def run_round(
    layer: MoELayer, xs: list, topk_ids: list, weights: list, ffn: Any, progress: Progress, warm_up: bool = True
) -> RoundResult:
    """Run one round and compare it with the dense reference.

    Args:
        layer: The compiled layer.
        xs: For each rank bfloat16 bits uint16 [T, H].
        topk_ids: For each rank int32 [T, K].
        weights: For each rank float32 [T, K].
        ffn: See `experts.expert_outputs`.
        progress: Shows the stages and times them.
        warm_up: Run dispatch and combine once before they are timed: the first use of memory costs more than a round.
    """
    cfg, ranks = layer.cfg, range(layer.cfg.n_ranks)
    if warm_up:
        with progress.step("warm-up", "Warming up"):
            buffers = layer.dispatch(xs, topk_ids, weights)
            rows = [np.zeros((*h.tokens.shape[:-1], cfg.hidden_size), _row_dtype(cfg)) for h in layer.handles(buffers)]
            layer.combine(rows, buffers)
            del buffers, rows
    with progress.step("dispatch", f"Dispatch: {report.number_of(sum(map(len, xs)), 'token')} to their experts"):
        buffers = layer.dispatch(xs, topk_ids, weights)
    handles = layer.handles(buffers)
    with progress.step("experts", f"Experts: {report.number_of(sum(int(h.counts.sum()) for h in handles), 'row')}"):
        ys = [expert_outputs(cfg, r, handles[r], ffn) for r in ranks]
    with progress.step("combine", "Combine: weighted sums back to the tokens' ranks"):
        outputs = [to_numpy(b) for b in layer.combine(ys, buffers)]
    outputs = [bfloat16_bits_to_float32(o) if o.dtype == np.uint16 else o for o in outputs]
    with progress.step("reference", "Dense float32 reference"):
        errors = _errors(cfg, xs, topk_ids, weights, outputs, ffn)
    stages = ("dispatch", "experts", "combine")
    return RoundResult(
        outputs,
        report.traffic_matrix(cfg, handles),
        report.rows_per_expert(cfg, handles),
        report.bytes_moved(cfg, topk_ids),
        errors,
        {name: progress.seconds[name] for name in stages},
    )


def _row_dtype(cfg: EPConfig) -> type:
    return np.uint16 if cfg.combine_dtype == "bfloat16" else np.float32


def _errors(
    cfg: EPConfig, xs: list, topk_ids: list, weights: list, outputs: list[np.ndarray], ffn: Any
) -> dict[str, Any]:
    x, ids, w, got = (np.concatenate(arrays) for arrays in (xs, topk_ids, weights, outputs))
    found: dict[str, Any] = {}
    lossless = isinstance(cfg.dispatch_format, BF16)
    references = {"rounding": (float_tokens(x, cfg), ROUNDING_LIMIT)}
    if not lossless:
        references["format"] = (bfloat16_bits_to_float32(x), FORMAT_LIMIT)
    with np.errstate(all="ignore"):
        for name, (values, limit) in references.items():
            want, size = dense_moe(values, ids, w, cfg.n_experts, ffn)
            finite = np.isfinite(want).all(axis=1) & np.isfinite(size)
            # Where nothing is expected nothing may come; the floor keeps the smallest numbers from dividing by zero.
            floor = np.float32(np.finfo(np.float32).tiny * cfg.hidden_size**0.5)
            error = np.linalg.norm(got[finite] - want[finite], axis=1) / np.maximum(size[finite], floor)
            error = np.where(np.isnan(error), np.inf, error)
            found[name] = {
                "largest": float(error.max(initial=0.0)),
                "rms": float(np.sqrt(np.mean(error**2))) if len(error) else 0.0,
                "limit": limit,
            }
            if name == "rounding":
                found["skipped_tokens"] = int((~finite).sum())
    return found


def failures(errors: dict[str, Any], names: Sequence[str] = ("rounding", "format")) -> list[str]:
    """The errors among `names` that are over their limit."""
    return [n for n in names if n in errors and not errors[n]["largest"] <= errors[n]["limit"]]


def report_text(cfg: EPConfig, result: RoundResult) -> str:
    """The report that people read."""
    ranks = range(cfg.n_ranks)
    lines = ["", "Tokens sent from rank (row) to rank (column); each counts once, however many experts it has there"]
    lines.append(report.table(["", *(f"to {r}" for r in ranks)], [[f"from {r}", *result.traffic[r]] for r in ranks]))
    lines += ["", f"Rows of each expert: {int(result.expert_rows.sum())} in all, one bar for each expert of a rank"]
    per_rank = result.expert_rows.reshape(cfg.n_ranks, -1)
    for r in ranks:
        row = per_rank[r]
        shown = f"{report.bars(row)}" if len(row) <= 128 else f"{report.bars(row[:128])}..."
        lines.append(f"  rank {r}: {int(row.sum()):6d} rows, {row.min()} to {row.max()} an expert  |{shown}|")
    lines += ["", "Time of each stage (all ranks share this machine's cores; the experts run in NumPy)"]
    lines.append(report.table(["stage", "time"], [[n, format_seconds(s)] for n, s in result.seconds.items()]))
    ours, theirs = result.bytes["ours"], result.bytes["per_expert"]
    rows = []
    for stage in ("dispatch", "combine", "total"):
        saved = f"{100 * (1 - ours[stage] / theirs[stage]):.0f} % less" if theirs[stage] else "-"
        rows.append([stage, report.size(ours[stage]), report.size(theirs[stage]), saved])
    lines += ["", "Bytes between ranks: one message a (token, rank) against one a (token, expert)"]
    lines.append(report.table(["", "here", "per expert", ""], rows))
    lines += ["", "Error against the layer computed densely in float32 (worst token, relative to its terms)"]
    names = {"rounding": "same dispatched values", "format": "tokens before fp8"}
    rows = []
    for name, text in names.items():
        if name in result.errors:
            e = result.errors[name]
            verdict = "ok" if e["largest"] <= e["limit"] else "TOO LARGE"
            rows.append([text, f"{e['largest']:.5f}", f"{e['rms']:.5f}", f"{e['limit']:.5f}", verdict])
    lines.append(report.table(["", "worst", "rms", "limit", ""], rows))
    if result.errors["skipped_tokens"]:
        n = result.errors["skipped_tokens"]
        lines.append(f"  Left out: {report.number_of(n, 'token')} whose reference is not finite")
    return "\n".join(lines)
