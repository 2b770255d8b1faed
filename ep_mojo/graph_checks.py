"""What the graph wrappers of `graph.py` take, checked by name while a graph is built: dtypes, shapes, numbers of ranks.

A symbolic dimension may be anything until the graph runs; what it turns out to be, the ops check.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .config import BY_SOURCE, MAX_SMS, EPConfig
from .errors import ConfigError, DeviceError, DTypeError, OrderError, ShapeError, UnsupportedError
from .formats import BF16, BlockwiseFP8, check_int
from .handle import Handle, graph_dtype

if TYPE_CHECKING:
    from max.graph import TensorType, TensorValue

    from .comm.base import Rank


def check_length(ranks: Sequence[Rank], needed: Sequence[str] = (), **lists: Sequence | None) -> None:
    """Raise unless `ranks` are ranks, and every list that is given or `needed` is one, with an entry for each rank.

    Raises:
        ShapeError: No ranks, or a list of another length.
        DTypeError: Not a list.
    """
    check_ranks(ranks)
    allowed = f"{len(ranks)}: one for each rank of the graph"
    for name, values in lists.items():
        if values is None and name not in needed:
            continue
        check_list(name, values, f"a list of {allowed}", "pass a list with one value a rank")
        if len(values) != len(ranks):
            raise ShapeError(
                field=name,
                value=f"{len(values)} values",
                allowed=allowed,
                remedy="pass a list with one value a rank",
            )


def check_list(name: str, values: Any, allowed: str, remedy: str) -> None:
    """Raise `DTypeError` unless `values` is a list or a tuple: one graph value is none, nor is a communicator."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise DTypeError(field=name, value=_named(values), allowed=allowed, remedy=remedy)


def check_ranks(ranks: Any) -> None:
    """Raise `DTypeError` unless `ranks` is a list of ranks, `ShapeError` where it is empty."""
    from .comm.base import Rank

    allowed, remedy = "the list that comm.bind(...) gives", "pass comm.bind(graph.inputs[-comm.num_inputs:])"
    check_list("ranks", ranks, allowed, remedy)
    if not ranks:
        raise ShapeError(field="ranks", value=0, allowed="at least one rank", remedy="pass comm.bind(...)")
    for rank in ranks:
        if not isinstance(rank, Rank):
            raise DTypeError(field="ranks", value=[_named(r) for r in ranks], allowed=allowed, remedy=remedy)


def check_graph_values(name: str, values: Sequence | None, optional: bool = True) -> None:
    """Raise `DTypeError` unless all of a list are tensors of the graph, or None where they are optional."""
    from max.graph import TensorValue

    for i, value in enumerate(values or []):
        if not isinstance(value, TensorValue) and not (optional and value is None):
            remedy = f"give the graph an input for {name}, or make one of ops.constant(...)"
            raise DTypeError(field=f"{name}[{i}]", value=_named(value), allowed="a tensor of the graph", remedy=remedy)


def _named(value: Any) -> Any:
    """What to show of a wrong argument: a number as it is, an object by its class."""
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def check_budget(n_sms: int | None) -> int:
    """An op's own budget of SMs, 0 where there is none. Raises `ConfigError` where it is out of range."""
    return 0 if n_sms is None else check_int("n_sms", n_sms, 1, MAX_SMS, "choose n_sms in that range, or None")


