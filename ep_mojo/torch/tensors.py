"""Tensors for rounds: what a dispatch writes, and what graphs can take."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ..config import EPConfig
from ..errors import UnsupportedError
from ..handle import HANDLE_TENSORS, handle_shapes, packed_handle

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int32": torch.int32,
    "uint32": torch.int32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""Types of the tensors of a handle."""
KEPT = 256
ALIGNMENT = 16
"""Of rows, for the kernels on GPUs."""


@functools.lru_cache(KEPT)
def places(cfg: EPConfig, rows: int | None = None) -> tuple[dict[str, tuple[int, int, torch.dtype, list[int]]], int]:
    """Where the tensors of a handle are in its block: name -> (first word, one past the last, dtype, shape); its words.

    `rows`: of the output, None: those of the config.

    Raises:
        UnsupportedError: torch has no tensors of the config's format.
    """
    if cfg.dispatch_format.token_dtype not in DTYPES:
        raise UnsupportedError(
            "torch has no tensors of this format",
            field="cfg.dispatch_format",
            value=cfg.dispatch_format,
            allowed="BF16 or BlockwiseFP8",
            remedy="use MAX graphs for a format of your own",
        )
    found, words = packed_handle(cfg, rows)
    return {n: (at, at + math.prod(shape), DTYPES[d], shape) for n, (at, d, shape) in found.items()}, words


@functools.lru_cache(KEPT)
def received_types(cfg: EPConfig, rows: int | None = None) -> list[tuple[torch.dtype, list[int]]]:
    """(dtype, shape) of what a dispatch writes: tokens, scales, and the block of the rest."""
    shapes = dict(zip(HANDLE_TENSORS, handle_shapes(cfg, rows), strict=True))
    words = places(cfg, rows)[1]
    return [*((DTYPES[d], shape) for d, shape in (shapes["tokens"], shapes["scales"])), (torch.int32, [words])]


@functools.lru_cache(KEPT)
def scales_by_row(cfg: EPConfig) -> tuple[list[int], list[int]]:
    """Shape and strides of the scales of layout "expert_padded", column-major [G*S, M], as [G, M, S]: a view of them
    would cost each call two operations of torch."""
    groups, per_token = cfg.n_local_experts, cfg.scales_per_token
    most = cfg.n_ranks * cfg.max_tokens_per_rank
    return [groups, most, per_token], [per_token * most, 1, most]


class Received(NamedTuple):
    """What a dispatch writes.

    Attributes:
        tokens: Rows, in the shape of the layout.
        scales: Their scales; None where there are none.
        memory: int32, flat: all else, see `places`.
    """

    tokens: torch.Tensor
    scales: torch.Tensor | None
    memory: torch.Tensor

    @classmethod
    def empty(
        cls,
        cfg: EPConfig,
        device: torch.device,
        rows: int | None = None,
        scales: tuple[list[int], list[int]] | None = None,
    ) -> Received:
        """Room for a dispatch, of so many rows (None: those of the config). `scales`: shape and strides in place of the
        config's shape, of the same memory."""
        # Sizes one by one: torch takes half as long again for a list of them.
        (dtype, shape), (scale_dtype, scales_shape), (words_dtype, words) = received_types(cfg, rows)
        tokens, made = torch.empty(*shape, dtype=dtype, device=device), None
        if scales_shape[0]:
            if scales is None:
                made = torch.empty(*scales_shape, dtype=scale_dtype, device=device)
            else:
                made = torch.empty_strided(*scales, dtype=scale_dtype, device=device)
        return cls(tokens, made, torch.empty(*words, dtype=words_dtype, device=device))


def part(memory: torch.Tensor, name: str, cfg: EPConfig, rows: int | None = None) -> torch.Tensor:
    """A tensor of a handle: a view of its block. Row offsets are below 2^31, and so int32."""
    begin, end, dtype, shape = places(cfg, rows)[0][name]
    found = memory[begin:end]
    if dtype != memory.dtype:
        found = found.view(dtype)
    return found if len(shape) == 1 else found.view(shape)


def used_here(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, of which the allocator is told that the current queue uses it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as graphs take it, itself or a copy: contiguous, on GPUs from a multiple of `ALIGNMENT` bytes on."""
    if tensor.is_neg():  # torch has not written it yet
        tensor = tensor.detach().resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    if tensor.is_cuda and tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.detach().clone()
    return tensor
