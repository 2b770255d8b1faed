"""Every stage of one virtual rank as a graph of its own, with sizes that are known at run time only.

What the engine fixes at compile time (H, format, layout, reduce mode, element types) makes a variant; R, E, K, Tmax, B,
alignment and T come with the inputs. All variants are graphs of one module, which MAX compiles in one go.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import ep_mojo as ep
from ep_mojo.comm import windows
from ep_mojo.comm.models import run_model
from ep_mojo.dtypes import storage_dtype, to_buffer, to_numpy
from ep_mojo.handle import HANDLE_TENSORS, graph_dtype, handle_types
from ep_mojo.layout import SETTINGS_WORDS

DISPATCH_TABLES, COMBINE_TABLES = slice(1, 4), slice(4, 7)
LAYOUTS = ("expert", "expert_padded", "rank", "gathered")
REDUCE_MODES = ("expert", "source")
FP8_HIDDEN = 640
FORMATS = {
    "bf16": ep.BF16(),
    **{
        f"fp8-{scale}-{layout}": ep.BlockwiseFP8(scale, layout)
        for scale in ep.BlockwiseFP8.SCALES
        for layout in ("row", "column")
    },
}
"""All formats by name: at H = 8 for bf16, at `FP8_HIDDEN` for the others."""
EXPERT_SLOTS_FORMATS = {name: FORMATS[name] for name in ("bf16", "fp8-ue8m0-row", "fp8-power_of_two-column")}
"""The formats that are compiled with slots="expert"."""
COMBINE_TYPES = {
    8: ("bfloat16", "bfloat16", "bfloat16"),
    72: ("float32", "float32", "float32"),
    128: ("bfloat16", "bfloat16", "bfloat16"),
    FP8_HIDDEN: ("bfloat16", "float32", "float32"),
}
"""Types of expert rows, output and bias, by the H at which they are compiled."""


@dataclass(frozen=True)
class Send:
    """dispatch_async."""

    hidden: int
    fmt: ep.TokenFormat = ep.BF16()
    ids: str = "int32"
    encoded: bool = False
    slots: str = "rank"

    name = "dispatch_async"
    tables = DISPATCH_TABLES

    def inputs(self, on_host):
        x = graph_dtype(self.fmt.token_dtype, on_host) if self.encoded else "bfloat16"
        return [
            (x, ["T", self.hidden]),
            (self.fmt.scale_dtype or "float32", ["scale_rows", "scale_columns"]),
            (self.ids, ["T", "K"]),
            ("float32", ["weight_rows", "weight_columns"]),
            ("int32", ["one"]),
            ("float32", ["factor"]),
        ]

    def shapes(self):
        return []

    def outputs(self, on_host):
        return []

    def parameters(self):
        return _format(self.hidden, self.fmt) | {"slots": self.slots}


@dataclass(frozen=True)
class Receive:
    """dispatch_wait. The sizes of its outputs come as inputs of size 0."""

    hidden: int
    fmt: ep.TokenFormat = ep.BF16()
    layout: str = "expert"
    slots: str = "rank"

    name = "dispatch_wait"
    tables = DISPATCH_TABLES

    def inputs(self, on_host):
        return []

    def shapes(self):
        return [["N", "S0", "S1", "offsets", "groups", 0], ["ids", "L0", "L1", 0], ["P0", "P1", "P2", "R", 0]]

    def outputs(self, on_host):
        per_token = ["P0", "P1", "P2"]
        return [
            (graph_dtype(self.fmt.token_dtype, on_host), ["N", self.hidden]),
            (self.fmt.scale_dtype or "float32", ["S0", "S1"]),
            ("uint32", ["offsets"]),
            ("int32", ["groups"]),
            ("int32", ["ids"]),
            ("int32", ["N", 2]),
            ("int32", ["L0", "L1"]),
            ("float32", ["L0", "L1"]),
            ("float32", per_token),
            ("int32", per_token),
            ("int32", ["R"]),
        ]

    def parameters(self):
        return _format(self.hidden, self.fmt) | {"layout": self.layout, "slots": self.slots}


@dataclass(frozen=True)
class SendBack:
    """combine_async. With slots="expert" it takes the handle's `src_info` in place of `row_map`."""

    hidden: int
    layout: str = "expert"
    reduce: str = "expert"
    dtype: str = "bfloat16"
    slots: str = "rank"

    name = "combine_async"
    tables = COMBINE_TABLES

    def inputs(self, on_host):
        per_token = ["P0", "P1", "P2"]
        where = ["N", 2] if self.slots == "expert" else per_token
        return [(self.dtype, ["N", self.hidden]), ("int32", where), ("float32", per_token), ("int32", ["R"])]

    def shapes(self):
        return [["T0", "H0", 0]]

    def outputs(self, on_host):
        return [(self.dtype, ["T0", "H0"])]

    def parameters(self):
        return {"hidden": self.hidden, "layout": self.layout, "reduce": self.reduce, "slots": self.slots}


