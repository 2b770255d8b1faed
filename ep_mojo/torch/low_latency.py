"""Low-latency mode: rows by local expert in room for the worst case, sums with the router's weights at the source.

The engine's layout "expert_padded" with reduce "source". L local experts, M = R*Tmax rows for each of them. Dispatch
and combine are one launch each, or with a hook two: the call sends, the hook receives into the tensors that the call
returned. Rounds are received in the order in which they were sent.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..config import MAX_HIDDEN, EPConfig
from ..errors import CapacityError, ConfigError, OrderError, ShapeError
from ..formats import BF16, BlockwiseFP8, TokenFormat, check_int
from ..layout import MAX_TOKENS
from . import graphs, sizes
from .checks import check_tensor, check_writable
from .normal import check_experts
from .rounds import Rounds
from .session import Session
from .tensors import ALIGNMENT, Received, dense, part, scales_by_row, used_here

Hook = Callable[[], None]
ZERO_COPY_BUFFERS = 2


class Plan(NamedTuple):
    """What all rounds of some sizes have in common: looked up once a call.

    Attributes:
        cfg: The engine's config.
        sets: The graphs.
        rounds: The rounds.
    """

    cfg: EPConfig
    sets: tuple[graphs.DispatchSet, graphs.CombineSet]
    rounds: Rounds


class LowLatencyHandle(Sequence):
    """What a low-latency dispatch leaves for combine. Of a round with a hook it is good once the hook was called.

    As a sequence: src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts. The two tensors are
    made when they are first asked for; combine does not need them.

    Attributes:
        plan: What it shares with other rounds.
        cfg: The engine's config.
        num_tokens: T of this rank.
        memory: The engine's handle: see `tensors.places`.
        made_on: The queue that has made it: see `Queue.use_here`.
        counts: int32 [L], rows of each local expert.
        received: Whether the round was received.
    """

    def __init__(self, session: Session, plan: Plan, num_tokens: int, memory: torch.Tensor):
        self.session, self.plan, self.num_tokens, self.memory = session, plan, num_tokens, memory
        self.cfg, self.made_on = plan.cfg, session.queue.current()
        self.counts = part(memory, "counts", plan.cfg)
        self.received = False

    @functools.cached_property
    def src_info(self) -> torch.Tensor:
        """int32 [L, M]: the token, on its source rank, that each row is; -1 past the last row of an expert."""
        origins = self._sources()
        return torch.where(origins < 0, -1, origins % self.cfg.max_tokens_per_rank)

    @functools.cached_property
    def layout_range(self) -> torch.Tensor:
        """int64 [L, R]: rows of an expert from a source rank: the first in the high 32 bits, how many in the low 32."""
        cfg, origins = self.cfg, self._sources()
        sources = torch.where(origins < 0, cfg.n_ranks, origins // cfg.max_tokens_per_rank).to(torch.int64)
        found = torch.zeros(cfg.n_local_experts, cfg.n_ranks + 1, dtype=torch.int64, device=origins.device)
        counts = found.scatter_add_(1, sources, torch.ones_like(sources))[:, : cfg.n_ranks]
        return (counts.cumsum(1) - counts) << 32 | counts

    def _sources(self) -> torch.Tensor:
        if not self.received:
            raise _hook_first("handle")
        return part(used_here(self.memory), "src_info", self.cfg)[:, 0].view(self.cfg.n_local_experts, -1)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        cfg = self.cfg
        names = ("src_info", "layout_range")
        sizes_ = (cfg.max_tokens_per_rank, cfg.hidden_size, cfg.n_experts)
        index %= len(self)
        return getattr(self, names[index]) if index < 2 else sizes_[index - 2]


class LowLatencyMode:
    """Dispatch and combine of one Buffer, without queues and events.

    Attributes:
        session: Whose.
        num_rdma_bytes: Of the Buffer.
    """

    def __init__(self, session: Session, num_rdma_bytes: int):
        self.session, self.num_rdma_bytes = session, num_rdma_bytes
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._pending: dict[tuple[Rounds, str], deque[object]] = {}
        self._zero_copy: dict[tuple[int, ...], deque[torch.Tensor]] = {}
        self._next: tuple[int, ...] | None = None

    def check_sizes(self, num_tokens: Any, hidden: Any, num_experts: Any) -> None:
        """Raise unless the Buffer was made for as many bytes.

        Raises:
            ConfigError: A number is out of range.
            CapacityError: num_rdma_bytes is too small for them.
        """
        most = check_int("num_max_dispatch_tokens_per_rank", num_tokens, 1, MAX_TOKENS)
        n_ranks = self.session.size
        n_experts = check_experts(num_experts, n_ranks)
        needed = sizes.low_latency_bytes(most, check_int("hidden", hidden, 8, MAX_HIDDEN), n_ranks, n_experts)
        if self.num_rdma_bytes < needed:
            raise CapacityError(
                f"{most} tokens a rank of {hidden} channels need more",
                field="num_rdma_bytes",
                value=self.num_rdma_bytes,
                allowed=f"at least {needed}",
                remedy="make the Buffer with Buffer.get_low_latency_rdma_size_hint(...) bytes",
            )

    # Dispatch

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_tokens: int,
        num_experts: int,
        stats: torch.Tensor | None,
        fmt: TokenFormat,
        later: bool,
    ) -> tuple[Any, torch.Tensor, LowLatencyHandle, Hook | None]:
        """See `Buffer.low_latency_dispatch`. `later`: return before anything is received, with a hook that does it."""
        device = self.session.device
        check_tensor("x", x, [torch.bfloat16], [None, None], device)
        check_tensor("topk_idx", topk_idx, [torch.int64], [x.shape[0], None], device)
        plan = self._plan(num_max_tokens, x.shape[1], topk_idx.shape[1], num_experts, fmt, stats)
        cfg, sets, rounds = plan
        self._check_room(rounds, "dispatch", later)
        given = dense(x), None, dense(topk_idx)
        found = Received.empty(cfg, device, scales=scales_by_row(cfg))
        handle = LowLatencyHandle(self.session, plan, x.shape[0], found.memory)
        if not later:
            with self.session.announcing(rounds, x.shape[0], _too_many):
                rounds.run(sets[0], "dispatch", *found, *given)
            self._arrived(handle, stats)
            return _rows(found), handle.counts, handle, None
        with self.session.announcing(rounds, x.shape[0], _too_many):
            rounds.run(sets[0], "send", None, None, None, *given)

        def receive() -> None:
            self.session.queue.use_here(handle.made_on, *found)
            if stats is not None:
                used_here(stats)  # the caller's, of any queue
            with self.session.announcing(rounds, 0, _too_many):
                rounds.run(sets[0], "receive", *found)
            self._arrived(handle, stats)

        hook = self._later(rounds, "dispatch", receive)
        return _rows(found), handle.counts, handle, hook

    def _plan(
        self,
        num_tokens: Any,
        hidden: int,
        top_k: int,
        num_experts: Any,
        fmt: TokenFormat,
        stats: torch.Tensor | None,
    ) -> Plan:
        """What such a round needs, if its sizes fit the Buffer, and `stats` them: all ranks make the first of a kind
        together, so nothing may be wrong then.

        Raises:
            ConfigError, CapacityError: See `check_sizes`.
            DTypeError, ShapeError, DeviceError: `stats` is not int32 [L].
            ConfigMismatchError, PeerTimeoutError, EPError: See `Session.rounds`.
        """
        key = num_tokens, hidden, top_k, num_experts, fmt
        plain = type(num_tokens) is int and type(num_experts) is int  # as a key 4.0 would pass for 4
        plan = self._plans.get(key) if plain else None
        if plan is None:
            self.check_sizes(num_tokens, hidden, num_experts)
            n_ranks, timeout_s = self.session.size, self.session.timeout_s
            cfg = sizes.low_latency_config(
                num_tokens, hidden, top_k, num_experts, n_ranks, dispatch_format=fmt, timeout_s=timeout_s
            )
        else:
            cfg = plan.cfg
        if stats is not None:
            n_local, name = cfg.n_local_experts, "cumulative_local_expert_recv_stats"
            check_writable(name, check_tensor(name, stats, [torch.int32], [n_local], self.session.device))
        if plan is None:
            sets = graphs.low_latency(cfg)
            plan = self._plans[key] = Plan(cfg, sets, self.session.rounds(cfg, sets, shrink=True))
        return plan

    def _arrived(self, handle: LowLatencyHandle, stats: torch.Tensor | None) -> None:
        handle.received = True
        if stats is not None:
            stats += handle.counts

    # Combine

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        zero_copy: bool,
        later: bool,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Hook | None]:
        """See `Buffer.low_latency_combine`."""
        handle = self.session.own(handle, LowLatencyHandle)
        cfg, device = handle.cfg, self.session.device
        shape = cfg.n_local_experts, cfg.n_ranks * cfg.max_tokens_per_rank, cfg.hidden_size
        check_tensor("x", x, [torch.bfloat16], shape, device)
        choices = handle.num_tokens, cfg.top_k
        check_tensor("topk_idx", topk_idx, [torch.int64], choices, device)
        check_tensor("topk_weights", topk_weights, [torch.float32], choices, device)
        if out is not None:
            check_tensor("out", out, [torch.bfloat16], [handle.num_tokens, cfg.hidden_size], device)
            if not out.is_contiguous():
                raise ShapeError(field="out", value="strided", allowed="contiguous", remedy="pass a contiguous tensor")
            if out.is_cuda and out.data_ptr() % ALIGNMENT:
                raise ShapeError(
                    field="out",
                    value=f"at {out.data_ptr():#x}",
                    allowed=f"from a multiple of {ALIGNMENT} bytes on",
                    remedy="pass a tensor of its own, not a part of one",
                )
        if not handle.received:
            raise _hook_first("handle")
        rounds, back = handle.plan.rounds, handle.plan.sets[1]
        self._check_room(rounds, "combine", later)
        self.session.queue.use_here(handle.made_on, handle.memory)
        rows = self._filled(shape) if zero_copy else dense(x)
        ids, weights = dense(topk_idx), dense(topk_weights)
        if later:  # the hook reads them, when the caller may have changed its own
            ids, weights = ids.clone(), weights.clone()
        y = torch.empty(handle.num_tokens, cfg.hidden_size, dtype=torch.bfloat16, device=device) if out is None else out
        if not later:
            with self.session.explaining(rounds):
                rounds.run(back, "combine", y, rows, handle.memory, ids, weights)
            return y, None
        with self.session.explaining(rounds):
            rounds.run(back, "send_back", None, rows, handle.memory)

        made_on = self.session.queue.current()

        def receive() -> None:
            self.session.queue.use_here(made_on, ids, weights)
            used_here(y)  # may be the caller's, of any queue
            with self.session.explaining(rounds):
                rounds.run(back, "receive_back", y, None, None, ids, weights)

        return y, self._later(rounds, "combine", receive)

    def next_buffer(self, handle: Any) -> torch.Tensor:
        """See `Buffer.get_next_low_latency_combine_buffer`."""
        cfg = self.session.own(handle, LowLatencyHandle).cfg
        shape = cfg.n_local_experts, cfg.n_ranks * cfg.max_tokens_per_rank, cfg.hidden_size
        if shape not in self._zero_copy:
            with torch.inference_mode(False):  # they outlive the mode they are made in
                made = [
                    torch.empty(shape, dtype=torch.bfloat16, device=self.session.device)
                    for _ in range(ZERO_COPY_BUFFERS)
                ]
            self._zero_copy[shape] = deque(made)
        self._next = shape
        return self._zero_copy[shape][0]

    def _filled(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor that the caller has filled; the next one is another, so that this one may still be read."""
        if self._next != shape:
            raise OrderError(
                "there is no buffer that the caller could have filled",
                field="zero_copy",
                value=True,
                allowed="after get_next_low_latency_combine_buffer(handle)",
                remedy="fill what that returns, or leave zero_copy out",
            )
        buffers, self._next = self._zero_copy[shape], None
        buffers.rotate(-1)
        return buffers[-1]

    # Hooks

    def _check_room(self, rounds: Rounds, stage: str, later: bool) -> None:
        """Raise where a round would overtake one whose hook has not been called, or more are under way than fit."""
        waiting = len(self._pending.get((rounds, stage), ()))
        most = rounds.cfg.num_buffers if later else 1
        if waiting >= most:
            raise OrderError(
                f"{waiting} earlier {stage} rounds have not been received",
                field="return_recv_hook",
                value=later,
                allowed=f"up to {rounds.cfg.num_buffers} rounds with hooks under way, and none in front of one without",
                remedy="call the hooks of the earlier rounds first",
            )

    def _later(self, rounds: Rounds, stage: str, receive: Callable[[], Any]) -> Hook:
        waiting = self._pending.setdefault((rounds, stage), deque())
        turn = object()  # not the hook itself, which would then keep itself and its tensors

        waiting.append(turn)
        return functools.partial(_receive_once, self.session, waiting, turn, stage, receive)

    def forget(self) -> None:
        """Drop the hooks of rounds that a reset has given up."""
        for waiting in self._pending.values():
            waiting.clear()  # hooks hold it
        self._pending.clear()

    def give_up_buffers(self) -> None:
        """Let go of the tensors that `next_buffer` gave."""
        self._zero_copy.clear()
        self._next = None

    # Masks

    def make_masks(self) -> None:
        """Let ranks be masked: once, before the first round."""
        session = self.session
        with torch.inference_mode(False), session.queue.launching():  # as in `next_buffer`
            session.masks = torch.zeros(session.size, dtype=torch.int32, device=session.device)

    def query_mask(self, mask_status: torch.Tensor) -> None:
        """Write int32 [R]: 1 for a rank that is masked, by hand or since it did not come.

        Raises:
            DTypeError, ShapeError, DeviceError: Not such a tensor.
        """
        device, n_ranks = self.session.device, self.session.size
        check_writable("mask_status", check_tensor("mask_status", mask_status, [torch.int32], [n_ranks], device))
        mask_status.copy_(self.session.masks)

    def update_mask(self, rank: Any, mask: Any) -> None:
        """Leave a rank out of the rounds that follow, or take it in again.

        Raises:
            ConfigError: There is no such rank, or it is this one.
        """
        n = check_int("rank_to_mask", rank, 0, self.session.size - 1)
        if mask and n == self.session.rank:
            raise ConfigError(
                "a rank cannot leave itself out",
                field="rank_to_mask",
                value=n,
                allowed="a rank other than this one",
                remedy="mask it on the other ranks, and make no calls here",
            )
        self.session.masks[n] = int(bool(mask))

    def clean_masks(self) -> None:
        """Take all ranks in again."""
        self.session.masks.zero_()


