"""One expert-parallel MoE layer as two MAX graphs: dispatch, and combine. The experts run in NumPy between them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from ..comm import Communicator, CompiledGraph
from ..comm.arguments import graph_specs
from ..config import EPConfig
from ..dtypes import to_buffer, to_numpy
from ..formats import BF16, BlockwiseFP8, TokenFormat
from ..handle import HANDLE_TENSORS
from .progress import Progress

FORMATS: dict[str, TokenFormat] = {
    "bf16": BF16(),
    "fp8": BlockwiseFP8(),
    "fp8-power-of-two": BlockwiseFP8(scale="power_of_two"),
    "fp8-ue8m0": BlockwiseFP8(scale="ue8m0"),
}
"""Formats of the programs by their command-line names; `cli.FORMATS` lists the same."""


class GraphSet:
    """Graphs that are compiled in groups: a compilation takes many seconds, each further graph in it few.

    A group is what other programs compile too, so that MAX finds it in its cache: a layer, whatever stands beside it.

    Attributes:
        library: Path of the compiled kernels.
        compiled: Compiled graphs by group and name, once `compile` has run.
    """

    def __init__(self, progress: Progress):
        """Build the kernels, if they are not in the cache.

        Raises:
            KernelBuildError: They could not be compiled.
        """
        self.library = build_kernels(progress)
        with progress.step("start", "Starting MAX"):
            import max.engine  # noqa: F401  # seconds, so not silently in the next step
        self.compiled: dict[tuple[str, str], CompiledGraph] = {}
        self._progress = progress
        self._modules: dict[str, Any] = {}
        self._specs: dict[tuple[str, str], tuple] = {}

    def graph(self, group: str, name: str, input_types: list) -> Any:
        """A new `max.graph.Graph` of a group, to be filled in a `with` block."""
        from max.graph import Graph, Module

        module = self._modules.setdefault(group, Module())
        return Graph(name, input_types=input_types, custom_extensions=[self.library], module=module)

    def add(self, group: str, graph: Any) -> None:
        """Note a graph that is complete."""
        self._specs[group, graph.name] = tuple(graph_specs(graph))

    def compile(self) -> None:
        """Compile all graphs, or take them from MAX's cache."""
        from max.driver import CPU
        from max.engine import InferenceSession

        with self._progress.step(
            "graphs", "Loading the graphs (a new shape compiles for about a minute, a known one loads in seconds)"
        ):
            session = InferenceSession(devices=[CPU()])
            for group, module in self._modules.items():
                models = session.load_all(module, custom_extensions=[self.library])
                names = [n for g, n in self._specs if g == group]
                found = models.values() if len(names) == 1 else [models[n] for n in names]
                for name, model in zip(names, found, strict=True):
                    self.compiled[group, name] = CompiledGraph(name, self._specs[group, name], model)