@dataclass(frozen=True)
class ReceiveBack:
    """combine_wait."""

    hidden: int
    layout: str = "expert"
    reduce: str = "expert"
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    bias: str = "bfloat16"
    ids: str = "int32"
    slots: str = "rank"

    name = "combine_wait"
    tables = COMBINE_TABLES

    def inputs(self, on_host):
        return [
            (self.ids, ["T", "K"]),
            ("float32", ["weight_rows", "weight_columns"]),
            ("int32", ["one"]),
            (self.bias, ["b0_rows", "b0_columns"]),
            (self.bias, ["b1_rows", "b1_columns"]),
            (self.dtype, ["shared_rows", "shared_columns"]),
        ]

    def shapes(self):
        return []

    def outputs(self, on_host):
        return [(self.out, ["T", self.hidden])]

    def parameters(self):
        return {"hidden": self.hidden, "layout": self.layout, "reduce": self.reduce, "slots": self.slots}


Variant = Send | Receive | SendBack | ReceiveBack


def _format(hidden, fmt):
    name = {ep.BF16: "bf16", ep.BlockwiseFP8: "blockwise_fp8"}[type(fmt)]
    column = fmt.scales_layout == "column"
    return {"hidden": hidden, "format": name, "scale": getattr(fmt, "scale", "float32"), "by_column": column}


def all_variants() -> list[Variant]:
    """What `conftest.stages` compiles: every format and layout, every layout and reduce mode, and a few sizes more."""
    fp8 = ep.BlockwiseFP8()
    found = [Send(8, ids="int64"), Send(72), Send(128, fp8), Receive(72), Receive(128, fp8)]
    found += [Send(FP8_HIDDEN, ep.BlockwiseFP8(scale), encoded=True) for scale in ("float32", "ue8m0")]
    for fmt in FORMATS.values():
        hidden = hidden_of(fmt)
        found += [Send(hidden, fmt), *(Receive(hidden, fmt, layout) for layout in LAYOUTS)]
    for hidden in (8, FP8_HIDDEN):
        for layout in LAYOUTS:
            found += _back(hidden, layout, "expert") + _back(hidden, layout, "source")
    for hidden in (72, 128):
        found += _back(hidden, "expert", "expert") + _back(hidden, "expert", "source")
    found += [ReceiveBack(8, ids="int64"), ReceiveBack(8, reduce="source", ids="int64")]
    return found + _expert_slots_variants()


def _expert_slots_variants():
    slots = {"slots": "expert"}
    found = [Send(8, ids="int64", **slots), ReceiveBack(8, reduce="source", ids="int64", **slots)]
    for fmt in EXPERT_SLOTS_FORMATS.values():
        hidden = hidden_of(fmt)
        found.append(Send(hidden, fmt, **slots))
        for layout in ("expert", "expert_padded"):
            found += [Receive(hidden, fmt, layout, **slots), *_back(hidden, layout, "source", "expert")]
    return found


def hidden_of(fmt: ep.TokenFormat) -> int:
    """The H at which a format of `FORMATS` is compiled."""
    return 8 if fmt == ep.BF16() else FP8_HIDDEN


def _back(hidden, layout, reduce, slots="rank"):
    types = COMBINE_TYPES[hidden]
    return [
        SendBack(hidden, layout, reduce, types[0], slots),
        ReceiveBack(hidden, layout, reduce, *types, slots=slots),
    ]


class Stages(dict):
    """Loaded models by variant, all for the host or all for GPU 0."""

    gpu = False


def compile_all(variants, gpu: bool = False) -> Stages:
    """Loaded models by variant: one module, one compilation."""
    from max.driver import CPU, Accelerator
    from max.engine import InferenceSession
    from max.graph import DeviceRef, Module

    module, names = Module(), {}
    for i, variant in enumerate(dict.fromkeys(variants)):
        names[variant] = f"stage_{i}"
        _add_graph(module, names[variant], variant, DeviceRef.GPU(0) if gpu else DeviceRef.CPU())
    session = InferenceSession(devices=[CPU(), *([Accelerator(0)] if gpu else [])])
    models = session.load_all(module, custom_extensions=[ep.kernel_library()])
    found = Stages({variant: models[name] for variant, name in names.items()})
    found.gpu = gpu
    return found


