"""The format and the programs of docs/formats.md: by itself, in all stages of a Mojo program, and in a MAX graph."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType

import ep_mojo as ep
from ep_mojo.kernels import find_compiler

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text()
STRUCT, USE = re.findall(r"```mojo\n(.*?)```", PAGE, re.DOTALL)
(GRAPH,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PROGRAM = """
from layout import TileTensor, row_major
from std.memory import bitcast
from std.testing import assert_equal
from ep_mojo import TokenHandler
from my_formats import Sixteenths
from virtual_world import E, K, L, R, ROWS, Round, World, bf16, check_rows

comptime H = 24

def sixteenths(rank: Int, token: Int, h: Int) -> Int:
    return (rank * 50 + token * 37 + h * 11) % 301 - 150  # each is a bfloat16 when divided by 16

def clamped(n: Int) -> Int:
    return max(-127, min(127, n))

def value(n: Int) -> BFloat16:
    return bitcast[DType.bfloat16](bf16(Float32(n) / 16))

def main() raises:
    var world = World[Sixteenths[H]]()
    var given = Round([5, 0, 3], H, 1)
    for r in range(R):
        for i in range(len(given.x[r])):
            given.x[r][i] = value(sixteenths(r, i // H, i % H))
        world.send(r, given.x[r], given.ids[r])
    var total = 0
    for r in range(R):
        var tokens = List[Int8](length=ROWS * H, fill=1)
        var offsets = List[UInt32](length=L + 1, fill=9)
        var experts = List[Int32](length=L, fill=9)
        var src_info = List[Int32](length=ROWS * 2, fill=9)
        var handler = TokenHandler[Sixteenths[H]](TileTensor(tokens, row_major[ROWS, H]()))
        world.receive(r, handler, offsets, experts, src_info)
        var rows = check_rows(r, given, offsets, experts, src_info)
        var y = List[BFloat16](length=ROWS * H, fill=0)
        for i in range(len(rows)):
            for h in range(H):
                var q = clamped(sixteenths(rows[i][1], rows[i][2], h))
                assert_equal(Int(tokens[i * H + h]), q)
                y[i * H + h] = value(q)
        total += len(rows)
        world.send_back(r, y, src_info)
    for r in range(R):
        var out = List[BFloat16](length=given.T[r] * H, fill=7)
        var seen = List[BFloat16](length=given.T[r] * H, fill=7)
        world.receive_back[False](r, given.T[r], out, seen)
        for t in range(given.T[r]):
            var n = 0
            for k in range(K):
                var id = given.ids[r][t * K + k]
                n += Int(id >= 0 and id < E)
            for h in range(H):
                assert_equal(out[t * H + h], value(n * clamped(sixteenths(r, t, h))))
        world.check(r)
    print("rows", total)
"""


@pytest.fixture(scope="module")
def my_formats(tmp_path_factory):
    package = tmp_path_factory.mktemp("user") / "my_formats"
    package.mkdir()
    (package / "__init__.mojo").write_text(STRUCT)
    return package


def test_the_mojo_program_of_the_page(my_formats):
    assert ".venv/bin/mojo run -I kernels my_program.mojo\n" in PAGE
    program = my_formats.parent / "my_program.mojo"
    program.write_text(USE)
    done = find_compiler().run("run", "-I", ROOT / "kernels", program)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(\S+) travels as (\S+) = (\S+)$", done.stdout, re.MULTILINE)
    assert len(lines) == 8
    for x, q, value in (map(float, line) for line in lines):
        assert (q, value) == (np.clip(np.round(x * 16), -127, 127), q / 16)


def test_in_a_mojo_program(my_formats):
    """All four stages over three virtual ranks; the program ends with an error where a value is wrong."""
    program = my_formats.parent / "program.mojo"
    program.write_text(PROGRAM)
    places = [ROOT / "kernels", ROOT / "tests" / "mojo", my_formats.parent]
    done = find_compiler().run("run", *(arg for place in places for arg in ("-I", place)), program)
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = re.findall(r"^rows (\d+)$", done.stdout, re.MULTILINE)
    assert int(rows) > 20


def test_a_format_that_is_not_there():
    """Its error is the package's, and says where to look."""
    fmt = ep.CustomFormat("my_formats.Nobody", token_dtype="int8", message_size=16)
    cfg = ep.EPConfig(hidden_size=16, top_k=1, n_experts=1, max_tokens_per_rank=2, n_ranks=1, dispatch_format=fmt)
    x, ids = (TensorType(dtype, ["T", n], DeviceRef.CPU()) for dtype, n in ((DType.bfloat16, 16), (DType.int32, 1)))
    with ep.Communicator.cpu(cfg) as comm:
        types = [x, ids, *comm.input_types()]
        with Graph("nobody", input_types=types, custom_extensions=[ep.kernel_library()]) as graph:
            given = [value.tensor for value in graph.inputs[:2]]
            (h,) = ep.dispatch(comm.bind(graph.inputs[2:]), given[:1], given[1:])
            graph.output(h.tokens)
        with pytest.raises(ep.KernelBuildError, match="extra_sources"):
            comm.compile(graph)


def test_the_graph_of_the_page(my_formats, monkeypatch, capsys):
    """Every row that arrives is the right token, rounded as the format says."""
    monkeypatch.chdir(my_formats.parent)
    program = my_formats.parent / "my_graph.py"
    program.write_text(GRAPH)
    names = runpy.run_path(str(program))
    names["comm"].destroy()
    assert "int8" in capsys.readouterr().out
    out, n_ranks = names["out"], names["R"]
    exact = [(bits.astype(np.uint32) << 16).view(np.float32) for bits in names["x"]]
    rows = 0
    for rank in range(n_ranks):
        for row, (where, _) in enumerate(out[n_ranks + rank]):
            if where >= 0:
                x = exact[where // 8][where % 8]
                np.testing.assert_array_equal(out[rank][row], np.clip(np.round(x * 16), -127, 127).astype(np.int8))
                rows += 1
    assert rows == n_ranks * 8 * names["K"]