def check_value(name: str, value: TensorValue, shape: list, dtypes: list[str]) -> None:
    """Raise unless a graph value has this shape (None = any dimension) and one of these dtypes.

    Raises:
        DTypeError, ShapeError: It has not.
    """
    if value.dtype.name not in dtypes:
        raise DTypeError(
            field=name, value=value.dtype.name, allowed=" or ".join(dtypes), remedy=f"cast {name} before the call"
        )
    fits = len(value.shape) == len(shape) and all(
        want is None or _may_be_equal(got, want) for got, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["any" if d is None else str(d) for d in shape]
        raise ShapeError(
            field=name,
            value=[str(d) for d in value.shape],
            allowed=f"[{', '.join(wanted)}]",
            remedy=f"reshape {name}, or make a config that fits",
        )


def check_lists(ranks: Sequence[Rank], needed: Sequence[str] = (), **lists: Sequence | None) -> None:
    """`check_length`, then that all are graph values, then `check_places`.

    Args:
        ranks: From `comm.bind`.
        needed: Names of lists that may not be None, nor have None in them.
        lists: By name, a graph value for each rank, where the rank is; None: not given.
    """
    check_length(ranks, needed, **lists)
    for name, values in lists.items():
        check_graph_values(name, values, optional=name not in needed)
    check_places(ranks, **lists)


def check_places(ranks: Sequence[Rank], **lists: Sequence | None) -> None:
    """Raise `DeviceError` unless every value that is given is where its rank is: kernels read what they are given.

    Args:
        ranks: From `comm.bind`.
        lists: By name, a value for each rank, or None; values may be None too.
    """
    for name, values in lists.items():
        for rank, value in zip(ranks, values or [], strict=False):
            if value is not None and value.device != rank.device:
                raise DeviceError(
                    f"rank {rank.index}",
                    field=name,
                    value=str(value.device),
                    allowed=f"{rank.device}, where the rank is",
                    remedy=f"move it there: {name}[{rank.index}].to(...), or give the graph's input that device",
                )


def check_pending(ranks: Sequence[Rank], pending: Any, kind: type) -> None:
    """Raise unless `pending` is what the `_async` half gave: one of this kind for each rank."""
    check_length(ranks, ("pending",), pending=pending)
    for p in pending:
        if not isinstance(p, kind):
            call = "dispatch_async" if kind.__name__ == "PendingDispatch" else "combine_async"
            raise OrderError.wrong_kind("pending", p, allowed=f"what {call} gave", remedy=f"call {call} first")


def check_results(found: Any, types: Sequence[TensorType]) -> list[TensorValue]:
    """What the body of `beside` returned as a list, if these are its types.

    Raises:
        ShapeError: Not as many values as types, or one of another shape.
        DTypeError: One is no graph value, or of another dtype.
        DeviceError: One is on another device.
    """
    from max.graph import TensorValue

    values = [found] if isinstance(found, TensorValue) or not isinstance(found, Iterable) else list(found)
    remedy = "let body return one value for each of result_types, in that order"
    if len(values) != len(types):
        raise ShapeError(
            field="results of body",
            value=f"{len(values)} values",
            allowed=f"{len(types)}: one for each of result_types",
            remedy=remedy,
        )
    check_graph_values("results of body", values, optional=False)
    for i, (value, wanted) in enumerate(zip(values, types, strict=True)):
        for error, part in ((DTypeError, "dtype"), (ShapeError, "shape"), (DeviceError, "device")):
            if getattr(value.type, part) != getattr(wanted, part):
                raise error(
                    f"another {part} than result_types[{i}]",
                    field=f"results of body[{i}]",
                    value=str(value.type),
                    allowed=str(wanted),
                    remedy=remedy,
                )
    return values


def _may_be_equal(got: Any, want: Any) -> bool:
    """Whether two dimensions are equal; a symbolic one may be anything until the graph runs."""
    try:
        return int(got) == int(want)
    except TypeError:
        return True


def check_dispatch(cfg: EPConfig, x: TensorValue, ids: TensorValue, w: Any, n: Any, scales: Any, factor: Any) -> None:
    """What dispatch_async takes for one rank.

    Args:
        cfg: The config.
        x: Tokens [T, H], bfloat16 or in the format's own dtype.
        ids: int32 or int64 [T, K].
        w: float32 [T, K], or None.
        n: int32 [1], or None.
        scales: Scales of encoded tokens [T, scales_per_token] in the format's scale dtype, or None.
        factor: float32 [1], or None.

    Raises:
        ShapeError, DTypeError, UnsupportedError: One does not fit the config or the others.
    """
    fmt = cfg.dispatch_format
    quantising = not isinstance(fmt, BF16)
    encoded = x.dtype.name != "bfloat16"
    if encoded:
        passes = isinstance(fmt, BlockwiseFP8) and fmt.scale != "power_of_two"
        dtypes = ["bfloat16", graph_dtype(fmt.token_dtype, x.device.is_cpu())] if passes else ["bfloat16"]
        check_value("xs", x, [None, cfg.hidden_size], dtypes)
        if scales is None:
            raise ShapeError(
                field="x_scales",
                value=None,
                allowed=f"[T, {cfg.scales_per_token}] with encoded tokens",
                remedy="pass x_scales, or bfloat16 tokens",
            )
        check_value("x_scales", scales, [x.shape[0], cfg.scales_per_token], [fmt.scale_dtype])
    else:
        check_value("xs", x, [None, cfg.hidden_size], ["bfloat16"])
        if scales is not None:
            raise UnsupportedError(
                field="x_scales",
                value="given with bfloat16 tokens",
                allowed="scales with tokens that are encoded already",
                remedy="leave x_scales out",
            )
    if factor is not None and (encoded or not quantising):
        raise UnsupportedError(
            field="input_scale",
            value="given, but nothing is quantised",
            allowed="bfloat16 tokens and a format that quantises",
            remedy="leave input_scale out",
        )
    check_value("topk_ids", ids, [x.shape[0], cfg.top_k], ["int32", "int64"])
    for name, value, shape, dtype in (
        ("weights", w, [x.shape[0], cfg.top_k], "float32"),
        ("num_tokens", n, [1], "int32"),
        ("input_scale", factor, [1], "float32"),
    ):
        if value is not None:
            check_value(name, value, shape, [dtype])


def check_combine(
    ranks: Sequence[Rank], ys: Sequence[TensorValue], handles: Sequence[Handle], reduce: str | None
) -> list[str]:
    """What combine_async takes, and each rank's reduce mode: "expert" or "source".

    Args:
        ranks: From `comm.bind`.
        ys: Expert rows of the shape of `handle.tokens` with H channels, in `cfg.combine_dtype`.
        handles: One for each rank, of the communicator's config.
        reduce: As given; None: the config's, or "expert".

    Raises:
        ShapeError, DTypeError: No list or one that is too short, or rows do not fit their handle.
        OrderError: Not a handle.
        ConfigError: A handle of another config, or a reduce mode that the config does not have.
        DeviceError: Rows or a handle are not where their rank is.
    """
    check_length(ranks, ("ys", "handles"), ys=ys, handles=handles)
    check_graph_values("ys", ys, optional=False)
    modes = []
    for rank, y, h in zip(ranks, ys, handles, strict=True):
        cfg = rank.cfg
        if not isinstance(h, Handle):
            raise OrderError.wrong_kind("handles", h, allowed="handles of dispatch_wait", remedy="dispatch first")
        if h.cfg != cfg:
            raise ConfigError(
                field="handles", value=h.cfg, allowed=f"handles of this communicator's config {cfg}", remedy="see value"
            )
        mode = reduce or cfg.reduce or "expert"
        if mode not in ("expert", "source") or (cfg.reduce is not None and mode != cfg.reduce):
            raise ConfigError(
                field="reduce",
                value=reduce,
                allowed=repr(cfg.reduce) if cfg.reduce else '"expert" or "source"',
                remedy="set EPConfig.reduce accordingly, or to None",
            )
        if (
            y.dtype == h.tokens.dtype
            and y.dtype.name != cfg.combine_dtype
            and not isinstance(cfg.dispatch_format, BF16)
        ):
            raise DTypeError(
                "rows as dispatch gave them, quantised",
                field="ys",
                value=y.dtype.name,
                allowed=cfg.combine_dtype,
                remedy="multiply them by h.scales, block by block, or decode a format of your own, then cast to "
                f"{cfg.combine_dtype}: docs/gpus.md shows it. A cast alone gives wrong sums",
            )
        check_value("ys", y, [*h.tokens.shape[:-1], cfg.hidden_size], [cfg.combine_dtype])
        modes.append(mode)
    check_places(ranks, ys=ys)
    for name in ("row_map", "src_info", "recv_weights", "recv_num_tokens", "topk_ids", "weights", "num_tokens"):
        check_places(ranks, **{f"handles.{name}": [getattr(h, name) for h in handles]})
    return modes


def check_wait(
    cfg: EPConfig,
    h: Handle,
    mode: str,
    weights: TensorValue | None,
    bias0: TensorValue | None,
    bias1: TensorValue | None,
) -> None:
    """What combine_wait takes beside the handle: weights float32 [T, K], biases bfloat16 or float32 [T, H], or None.

    Raises:
        ShapeError, DTypeError: One does not fit the config or the handle.
        UnsupportedError: Weights where they have been applied already.
    """
    T, H = h.topk_ids.shape[0], cfg.hidden_size
    if weights is not None and (mode != "source" or cfg.output_layout in BY_SOURCE):
        raise UnsupportedError(
            field="weights",
            value=f"given, with reduce={mode!r} and output_layout={cfg.output_layout!r}",
            allowed='weights at combine with reduce="source" and an expert layout only',
            remedy="give the weights to dispatch",
        )
    if weights is not None:
        check_value("weights", weights, [T, cfg.top_k], ["float32"])
    for name, bias in (("bias0", bias0), ("bias1", bias1)):
        if bias is not None:
            check_value(name, bias, [T, H], ["bfloat16", "float32"])
    if bias0 is not None and bias1 is not None and bias0.dtype != bias1.dtype:
        raise DTypeError(
            field="bias1", value=bias1.dtype.name, allowed=f"{bias0.dtype.name}, as bias0", remedy="cast one of the two"
        )