def _add_graph(module, name, variant, device):
    from max.dtype import DType
    from max.graph import BufferType, DeviceRef, Graph, TensorType, ops

    host = DeviceRef.CPU()

    def tensor(dtype, shape, place=device):
        return TensorType(getattr(DType, dtype), shape, place)

    common = [
        BufferType(DType.int32, [windows.ORDER_WORDS], device),
        BufferType(DType.int32, ["words"], device),
        tensor("int64", [SETTINGS_WORDS], host),
        *[tensor("uint64", ["R"], host)] * 3,
    ]
    given = [tensor(*t) for t in variant.inputs(device.is_cpu())]
    types = [*common, *given, *(tensor("int8", s, host) for s in variant.shapes())]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library()], module=module) as graph:
        values = [*(v.buffer for v in graph.inputs[:2]), *(v.tensor for v in graph.inputs[2:])]
        outputs = ops.inplace_custom(
            f"ep_mojo_{variant.name}",
            device,
            values[: len(values) - len(variant.shapes())],
            out_types=[tensor(*t) for t in variant.outputs(device.is_cpu())],
            parameters=variant.parameters() | {"n_sms": 0},
        )
        graph.output(*outputs)


class Engine:
    """The virtual ranks of one config, stage by stage and rank by rank. Nothing raises what ranks have on record.

    Attributes:
        cfg, comm: The config and its communicator.
    """

    def __init__(self, models: dict, cfg: ep.EPConfig):
        self.cfg, self.models = cfg, models
        self.gpu = getattr(models, "gpu", False)
        self.comm = ep.Communicator.one_gpu(cfg) if self.gpu else ep.Communicator.cpu(cfg)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.comm.destroy()

    def send(self, rank, x, ids, weights=None, num_tokens=None, x_scales=None, input_scale=None):
        """dispatch_async."""
        cfg = self.cfg
        variant = Send(cfg.hidden_size, cfg.dispatch_format, ids.dtype.name, x_scales is not None, cfg.slots)
        factor = None if input_scale is None else np.array([input_scale], np.float32)
        self._run(variant, rank, [x, _or(x_scales, 2), ids, _or(weights, 2), _or(num_tokens, 1), _or(factor, 1)])

    def receive(self, rank):
        """dispatch_wait: the handle's tensors as NumPy arrays."""
        cfg = self.cfg
        types = dict(zip(HANDLE_TENSORS, handle_types(cfg), strict=True))
        dims = {name: [int(d) for d in t.shape] for name, t in types.items()}
        shapes = [
            [cfg.rows_capacity, *dims["scales"], *dims["row_offsets"], *dims["counts"], 0],
            [*dims["expert_ids"], *dims["local_ids"], 0],
            [*dims["row_map"], cfg.n_ranks, 0],
        ]
        variant = Receive(cfg.hidden_size, cfg.dispatch_format, cfg.output_layout, cfg.slots)
        handle = SimpleNamespace(**dict(zip(HANDLE_TENSORS, self._run(variant, rank, [], shapes), strict=True)))
        handle.tokens = handle.tokens.reshape(dims["tokens"])
        return handle

    def send_back(self, rank, rows, handle, reduce="expert", own_rows=0):
        """combine_async: the shared expert's rows [own_rows, H], or [0, 0]."""
        cfg = self.cfg
        shape = [own_rows, cfg.hidden_size, 0] if cfg.shared_expert else [0, 0, 0]
        variant = SendBack(cfg.hidden_size, cfg.output_layout, reduce, cfg.combine_dtype, cfg.slots)
        rows = rows.reshape(-1, cfg.hidden_size)
        where = handle.src_info if cfg.slots == "expert" else handle.row_map
        given = [rows, where, handle.recv_weights, handle.recv_num_tokens]
        return self._run(variant, rank, given, [shape])[0]

    def receive_back(self, rank, ids, shared, reduce="expert", weights=None, num_tokens=None, bias0=None, bias1=None):
        """combine_wait: the sums [T, H]."""
        cfg = self.cfg
        types = cfg.combine_dtype, cfg.output_dtype, COMBINE_TYPES[cfg.hidden_size][2], ids.dtype.name
        variant = ReceiveBack(cfg.hidden_size, cfg.output_layout, reduce, *types, cfg.slots)
        given = [ids, _or(weights, 2), _or(num_tokens, 1), _or(bias0, 2), _or(bias1, 2), shared]
        return self._run(variant, rank, given)[0]

    def _run(self, variant, rank, values, shapes=()):
        settings, *rest = self.comm.inputs()
        tables = rest[variant.tables.start - 1 : variant.tables.stop - 1]
        order, counters = rest[6], rest[7 + rank]
        given = [
            to_buffer(np.zeros(v.shape, storage_dtype(dtype)) if v.size == 0 else v, dtype)
            for v, (dtype, _) in zip(values, variant.inputs(not self.gpu), strict=True)
        ]
        if self.gpu:
            given = [buffer.to(self.comm.devices[0]) for buffer in given]
        given += [to_buffer(np.zeros(shape, np.int8)) for shape in shapes]
        outputs = run_model(self.models[variant], [order, counters, settings, *tables, *given])
        return [to_numpy(o) for o in outputs]


def _or(value, rank):
    return np.zeros([0] * rank) if value is None else value
