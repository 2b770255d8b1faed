"""What `ep-mojo bench` counts and says of the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from ..config import EPConfig
from ..handle import handle_shapes
from ..layout import CELL_BYTES, FEW_CHOICES, GATHERED_CHOICES, align_up
from .baselines import available_cores
from .report import pairs

FORMULA = """\
Bytes that a round must move: M = message, Y = row of combine, X = token, all in bytes; N tokens, P (token, other rank)
pairs, Q (token, expert) pairs. A copy of n bytes reads n and writes n, so copy = (read + written) / 2. What a rank
keeps for itself is not counted as a message.
  read    = N X + P M + Q Y + P Y        tokens, messages, expert rows, partial sums
  written = P M + Q M + P Y + N X        messages, rows for the experts, partial sums, output"""

WINDOW_FORMULA = """\
Payload of dispatch: slots rank B R Tmax M, slots expert L R Tmax (M + 16). Payload of combine: rank B Tmax S Y with
S = R (reduce="expert"), expert Tmax K Y; rank with R Tmax K up to 1024 twice that. The rest are signals and routing
tables (docs/protocol.md)."""


def round_bytes(cfg: EPConfig, topk_ids: list[np.ndarray]) -> dict[str, int]:
    """Bytes by `FORMULA`: "read", "written", "copy"."""
    message, y = cfg.dispatch_format.message_bytes(cfg.hidden_size), cfg.combine_row_bytes
    token = 2 * cfg.hidden_size
    n = sum(len(ids) for ids in topk_ids)
    q = sum(ids.size for ids in topk_ids)
    p = int(pairs(cfg, topk_ids).sum())
    read = n * token + p * message + q * y + p * y
    written = p * message + q * message + p * y + n * token
    return {"read": read, "written": written, "copy": (read + written) // 2}


def window_bytes(cfg: EPConfig) -> dict[str, int]:
    """Window bytes of one rank by the formulas of docs/protocol.md, written out here once more on purpose."""
    ranks, tmax, k, buffers = cfg.n_ranks, cfg.max_tokens_per_rank, cfg.top_k, cfg.num_buffers
    message, y = cfg.dispatch_format.message_bytes(cfg.hidden_size), cfg.combine_row_bytes
    if cfg.slots == "expert":
        dispatch, combine = cfg.n_local_experts * ranks * tmax * (message + 16), tmax * k * y
        counts = 8 * cfg.n_local_experts * ranks + 8 * cfg.n_experts
    else:
        room = 2 if cfg.few_tokens else 1  # for messages as cells
        dispatch, combine = buffers * ranks * tmax * room * message, buffers * tmax * cfg.combine_slots * y
        signals = align_up(8 * ranks) + align_up(8 * buffers * ranks) + buffers * ranks * align_up(8 * cfg.n_signals)
        tables = buffers * ranks * (align_up(2 * tmax * k) + align_up(4 * tmax * k))
        tables += buffers * ranks * align_up(16 * tmax * k) * cfg.table_room  # as cells
        counts = 2 * signals + tables
    return {"dispatch_payload": dispatch, "combine_payload": combine, "total": dispatch + combine + counts}


def round_memory(cfg: EPConfig) -> dict[str, int]:
    """Bytes of a rank's memory in a bfloat16 round of Tmax tokens: "windows", "inputs", "outputs" of both stages."""
    T, H, K = cfg.max_tokens_per_rank, cfg.hidden_size, cfg.top_k
    handle = sum((2 if dtype == "bfloat16" else 4) * math.prod(shape) for dtype, shape in handle_shapes(cfg))
    return {
        "windows": window_bytes(cfg)["total"],
        "inputs": T * (2 * H + (4 + 4) * K),
        "outputs": handle + 2 * T * H,
    }


def gather_memory(ranks: int, tokens: int, hidden: int, top_k: int) -> dict[str, int]:
    """Bytes of a rank that `AllGatherVDispatcher` takes with bfloat16 sums: "windows", "buffers", "step"."""
    n = ranks * tokens
    few = n * GATHERED_CHOICES <= FEW_CHOICES  # room for cells
    message, choice = (2 * 2 * hidden, 6 + CELL_BYTES) if few else (2 * hidden, 6)
    return {
        "windows": 2 * n * (message + 2 * hidden + choice * top_k + 16),
        "buffers": n * (2 * hidden + (4 + 4) * top_k + 8 + 2 * hidden),  # rows, routes, sources; rows to be reduced
        "step": tokens * (2 * hidden + (8 + 4) * top_k) + 8 * n * top_k + 2 * tokens * hidden,  # in, int64 routes, out
    }


def allocated_bytes(comm: Any) -> int:
    """Bytes of the four windows of rank 0 as they are in memory."""
    memory = comm.memories[0]
    parts = ("dispatch_recv", "combine_recv", "dispatch_count", "combine_count")
    return sum(int(getattr(memory, part).nbytes) for part in parts)


def statistics(samples: np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = (float(v) for v in np.percentile(samples, [10, 50, 90]))
    return {"median": median, "p10": p10, "p90": p90}


def machine() -> dict[str, Any]:
    """Processor, cores, system and versions."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {}
    for name in ("max", "numpy", "ml_dtypes"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {"cpu": cpu, "cores": available_cores(), "platform": system} | versions


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with "-dirty" where it was changed; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
