"""`Communicator.process_group` without rounds: who is in it, what is refused and where, what is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torch import group_calls as calls
from tests.torch import refusals
from tests.torch.launch import Pool, run

ROOT = Path(__file__).resolve().parents[2]


def test_windows_are_shared_and_have_no_name(pool):
    for rank, (got, names) in enumerate(pool.run(calls.exchange)):
        assert (got == [[10 * source + rank] for source in range(4)]).all()
        assert not names


def test_without_proc_blocks_have_a_name_until_all_have_them(pool):
    for rank, (got, names) in enumerate(pool.run(calls.exchange, "/nowhere")):
        assert (got == [[10 * source + rank] for source in range(4)]).all()
        assert not names


def test_what_a_communicator_is(pool):
    for rank, about in enumerate(pool.run(refusals.about)):
        assert about == {
            "rank": rank,
            "graph_ranks": 1,
            "fused_allowed": True,
            "lost": [],
            "memories": [0, 1, 2, 3],
            "own": rank,
            "same_group": True,
            "inputs": 9,
        }


def test_fresh_processes_and_one_rank_alone():
    assert run(1, refusals.alone) == [(0, [])]


# Refused


@pytest.mark.parametrize("name", refusals.EVERYWHERE)
def test_what_is_wrong_on_one_rank_is_raised_on_all(pool, name):
    """At once, and named alike; nothing stays behind, and the next communicator is right."""
    _, error, words = refusals.EVERYWHERE[name]
    before = pool.run(calls.resources)
    for found in pool.run(refusals.make_wrong, name):
        assert found[0] == error, found
        for word in words:
            assert word in found[1], found[1]
    assert pool.run(calls.resources) == before
    assert pool.run(refusals.make_right) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", refusals.HERE)
def test_what_has_no_group_is_refused_here(pool, name):
    how, error, words = refusals.HERE[name]
    found = pool.run(refusals.refuse_here, how)
    for name_of_error, text, _ in found:
        assert name_of_error == error, text
        for word in words:
            assert word in text
    assert pool.run(refusals.make_right) == [0, 1, 2, 3]


def test_no_process_group_yet():
    with Pool(1, init=False) as bare:
        ((name, text, _),) = bare.run(refusals.no_group)
        assert (name, "init_process_group" in text) == ("OrderError", True)
        ((name, text, _),) = bare.run(refusals.other_backend)
        assert (name, "cpu:gloo,cuda:nccl" in text) == ("UnsupportedError", True)


def test_torch_that_is_not_installed_is_named():
    code = "import sys; sys.modules['torch'] = None; import ep_mojo as ep; ep.Communicator.process_group(None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MissingDependencyError" in done.stderr
    assert "Remedy: pip install torch, or '.[torch]' in the checkout" in done.stderr


def test_graphs_and_arguments_that_are_wrong(built):
    """On one rank: an argument is refused there alone, a graph on all ranks."""
    for rank, found in enumerate(built.run(refusals.bad_arguments)):
        assert [name for name, _, _ in found] == ["DTypeError", "ShapeError", "UnsupportedError", "DTypeError", None]
        assert f"rank {rank}" in found[0][1]
    for found in built.run(refusals.bad_graphs):
        assert [name for name, _, _ in found] == ["DTypeError", "ConfigMismatchError", "ConfigMismatchError", None]
        assert "compiles_once = False" in found[1][1]


def test_what_compiling_raises_on_the_first_rank_is_raised_on_all(built):
    for name, text, _ in built.run(refusals.compile_error):
        assert (name, text) == ("KernelBuildError", "no compiler today")


def test_each_rank_may_compile_its_own(built):
    for rank, found in enumerate(built.run(refusals.compile_alone, None)):
        assert found == ([(rank, f"add_on_{rank}")], None, "")
    for found in built.run(refusals.compile_alone, 2):
        assert found == ([], "KernelBuildError", "no compiler on rank 2")


# Ends


def test_destroy_is_final_and_another_thread_is_refused(pool):
    for found in pool.run(refusals.ends):
        assert found == ["OrderError"] * 6 + [None]


@pytest.mark.parametrize("how", ["destroy", "forget"])
def test_communicators_that_go_leave_nothing(pool, how):
    results = pool.run(calls.cycles, 200, how, timeout_s=240)
    for before, after in results[:2]:
        assert after == before


def test_what_is_said_through_the_store(pool):
    pool.run(calls.over_the_store)


def test_the_program_of_the_page_under_torchrun(tmp_path):
    """Ranks by environment variables; docs/torch.md, as it stands there."""
    (program,) = re.findall(r"(?s)^```python\n(.*?)^```", (ROOT / "docs" / "torch.md").read_text(), re.MULTILINE)
    (tmp_path / "layer.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "layer.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(re.findall(r"rank \d: (?:True|False)", done.stdout)) == ["rank 0: True", "rank 1: True"]
