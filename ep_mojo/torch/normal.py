"""Normal mode: rows by source rank and then source token, for many tokens; `Buffer.dispatch` and `Buffer.combine`.

The engine's layout "rank". T tokens of a rank, R ranks, E experts, L = E/R local ones, K choices, N rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ..config import EPConfig
from ..errors import CapacityError, ConfigError, ConfigMismatchError, ShapeError, UnsupportedError
from ..formats import BF16, BLOCK_SIZE, BlockwiseFP8, TokenFormat, align_up, check_int
from ..layout import MAX_EXPERTS
from . import graphs, sizes
from .checks import check_tensor
from .rounds import Rounds
from .session import Session
from .streams import check_not_capturing
from .tensors import Received, dense, part, used_here

MAX_ALIGNMENT = 1 << 20
MAX_WORST_TOKENS = (1 << 31) - 1
Tokens = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class NormalHandle:
    """What a dispatch leaves for combine, and for dispatches of other tokens along the same routes.

    It holds copies: the tensors given to dispatch may change. It may be used any number of times, with its own Buffer.

    Attributes:
        cfg: The engine's config.
        made_on: The queue that has made the tensors: see `Queue.use_here`.
        topk_idx: int64 [T, K], the rank's own choices; without top-k int64 [T, R], the ranks themselves.
        has_topk: Whether the dispatch had top-k choices.
        num_recv_tokens: N, rows of the received tensors; with num_worst_tokens that number.
        memory: The engine's handle: see `tensors.places`.
        recv_count: int32 [1] on the device: rows that hold a token.
        rank_offsets: int32 [R + 1], the first row of each source rank.
    """

    def __init__(
        self,
        session: Session,
        cfg: EPConfig,
        topk_idx: torch.Tensor,
        has_topk: bool,
        num_recv_tokens: int,
        memory: torch.Tensor,
        capacity: int,
    ):
        self.session, self.cfg, self.made_on = session, cfg, session.queue.current()
        self.topk_idx, self.has_topk = topk_idx, has_topk
        self.num_recv_tokens = num_recv_tokens
        self.memory, self._capacity = memory, capacity
        self.rank_offsets = part(memory, "row_offsets", cfg, capacity)
        self.recv_count = self.rank_offsets[-1:]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.topk_idx.shape[0]

    @property
    def recv_src_idx(self) -> torch.Tensor:
        """int32 [N]: the token, on its source rank, that each row is; unspecified past `recv_count`."""
        src_info = part(used_here(self.memory), "src_info", self.cfg, self._capacity)
        return src_info[: self.num_recv_tokens, 0] % self.cfg.max_tokens_per_rank


class NormalMode:
    """Dispatch and combine of one Buffer, without queues and events.

    Attributes:
        session: Whose.
        num_nvl_bytes: Of the Buffer.
    """

    def __init__(self, session: Session, num_nvl_bytes: int):
        self.session, self.num_nvl_bytes = session, num_nvl_bytes

    # Layout

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens a rank int32 [R], tokens an expert int32 [E], is-token-in-rank bool [T, R]. Sends nothing.

        Raises:
            DTypeError, ShapeError, DeviceError, ConfigError: An argument does not fit.
        """
        check_tensor("topk_idx", topk_idx, [torch.int64], [None, None], self.session.device)
        n_ranks, n_experts = self.session.size, check_experts(num_experts, self.session.size)
        valid = (topk_idx >= 0) & (topk_idx < n_experts)
        ids = torch.where(valid, topk_idx, n_experts)
        in_rank = torch.zeros(topk_idx.shape[0], n_ranks + 1, dtype=torch.bool, device=topk_idx.device)
        in_rank.scatter_(1, ids // (n_experts // n_ranks), True)
        in_rank = in_rank[:, :n_ranks].contiguous()
        return in_rank.sum(0, dtype=torch.int32), occurrences(ids, n_experts + 1)[:n_experts], in_rank

    # Dispatch

    def dispatch(
        self,
        x: Tokens,
        num_tokens_per_rank: torch.Tensor,
        is_token_in_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        expert_alignment: int,
        num_worst_tokens: int,
        num_sms: int,
    ) -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None, list[int], NormalHandle]:
        """See `Buffer.dispatch`, without handle."""
        device, n_ranks = self.session.device, self.session.size
        tokens, fmt = self._tokens(x)
        n_tokens, hidden = tokens[0].shape
        alignment = check_int("expert_alignment", expert_alignment, 1, MAX_ALIGNMENT)
        worst = check_int("num_worst_tokens", num_worst_tokens, 0, MAX_WORST_TOKENS)
        check_tensor("num_tokens_per_rank", num_tokens_per_rank, [torch.int32], [n_ranks], device)
        check_tensor("is_token_in_rank", is_token_in_rank, [torch.bool], [n_tokens, n_ranks], device)
        check_tensor("num_tokens_per_expert", num_tokens_per_expert, [torch.int32], [None], device)
        n_experts = check_experts(num_tokens_per_expert.shape[0], n_ranks)
        if (topk_idx is None) != (topk_weights is None):
            raise ShapeError(
                "top-k choices and weights go together",
                field="topk_weights" if topk_weights is None else "topk_idx",
                value=None,
                allowed="both, or neither",
                remedy="pass both: weights of 1 if there are none",
            )
        if topk_idx is None:
            ranks = torch.arange(n_ranks, device=device)
            ids, n_experts = torch.where(is_token_in_rank, ranks, -1).contiguous(), n_ranks
            weights = None
        else:
            check_tensor("topk_idx", topk_idx, [torch.int64], [n_tokens, None], device)
            check_tensor("topk_weights", topk_weights, [torch.float32], topk_idx.shape, device)
            ids, weights = topk_idx.detach().clone(memory_format=torch.contiguous_format), dense(topk_weights)
        cfg = self._config(hidden, ids.shape[1], n_experts, fmt)
        if not worst:
            check_not_capturing(device, "the host cannot wait for counts", "pass num_worst_tokens, or a handle")
        capacity, has_topk = worst or cfg.rows_capacity, topk_idx is not None
        sets = graphs.normal(cfg)
        rounds = self.session.rounds(cfg, sets)
        with self.session.announcing(rounds, n_tokens, self._too_many):
            found = Received.empty(cfg, device, capacity)
            handle = NormalHandle(self.session, cfg, ids, has_topk, worst, found.memory, capacity)
            rounds.run(sets[0], "dispatch", *found, *tokens, ids, weights, n_sms=num_sms)
            recv_ids, recv_weights = self._choices(handle, capacity) if has_topk else (None, None)
            if worst:
                return self._received(found, worst, fmt), recv_ids, recv_weights, [], handle
            *counts, rows = self._wait_for_counts(handle, recv_ids)
            rounds.glance()
        handle.num_recv_tokens = rows
        recv_x = self._received(found, rows, fmt)
        if recv_ids is None or recv_weights is None:
            counts = self._count_experts(num_tokens_per_expert, rounds)
            return recv_x, None, None, [align_up(c, alignment) for c in counts], handle
        return recv_x, recv_ids[:rows], recv_weights[:rows], [align_up(c, alignment) for c in counts], handle

    def _choices(self, handle: NormalHandle, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Local ids int64 and weights float32 [capacity, K]; -1 and 0 in rows without a token."""
        cfg, memory = handle.cfg, handle.memory
        here = torch.arange(capacity, device=memory.device)[:, None] < handle.recv_count
        ids = torch.where(here, part(memory, "local_ids", cfg, capacity), -1).to(torch.int64)
        return ids, torch.where(here, part(memory, "local_weights", cfg, capacity), 0)

    def _wait_for_counts(self, handle: NormalHandle, recv_ids: torch.Tensor | None) -> list[int]:
        """Rows of each local expert, if there are choices, and of all. The host waits."""
        if recv_ids is None:
            return handle.recv_count.tolist()
        counts = occurrences(recv_ids + 1, handle.cfg.n_local_experts + 1)[1:]
        return torch.cat([counts, handle.recv_count]).tolist()

    def _count_experts(self, per_expert: torch.Tensor, rounds: Rounds) -> list[int]:
        """Tokens of each local expert, from what all ranks say of theirs: rows without top-k do not tell."""
        told = rounds.exchange("telling tokens of each expert, in a dispatch without topk_idx", per_expert.tolist())
        if len(set(map(len, told))) > 1:
            raise ConfigMismatchError(
                "ranks have different numbers of experts",
                field="num_tokens_per_expert",
                value=per_expert.shape[0],
                allowed=f"the same length on every rank: {[len(each) for each in told]}",
                remedy="pass what get_dispatch_layout gives for the same num_experts",
            )
        n_local = per_expert.shape[0] // self.session.size
        own = slice(self.session.rank * n_local, (self.session.rank + 1) * n_local)
        return [sum(counts) for counts in zip(*(each[own] for each in told), strict=True)]

    def dispatch_again(self, x: Tokens, handle: Any, num_sms: int) -> Tokens:
        """Send other tokens along the routes of a handle: rows as then, no top-k, no wait for counts.

        Raises:
            OrderError: Not a handle of this Buffer.
            ShapeError, DTypeError, DeviceError: The tokens do not fit it.
        """
        handle = self.session.own(handle, NormalHandle)
        tokens, fmt = self._tokens(x, handle.num_tokens)
        cfg = self._config(tokens[0].shape[1], handle.cfg.top_k, handle.cfg.n_experts, fmt)
        sets = graphs.normal(cfg)
        rounds = self.session.rounds(cfg, sets)
        self.session.queue.use_here(handle.made_on, handle.topk_idx)
        with self.session.announcing(rounds, handle.num_tokens, self._too_many):
            found = Received.empty(cfg, self.session.device, handle.num_recv_tokens)
            rounds.run(sets[0], "dispatch", *found, *tokens, handle.topk_idx, n_sms=num_sms)
        return self._received(found, handle.num_recv_tokens, fmt)

    def _tokens(self, x: Tokens, n_tokens: int | None = None) -> tuple[tuple[Any, Any], TokenFormat]:
        """Contiguous tokens, their scales or None, and their format."""
        device = self.session.device
        if not isinstance(x, (tuple, list)):
            check_tensor("x", x, [torch.bfloat16], [n_tokens, None], device)
            return (dense(x), None), BF16()
        if len(x) != 2:
            raise ShapeError(
                field="x",
                value=f"{len(x)} tensors",
                allowed="tokens, or (tokens, scales)",
                remedy="pass one of the two",
            )
        values, scales = x
        check_tensor("x[0]", values, [torch.float8_e4m3fn], [n_tokens, None], device)
        check_tensor("x[1]", scales, [torch.float32, torch.int32], [values.shape[0], None], device)
        fmt = BlockwiseFP8("ue8m0" if scales.dtype == torch.int32 else "float32")
        hidden = values.shape[1]
        per_token = fmt.scales_per_token(hidden)
        if hidden % BLOCK_SIZE == 0 and scales.shape[1] != per_token:
            raise ShapeError(
                field="x[1]",
                value=list(scales.shape),
                allowed=f"[{values.shape[0]}, {per_token}] with {scales.dtype}",
                remedy="pass one float32 scale for 128 channels, or four exponent bytes in an int32",
            )
        return (dense(values), dense(scales)), fmt

    def _config(self, hidden: int, top_k: int, n_experts: int, fmt: TokenFormat) -> EPConfig:
        timeout_s = self.session.timeout_s
        return sizes.normal_config(self.num_nvl_bytes, hidden, top_k, n_experts, self.session.size, fmt, timeout_s)

    def _too_many(self, cfg: EPConfig, rank: int, tokens: int) -> CapacityError:
        most = cfg.max_tokens_per_rank
        return CapacityError(
            f"rank {rank} has {tokens} tokens, and the windows have room for {most} a rank",
            field="num_nvl_bytes",
            value=self.num_nvl_bytes,
            allowed=f"at least {sizes.bytes_for(tokens, 2 * cfg.hidden_size, cfg.n_ranks)} for {tokens} tokens",
            remedy="make a Buffer of so many bytes on all ranks; or call reset() on all ranks and send less",
        )

    def _received(self, found: Received, rows: int, fmt: TokenFormat) -> Tokens:
        return found.tokens[:rows] if isinstance(fmt, BF16) else (found.tokens[:rows], found.scales[:rows])

    # Combine

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Buffer.combine`."""
        handle = self.session.own(handle, NormalHandle)
        device, cfg = self.session.device, handle.cfg
        check_tensor("x", x, [torch.bfloat16], [handle.num_recv_tokens, cfg.hidden_size], device)
        biases = biases_of(bias)
        for i, value in enumerate(biases):
            check_tensor(f"bias[{i}]", value, [torch.bfloat16], [handle.num_tokens, cfg.hidden_size], device)
        if topk_weights is not None:
            check_tensor("topk_weights", topk_weights, [torch.float32], [handle.num_recv_tokens, None], device)
        sums = None if topk_weights is None else sizes.sums_config(cfg, topk_weights.shape[1])
        sets = graphs.normal(cfg)
        rounds = self.session.rounds(cfg, sets)
        self.session.queue.use_here(handle.made_on, handle.memory, handle.topk_idx)
        sent = dense(x), handle.memory, handle.topk_idx, None, *map(dense, biases)
        combined = torch.empty(handle.num_tokens, cfg.hidden_size, dtype=torch.bfloat16, device=device)
        with self.session.explaining(rounds):
            rounds.run(sets[1], "combine", combined, *sent, n_sms=num_sms)
        if topk_weights is None or sums is None:
            return combined, None
        return combined, self._sum_weights(sums, topk_weights, handle, num_sms)

    def _sum_weights(self, cfg: EPConfig, weights: torch.Tensor, handle: NormalHandle, num_sms: int) -> torch.Tensor:
        """Weights travel as rows do: a combine of its own, K channels of float32."""
        top_k = weights.shape[1]
        sets = graphs.sums(cfg)
        rounds = self.session.rounds(cfg, sets)
        rows = pad(weights.detach(), (0, cfg.hidden_size - top_k)).contiguous()
        summed = torch.empty(handle.num_tokens, cfg.hidden_size, dtype=torch.float32, device=rows.device)
        with self.session.explaining(rounds):
            rounds.run(sets[0], "combine", summed, rows, handle.memory, handle.topk_idx, n_sms=num_sms)
        return summed[:, :top_k].contiguous()


def occurrences(ids: torch.Tensor, n: int) -> torch.Tensor:
    """int32 [n]: how often each of 0 to n-1 occurs in ids, int64, which has no other numbers. No wait of the host."""
    flat = ids.flatten()
    counts = torch.zeros(n, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def check_experts(num_experts: Any, n_ranks: int) -> int:
    """`num_experts`, if every rank can have as many.

    Raises:
        ConfigError: It is no such number.
    """
    n = check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    if n % n_ranks:
        raise ConfigError(
            field="num_experts",
            value=n,
            allowed=f"a multiple of the group's {n_ranks} ranks",
            remedy="pad the number of experts",
        )
    return n


def biases_of(bias: Any) -> list[Any]:
    """A bias, two, or none, as a list. Raises `ShapeError` where there are more."""
    if bias is None:
        return []
    found = list(bias) if isinstance(bias, (tuple, list)) else [bias]
    if len(found) > 2:
        raise ShapeError(
            field="bias", value=f"{len(found)} tensors", allowed="none, one or two", remedy="add them up first"
        )
    return [b for b in found if b is not None]


def check_one_node(num_tokens_per_rdma_rank: Any) -> None:
    """Raise `UnsupportedError` where a caller has ranks on several nodes in mind."""
    if num_tokens_per_rdma_rank is not None:
        raise UnsupportedError(
            "ranks are those of one node",
            field="num_tokens_per_rdma_rank",
            value="given",
            allowed="None, as get_dispatch_layout gives it",
            remedy="leave it out",
        )
