"""Rounds of virtual ranks, stage by stage in any order that the protocol allows, compared with the reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from graph.stages import COMBINE_TYPES, Engine
from unit.cases import Case, make_case

import ep_mojo as ep
from ep_mojo import reference
from ep_mojo.config import BY_SOURCE
from ep_mojo.dtypes import float32_to_bfloat16_bits

SPECIAL = np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x0001, 0x8001, 0x007F, 0x8000, 0x7F7F, 0xFF7F], np.uint16)
"""bfloat16 Inf, NaN, signalling NaN, subnormals, -0 and the largest values."""
ACTIONS = ("send", "receive", "send_back", "receive_back")


@dataclass
class Round:
    """One round's inputs, and what the reference gives.

    Attributes:
        case: Inputs of dispatch.
        reduce: "expert" or "source".
        ys: Expert rows of every rank.
        weights, bias0, bias1: For combine, lists by rank or None.
        x_scales, input_scale: For dispatch; with scales `case.xs` are encoded tokens.
    """

    case: Case
    reduce: str = "expert"
    ys: list | None = None
    weights: list | None = None
    bias0: list | None = None
    bias1: list | None = None
    x_scales: list | None = None
    input_scale: float | None = None
    handles: list | None = None
    outputs: list | None = None

    def solve(self) -> Round:
        """Fill in what the reference gives. Expert rows that are not given are random."""
        cfg, case = self.case.cfg, self.case
        self.handles = reference.dispatch(
            cfg, case.xs, case.topk_ids, case.weights, case.num_tokens, self.x_scales, self.input_scale
        )
        rng = np.random.default_rng(sum(x.shape[0] for x in case.xs))
        shapes = [(*h.tokens.shape[:-1], cfg.hidden_size) for h in self.handles]
        if self.ys is None:
            self.ys = [random_rows(rng, shape, cfg.combine_dtype) for shape in shapes]
        options = {"weights": self.weights, "bias0": self.bias0, "bias1": self.bias1}
        with np.errstate(all="ignore"):
            self.outputs = reference.combine(cfg, self.ys, self.handles, reduce=self.reduce, **options)
        return self


def random_rows(rng, shape, dtype="bfloat16", special=0.0):
    """Normal values, float32 or bfloat16 bits, a share of them special."""
    rows = rng.normal(size=shape).astype(np.float32)
    bits = float32_to_bfloat16_bits(rows)
    odd = rng.random(shape) < special
    strange = rng.choice(SPECIAL, shape)
    if dtype == "bfloat16":
        return np.where(odd, strange, bits)
    return np.where(odd, (strange.astype(np.uint32) << 16).view(np.float32), rows)


def random_round(cfg, seed, *, routing="mixed", reduce="expert", weights=True, ragged=True, special=0.0) -> Round:
    """A random round of a config, solved. Biases and weights at combine come and go with the seed."""
    rng = np.random.default_rng([seed, 1])
    case = make_case(cfg, seed, routing, weights, ragged)
    for r, ids in enumerate(case.topk_ids):
        if cfg.hidden_size == 8 and cfg.output_layout == "expert" and rng.random() < 0.3:
            case.topk_ids[r] = wide = ids.astype(np.int64)
            wide[rng.random(ids.shape) < 0.1] += 1 << 32  # valid again, if the upper half were dropped
        else:
            case.topk_ids[r] = ids.astype(np.int32)
        case.xs[r] = random_rows(rng, case.xs[r].shape, special=special)
    if cfg.output_layout == "expert_padded":
        drop_repeats(case)
    if case.weights and special:
        for w in case.weights:
            w[rng.random(w.shape) < 0.05] = rng.choice(np.array([0.0, -0.0, 1e-40, -2.0, np.inf, np.nan], np.float32))
    found = Round(case, reduce)
    bias = COMBINE_TYPES[cfg.hidden_size][2]
    for name in ("bias0", "bias1"):
        if rng.random() < 0.4:
            setattr(found, name, [random_rows(rng, x.shape, bias, special) for x in case.xs])
    if reduce == "source" and cfg.output_layout not in BY_SOURCE and rng.random() < 0.3:
        found.weights = [rng.normal(size=ids.shape).astype(np.float32) for ids in case.topk_ids]
    if not isinstance(cfg.dispatch_format, ep.BF16) and rng.random() < 0.3:
        found.input_scale = float(np.float32(rng.normal()))
    rows = (cfg.rows_capacity,)
    if cfg.output_layout == "expert_padded":
        rows = (cfg.n_groups, cfg.n_ranks * cfg.max_tokens_per_rank)
    shape = (*rows, cfg.hidden_size)
    found.ys = [random_rows(rng, shape, cfg.combine_dtype, special) for _ in range(cfg.n_ranks)]
    return found.solve()


def drop_repeats(case: Case) -> None:
    """Let no token choose an expert twice, so that "expert_padded" has room for the worst case."""
    for ids in case.topk_ids:
        for k in range(1, ids.shape[1]):
            ids[(ids[:, :k] == ids[:, k : k + 1]).any(axis=1), k] = -1


class Play:
    """Rounds in progress: which stage each rank does next, its results so far, and what was wrong with them."""

    def __init__(self, engine: Engine, rounds: list[Round]):
        self.engine, self.rounds = engine, rounds
        self.done = {action: [0] * engine.cfg.n_ranks for action in ACTIONS}
        self.handles = [[None] * engine.cfg.n_ranks for _ in rounds]
        self.shared = [[None] * engine.cfg.n_ranks for _ in rounds]
        self.outputs = [[None] * engine.cfg.n_ranks for _ in rounds]
        self.differences: list[str] = []

    def run(self, rng) -> list[str]:
        """Play everything in a random order that virtual ranks allow. Returns what differs from the reference."""
        while actions := [(a, r) for a in ACTIONS for r in range(self.engine.cfg.n_ranks) if self.may(a, r)]:
            self.step(*actions[rng.integers(len(actions))])
        assert min(self.done["receive_back"]) == len(self.rounds), "the schedule came to a halt"
        return self.differences

    def may(self, action: str, rank: int) -> bool:
        """Whether a rank may do a stage of its next round: signals and credits that it needs are there."""
        done, n, buffers = self.done, self.done[action][rank], self.engine.cfg.num_buffers
        if n >= len(self.rounds):
            return False
        if action == "send":
            if self.engine.cfg.slots == "expert" and n > done["receive_back"][rank]:
                return False  # dispatch and combine alternate
            return n - min(done["receive"]) < buffers
        if action == "receive":
            return n < min(done["send"])
        if action == "send_back":
            return n < done["receive"][rank] and n - min(done["receive_back"]) < buffers
        return n < min(done["send_back"])

    def step(self, action: str, rank: int) -> None:
        """Do one stage of a rank's next round."""
        i = self.done[action][rank]
        self.done[action][rank] += 1
        getattr(self, f"_{action}")(self.rounds[i], i, rank)

    def _send(self, rnd, i, rank):
        case = rnd.case
        given = [_at(v, rank) for v in (case.xs, case.topk_ids, case.weights, case.num_tokens, rnd.x_scales)]
        self.engine.send(rank, *given, rnd.input_scale)

    def _receive(self, rnd, i, rank):
        self.handles[i][rank] = handle = self.engine.receive(rank)
        found = reference.handle_differences(self.engine.cfg, rnd.handles[rank], handle)
        self.differences += [f"round {i} {text}" for text in found]

    def _send_back(self, rnd, i, rank):
        handle, rows = self.handles[i][rank], rnd.case.xs[rank].shape[0]
        self.shared[i][rank] = self.engine.send_back(rank, rnd.ys[rank], handle, rnd.reduce, rows)

    def _receive_back(self, rnd, i, rank):
        case = rnd.case
        weights = _at(rnd.weights or case.weights, rank)
        options = [_at(v, rank) for v in (case.num_tokens, rnd.bias0, rnd.bias1)]
        y = self.engine.receive_back(rank, case.topk_ids[rank], self.shared[i][rank], rnd.reduce, weights, *options)
        self.outputs[i][rank] = y
        difference = reference.output_difference(f"round {i} rank {rank} y", rnd.outputs[rank], y)
        if difference:
            self.differences.append(difference)

    def all_bytes(self) -> bytes:
        """Everything that the reference specifies, as bytes."""
        parts = []
        for handles, outputs in zip(self.handles, self.outputs, strict=True):
            for handle, y in zip(handles, outputs, strict=True):
                parts += [*defined(self.engine.cfg, handle), y]
        return b"".join(np.ascontiguousarray(p).tobytes() for p in parts)


def defined(cfg: ep.EPConfig, handle: SimpleNamespace) -> list[np.ndarray]:
    """A handle's tensors, tokens and scales without the rows that are unspecified."""
    rows = reference.defined_rows(cfg, handle)
    scales = handle.scales
    if scales.size:
        scales = scales[:, rows] if cfg.dispatch_format.scales_layout == "column" else scales[rows]
    others = [v for k, v in vars(handle).items() if k not in ("tokens", "scales")]
    return [handle.tokens.reshape(cfg.rows_capacity, -1)[rows], scales, *others]


def _at(values, rank):
    return None if values is None else values[rank]
