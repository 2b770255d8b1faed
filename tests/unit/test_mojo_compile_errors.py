"""What the seed-named Mojo functions cannot do yet is refused by the compiler, in words that say what is missing."""

import os
import tempfile
from pathlib import Path

import pytest

from ep_mojo.errors import EPError
from ep_mojo.kernels import find_compiler

KERNELS = Path(__file__).parents[2] / "kernels"

PROGRAM = """
from ep_mojo.api import check_target
from ep_mojo.formats import check_format
from ep_mojo.ops.tensors import rank_slots_only

def main():
    {call}
"""

CASES = {
    'check_target["cpu", True, 1]()': ["use_shmem=True", "NVSHMEM transport", "missing", "use_shmem=False"],
    'check_target["cpu", True, 2]()': ["n_nodes > 1", "NVSHMEM transport", "missing", "n_nodes=1"],
    'check_target["tpu", False, 1]()': ["target", "'cpu' or 'gpu'"],
    'check_format["int3"]()': ["unknown format", "extra_sources"],
    'rank_slots_only["expert"]()': ["slots='expert'", "split ops"],
}

API = """
from ep_mojo import BF16, ep_dispatch_async_kernel_api
from layout import TileTensor, row_major
from max.gpu.host import DeviceContext

def main() raises:
    var words = List[Int32](length=80, fill=0)
    var ids = List[Int32](length=4, fill=0)
    var x = List[BFloat16](length=16, fill=0)
    var a = List[UInt64](length=2, fill=0)
    var b = List[UInt64](length=2, fill=0)
    var c = List[UInt64](length=2, fill=0)
    ep_dispatch_async_kernel_api[BF16[8], 4, 16, 2, {nodes}, "cpu"{more}](
        TileTensor(words, row_major[80]()), TileTensor(x, row_major[2, 8]()), TileTensor(ids, row_major[2, 2]()),
        TileTensor(a, row_major[2]()), TileTensor(b, row_major[2]()), TileTensor(c, row_major[2]()),
        DeviceContext(api="cpu"),
    )
"""


def build(program: str) -> tuple[int, str]:
    """Exit status and output of compiling a program."""
    try:
        compiler = find_compiler()
    except EPError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "program.mojo"
        file.write_text(program)
        done = compiler.run("build", "-I", KERNELS, file, "-o", Path(directory) / f"program{os.extsep}out", timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("call", "words"), CASES.items(), ids=CASES)
def test_refusals(call, words):
    status, text = build(PROGRAM.format(call=call))
    assert status != 0
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(("nodes", "more"), [(1, ", use_shmem=True"), (2, "")], ids=["use_shmem", "two nodes"])
def test_seed_function(nodes, more):
    """use_shmem defaults to n_nodes > 1, as in the seed; either is refused where a program asks for it."""
    status, text = build(API.format(nodes=nodes, more=more))
    assert status != 0
    assert "NVSHMEM transport" in text, text