class MoELayer:
    """Virtual ranks on the CPU. Can run once its `GraphSet` is compiled.

    Attributes:
        cfg: The config.
        comm: The communicator; `close` destroys it.
    """

    def __init__(self, cfg: EPConfig, graphs: GraphSet, name: str = "moe"):
        """Make the communicator and add two graphs, "dispatch" and "combine", as group `name`.

        Raises:
            SharedMemoryError: There is not enough memory for the windows.
        """
        self.cfg = cfg
        self.name = name
        self.comm = Communicator.cpu(cfg)
        self._graphs = graphs
        try:
            self._add_dispatch()
            self._add_combine()
        except BaseException:
            self.comm.destroy()
            raise

    def close(self) -> None:
        """Give up the windows."""
        self.comm.destroy()

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def dispatch(self, xs: list, topk_ids: list, weights: list) -> list[Any]:
        """Send the tokens to their experts.

        Args:
            xs: For each rank bfloat16 [T, H], uint16 bits or a MAX buffer.
            topk_ids: For each rank int32 [T, K].
            weights: For each rank float32 [T, K].

        Returns:
            MAX buffers for `handles` and `combine`.
        """
        return self.comm.execute(
            self._graphs.compiled[self.name, "dispatch"], *xs, *topk_ids, *weights, as_buffers=True
        )

    def handles(self, buffers: list[Any]) -> list[Any]:
        """What `dispatch` returned, as one object a rank with the fields of `Handle` in NumPy (no copies)."""
        n = self.cfg.n_ranks
        arrays = [to_numpy(b) for b in buffers[: n * len(HANDLE_TENSORS)]]
        return [SimpleNamespace(**dict(zip(HANDLE_TENSORS, arrays[r::n], strict=True))) for r in range(n)]

    def combine(self, ys: list, buffers: list[Any]) -> list[Any]:
        """Bring the experts' rows back and sum them.

        Args:
            ys: For each rank the rows in combine_dtype, shaped like `Handle.tokens` with H elements a row.
            buffers: From `dispatch`, of this or an earlier round.

        Returns:
            For each rank a MAX buffer [T, H] in output_dtype.
        """
        return self.comm.execute(self._graphs.compiled[self.name, "combine"], *ys, *buffers, as_buffers=True)

    def _add_dispatch(self) -> None:
        from max.dtype import DType
        from max.graph import DeviceRef, TensorType

        from .. import graph as ep

        cfg, comm, n = self.cfg, self.comm, self.cfg.n_ranks
        sizes = ((DType.bfloat16, cfg.hidden_size), (DType.int32, cfg.top_k), (DType.float32, cfg.top_k))
        types = [TensorType(d, [f"tokens{r}", size], DeviceRef.CPU()) for d, size in sizes for r in range(n)]
        with self._graphs.graph(self.name, "dispatch", [*types, *comm.input_types()]) as graph:
            own = [v.tensor for v in graph.inputs[: 3 * n]]
            ranks = comm.bind(graph.inputs[-comm.num_inputs :])
            flat = [h.flat() for h in ep.dispatch(ranks, own[:n], own[n : 2 * n], own[2 * n :])]
            outputs = [flat[r][i] for i in range(len(flat[0])) for r in range(n)]
            self._handle_types = [value.type for value in outputs]
            graph.output(*outputs)
        self._graphs.add(self.name, graph)

    def _add_combine(self) -> None:
        from max.dtype import DType
        from max.graph import DeviceRef, TensorType

        from .. import graph as ep

        cfg, comm, n = self.cfg, self.comm, self.cfg.n_ranks
        shape = [*self._handle_types[0].shape[:-1], cfg.hidden_size]
        types = [*[TensorType(getattr(DType, cfg.combine_dtype), shape, DeviceRef.CPU())] * n, *self._handle_types]
        with self._graphs.graph(self.name, "combine", [*types, *comm.input_types()]) as graph:
            own = [v.tensor for v in graph.inputs[: len(types)]]
            ranks = comm.bind(graph.inputs[-comm.num_inputs :])
            handles = [ep.Handle.from_flat(cfg, own[n:][r::n]) for r in range(n)]
            graph.output(*ep.combine(ranks, own[:n], handles))
        self._graphs.add(self.name, graph)


def build_kernels(progress: Progress) -> Any:
    """Path of the compiled kernels; shows when they have to be compiled first.

    Raises:
        KernelBuildError: They could not be compiled.
    """
    from ..kernels import cached_library, kernel_library

    ready = cached_library()
    if ready is not None:
        return ready
    with progress.step("kernels", "Compiling the Mojo kernels (once on this machine, a few seconds)"):
        return kernel_library()


def float_tokens(x: np.ndarray, cfg: EPConfig) -> np.ndarray:
    """What the experts see of bfloat16 tokens (uint16 bits [N, H]): the format's rounding and back, float32."""
    from ..reference import dequantize, encode

    tokens, scales = encode(cfg, x, None)
    return dequantize(cfg, tokens, scales)


class Encoder:
    """The send of dispatch by itself: one rank that encodes its tokens into its own window and waits for nothing."""

    def __init__(self, cfg: EPConfig, x: np.ndarray, graphs: GraphSet):
        """Add the graph "encode" for one rank, one expert and the tokens `x` (bfloat16 bits [N, H])."""
        from max.dtype import DType
        from max.graph import DeviceRef, TensorType

        from .. import graph as ep

        self.comm = Communicator.cpu(cfg.replace(n_ranks=1, n_experts=1, top_k=1, max_tokens_per_rank=len(x)))
        sizes = ((DType.bfloat16, cfg.hidden_size), (DType.int32, 1))
        types = [TensorType(dtype, ["tokens", size], DeviceRef.CPU()) for dtype, size in sizes]
        with graphs.graph("encoder", "encode", [*types, *self.comm.input_types()]) as graph:
            ranks = self.comm.bind(graph.inputs[-self.comm.num_inputs :])
            ep.dispatch_async(ranks, [graph.inputs[0].tensor], [graph.inputs[1].tensor])
            graph.output()
        graphs.add("encoder", graph)
        self._graphs = graphs
        self._args = [to_buffer(x, "bfloat16"), to_buffer(np.zeros((len(x), 1), np.int32))]

    def run(self) -> None:
        """Encode all tokens into the window."""
        self.comm.execute(self._graphs.compiled["encoder", "encode"], *self._args)

    def reset(self) -> None:
        """Make room for the next run."""
        self.comm.reset()

    def close(self) -> None:
        """Give up the window."""
        self.comm.destroy()
