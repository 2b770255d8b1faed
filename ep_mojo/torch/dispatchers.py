"""Dispatchers in the shape of Megatron-Core's for inference: all tokens to all ranks, then a reduction.

`AllGatherVDispatcher`: any counts, which stay on the device; nothing waits for the host, so that steps can be captured.
`AllGatherDispatcher`: equal counts, or with `_use_allgather_v` any, which the host then waits for.

A step: `dispatch_preprocess`, `token_dispatch`, the experts, `token_combine`, `combine_postprocess`, by all ranks
alike. Buffers belong to the classes, as there: layers use them in turn, and addresses stay. Letters as in
`gathering.py`; K = topk, the router's choices.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ..errors import OrderError, ShapeError
from .dispatcher_base import AllGatherDispatcherBase
from .gathering import Gathering
from .streams import check_not_capturing


class AllGatherVDispatcher(AllGatherDispatcherBase):
    """Any counts, which may change from step to step and stay on the device. Steps can be captured.

    token_dispatch gives R*Tmax rows; `_valid_tokens_tensor` says how many hold a token.
    """

    def _rows(self, gathering: Gathering, tokens: int) -> int:
        return gathering.rows.shape[0]

    @classmethod
    def _get_rsv_tensor(cls) -> torch.Tensor | None:
        """[R*Tmax, H] in `reduce_dtype`, for experts to write to: token_combine then copies nothing."""
        made = AllGatherDispatcherBase._symm_rsv
        return None if made is None else made["tensor"]

    @classmethod
    def _rank_token_offset(cls) -> torch.Tensor:
        cls._made()
        return AllGatherDispatcherBase._step_metadata[1:2]

    @classmethod
    def _ep_max_tokens(cls) -> torch.Tensor:
        cls._made()
        return AllGatherDispatcherBase._step_metadata[2:3]


class AllGatherDispatcher(AllGatherDispatcherBase):
    """Equal counts on all ranks: token_dispatch gives R*T rows. With `_use_allgather_v` counts may differ: the host
    waits for them, in the first instance's token_dispatch, which gives as many rows as there are tokens.

    With `_use_allgather_v` it is an OrderError inside a capture, and before the first instance's. Without it, in host
    memory, other counts on other ranks are a ShapeError on all of them, when tokens have been gathered; on GPUs the
    host does not know, and the rows past R*T are not among those that are given.
    """

    _use_allgather_v: ClassVar[bool] = False

    def _note(self, offsets: torch.Tensor, counts: torch.Tensor) -> None:
        super()._note(offsets, counts)
        if self._use_allgather_v:
            AllGatherDispatcherBase._local_tokens_per_rank = counts.tolist()
            AllGatherDispatcherBase._host_valid_tokens_estimate = sum(AllGatherDispatcherBase._local_tokens_per_rank)

    def _check_turn(self, gathering: Gathering) -> None:
        if not self._use_allgather_v:
            return
        remedy = "leave _use_allgather_v out, with equal counts; or take AllGatherVDispatcher"
        check_not_capturing(gathering.counts.device, "the host cannot wait for counts", remedy)
        if not self.runs_metadata_sync and AllGatherDispatcherBase._local_tokens_per_rank is None:
            raise OrderError(
                "the host does not know the counts of this step",
                field="runs_metadata_sync",
                value=False,
                allowed="after token_dispatch of an instance with runs_metadata_sync=True",
                remedy="let the first layer's instance have it",
            )

    def _rows(self, gathering: Gathering, tokens: int) -> int:
        if self._use_allgather_v:
            return sum(AllGatherDispatcherBase._local_tokens_per_rank or [])
        n = tokens * len(gathering.counts)
        if gathering.counts.is_cuda:
            return n
        padded = AllGatherDispatcherBase._local_tokens_tensor is not None  # then counts are no more than T
        if int(gathering.offsets[-1]) > n if padded else bool((gathering.counts != tokens).any()):
            raise ShapeError(
                "ranks have different numbers of tokens",
                field="tokens of this rank",
                value=tokens,
                allowed=f"as many as the others: {gathering.counts.tolist()}",
                remedy="set AllGatherDispatcher._use_allgather_v, or take AllGatherVDispatcher",
            )
        return n
