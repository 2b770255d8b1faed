"""`ep_mojo.torch.dispatch` and `combine`, torch.compile, and gradients, on processes over gloo."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.torch import api_calls as calls

RANKS = 2, 4


@pytest.mark.parametrize("name", calls.buffers.CONFIGS)
def test_rounds_are_the_reference(ready, name):
    for seed in range(3):
        ready.run(calls.check_api, 4, name, seed, torch.int64, True, timeout_s=300)
    ready.run(calls.check_api, 2, name, 3, torch.int64, True)


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


def test_ops_are_what_torch_expects(ready):
    ready.run(calls.check_library, 4, timeout_s=300)


@pytest.mark.parametrize("n", RANKS)
def test_gradients(ready, n):
    ready.run(calls.check_gradients, n)
    ready.run(calls.check_gradients_of_each, n)
