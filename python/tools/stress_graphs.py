"""The cases of `gpu_stress.py` and their graphs: rounds whose inputs are made, and results checked, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stress_law as law_of

import ep_mojo as ep
from ep_mojo.handle import HANDLE_TENSORS

OPS = Path(__file__).resolve().parent / "stress_ops"
DRAWN = ("x", "ids", "weights", "num_tokens", "info")
"""What a round's inputs are, in the order of the op that makes them."""
FAULTS = {
    "tokens": (5, 0x10, ["content of a row"]),
    "scales": (3, 0x01, ["scale of a row"]),
    "row_map": (0, 0x01, ["row_map"]),
    "src_info": (0, 0x01, ["src_info of a row", "row_map", "order of rows"]),
    "counts": (0, 0x01, ["row_offsets", "row_map", "src_info of a row", "src_info where there is no row"]),
    "recv_weights": (3, 0x40, ["recv_weights"]),
    "y": (1, 0x01, ["sum of a token"]),
}
"""Spoilt by the self-test: byte, mask, and what may be noticed first."""
GATHERED_FAULTS = {
    "tokens": (5, 0x10, ["content of a row"]),
    "scales": (3, 0x01, ["scale of a row"]),
    "row_offsets": (0, 0x01, ["row_offsets"]),
    "counts": (0, 0x01, ["counts"]),
    "src_info": (4, 0x01, ["src_info of a row"]),
    "local_ids": (0, 0x01, ["choice of a row"]),
    "local_weights": (3, 0x40, ["weight of a row"]),
    "y": (1, 0x01, ["sum of a token"]),
}
"""The same of gathered rounds."""
FP8 = ep.BlockwiseFP8()


@dataclass(frozen=True)
class Case:
    """Rounds of one config.

    Attributes:
        name: Its name in the table.
        fused: Whether dispatch and combine are one launch each; else stages are split and overlap.
        experts: Experts of a rank.
        fields: Other fields of the config.
        per_graph: Rounds in one graph.
    """

    name: str
    fused: bool
    experts: int
    fields: dict = field(default_factory=dict, hash=False)
    per_graph: int = 4

    def config(self, n_ranks: int) -> ep.EPConfig:
        """Its config."""
        return ep.EPConfig(n_experts=self.experts * n_ranks, n_ranks=n_ranks, timeout_s=20.0, **self.fields)

    @property
    def faults(self) -> dict[str, tuple[int, int, list[str]]]:
        """What the self-test spoils."""
        return GATHERED_FAULTS if self.fields.get("output_layout") == "gathered" else FAULTS


def sizes(hidden: int, top_k: int, tokens: int, **others: Any) -> dict[str, Any]:
    """Fields of a config."""
    return {"hidden_size": hidden, "top_k": top_k, "max_tokens_per_rank": tokens, **others}


def gathered(hidden: int, top_k: int, tokens: int, **others: Any) -> dict[str, Any]:
    """Those of layout "gathered": K up to 6, see `Law.share`."""
    return sizes(hidden, top_k, tokens, output_layout="gathered", **others)