def _rows(found: Received) -> Any:
    return found.tokens if found.scales is None else (found.tokens, found.scales)


@functools.cache
def format_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> TokenFormat:
    """The format of a low-latency dispatch.

    Raises:
        ConfigError: UE8M0 scales that are not powers of two, or rounding without fp8.
    """
    if not use_fp8:
        if round_scale or use_ue8m0:
            raise ConfigError(
                field="round_scale" if round_scale else "use_ue8m0",
                value=True,
                allowed="with use_fp8=True",
                remedy="leave it out, or pass use_fp8=True",
            )
        return BF16()
    if use_ue8m0 and not round_scale:
        raise ConfigError(
            "UE8M0 has powers of two only",
            field="use_ue8m0",
            value=True,
            allowed="with round_scale=True",
            remedy="pass round_scale=True",
        )
    return BlockwiseFP8("ue8m0" if use_ue8m0 else "power_of_two" if round_scale else "float32", "column")


def _too_many(cfg: EPConfig, rank: int, tokens: int) -> CapacityError:
    needed = sizes.low_latency_bytes(tokens, cfg.hidden_size, cfg.n_ranks, cfg.n_experts)
    return CapacityError(
        f"rank {rank} has {tokens} tokens",
        field="num_max_dispatch_tokens_per_rank",
        value=cfg.max_tokens_per_rank,
        allowed=f"at least {tokens}, with num_rdma_bytes of at least {needed}",
        remedy="pass that number on all ranks, after reset() on all ranks; or send less",
    )


def _hook_first(field: str) -> OrderError:
    return OrderError(
        "the round has not been received",
        field=field,
        value="of a dispatch whose hook has not been called",
        allowed="after its hook",
        remedy="call the hook first",
    )


@torch.compiler.disable
def _receive_once(
    session: Session, waiting: deque[object], turn: object, stage: str, receive: Callable[[], Any]
) -> None:
    """A hook: see `Buffer.low_latency_dispatch`."""
    session.live()
    if turn not in waiting:
        raise OrderError(
            "the hook was called before, or its round was given up by reset()",
            allowed="once",
            remedy="call each hook once, and none from before a reset",
        )
    if waiting[0] is not turn:
        raise OrderError(
            f"an earlier {stage} round has not been received",
            allowed="hooks in the order of their calls",
            remedy="call the earlier hook first",
        )
    waiting.popleft()
    receive()
