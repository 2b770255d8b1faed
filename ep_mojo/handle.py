"""`Handle`: what a rank has received, and what combine needs to send it back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import BY_SOURCE, EPConfig
from .errors import ShapeError

if TYPE_CHECKING:
    from max.graph import DeviceRef, TensorType, TensorValue

HANDLE_TENSORS = (
    "tokens",
    "scales",
    "row_offsets",
    "counts",
    "expert_ids",
    "src_info",
    "local_ids",
    "local_weights",
    "recv_weights",
    "row_map",
    "recv_num_tokens",
)
"""Outputs of dispatch_wait, in the order of the op."""


@dataclass(frozen=True)
class Handle:
    """What `dispatch_wait` gives a rank. All tensors are copies of its own: good as long as the caller keeps them.

    R ranks, L local experts, G = L groups (L + 1 with a shared expert), K = top_k, N = cfg.rows_capacity rows, S scales
    a row. Rows are sorted by (group, source rank, source token, k). Rows past the last one are unspecified.

    Attributes:
        cfg: The config.
        tokens: [N, H], "expert_padded" [G, R*Tmax, H]; in the format's token dtype, but on the host float8 as uint8 bit
            patterns, because MAX has no float8 tensors there. Quantised rows are to be multiplied by their scales
            (docs/gpus.md): a cast alone makes combine's sums wrong.
        scales: [N, S] or, column-major, [S, N], with "expert_padded" [G*S, N/G]: a block [S, N/G] for each group, as
            grouped GEMMs of padded rows take it; [0, 0] where the format has none.
        row_offsets: uint32. "expert" [G + 1], the aligned first row of each group; "expert_padded" [G + 1];
            by source [R + 1], the first row of each source rank. ("By source": the layouts "rank" and "gathered".)
        counts: int32 [G], true rows of each group; by source [R].
        expert_ids: int32 [G], the global expert of each group, E for the shared one; by source [0].
        src_info: int32 [N, 2] = (source rank * Tmax + token, k), -1 where there is no row; k = -1 in shared rows and
            by source.
        local_ids: int32 [N, K], "rank": local expert ids, -1 = not on this rank; "gathered": global ids, -1 = none;
            else [0, 0].
        local_weights: float32 [N, K] by source, the weights of these choices, 0 where the id is -1 in "rank"; rows
            that hold no token have -1 and 0; else [0, 0].
        recv_weights: float32 [R, Tmax, K]: all sources' weights, 1 where there are none, 0 past their tokens. With
            slots="expert" all 0: weights do not travel, and the source sums.
            "gathered" [0, 0, 0].
        row_map: int32 [R, Tmax, K]: the row of a source token's k-th choice, -1 = none here. "gathered" [0, 0, 0].
        recv_num_tokens: int32 [R]: all sources' tokens. With slots="expert" one more than the highest token that came
            from each source.
        topk_ids, weights, num_tokens: The rank's own, as given to dispatch (weights and num_tokens may be None).
    """

    cfg: EPConfig
    tokens: TensorValue
    scales: TensorValue
    row_offsets: TensorValue
    counts: TensorValue
    expert_ids: TensorValue
    src_info: TensorValue
    local_ids: TensorValue
    local_weights: TensorValue
    recv_weights: TensorValue
    row_map: TensorValue
    recv_num_tokens: TensorValue
    topk_ids: TensorValue
    weights: TensorValue | None = None
    num_tokens: TensorValue | None = None

    def flat(self) -> list[TensorValue]:
        """The tensors as graph outputs, for `from_flat` in another graph: `HANDLE_TENSORS`, then topk_ids."""
        return [*(getattr(self, name) for name in HANDLE_TENSORS), self.topk_ids]

    @classmethod
    def from_flat(
        cls,
        cfg: EPConfig,
        values: Sequence[TensorValue],
        *,
        weights: TensorValue | None = None,
        num_tokens: TensorValue | None = None,
    ) -> Handle:
        """A handle from graph inputs that hold what `flat` gave.

        Args:
            cfg: The config.
            values: As many values as `flat` gives.
            weights, num_tokens: As given to the dispatch.

        Raises:
            ShapeError: Another number of values.
        """
        values = list(values)
        if len(values) != len(HANDLE_TENSORS) + 1:
            raise ShapeError(
                field="values",
                value=len(values),
                allowed=len(HANDLE_TENSORS) + 1,
                remedy="pass exactly what handle.flat() gave",
            )
        *tensors, topk_ids = values
        fields = dict(zip(HANDLE_TENSORS, tensors, strict=True))
        return cls(cfg=cfg, topk_ids=topk_ids, weights=weights, num_tokens=num_tokens, **fields)


def graph_dtype(dtype: str, on_host: bool = True) -> str:
    """The dtype that a tensor has in a MAX graph: MAX allows no float8 on the host, so there its bytes go as uint8."""
    return "uint8" if on_host and dtype.startswith("float8") else dtype


def handle_shapes(cfg: EPConfig, rows: int | None = None) -> list[tuple[str, list[int]]]:
    """(dtype, shape) of `HANDLE_TENSORS` for a config; `rows`: N, where it is not `cfg.rows_capacity`."""
    R, K, G, S = cfg.n_ranks, cfg.top_k, cfg.n_groups, cfg.scales_per_token
    N = cfg.rows_capacity if rows is None else rows
    fmt, by_rank = cfg.dispatch_format, cfg.output_layout in BY_SOURCE
    tokens = [G, N // G] if cfg.output_layout == "expert_padded" else [N]
    scales = [N, S] if S else [0, 0]
    if S and fmt.scales_layout == "column":
        scales = [G * S, N // G] if cfg.output_layout == "expert_padded" else [S, N]
    per_token = [0, 0, 0] if cfg.output_layout == "gathered" else [R, cfg.max_tokens_per_rank, K]
    types = {
        "tokens": (fmt.token_dtype, [*tokens, cfg.token_elements]),
        "scales": (fmt.scale_dtype or "float32", scales),
        "row_offsets": ("uint32", [(R if by_rank else G) + 1]),
        "counts": ("int32", [R if by_rank else G]),
        "expert_ids": ("int32", [0 if by_rank else G]),
        "src_info": ("int32", [N, 2]),
        "local_ids": ("int32", [N, K] if by_rank else [0, 0]),
        "local_weights": ("float32", [N, K] if by_rank else [0, 0]),
        "recv_weights": ("float32", per_token),
        "row_map": ("int32", per_token),
        "recv_num_tokens": ("int32", [R]),
    }
    return [types[name] for name in HANDLE_TENSORS]


def handle_types(cfg: EPConfig, device: DeviceRef | None = None) -> list[TensorType]:
    """MAX types of `HANDLE_TENSORS` for a config, on a device (None: the host)."""
    from max.dtype import DType
    from max.graph import DeviceRef, TensorType

    device = device or DeviceRef.CPU()
    return [
        TensorType(getattr(DType, graph_dtype(dtype, device.is_cpu())), shape, device)
        for dtype, shape in handle_shapes(cfg)
    ]


PACKED = (
    "row_offsets",
    "counts",
    "expert_ids",
    "recv_num_tokens",
    "row_map",
    "recv_weights",
    "src_info",
    "local_ids",
    "local_weights",
)
"""Tensors of a handle in one block of memory, in their order there: all but tokens and scales."""
PACKED_WORDS = 4


def packed_handle(cfg: EPConfig, rows: int | None = None) -> tuple[dict[str, tuple[int, str, list[int]]], int]:
    """Where `PACKED` are in their block: name -> (first int32 word, dtype, shape); and the words of the block.

    Mirrors `kernels/ep_mojo/handle_memory.mojo`. `rows`: see `handle_shapes`.
    """
    shapes = dict(zip(HANDLE_TENSORS, handle_shapes(cfg, rows), strict=True))
    places, at = {}, 0
    for name in PACKED:
        dtype, shape = shapes[name]
        places[name] = at, dtype, shape
        at += -(-math.prod(shape) // PACKED_WORDS) * PACKED_WORDS
    return places, at
