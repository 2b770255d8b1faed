"""Times of marks on GPUs: the numbers of the marks, and what the host makes of the clock."""

import re
from pathlib import Path

import numpy as np
import pytest

import ep_mojo as ep
from ep_mojo import timeline

KERNELS = Path(__file__).resolve().parents[2] / "kernels" / "ep_mojo" / "gpu"


def test_marks_are_those_of_the_kernels():
    text = (KERNELS / "timeline.mojo").read_text()
    mojo = {name: int(value) for name, value in re.findall(r"^comptime (\w+) = (\d+)$", text, re.M)}
    assert (mojo.pop("TIMELINE_CTAS"), mojo.pop("TIMELINE_MARKS")) == (timeline.CTAS, timeline.N_MARKS)
    assert {name.removeprefix("MARK_").lower().replace("_", " "): n for name, n in mojo.items()} == timeline.MARKS
    (warps,) = re.findall(r"^comptime MAX_WARPS = (\d+)$", (KERNELS / "shared_memory.mojo").read_text(), re.M)
    assert int(warps) == timeline.WARPS
    assert max(timeline.MARKS.values()) < timeline.N_MARKS


def test_kernels_come_by_all_marks():
    used = {name for path in KERNELS.glob("*.mojo") for name in re.findall(r"mark\[(\w+)\]", path.read_text())}
    assert {name.removeprefix("MARK_").lower().replace("_", " ") for name in used} == set(timeline.MARKS)


def clock(**marks):
    found = np.zeros((timeline.CTAS, timeline.WARPS, timeline.N_MARKS), np.int64)
    for name, places in marks.items():
        for (cta, warp), ns in places.items():
            found[cta, warp, timeline.MARKS[name.replace("_", " ")]] = ns
    return found.ravel()


def test_times_are_those_of_the_last_round():
    old, now = 10_000_000, 50_000_000
    given = clock(
        begun={(0, 0): now, (1, 0): now + 300, (2, 0): old},
        header_seen={(0, 0): now + 5_000, (2, 0): old + 9_000},
    )
    times = timeline.since_begun(given)
    assert times[0, 0, 0] == 0
    assert times[1, 0, 0] == pytest.approx(0.3)
    assert times[0, 0, timeline.MARKS["header seen"]] == pytest.approx(5)
    assert np.isfinite(times).sum() == 3
    found = timeline.summary([times, times + 2])
    assert set(found) == {"begun", "header seen"}
    assert found["header seen"] == {"first": 6, "median": 6, "last": 6, "warps": 1}
    assert found["begun"]["last"] == pytest.approx(1.3)


def test_nothing_has_run():
    assert timeline.summary([timeline.since_begun(clock())]) == {}


def test_split_rounds_have_no_times():
    assert not np.isfinite(timeline.since_begun(clock(header_seen={(0, 0): 5_000}))).any()


def test_only_on_gpus():
    cfg = ep.EPConfig(hidden_size=8, top_k=1, n_experts=2, max_tokens_per_rank=1, n_ranks=2)
    with ep.Communicator.cpu(cfg) as comm, pytest.raises(ep.UnsupportedError, match=r"CPUCommunicator.*one_gpu"):
        timeline.Timeline(comm)
