"""The receiving halves in MAX graphs, with outputs that the caller gives: for programs that own the memory.

Beside `dispatch_wait` and `combine_wait` of `ep_mojo.graph`, whose outputs MAX allocates when the graph runs. Here they
are mutable inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DeviceError, DTypeError, ShapeError
from .graph import _format_parameters, _reduce, add_op
from .graph_checks import check_budget, check_length, check_lists, check_value
from .handle import HANDLE_TENSORS, handle_types

if TYPE_CHECKING:
    from max.graph import BufferValue, TensorValue

    from .comm.base import Rank


def dispatch_wait_into(
    ranks: Sequence[Rank], outputs: Sequence[Sequence[BufferValue]], *, n_sms: int | None = None
) -> None:
    """Receive what `dispatch_async` sent, into the caller's tensors.

    Args:
        ranks: From `comm.bind`.
        outputs: For each rank the tensors of `HANDLE_TENSORS`, mutable graph inputs of the types of `handle_types`; for
            the layouts that take `max_rows` the number of rows may be another.
        n_sms: See `dispatch_async`.

    Raises:
        DTypeError, ShapeError, DeviceError: An output is not what it has to be; nothing is added to the graph.
        ConfigError: n_sms is out of range.
    """
    check_length(ranks, ("outputs",), outputs=outputs)
    budget = check_budget(n_sms)
    for rank, given in zip(ranks, outputs, strict=True):
        rows = None if rank.cfg.output_layout == "expert_padded" or not given else given[0].shape[0]
        types = handle_types(rank.cfg, rank.device, rows)
        if len(given) != len(types):
            raise ShapeError(
                field="outputs", value=f"{len(given)} tensors", allowed=", ".join(HANDLE_TENSORS), remedy="pass all"
            )
        for name, value, wanted in zip(HANDLE_TENSORS, given, types, strict=True):
            _check_output(name, value, list(wanted.shape), wanted.dtype.name, rank)
    for rank, given in zip(ranks, outputs, strict=True):
        parameters = _format_parameters(rank.cfg) | {"layout": rank.cfg.output_layout}
        add_op("dispatch_wait_into", rank, "dispatch", list(given), [], parameters, budget)


def combine_wait_into(
    ranks: Sequence[Rank],
    outputs: Sequence[BufferValue],
    topk_ids: Sequence[TensorValue],
    weights: Sequence[TensorValue],
    *,
    n_sms: int | None = None,
) -> None:
    """Receive and sum what `combine_async` sent with reduce "source", into the caller's tensors.

    Args:
        ranks: From `comm.bind`; their config's combine_dtype is its output_dtype.
        outputs: For each rank a mutable graph input [T, H] in `cfg.output_dtype`.
        topk_ids: int32 or int64 [T, K], as given to the dispatch.
        weights: float32 [T, K].
        n_sms: See `dispatch_async`.

    Raises:
        ConfigError: n_sms is out of range, or the config is another.
        DTypeError, ShapeError, DeviceError: An argument does not fit; nothing is added to the graph.
    """
    check_length(ranks, ("outputs",), outputs=outputs)
    check_lists(ranks, ("topk_ids", "weights"), topk_ids=topk_ids, weights=weights)
    budget = check_budget(n_sms)
    for rank, y, ids, w in zip(ranks, outputs, topk_ids, weights, strict=True):
        cfg = rank.cfg
        if cfg.reduce == "expert" or cfg.output_layout == "rank" or cfg.output_dtype != cfg.combine_dtype:
            raise ConfigError(
                "sums into a tensor of the caller take rows one by one",
                field="cfg",
                value=cfg,
                allowed='reduce="source", an expert layout, and combine_dtype = output_dtype',
                remedy="use ep_mojo.combine_wait",
            )
        _check_output("outputs", y, [ids.shape[0], cfg.hidden_size], cfg.output_dtype, rank)
        check_value("topk_ids", ids, [None, cfg.top_k], ["int32", "int64"])
        check_value("weights", w, [ids.shape[0], cfg.top_k], ["float32"])
    for rank, y, ids, w in zip(ranks, outputs, topk_ids, weights, strict=True):
        add_op("combine_wait_into", rank, "combine", [y, ids, w], [], _reduce(rank.cfg, "source"), budget)


def _check_output(name: str, value: Any, shape: list, dtype: str, rank: Rank) -> None:
    from max.graph import BufferValue

    if not isinstance(value, BufferValue):
        raise DTypeError(
            field=name,
            value=type(value).__name__,
            allowed="a mutable input of the graph",
            remedy="give the graph an input of BufferType, and pass its .buffer",
        )
    check_value(name, value, shape, [dtype])
    if value.device != rank.device:
        raise DeviceError(
            field=name, value=str(value.device), allowed=str(rank.device), remedy="give the graph's input that device"
        )
