"""The calls of `Buffer` for low-latency mode: here they meet queues and events; `LowLatencyMode` does the work.

A graph of torch.compile ends at each of them, and goes on behind it.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from . import sizes
from .low_latency import Hook, LowLatencyHandle, LowLatencyMode, format_of
from .session import Session
from .streams import EventOverlap


class LowLatencyCalls:
    """Base of `Buffer`."""

    low_latency_mode: bool
    enable_shrink: bool
    _low_latency: LowLatencyMode

    def _live(self) -> Session:
        raise NotImplementedError

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of a rank's windows in low-latency mode, for bfloat16 and 8 choices a token.

        Raises:
            ConfigError: A number is out of range.
        """
        return sizes.low_latency_bytes(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @torch.compiler.disable
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing: rounds of either mode leave no state that others would have to clear. The numbers are checked.

        Raises:
            ConfigError, CapacityError: They do not fit the Buffer.
            OrderError: After `destroy`.
        """
        self._low_latency_session()
        self._low_latency.check_sizes(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    @torch.compiler.disable
    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Send tokens to their experts, in room for the worst case; the host waits for no count.

        Args:
            x: bfloat16 [T, H], T up to num_max_dispatch_tokens_per_rank; H a multiple of 8, with use_fp8 of 128.
            topk_idx: int64 [T, K], K up to 32; -1 is no choice.
            num_max_dispatch_tokens_per_rank: Tmax, the same on all ranks.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: int32 [L]; the counts are added to it.
            dispatch_wait_recv_cost_stats: None.
            use_fp8: Quantise, with a scale for each 128 channels.
            round_scale: Scales are powers of two.
            use_ue8m0: Scales are packed exponents; with round_scale.
            async_finish: Return an event, and do not let the current queue wait.
            return_recv_hook: Only send. The hook that is returned receives, into the tensors that are returned; hooks
                are called in the order of the calls, and at most two rounds are under way.

        Returns:
            recv_x: bfloat16 [L, R*Tmax, H], rows by source rank, then token; or with use_fp8 (float8_e4m3fn, scales):
                float32 [L, R*Tmax, H/128], or int32 [L, R*Tmax, ceil(H/512)] with use_ue8m0, of which rows are adjacent
                in memory. Rows from the count on are unspecified.
            recv_count: int32 [L].
            handle: For `low_latency_combine`.
            event: To wait for, if async_finish.
            hook: If return_recv_hook, else None.

        Raises:
            DTypeError, ShapeError, DeviceError, ConfigError, UnsupportedError: An argument does not fit. Nothing was
                sent.
            CapacityError: num_rdma_bytes is too small; or a rank has more than Tmax tokens, on all ranks. `reset` on
                all ranks to go on.
            OrderError: After `destroy`, or hooks that have not been called.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone. With a hook, from it.
                With enable_shrink that rank is masked, and it is no error.
        """
        queue = self._low_latency_session().queue
        _check_one_way(async_finish, return_recv_hook)
        _check_no_cost_stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
        fmt = format_of(bool(use_fp8), bool(round_scale), bool(use_ue8m0))
        stats = cumulative_local_expert_recv_stats
        work = queue.working(None, bool(async_finish))
        with work:
            recv_x, count, handle, hook = self._low_latency.dispatch(
                x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, stats, fmt, bool(return_recv_hook)
            )
        event = work.finish((x, topk_idx, stats), (recv_x, count, handle.memory))
        return recv_x, count, handle, event, hook

    @torch.compiler.disable
    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Send rows back; the source adds up weight times row in float32, k ascending (fma), and rounds once.

        Args:
            x: bfloat16 [L, R*Tmax, H], in the rows of the dispatch.
            topk_idx: int64 [T, K], as given to the dispatch. Other choices are found out, by a later call, where rows
                travel as cells (T·K up to 2048 on GPUs): ShapeError, or PeerTimeoutError.
            topk_weights: float32 [T, K].
            handle: Of that dispatch.
            use_logfmt: False.
            zero_copy: Take what was written to `get_next_low_latency_combine_buffer`, and not x.
            async_finish, return_recv_hook: See `low_latency_dispatch`.
            out: bfloat16 [T, H], contiguous: the result goes there.
            combine_wait_recv_cost_stats: None.

        Returns:
            combined_x: bfloat16 [T, H], or out.
            event: To wait for, if async_finish.
            hook: If return_recv_hook, else None.

        Raises:
            DTypeError, ShapeError, DeviceError, ConfigError, UnsupportedError: An argument does not fit. Nothing was
                sent.
            OrderError: After `destroy`; a handle of another Buffer, or whose hook has not been called; zero_copy
                without a buffer.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone. With a hook, from it.
                With enable_shrink that rank is masked, and it is no error.
        """
        queue = self._low_latency_session().queue
        _check_one_way(async_finish, return_recv_hook)
        _check_no_cost_stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
        if use_logfmt:
            raise UnsupportedError(
                "rows travel back as bfloat16",
                field="use_logfmt",
                value=True,
                allowed="False",
                remedy="leave it out",
            )
        work = queue.working(None, bool(async_finish))
        with work:
            combined, hook = self._low_latency.combine(
                x, topk_idx, topk_weights, handle, bool(zero_copy), bool(return_recv_hook), out
            )
        return combined, work.finish((x, topk_idx, topk_weights, out), combined), hook

    @torch.compiler.disable
    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bfloat16 [L, R*Tmax, H] to write expert rows to, for `low_latency_combine(..., zero_copy=True)`.

        Raises:
            DTypeError, OrderError: Not a handle of this Buffer; after `destroy`.
        """
        self._low_latency_session()
        return self._low_latency.next_buffer(handle)

    @torch.compiler.disable
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of this rank's rounds that follow, on the device, or take it in again.

        Nothing is sent to a masked rank and nothing awaited of it: it counts as one without tokens, and choices of its
        experts add nothing. To be called between rounds, on all ranks that are left.

        Args:
            rank_to_mask: The rank.
            mask: Whether to leave it out.

        Raises:
            ConfigError: There is no such rank, it is this one, or the Buffer was made without enable_shrink.
            OrderError: After `destroy`.
        """
        with self._shrinking().queue.launching():
            self._low_latency.update_mask(rank_to_mask, mask)

    @torch.compiler.disable
    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write which ranks are masked to int32 [R]: 1 for those, by hand or since they did not come to a round.

        Raises:
            DTypeError, ShapeError, DeviceError: Not such a tensor.
            ConfigError: The Buffer was made without enable_shrink.
            OrderError: After `destroy`.
        """
        with self._shrinking().queue.launching():
            self._low_latency.query_mask(mask_status)

    @torch.compiler.disable
    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks in again: right if they have made as many rounds as this one; otherwise use `reset`.

        Raises:
            ConfigError: The Buffer was made without enable_shrink.
            OrderError: After `destroy`.
        """
        with self._shrinking().queue.launching():
            self._low_latency.clean_masks()

    def _low_latency_session(self) -> Session:
        if not self.low_latency_mode:
            raise ConfigError(
                "the Buffer was made without it",
                field="low_latency_mode",
                value=False,
                allowed="True for low_latency_* calls",
                remedy="make the Buffer with low_latency_mode=True, on all ranks",
            )
        return self._live()

    def _shrinking(self) -> Session:
        session = self._low_latency_session()
        if not self.enable_shrink:
            raise ConfigError(
                "the Buffer was made without it",
                field="enable_shrink",
                value=False,
                allowed="True for the mask calls",
                remedy="make the Buffer with enable_shrink=True",
            )
        return session


def _check_one_way(async_finish: Any, return_recv_hook: Any) -> None:
    if async_finish and return_recv_hook:
        raise ConfigError(
            "a hook and an event at once",
            field="async_finish",
            value=True,
            allowed="False with return_recv_hook=True",
            remedy="choose one of the two",
        )


def _check_no_cost_stats(name: str, value: Any) -> None:
    if value is not None:
        raise UnsupportedError(
            "waits are not timed one by one",
            field=name,
            value="given",
            allowed="None",
            remedy="leave it out",
        )