# About half of them have few tokens, which travel as cells, with 2 ranks as with 8.
CASES = (
    Case("bf16 fused, padded", True, 4, sizes(256, 1, 64, output_layout="expert_padded", num_buffers=1)),
    Case("bf16 split, 2 in flight", False, 8, sizes(1024, 4, 300, tokens_per_signal=1, alignment=8), 8),
    Case(
        "fp8 split, 3 in flight", False, 16, sizes(512, 8, 16, dispatch_format=FP8, num_buffers=3, reduce="source"), 9
    ),
    Case("fp8 fused", True, 32, sizes(7168, 8, 160, dispatch_format=FP8, tokens_per_signal=1, alignment=16)),
    Case("bf16 fused, 7 SMs", True, 32, sizes(7168, 8, 16, num_buffers=1, reduce="expert", n_sms=7)),
    Case(
        "bf16 fused, many tokens", True, 8, sizes(512, 4, 1500, reduce="expert", tokens_per_signal=1, num_buffers=1), 2
    ),
    Case("bf16 split, 16 SMs", False, 3, sizes(2880, 2, 64, n_sms=16, tokens_per_signal=3), 8),
    Case("gathered bf16 fused", True, 32, gathered(7168, 6, 16, tokens_per_signal=1)),
    Case("gathered bf16 split", False, 4, gathered(1024, 4, 200, tokens_per_signal=3, n_sms=16), 8),
    Case("gathered fp8 fused", True, 8, gathered(7168, 6, 160, dispatch_format=FP8, num_buffers=1)),
    Case("gathered fp8 split, 3 bufs", False, 2, gathered(512, 3, 16, dispatch_format=FP8, num_buffers=3), 9),
    Case("gathered rows alone", True, 1, gathered(512, 0, 1500, num_buffers=1), 2),
)
SELF_TESTS = (
    Case("self-test", False, 4, sizes(256, 2, 16, dispatch_format=FP8, n_sms=8), 1),
    Case("gathered self-test", True, 4, gathered(256, 2, 16, dispatch_format=FP8, n_sms=8), 1),
)


class Rounds:
    """The ops of a graph's rounds, for all ranks."""

    def __init__(self, case: Case, ranks: list[Any], laws: list[Any], findings: list[Any], faulty: bool):
        """Name the graph values: the ranks, and a law and findings for each."""
        self.case, self.ranks, self.laws, self.findings, self.faulty = case, ranks, laws, findings, faulty
        self.cfg = ranks[0].cfg
        self.fp8 = not isinstance(self.cfg.dispatch_format, ep.BF16)

    def _op(self, name: str, rank: Any, values: list[Any], types: list[Any] | None = None, **parameters: Any) -> list:
        from max.graph import ops

        return ops.inplace_custom(
            f"ep_stress_{name}", rank.device, values, out_types=types or [], parameters=parameters
        )

    def _delay(self, drawn: list[dict], stage: int) -> None:
        for rank, d in zip(self.ranks, drawn, strict=True):
            self._op("delay", rank, [rank.order, d["info"]], stage=stage)

    def _fault(self, drawn: list[dict], name: str, victims: list[Any]) -> None:
        if not self.faulty:
            return
        for rank, found, d, victim in zip(self.ranks, self.findings, drawn, victims, strict=True):
            self._op("fault", rank, [rank.order, found, d["info"], victim], place=[*self.case.faults].index(name))

    def draw(self) -> list[dict]:
        """The inputs of the next round."""
        from max.dtype import DType
        from max.graph import TensorType

        T, H, K = self.cfg.max_tokens_per_rank, self.cfg.hidden_size, self.cfg.top_k
        shapes = ((DType.bfloat16, [T, H]), (DType.int32, [T, K]), (DType.float32, [T, K]), (DType.int32, [1]))
        found = []
        for rank, law in zip(self.ranks, self.laws, strict=True):
            types = [TensorType(d, s, rank.device) for d, s in (*shapes, (DType.int64, [law_of.LAW_WORDS]))]
            found.append(dict(zip(DRAWN, self._op("fill", rank, [law], types), strict=True)))
        return found

    def send(self, drawn: list[dict]) -> Any:
        """dispatch_async."""
        self._delay(drawn, 0)
        x, ids, weights, n, _ = ([d[name] for d in drawn] for name in DRAWN)
        return ep.dispatch_async(self.ranks, x, ids, weights, num_tokens=n)

    def receive(self, drawn: list[dict], pending: Any) -> tuple[list, list]:
        """dispatch_wait, and the experts: handles and rows."""
        self._delay(drawn, 1)
        handles = ep.dispatch_wait(self.ranks, pending)
        return handles, self.experts(drawn, handles)

    def experts(self, drawn: list[dict], handles: list) -> list:
        """Check the handles; rows for combine."""
        from max.dtype import DType
        from max.graph import TensorType

        op, names = "experts", ("expert_ids", "src_info", "recv_weights", "row_map")
        if self.cfg.output_layout == "gathered":
            op, names = "gathered", ("src_info", "local_ids", "local_weights")
        names = ("tokens", "scales", "row_offsets", "counts", *names, "recv_num_tokens")
        for name in self.case.faults:
            if name != "y":
                self._fault(drawn, name, [getattr(h, name) for h in handles])
        rows = []
        for rank, found, d, h in zip(self.ranks, self.findings, drawn, handles, strict=True):
            given = [rank.order, found, d["info"], *(getattr(h, name) for name in names)]
            shape = TensorType(DType.bfloat16, h.tokens.shape, rank.device)
            rows += self._op(op, rank, given, [shape], fp8=self.fp8)
        return rows

    def sums(self, drawn: list[dict], ys: list) -> list:
        """Check what combine gave."""
        self._fault(drawn, "y", ys)
        for rank, found, d, y in zip(self.ranks, self.findings, drawn, ys, strict=True):
            self._op("sums", rank, [rank.order, found, d["info"], y])
        return ys

    def fused(self) -> tuple[list, list, list]:
        """A whole round; inputs, handles and sums."""
        drawn = self.draw()
        self._delay(drawn, 0)
        x, ids, weights, n, _ = ([d[name] for d in drawn] for name in DRAWN)
        handles = ep.dispatch(self.ranks, x, ids, weights, num_tokens=n)
        rows = self.experts(drawn, handles)
        self._delay(drawn, 2)
        return drawn, handles, self.sums(drawn, ep.combine(self.ranks, rows, handles))

    def overlapping(self, count: int) -> tuple[list, list, list]:
        """`count` rounds, with as many dispatches and combines in flight as there are buffers; of the last one inputs,
        handles and sums."""
        behind = self.cfg.num_buffers - 1
        sent, back, last = {}, {}, None
        for step in range(count + 2 * behind):
            if step < count:
                drawn = self.draw()
                sent[step] = drawn, self.send(drawn)
            i = step - behind
            if 0 <= i < count:
                drawn, pending = sent.pop(i)
                handles, rows = self.receive(drawn, pending)
                self._delay(drawn, 2)
                back[i] = drawn, handles, ep.combine_async(self.ranks, rows, handles)
            i -= behind
            if 0 <= i < count:
                drawn, handles, pending = back.pop(i)
                self._delay(drawn, 3)
                last = drawn, handles, self.sums(drawn, ep.combine_wait(self.ranks, pending))
        return last


