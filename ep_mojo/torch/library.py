"""Dispatch and combine as torch ops, `torch.ops.ep_mojo.dispatch` and `.combine`, for graphs of torch.compile.

An op takes tensors and numbers, so a communicator goes by its number here. Both ops say that they write `ORDER`, which
every one of them takes: so torch.compile keeps all of them, in their order, as the ranks need it.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from ..comm import Communicator
from ..comm.board import board_of
from ..comm.process_group import shared_fields
from ..config import EPConfig
from ..errors import OrderError, UnsupportedError
from ..formats import BF16
from .checks import check_tensor
from .graphs import CombineSet, DispatchSet
from .rounds import Rounds, check_may_make, place_of
from .tensors import DTYPES, Received, dense, places, received_types

with torch.inference_mode(False):  # whoever imports this first may be in it
    ORDER = torch.zeros(1, dtype=torch.int32, device="cpu")
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
IDS = {torch.int32: "int32", torch.int64: "int64"}

_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Rounds] = weakref.WeakValueDictionary()


def number_of(comm: Communicator) -> int:
    """The number of a communicator. The first call for it needs all ranks, and must not be inside of torch.compile.

    Raises:
        UnsupportedError: Not one of `Communicator.process_group`, or with a config that these ops do not know.
        ConfigMismatchError, PeerTimeoutError: Another rank comes with another config, or does not come.
        OrderError: That call is inside the capture of a CUDA graph.
    """
    number = getattr(comm, "torch_number", -1)
    return _prepare(comm) if number < 0 else number


@torch.compiler.disable
def _prepare(comm: Communicator) -> int:
    if not isinstance(comm, Communicator) or not hasattr(comm, "group"):
        raise UnsupportedError(
            "tensors of torch are of one rank",
            field="comm",
            value=type(comm).__name__,
            allowed="a communicator of Communicator.process_group",
            remedy="call ep_mojo.Communicator.process_group(cfg, group)",
        )
    cfg = comm.cfg
    if cfg.output_layout == "gathered":
        raise UnsupportedError(
            field="cfg.output_layout",
            value="gathered",
            allowed='"expert", "expert_padded" or "rank"',
            remedy="use AllGatherVDispatcher, or ep_mojo.all_gather_v in a graph",
        )
    for name, allowed in (("slots", "rank"), ("shared_expert", False)):
        if getattr(cfg, name) != allowed:
            raise UnsupportedError(
                field=f"cfg.{name}", value=getattr(cfg, name), allowed=repr(allowed), remedy="use ep_mojo.dispatch"
            )
    check_may_make(place_of(comm))
    board = board_of(comm.group)
    name = board.agree_on("using a communicator with tensors", {"config": shared_fields(cfg)}, cfg.timeout_s)
    number = next(_numbers)
    comm.torch_rounds = _by_number[number] = Rounds(weakref.proxy(comm), board, name, cfg.timeout_s)
    comm.torch_number = number
    return number


def _rounds(number: int) -> Rounds:
    if number not in _by_number:
        raise OrderError(
            "the communicator is gone", field="comm", value=number, allowed="one that lives", remedy="keep a reference"
        )
    return _by_number[number]


def _prepared(rounds: Rounds, graphs: DispatchSet | CombineSet, stage: str) -> None:
    if not rounds.has(graphs, stage):
        rounds.prepare([graphs])


@torch.library.custom_op("ep_mojo::dispatch", mutates_args=("order",))
def dispatch(
    order: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None,
    comm: int,
) -> Outputs:
    """See `ep_mojo.torch.dispatch`; returns tokens, scales, and the rest of the handle in one block."""
    rounds = _rounds(comm)
    cfg, device = rounds.cfg, rounds.device
    fmt, encoded = cfg.dispatch_format, x_scales is not None
    if encoded and isinstance(fmt, BF16):
        raise UnsupportedError(
            field="x_scales",
            value="given",
            allowed="None with BF16",
            remedy="leave it out, or use a config with BlockwiseFP8",
        )
    given = check_tensor("x", x, [torch.float8_e4m3fn if encoded else torch.bfloat16], [None, cfg.hidden_size], device)
    tensors = [dense(given), None]
    if x_scales is not None:
        dtype = DTYPES[fmt.scale_dtype or "float32"]
        tensors[1] = dense(check_tensor("x_scales", x_scales, [dtype], [x.shape[0], cfg.scales_per_token], device))
    tensors.append(dense(check_tensor("topk_ids", topk_ids, list(IDS), [x.shape[0], cfg.top_k], device)))
    if weights is not None:
        tensors.append(dense(check_tensor("weights", weights, [torch.float32], topk_ids.shape, device)))
    graphs = dispatch_set(cfg, encoded, IDS[topk_ids.dtype])
    _prepared(rounds, graphs, "dispatch")
    order += 1
    found = Received.empty(cfg, device)
    rounds.run(graphs, "dispatch", *found, *tensors)
    nothing = received_types(cfg)[1]
    scales = torch.empty(nothing[1], dtype=nothing[0], device=device) if found.scales is None else found.scales
    return found.tokens, scales, found.memory


@dispatch.register_fake
def _(order, x, x_scales, topk_ids, weights, comm):
    return tuple(x.new_empty(shape, dtype=dtype) for dtype, shape in received_types(_rounds(comm).cfg))


@torch.library.custom_op("ep_mojo::combine", mutates_args=("order",))
def combine(
    order: torch.Tensor,
    y: torch.Tensor,
    memory: torch.Tensor,
    topk_ids: torch.Tensor,
    weights: torch.Tensor | None,
    bias0: torch.Tensor | None,
    bias1: torch.Tensor | None,
    comm: int,
) -> torch.Tensor:
    """See `ep_mojo.torch.combine`."""
    rounds = _rounds(comm)
    cfg, device = rounds.cfg, rounds.device
    rows = received_types(cfg)[0][1][:-1]
    check_tensor("y", y, [DTYPES[cfg.combine_dtype]], [*rows, cfg.hidden_size], device)
    check_tensor("topk_ids", topk_ids, list(IDS), [None, cfg.top_k], device)
    check_tensor("handle.memory", memory, [torch.int32], [places(cfg)[1]], device)
    biases = [b for b in (bias0, bias1) if b is not None]
    for i, bias in enumerate(biases):
        check_tensor(f"bias{i}", bias, [torch.bfloat16], [topk_ids.shape[0], cfg.hidden_size], device)
    graphs = combine_set(cfg, IDS[topk_ids.dtype])
    _prepared(rounds, graphs, "combine")
    factors = None
    if reduce_of(cfg) == "source" and weights is not None:
        factors = dense(check_tensor("handle.weights", weights, [torch.float32], topk_ids.shape, device))
    order += 1
    given = [dense(y), dense(memory), dense(topk_ids), factors, *map(dense, biases)]
    out = torch.empty(topk_ids.shape[0], cfg.hidden_size, dtype=DTYPES[cfg.output_dtype], device=device)
    rounds.run(graphs, "combine", out, *given)
    return out


@combine.register_fake
def _(order, y, memory, topk_ids, weights, bias0, bias1, comm):
    cfg = _rounds(comm).cfg
    return y.new_empty((topk_ids.shape[0], cfg.hidden_size), dtype=DTYPES[cfg.output_dtype])


def reduce_of(cfg: EPConfig) -> str:
    """Who sums: "expert" or "source"."""
    return "expert" if cfg.output_layout == "rank" else cfg.reduce or "expert"


def dispatch_set(cfg: EPConfig, encoded: bool, ids: str) -> DispatchSet:
    """The graph of a dispatch."""
    return DispatchSet(cfg.hidden_size, cfg.output_layout, cfg.dispatch_format, encoded, False, ids)


def combine_set(cfg: EPConfig, ids: str) -> CombineSet:
    """The graphs of a combine."""
    types = cfg.combine_dtype, cfg.output_dtype
    return CombineSet(cfg.hidden_size, cfg.output_layout, reduce_of(cfg), *types, ids)


@torch.compiler.assume_constant_result
def parts_of(number: int) -> list[tuple[str, int, int, torch.dtype, list[int]]]:
    """Where the tensors of a handle are in its block: name, first word, one past the last, dtype, shape."""
    return [(name, *place) for name, place in places(_rounds(number).cfg)[0].items()]
