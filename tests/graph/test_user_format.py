"""The format of docs/formats.md, in a Mojo program and in a MAX graph."""

import re
from pathlib import Path

import numpy as np
import pytest

import ep_mojo as ep
from ep_mojo.dtypes import float32_to_bfloat16_bits
from ep_mojo.kernels import find_compiler

ROOT = Path(__file__).resolve().parents[2]
H, R, K = 256, 2, 2
PROGRAM = """
from std.memory import bitcast
from ep_mojo import Bytes, HostTeam
from my_formats import Sixteenths

def main():
    var token = List[UInt16](length=16, fill=0x3FC0)  # 1.5
    token[3] = 0xC2F0  # -120, beyond the range
    var message = List[Int8](length=16, fill=0)
    Sixteenths[16].encode[HostTeam](
        Bytes(unsafe_from_address=Int(token.unsafe_ptr())), 1.0, Bytes(unsafe_from_address=Int(message.unsafe_ptr()))
    )
    print(message[0], message[3])
    _ = token^
"""


@pytest.fixture(scope="module")
def my_formats(tmp_path_factory):
    text = (ROOT / "docs" / "formats.md").read_text()
    (code,) = re.findall(r"```mojo\n(.*?)```", text, re.DOTALL)
    package = tmp_path_factory.mktemp("user") / "my_formats"
    package.mkdir()
    (package / "__init__.mojo").write_text(code)
    return package


def test_in_a_mojo_program(my_formats):
    program = my_formats.parent / "program.mojo"
    program.write_text(PROGRAM)
    done = find_compiler().run("run", "-I", ROOT / "kernels", "-I", my_formats.parent, program)
    assert done.stdout.split() == ["24", "-127"], done.stderr


def test_in_a_max_graph(my_formats):
    from max.dtype import DType
    from max.graph import DeviceRef, Graph, TensorType

    fmt = ep.CustomFormat("my_formats.Sixteenths", token_dtype="int8", message_size=H)
    cfg = ep.EPConfig(
        hidden_size=H, top_k=K, n_experts=4, max_tokens_per_rank=8, n_ranks=R, dispatch_format=fmt, reduce="expert"
    )
    library = ep.kernel_library(extra_sources=[my_formats])
    cpu = DeviceRef.CPU()
    with ep.Communicator.cpu(cfg) as comm:
        types = [
            TensorType(dtype, [f"T{r}", n], cpu)
            for dtype, n in ((DType.bfloat16, H), (DType.int32, K))
            for r in range(R)
        ]
        with Graph("user_format", input_types=[*types, *comm.input_types()], custom_extensions=[library]) as graph:
            ranks = comm.bind(graph.inputs[-comm.num_inputs :])
            values = [v.tensor for v in graph.inputs[: 2 * R]]
            handles = ep.dispatch(ranks, values[:R], values[R:])
            graph.output(*[h.tokens for h in handles], *[h.src_info for h in handles])
        model = comm.compile(graph)
        rng = np.random.default_rng(5)
        xs = [rng.uniform(-9, 9, (8, H)).astype(np.float32) for _ in range(R)]
        bits = [float32_to_bfloat16_bits(x) for x in xs]
        ids = [rng.integers(0, 4, (8, K)).astype(np.int32) for _ in range(R)]
        out = comm.execute(model, *bits, *ids)
    exact = [(b.astype(np.uint32) << 16).view(np.float32) for b in bits]
    rows = 0
    for rank in range(R):
        for row, (where, _) in enumerate(out[R + rank]):
            if where >= 0:
                x = exact[where // 8][where % 8]
                np.testing.assert_array_equal(out[rank][row], np.clip(np.round(x * 16), -127, 127).astype(np.int8))
                rows += 1
    assert rows == R * 8 * K
