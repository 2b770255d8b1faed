"""`Buffer`: what programs written for DeepEP call. The modes do the work; here calls meet queues and events."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..config import MAX_RANKS, MAX_SMS, check_seconds
from ..errors import ConfigError, DTypeError, ShapeError, UnsupportedError
from ..formats import check_int
from . import sizes
from .low_latency import LowLatencyMode
from .low_latency_calls import LowLatencyCalls
from .normal import NormalHandle, NormalMode, Tokens, check_one_node
from .session import Session
from .sizes import Config
from .streams import EventHandle, EventOverlap, check_events, check_group, check_not_capturing, device_of


class Buffer(LowLatencyCalls):
    """Dispatch and combine between the ranks of a `torch.distributed` group, in DeepEP's shape.

    All ranks make it and make the same calls in the same order. Windows (the memory that peers write) and compiled
    graphs are made by the first call that needs them, and by the first with another hidden size, number of choices or
    experts, or format: these calls wait for all ranks, and compile for some seconds.

    A group with the nccl backend takes tensors on the GPU that is current when the Buffer is made, one for each rank;
    one with gloo alone takes tensors in host memory. On a GPU calls return when their work has been queued, but where
    they say that the host waits; a failure of such a call is raised by a later one, or by `check`.

    Args:
        group: The ranks, at most 8, all on this node.
        num_nvl_bytes: Bytes of a rank's windows in normal mode; they bound its tokens: see `Config`. Each hidden size,
            number of choices or experts, and format that is used has windows of its own, of at most so many bytes.
        num_rdma_bytes: The same for low-latency mode: see `get_low_latency_rdma_size_hint`.
        low_latency_mode: Whether the low_latency_* calls are going to be used.
        num_qps_per_rank: Not used: ranks of one node need no queue pairs.
        allow_nvlink_for_low_latency_mode: True: there is no other way.
        allow_mnnvl: Not used: one node.
        explicitly_destroy: The program calls `destroy` itself. Otherwise the end of the object does; either way
            `destroy` may be called, and again.
        enable_shrink: Whether low-latency rounds leave ranks out: those masked by the mask calls, and a rank that does
            not come within `timeout_s`, fails or ends, which is masked then and no error.
        comm: None. DeepEP takes an mpi4py communicator here.

    Attributes:
        rank, group_size, group: The ranks.
        num_sms: SMs of a launch in normal mode, of the class: `set_num_sms`.
        timeout_s: The longest wait for a peer in seconds, 0 = no limit. A class attribute: set it before the first
            Buffer, on all ranks.
        make_timeout_s: The same where ranks make a Buffer, windows or graphs together.

    Raises:
        ConfigError, DTypeError, UnsupportedError: An argument is out of range, or asks for what there is not.
        OrderError: The group was destroyed; or inside the capture of a CUDA graph.
        ConfigMismatchError: Ranks pass different arguments; on all of them.
        PeerTimeoutError, PeerLostError: A rank did not come, or the process that has the group's store is gone.
    """

    num_sms: int = 20
    timeout_s: float = 30.0
    make_timeout_s: float = 300.0

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ):
        self._session: Session | None = None
        self.explicitly_destroy = explicitly_destroy
        if comm is not None:
            raise UnsupportedError.wrong_kind("comm", comm, allowed="None", remedy="pass a torch.distributed group")
        device = device_of(check_group("group", group))
        if group.size() > MAX_RANKS:
            raise ConfigError(
                field="group", value=f"{group.size()} ranks", allowed=f"1 to {MAX_RANKS}", remedy="use smaller groups"
            )
        self.num_nvl_bytes = check_int("num_nvl_bytes", num_nvl_bytes, 0, sizes.LARGEST_BYTES)
        self.num_rdma_bytes = check_int("num_rdma_bytes", num_rdma_bytes, 0, sizes.LARGEST_BYTES)
        check_int("num_qps_per_rank", num_qps_per_rank, 1, 1 << 20)
        if not allow_nvlink_for_low_latency_mode:
            raise UnsupportedError(
                "ranks of one node reach each other over NVLink alone",
                field="allow_nvlink_for_low_latency_mode",
                value=False,
                allowed="True",
                remedy="leave it out",
            )
        self.low_latency_mode, self.enable_shrink = bool(low_latency_mode), bool(enable_shrink)
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        check_not_capturing(device, "a Buffer cannot be made", "make it before")
        waits = {name: check_seconds(name, getattr(self, name)) for name in ("timeout_s", "make_timeout_s")}
        session = Session(group, device, **waits)
        same = ("num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "enable_shrink")
        given = {name: getattr(self, name) for name in same} | {"timeout_s": session.timeout_s}
        session.board.agree_on("Buffer", given, session.make_timeout_s)
        self._session = session
        self._normal = NormalMode(session, self.num_nvl_bytes)
        self._low_latency = LowLatencyMode(session, self.num_rdma_bytes)
        if self.low_latency_mode and self.enable_shrink:
            self._low_latency.make_masks()

    # Life

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a Buffer has windows that are its own",
            field="copy or pickle",
            value="a Buffer",
            allowed="references to it",
            remedy="pass it on as it is, or make another one, on all ranks",
        )

    def destroy(self) -> None:
        """Give up windows and graphs. Can be called again; every other call then raises `OrderError`."""
        if self._session is not None:
            self._session.destroy()
            self._low_latency.give_up_buffers()

    def check(self) -> None:
        """Wait for all rounds of this rank, and raise what failed in them. Not in DeepEP.

        Raises:
            OrderError: After `destroy`, or inside the capture of a CUDA graph.
            CapacityError, PeerTimeoutError, PeerLostError: See `dispatch`.
        """
        self._live().check()

    def reset(self) -> None:
        """Go on after a round that failed, on all ranks: all of them call this. No rank is masked then. Not in DeepEP.

        Raises:
            OrderError: After `destroy`, or inside the capture of a CUDA graph.
            PeerTimeoutError, PeerLostError: A rank does not come, or is gone.
        """
        self._live().reset()
        self._low_latency.forget()

    def __del__(self):
        with contextlib.suppress(AttributeError, RuntimeError):
            if self._session is not None and not self._session.destroyed:
                self._session.destroy()
                if self.explicitly_destroy:
                    warnings.warn(
                        "a Buffer with explicitly_destroy=True was not destroyed", ResourceWarning, stacklevel=2
                    )

    def _live(self) -> Session:
        self._session.live()
        return self._session

    # Settings and sizes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the SMs (on the host: worker threads) that a launch of normal mode may use, for all Buffers.

        Raises:
            ConfigError: Not an even number from 2 to 1024.
        """
        n = check_int("new_num_sms", new_num_sms, 2, 1024)
        if n % 2:
            raise ConfigError(field="new_num_sms", value=n, allowed="an even number", remedy=f"use {n + 1}")
        Buffer.num_sms = n

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: the kernels are compiled for the device that is there."""
        return True

    @staticmethod
    def capture() -> EventOverlap:
        """An event after all that the current queue has been given."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config with `Buffer.num_sms`.

        Raises:
            ConfigError: num_ranks is out of range.
        """
        check_int("num_ranks", num_ranks, 1, MAX_RANKS)
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    def get_comm_stream(self) -> Any:
        """The queue of calls with previous_event or async_finish."""
        return self._live().queue.stream

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Sequence[int] | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """This rank's own receive window of dispatch, as it is: for looking at. Peers write it in every round.

        Messages of few tokens (R·T·K up to 1024) have room for cells, twice their bytes, which GPUs write: see
        docs/protocol.md.

        Args:
            dtype: Of the elements.
            size: Shape; None: all of it, flat.
            offset: First element.
            use_rdma_buffer: The window of low-latency mode, not of normal mode.

        Raises:
            DTypeError, ConfigError, ShapeError: An argument does not fit.
            OrderError: No round of that mode has made windows.
        """
        if not isinstance(dtype, torch.dtype):
            raise DTypeError(field="dtype", value=dtype, allowed="a torch.dtype", remedy="pass torch.uint8, say")
        return self._live().window(dtype, size, check_int("offset", offset, 0, sizes.LARGEST_BYTES), use_rdma_buffer)

    # Normal mode

    @torch.compiler.disable  # a graph of torch.compile ends here, and goes on behind it
    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where tokens go. Sends nothing.

        Args:
            topk_idx: int64 [T, K]; -1, and whatever is no expert, is no choice.
            num_experts: E, a multiple of R.
            previous_event, async_finish, allocate_on_comm_stream: See `dispatch`.

        Returns:
            num_tokens_per_rank int32 [R], None (tokens per RDMA rank), num_tokens_per_expert int32 [E],
            is_token_in_rank bool [T, R], the event.

        Raises:
            DTypeError, ShapeError, DeviceError, ConfigError: An argument does not fit.
            OrderError: After `destroy`.
        """
        queue = self._live().queue
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        work = queue.working(previous_event, async_finish)
        with work:
            per_rank, per_expert, in_rank = self._normal.layout(topk_idx, num_experts)
        event = work.finish(topk_idx, (per_rank, per_expert, in_rank))
        return per_rank, None, per_expert, in_rank, event

    @torch.compiler.disable  # a graph of torch.compile ends here, and goes on behind it
    def dispatch(
        self,
        x: Tokens,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tokens, torch.Tensor | None, torch.Tensor | None, list[int] | None, NormalHandle | None, EventOverlap]:
        """Send tokens to the ranks of their experts, once to each rank. Rows come by source rank, then source token.

        Args:
            x: bfloat16 [T, H], H a multiple of 8; or (float8_e4m3fn [T, H], scales), H a multiple of 128, scales
                float32 [T, H/128] or UE8M0 exponents, four to an int32, [T, ceil(H/512)]. Any strides.
            handle: Of an earlier dispatch with the same T: send these tokens along the same routes, without top-k and
                without a wait of the host.
            num_tokens_per_rank: int32 [R]. This and the next two are from `get_dispatch_layout`; needed without handle.
            num_tokens_per_rdma_rank: None.
            is_token_in_rank: bool [T, R]. Says where tokens go if there is no topk_idx; otherwise that one says it.
            num_tokens_per_expert: int32 [E]; its size says E. Without topk_idx the ranks tell each other what it holds:
                all of them give num_worst_tokens then, or none.
            topk_idx: int64 [T, K], K up to 32.
            topk_weights: float32 [T, K], with topk_idx.
            expert_alignment: The counts of the returned list are rounded up to multiples of it.
            num_worst_tokens: If positive, the host does not wait for counts, and outputs have that many rows; more rows
                are a `CapacityError` on the rank that gets them.
            config: How many SMs a launch may use; None: `get_dispatch_config`.
            previous_event: Begin after it, and not after all that the current queue was given.
            async_finish: Return an event, and do not let the current queue wait.
            allocate_on_comm_stream: Outputs belong to the communication queue; with the two above. Those of such calls
                always do, and the allocator knows that the current queue uses them.

        Returns:
            recv_x: Like x, N rows.
            recv_topk_idx: int64 [N, K], local expert ids, -1 for experts elsewhere; None without topk_idx.
            recv_topk_weights: float32 [N, K], 0 there; None without topk_idx.
            num_recv_tokens_per_expert_list: L numbers; with num_worst_tokens empty.
            handle: For `combine` and further dispatches.
            event: To wait for, if async_finish.
            With num_worst_tokens rows from `handle.recv_count` on hold no token: their ids are -1, weights 0. With
            handle all but recv_x and event are None.

        Raises:
            DTypeError, ShapeError, DeviceError, ConfigError: An argument does not fit. Nothing was sent.
            CapacityError: A rank has more tokens than `num_nvl_bytes` has room for, on all ranks, and says how many
                bytes would do; or more rows than num_worst_tokens. `reset` on all ranks to go on.
            ConfigMismatchError: Without topk_idx: num_tokens_per_expert is longer on some rank.
            OrderError: After `destroy`, or a handle of another Buffer.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone.
        """
        queue = self._live().queue
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        check_one_node(num_tokens_per_rdma_rank)
        num_sms = self._num_sms(config)
        layout = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
        work = queue.working(previous_event, async_finish)
        if handle is not None:
            _check_no_choices(topk_idx, topk_weights)
            with work:
                recv_x = self._normal.dispatch_again(x, handle, num_sms)
            return recv_x, None, None, None, None, work.finish((x,), (recv_x,))
        if any(value is None for value in layout):
            raise ShapeError(
                "without a handle the layout is needed",
                field="num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert",
                value=None,
                allowed="three tensors",
                remedy="call get_dispatch_layout, and pass what it returns",
            )
        with work:
            found = self._normal.dispatch(
                x, *layout, topk_idx, topk_weights, expert_alignment, num_worst_tokens, num_sms
            )
        return *found, work.finish((x, layout, topk_idx, topk_weights), (found, found[-1].memory))

    @torch.compiler.disable  # a graph of torch.compile ends here, and goes on behind it
    def combine(
        self,
        x: torch.Tensor,
        handle: NormalHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send rows back and add up those of a token: float32, biases first, then ranks ascending, rounded once.

        Args:
            x: bfloat16 [N, H], in the rows of the dispatch. Any strides.
            handle: Of that dispatch.
            topk_weights: float32 [N, K]: added up over ranks in the same way.
            bias: None, one bfloat16 [T, H], or a tuple of two.
            config, previous_event, async_finish, allocate_on_comm_stream: See `dispatch`.

        Returns:
            combined_x: bfloat16 [T, H]. A token that went nowhere is its bias, or 0.
            combined_topk_weights: float32 [T, K], or None.
            event: To wait for, if async_finish.

        Raises:
            DTypeError, ShapeError, DeviceError: An argument does not fit. Nothing was sent.
            OrderError: After `destroy`, or a handle of another Buffer.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone.
        """
        queue = self._live().queue
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        num_sms = self._num_sms(config)
        work = queue.working(previous_event, async_finish)
        with work:
            combined = self._normal.combine(x, handle, topk_weights, bias, num_sms)
        return *combined, work.finish((x, topk_weights, bias), combined)

    def _num_sms(self, config: Any) -> int:
        """The budget of a config; None: what `get_dispatch_config` would say, without making one."""
        if config is None:
            return check_int("num_sms", Buffer.num_sms, 1, MAX_SMS)
        if not isinstance(config, Config):
            raise DTypeError.wrong_kind("config", config, allowed="a Config or None", remedy="use ep_mojo.torch.Config")
        return config.num_sms


def _check_no_choices(*given: Any) -> None:
    if any(value is not None for value in given):
        raise ShapeError(
            "a handle has its choices",
            field="topk_idx, topk_weights",
            value="given",
            allowed="None with a handle",
            remedy="leave them out, or leave handle out",
        )
