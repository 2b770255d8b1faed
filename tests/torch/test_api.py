"""`ep_mojo.torch.dispatch` and `combine`, torch.compile, and gradients, on processes over gloo."""

from __future__ import annotations

import importlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ep_mojo as ep
from ep_mojo.torch import rounds
from ep_mojo.torch.graphs import CombineSet
from tests.torch import api_calls as calls
from tests.torch import launch

RANKS = 2, 4


@pytest.mark.parametrize("name", calls.buffers.CONFIGS)
def test_rounds_are_the_reference(ready, name):
    for seed in range(3):
        ready.run(calls.check_api, 4, name, seed, torch.int64, True, timeout_s=300)
    ready.run(calls.check_api, 2, name, 3, torch.int64, True)


def test_a_forgotten_communicator_goes(ready):
    ready.run(calls.check_forgotten, 2)


def test_other_inputs(ready):
    ready.run(calls.check_api, 4, "expert", 1, torch.int32, False, timeout_s=300)
    for biases in (1, 2):
        ready.run(calls.check_api, 4, "expert", 1, torch.int64, True, biases, timeout_s=300)


def test_bad_input_is_named_and_hangs_nobody(ready):
    ready.run(calls.check_api_bad_input, 4, timeout_s=300)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile(ready, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    ready.run(calls.check_compiled, 4, backend, timeout_s=300)


def test_compile_of_a_buffer(ready):
    ready.run(calls.check_broken_graphs, 2, timeout_s=300)


def test_ops_are_what_torch_expects(ready):
    ready.run(calls.check_library, 4, timeout_s=300)


@pytest.mark.parametrize("n", RANKS)
def test_gradients(ready, n):
    ready.run(calls.check_gradients, n)
    ready.run(calls.check_gradients_of_each, n)


def test_graphs_between_rounds_of_tensors(ready):
    ready.run(calls.check_execute_between, 2, timeout_s=300)


def test_graphs_are_built_in_any_thread():
    """As the threads of backward passes do that make a first round."""
    importlib.import_module("max.graph")  # it serves the thread that imports it
    cfg = calls.buffers.api_config(1, "rank").replace(n_ranks=1, n_experts=4)
    with ep.Communicator.cpu(cfg) as comm, ThreadPoolExecutor(1) as threads:
        comm.compile_calls = lambda graphs: [None] * len(graphs)
        threads.submit(rounds.compile_sets, comm, [CombineSet(8, "rank", "expert", "float32", "float32")]).result()


def test_the_example_under_torchrun():
    """A layer of 2 ranks, its gradients too, against a dense one."""
    printed = launch.torchrun(2, "torch_moe_layer.py", "--train")
    found = re.findall(r"rank ([01]): \d+ tokens; [\w ]*: output 0\.00\d+, gradient of x 0\.00", printed)
    assert sorted(found) == ["0", "1"], printed  # in one line or two: processes share the pipe
