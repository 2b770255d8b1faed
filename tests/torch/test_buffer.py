"""`ep_mojo.torch.Buffer` as such: bad input, failures, events, sizes, the end. On processes over gloo."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ep_mojo.comm import board
from ep_mojo.errors import PeerLostError
from tests.torch import buffer_calls as calls
from tests.torch import life_calls
from tests.torch.launch import Died, Pool

RANKS = 2, 4


@pytest.mark.parametrize("n", RANKS)
def test_bad_input_is_named_and_hangs_nobody(ready, n):
    assert ready.run(calls.check_bad_input, n)[0] > 60


def test_bad_arguments_of_a_buffer(ready):
    ready.run(calls.check_bad_buffers)


@pytest.mark.parametrize("n", RANKS)
def test_what_ranks_must_agree_on(ready, n):
    ready.run(calls.check_mismatch, n)


def test_what_a_buffer_lacks(ready):
    ready.run(calls.check_plain_buffer, 2)


@pytest.mark.parametrize("hook", [False, True], ids=["whole", "hook"])
@pytest.mark.parametrize(("n", "rank"), [(2, 0), (4, 3)])
def test_too_many_tokens_on_one_rank(ready, n, rank, hook):
    took = ready.run(calls.check_too_many_tokens, n, rank, hook)
    assert max(took) < 10, "an error, not a time-out"


def test_more_rows_than_num_worst_tokens(ready):
    ready.run(calls.check_worst_too_small, 4)


def test_groups_made_again_and_destroyed(ready):
    ready.run(calls.check_lives, 2)
    ready.run(calls.check_lives, 4)
    ready.run(calls.check_destroyed_group)


def test_a_store_that_is_gone_is_named():
    with pytest.raises(PeerLostError, match="new process group"), board._named():
        raise RuntimeError("connection reset")


def test_a_rank_that_does_not_come(ready):
    took = ready.run(calls.check_missing_rank, 2)
    assert 1 < max(took) < 8


def test_a_rank_that_dies():
    with Pool(2) as pool:
        pool.run(calls.buffers.prepare, timeout_s=600)
        found = pool.run(calls.die_in_the_middle, 1, raise_errors=False)
    name, took = found[0]
    assert name in ("PeerLostError", "PeerTimeoutError")
    assert took < 10, "later than it should"
    assert isinstance(found[1], Died)


@pytest.mark.parametrize("n", RANKS)
def test_events(ready, n):
    ready.run(calls.check_events, n)


@pytest.mark.parametrize("n", RANKS)
def test_sizes_and_settings(ready, n):
    ready.run(life_calls.check_sizes_and_settings, n)


def test_use_after_destroy(ready):
    ready.run(life_calls.check_after_destroy, 2)


def test_two_hundred_buffers_leave_nothing_behind(ready):
    ready.run(life_calls.check_life, 2, 200, timeout_s=120)


def test_torch_is_imported_on_demand():
    code = "import ep_mojo, sys; from ep_mojo import Communicator, EPConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_torch_the_error_names_the_package():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import ep_mojo.errors as errors\n"
        "try:\n    import ep_mojo.torch\n"
        "except errors.MissingDependencyError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "pip install torch" in done.stdout
