"""What both dispatchers have in common: their buffers, which belong to the classes, and a step. See `dispatchers.py`.

Letters as in `gathering.py`; K = topk, the router's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..comm.board import board_of
from ..config import check_seconds
from ..errors import ConfigError, DTypeError, OrderError, ShapeError
from ..formats import check_int
from ..layout import MAX_EXPERTS, MAX_TOKENS, MAX_TOP_K
from .checks import check_tensor
from .gathering import Gathering, gather_config, gather_graph, most_experts
from .streams import check_group, check_not_capturing, device_of

METADATA = ("valid tokens", "own offset", "largest count")
"""What `_step_metadata` holds."""
REDUCED = torch.bfloat16, torch.float32
"""What `reduce_dtype` can be."""
COUNT_WIDTH = 8
"""Channels of a row that carries a count."""


class AllGatherDispatcherBase:
    """What both dispatchers share; for isinstance, and for who reads `_valid_tokens_tensor`.

    Args:
        num_local_experts: Experts of this rank.
        local_expert_indices: Their global numbers.
        config: Of the layer; kept, not read.
        pg_collection: Not read: the group is that of `allocate_buffers`.
        runs_metadata_sync: Whether this instance's `token_dispatch` refreshes the metadata: the first layer's does.

    Attributes:
        routing_map: int64 [n, K], the choices of all gathered tokens, -1 past the last; before token_dispatch the
            rank's own.
        timeout_s, make_timeout_s: See `Buffer`. Class attributes: set them before `allocate_buffers`, on all ranks.
        reduce_dtype: Type of the rows that are reduced, and so of `_get_rsv_tensor()`: float32 or bfloat16; the same
            holds. Kernels that write float32 rows there need float32 here.
    """

    timeout_s: float = 30.0
    make_timeout_s: float = 300.0
    reduce_dtype: torch.dtype = torch.bfloat16

    _valid_tokens_tensor: ClassVar[torch.Tensor | None] = None
    _host_valid_tokens_estimate: ClassVar[int | None] = None
    _local_tokens_per_rank: ClassVar[list[int] | None] = None
    _external_shared_expert_launch: ClassVar[bool] = False
    _step_metadata: ClassVar[torch.Tensor | None] = None
    _per_rank_worst_case_token_count: ClassVar[int] = 2048
    _local_tokens_tensor: ClassVar[torch.Tensor | None] = None
    _topk: ClassVar[int] = 0
    _device: ClassVar[torch.device | None] = None
    _rank: ClassVar[int] = 0
    _gatherings: ClassVar[dict[str, Gathering]] = {}
    _symm_agv_hidden: ClassVar[dict[str, torch.Tensor] | None] = None
    _symm_agv_routing: ClassVar[dict[str, torch.Tensor] | None] = None
    _symm_agv_probs: ClassVar[dict[str, torch.Tensor] | None] = None
    _symm_rsv: ClassVar[dict[str, torch.Tensor] | None] = None

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: Sequence[int],
        config: Any = None,
        pg_collection: Any = None,
        runs_metadata_sync: bool = True,
    ):
        self.num_local_experts = check_int("num_local_experts", num_local_experts, 1, MAX_EXPERTS)
        indices = list(local_expert_indices) if isinstance(local_expert_indices, Iterable) else []
        if len(indices) != num_local_experts:
            raise ShapeError(
                field="local_expert_indices",
                value=local_expert_indices,
                allowed=f"{num_local_experts} numbers",
                remedy="pass the global numbers of this rank's experts",
            )
        most = MAX_EXPERTS
        self.local_expert_indices = [check_int("local_expert_indices", i, -most, most) for i in indices]
        self.config = config
        self.runs_metadata_sync = bool(runs_metadata_sync)
        self.shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.routing_map: torch.Tensor | None = None
        self.hidden_shape: torch.Size | None = None
        self._shared_output: torch.Tensor | None = None
        self._shared_stream: torch.cuda.Stream | None = None
        self._brought: Gathering | None = None  # counts of this step, while token_dispatch has them noted

    # Buffers

    @classmethod
    def allocate_buffers(
        cls, per_rank_worst_case_token_count: int, topk: int, hidden_size: int, ep_group: dist.ProcessGroup
    ) -> None:
        """Make everything that steps need, for all instances of both classes. All ranks of the group call this.

        Args:
            per_rank_worst_case_token_count: Tmax.
            topk: K, up to 32.
            hidden_size: H, a multiple of 8.
            ep_group: The ranks.

        Raises:
            ConfigError: A number is out of range.
            DTypeError: `reduce_dtype`, or ep_group, is something else.
            UnsupportedError: The group has another backend than gloo or nccl.
            ConfigMismatchError: Ranks pass different ones; on all of them.
            OrderError: Inside the capture of a CUDA graph.
            PeerTimeoutError, PeerLostError: A rank did not come, or is gone.
        """
        base, device = AllGatherDispatcherBase, device_of(check_group("ep_group", ep_group))
        if cls.reduce_dtype not in REDUCED:
            raise DTypeError(
                field="reduce_dtype",
                value=cls.reduce_dtype,
                allowed=" or ".join(map(str, REDUCED)),
                remedy="set one of these before allocate_buffers, on all ranks",
            )
        make_timeout_s = check_seconds("make_timeout_s", cls.make_timeout_s)
        check_not_capturing(device, "buffers cannot be made", "call allocate_buffers when the model is made")
        tmax = check_int("per_rank_worst_case_token_count", per_rank_worst_case_token_count, 1, MAX_TOKENS)
        topk = check_int("topk", topk, 1, MAX_TOP_K)
        # Before anything that is there is given up: numbers out of range end here.
        tokens = gather_config(ep_group.size(), tmax, hidden_size, topk, cls.timeout_s, cls.reduce_dtype)
        counts = gather_config(ep_group.size(), 1, COUNT_WIDTH, 0, cls.timeout_s)
        with torch.inference_mode(False):  # they outlive the mode they are made in
            base._give_up_buffers()
            how = ep_group, board_of(ep_group), device
            base._gatherings = {
                "tokens": Gathering(*how, tokens, make_timeout_s, cls.reduce_dtype, [gather_graph(COUNT_WIDTH)]),
                "counts": Gathering(*how, counts, make_timeout_s),
            }
            n = ep_group.size() * tmax
            base._per_rank_worst_case_token_count, base._topk = tmax, topk
            if base._device != device:
                base._step_metadata = base._valid_tokens_tensor = None
            elif base._step_metadata is not None:
                base._step_metadata.zero_()
            base._device = device
            made = base._gatherings["tokens"]
            base._symm_agv_hidden = {"tensor": made.rows}
            base._symm_agv_routing = {"tensor": made.ids}
            base._symm_agv_probs = {"tensor": made.weights}
            base._symm_rsv = {"tensor": torch.zeros(n, hidden_size, dtype=cls.reduce_dtype, device=device)}
            base._rank = ep_group.rank()
            base.allocate_valid_tokens_tensor()

    @classmethod
    def allocate_valid_tokens_tensor(cls) -> None:
        """Make `_step_metadata`, int32 [3], and `_valid_tokens_tensor`, its first word, unless they are there: on the
        current GPU, without one in host memory. `allocate_buffers` keeps them, if its group's device is the same.

        Raises:
            OrderError: Inside the capture of a CUDA graph.
        """
        base = AllGatherDispatcherBase
        if base._valid_tokens_tensor is not None:
            return
        device = base._device
        if device is None:
            on_gpu = torch.cuda.is_available()
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        check_not_capturing(device, "tensors that stay cannot be made", "call it when the model is made")
        base._device = device
        with torch.inference_mode(False):
            base._step_metadata = torch.zeros(len(METADATA), dtype=torch.int32, device=base._device)
            base._valid_tokens_tensor = base._step_metadata[:1]

    @classmethod
    def _delete_buffers(cls) -> None:
        base = AllGatherDispatcherBase
        base._give_up_buffers()
        base._step_metadata = base._valid_tokens_tensor = base._device = None

    @classmethod
    def _give_up_buffers(cls) -> None:
        """All that depends on sizes and the group."""
        base = AllGatherDispatcherBase
        made, base._gatherings = base._gatherings, {}
        for each in made.values():
            each.destroy()
        base._symm_agv_hidden = base._symm_agv_routing = base._symm_agv_probs = base._symm_rsv = None
        base._local_tokens_tensor = None
        base._host_valid_tokens_estimate = base._local_tokens_per_rank = None

    @classmethod
    def check(cls) -> None:
        """Wait for all steps, and raise what failed in them."""
        for each in cls._made().values():
            each.check()

    @classmethod
    def reset(cls) -> None:
        """Go on after a failure. All ranks call this."""
        for each in cls._made().values():
            each.reset()

    @classmethod
    def _made(cls) -> dict[str, Gathering]:
        if not AllGatherDispatcherBase._gatherings:
            raise OrderError(
                "there are no buffers",
                allowed="after allocate_buffers",
                remedy=f"call {cls.__name__}.allocate_buffers(tokens, topk, hidden_size, ep_group) on all ranks first",
            )
        return AllGatherDispatcherBase._gatherings

    @classmethod
    def set_local_tokens(cls, count: torch.Tensor | None) -> None:
        """Let a device count say how many of a rank's rows are tokens, the first ones; the others are padding.

        Args:
            count: int32 [1], read in every step, so that it may change between replays of a captured one; None: all
                rows are tokens.
        """
        cls._made()
        if count is not None:
            check_tensor("count", count, [torch.int32], [1], AllGatherDispatcherBase._device)
        AllGatherDispatcherBase._local_tokens_tensor = count

    @classmethod
    def _valid_tokens(cls) -> torch.Tensor:
        cls._made()
        return AllGatherDispatcherBase._valid_tokens_tensor

    @classmethod
    def _get_host_valid_tokens_estimate(cls) -> int | None:
        return AllGatherDispatcherBase._host_valid_tokens_estimate

    # A step

    def update_metadata(self, local_tokens: int) -> None:
        """Tell all ranks how many tokens this one has, and refresh `_step_metadata` and `_valid_tokens_tensor`.

        Once a step, by all ranks. `token_dispatch` of the first instance calls it, when tokens have come with their
        counts: then nothing is launched for these.

        Raises:
            OrderError: Before `allocate_buffers`.
            ConfigError: No number from 0 to Tmax.
            PeerTimeoutError, PeerLostError: See `token_dispatch`.
        """
        base, made = AllGatherDispatcherBase, self._made()
        local_tokens = check_int("local_tokens", local_tokens, 0, base._per_rank_worst_case_token_count)
        if self._brought is not None:
            self._note(self._brought.offsets, self._brought.counts)
            return
        count = base._local_tokens_tensor
        if count is None:
            count = torch.full((1,), local_tokens, dtype=torch.int32, device=base._device)
        words = torch.nn.functional.pad(count[None].clamp(0, local_tokens), (0, COUNT_WIDTH // 2 - 1))
        made["counts"].gather(words.view(torch.bfloat16))
        told = made["counts"]
        counts = torch.where(told.counts > 0, told.rows.view(torch.int32)[:, 0], 0)  # none of a launch that has failed
        self._note(torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)), counts)

    def _note(self, offsets: torch.Tensor, counts: torch.Tensor) -> None:
        """Refresh what is known of a step.

        Args:
            offsets: int32 [R + 1], the first row of each rank.
            counts: int32 [R], tokens of each.
        """
        base = AllGatherDispatcherBase
        base._host_valid_tokens_estimate = None
        own = offsets[base._rank : base._rank + 1]
        torch.cat([offsets[-1:], own, counts.amax(0, keepdim=True)], out=base._step_metadata)

    def set_shared_experts(self, shared_experts: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run `shared_experts` beside the step, and add what it gives in `combine_postprocess`."""
        self.shared_experts = shared_experts

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the routes, and begin the shared experts on a queue of their own; nothing is sent.

        Args:
            hidden_states: [..., H].
            routing_map: int64 or int32 [T, K], global experts.
            probs: float32 [T, K].

        Returns:
            hidden_states [T, H], probs.

        Raises:
            DTypeError, ShapeError: hidden_states is no such tensor.
        """
        if not isinstance(hidden_states, torch.Tensor):
            raise DTypeError.wrong_kind(
                "hidden_states", hidden_states, allowed="a torch.Tensor", remedy="pass the tokens as one"
            )
        if hidden_states.dim() < 1 or not hidden_states.shape[-1]:
            raise ShapeError(
                field="hidden_states",
                value=list(hidden_states.shape),
                allowed="[..., H]",
                remedy="pass the tokens' channels",
            )
        self.hidden_shape, self.routing_map = hidden_states.shape, routing_map
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.shared_experts is not None and not self._external_shared_expert_launch:
            self._shared_output = self._beside(hidden)
        return hidden, probs

    def _beside(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.is_cuda:
            return self.shared_experts(hidden)
        if self._shared_stream is None:
            self._shared_stream = torch.cuda.Stream(hidden.device)
        self._shared_stream.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(self._shared_stream):
            hidden.record_stream(self._shared_stream)
            return self.shared_experts(hidden)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather tokens, probabilities and routes of all ranks, ranks ascending, without gaps. All ranks call this.

        Args:
            hidden_states: bfloat16 [T, H].
            probs: float32 [T, K].

        Returns:
            hidden_states [n, H] and probs [n, K], and `routing_map` becomes int64 [n, K]: n rows, of which the first
            `_valid_tokens_tensor` hold a token; past those routes are -1, and the rest is unspecified. All stay good
            until the next token_dispatch of any instance.

        Raises:
            OrderError: Before `allocate_buffers` or `dispatch_preprocess`; see `AllGatherDispatcher`.
            ConfigError: The instance has experts that choices cannot name.
            CapacityError: T > Tmax. Nothing was sent.
            DTypeError, ShapeError, DeviceError: An argument does not fit. Nothing was sent.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone. With GPUs later.
        """
        base, made = AllGatherDispatcherBase, self._made()
        if self.routing_map is None:
            raise OrderError("there are no routes", allowed="after dispatch_preprocess", remedy="call that first")
        gathering = made["tokens"]
        self._check_turn(gathering)
        gathering.check_rows("hidden_states", hidden_states)
        self._check_experts(gathering)
        tokens, choices = hidden_states.shape[0], base._topk
        check_tensor("probs", probs, [torch.float32], [tokens, choices], base._device)
        check_tensor("routing_map", self.routing_map, [torch.int64, torch.int32], [tokens, choices], base._device)
        gathering.gather(hidden_states, self.routing_map.to(torch.int64), probs, base._local_tokens_tensor)
        if self.runs_metadata_sync:
            self._brought = gathering
            try:
                self.update_metadata(tokens)
            finally:
                self._brought = None
        n = self._rows(gathering, tokens)
        self.routing_map = gathering.ids[:n].to(torch.int64)
        return gathering.rows[:n], gathering.weights[:n]

    def _check_experts(self, gathering: Gathering) -> None:
        most = most_experts(len(gathering.counts))
        wrong = [index for index in self.local_expert_indices if not 0 <= index < most]
        if wrong:
            raise ConfigError(
                field="local_expert_indices",
                value=wrong[0],
                allowed=f"0 to {most - 1} with {len(gathering.counts)} ranks",
                remedy="number the experts from 0",
            )

    def _check_turn(self, gathering: Gathering) -> None:
        """Raise where this instance cannot gather now."""

    def _rows(self, gathering: Gathering, tokens: int) -> int:
        """How many gathered rows to give."""
        raise NotImplementedError

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """As they are, and None for the tokens of each expert: experts take the gathered tokens with `routing_map`."""
        return hidden_states, None, probs

    def combine_preprocess(self, expert_output: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return expert_output

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Add up what the ranks give for each token: float32, ranks ascending, rounded once. All ranks call this.

        Args:
            hidden_states: [n, H], the rows of `token_dispatch`; in `reduce_dtype`, as `_get_rsv_tensor()` is, which is
                read in place. Other types are converted first.

        Returns:
            bfloat16 [T, H].

        Raises:
            OrderError: Before the first `token_dispatch`.
            DTypeError, ShapeError, DeviceError: An argument does not fit. Nothing was sent.
            PeerTimeoutError, PeerLostError: See `token_dispatch`.
        """
        gathering = self._made()["tokens"]
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            raise DTypeError(
                field="hidden_states",
                value=getattr(hidden_states, "dtype", type(hidden_states).__name__),
                allowed="a tensor of real numbers",
                remedy="pass the experts' rows",
            )
        return gathering.reduce(hidden_states.detach().to(AllGatherDispatcherBase._symm_rsv["tensor"].dtype))

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """In the shape given to `dispatch_preprocess`, with what the shared experts gave added.

        Raises:
            ShapeError: Not as many rows as that had.
        """
        if self.hidden_shape is not None and hidden_states.numel() != self.hidden_shape.numel():
            raise ShapeError(
                field="hidden_states",
                value=list(hidden_states.shape),
                allowed=f"the rows of {list(self.hidden_shape)}",
                remedy="pass what token_combine gave",
            )
        shared, self._shared_output = self._shared_output, None
        if shared is not None:
            if self._shared_stream is not None:
                current = torch.cuda.current_stream(shared.device)
                current.wait_stream(self._shared_stream)
                shared.record_stream(current)
            hidden_states = hidden_states + shared.reshape(hidden_states.shape)
        return hidden_states if self.hidden_shape is None else hidden_states.view(self.hidden_shape)