def add_graph(module: Any, case: Case, comm: Any, name: str, faulty: bool = False) -> Any:
    """A graph of `case.per_graph` rounds. Its inputs are a law and findings for each rank, all changed in place; its
    outputs the last round's inputs, handles and sums, rank by rank."""
    from max.dtype import DType
    from max.graph import BufferType, Graph

    R, refs = comm.cfg.n_ranks, comm.device_refs()
    words = (law_of.LAW_WORDS, law_of.FINDINGS_WORDS)
    types = [*(BufferType(DType.int64, [n], ref) for n in words for ref in refs), *comm.input_types()]
    with Graph(name, input_types=types, custom_extensions=[ep.kernel_library(), OPS], module=module) as graph:
        buffers = [v.buffer for v in graph.inputs[: 2 * R]]
        rounds = Rounds(case, comm.bind(graph.inputs[2 * R :]), buffers[:R], buffers[R:], faulty)
        if case.fused:
            drawn, handles, ys = [rounds.fused() for _ in range(case.per_graph)][-1]
        else:
            drawn, handles, ys = rounds.overlapping(case.per_graph)
        outputs = []
        for d, h, y in zip(drawn, handles, ys, strict=True):
            outputs += [*(d[n] for n in DRAWN), *(getattr(h, n) for n in HANDLE_TENSORS), y]
        graph.output(*outputs)
    return graph
