"""Every GPU kernel keeps the order rules, as its PTX shows; and the check fails where a rule is broken on purpose."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ptx import rules

from ep_mojo import layout
from ep_mojo.kernels import find_compiler

ROOT = Path(__file__).resolve().parents[2]

SIGNALS = {
    "dispatch_async": 3,  # header, chunk, FAILED
    "dispatch_wait": 1,  # credit
    "combine_async": 3,
    "combine_wait": 1,  # credit
    "dispatch fused": 5,  # header, chunk with roles and without, FAILED, credit
    "combine fused": 4,
    "cell tables dispatch_async": 2,  # chunk, FAILED
    "cell tables dispatch_wait": 1,
    "cell tables dispatch fused": 4,
    "gathered dispatch_wait": 1,
    "gathered combine_async": 3,
    "gathered dispatch fused": 5,
    "gathered combine fused": 4,
    "expert slots dispatch_async": 1,  # messages of each expert, or FAILED
    "expert slots dispatch_wait": 0,
    "expert slots combine_async": 1,
    "expert slots combine_wait": 0,  # no credits: the next signals are those
    "push": 0,  # nobody is told
    "few dispatch_async": 1,  # FAILED
    "few dispatch_wait": 1,  # credit
    "few dispatch fused": 2,
    "few combine_async": 1,
    "few combine_wait": 1,
    "few combine fused": 2,
    "few gathered": 1,
    "few gathered dispatch fused": 2,
    "few gathered combine fused": 2,
}
"""Words that a kernel publishes to ranks, by the beginning of its name."""
NOTES = {
    "dispatch_async": 1,  # tables sent
    "dispatch_wait": 1,  # mapped
    "dispatch fused": 2,
    "cell tables dispatch_wait": 1,  # mapped: no table is waited for
    "cell tables dispatch fused": 1,
    "few dispatch_wait": 1,  # mapped
    "few dispatch fused": 1,
    "combine_async padded": 1,  # headers are about to leave
    "combine fused padded": 1,
    "gathered dispatch fused": 1,  # nothing is mapped
    "expert slots dispatch_wait": 1,  # rows of a block
}
"""Words that a kernel publishes to its own CTAs."""
FEW = "few "
"""Beginning of the names of kernels whose tables and rows travel as cells."""
CELL_TABLES = "cell tables "
"""Of those whose tables alone do."""
OUTSIDE_OF_ROUNDS = "push"
"""A benchmark's kernel, which takes part in no round."""
AWAITS_NOTHING = ("expert slots dispatch_async", "expert slots combine_async", OUTSIDE_OF_ROUNDS)
"""Kernels that go by the rank's own epochs alone, or by none."""

MASKING = ("dispatch_async", "combine_wait source")
"""Kernels that can leave masked ranks out, besides those of layout "expert_padded", whose rounds they are part of."""

SUMS_FROM_GLOBAL_MEMORY = (
    "combine_wait expert",
    "combine_wait source",
    "combine_async expert",
    "combine fused",
    "expert slots combine_wait",
)
"""Kernels that bring no row into shared memory."""


@pytest.fixture(scope="session")
def kernels(tmp_path_factory) -> dict[str, str]:
    """PTX for sm_90a by kernel."""
    program = tmp_path_factory.mktemp("ptx") / "kernels"
    target = ["--target-accelerator", "sm_90a", "-D", "EP_GPU_TARGET=sm_90a"]
    source = ROOT / "tests" / "mojo" / "gpu_kernels.mojo"
    built = find_compiler().run("build", *target, "-I", ROOT / "kernels", source, "-o", program)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([program], capture_output=True, text=True, check=True, timeout=300).stdout
    parts = re.split(r"^//// (.*)$", printed, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def broken(ptx: str, name: str = "", writes_for_others: bool = False) -> list[str]:
    """Peers get no bulk stores of kernels that send and receive few tokens."""
    to_peers = not name.startswith(FEW)
    return [text for f in rules.functions(ptx) for text in rules.errors(f, writes_for_others, to_peers)]


def expected(table: dict[str, int], name: str) -> int:
    return max((n for start, n in table.items() if name.startswith(start)), default=0)


def expected_words(functions: list[rules.Function], name: str) -> int:
    """Words of 64 bits that a kernel releases at system scope: to ranks, and that of its own failure record."""
    return expected(SIGNALS, name) + sum("Head_fail" in f.name for f in functions)


def test_all_kernels_are_there(kernels):
    assert len(kernels) == 51
    for name, ptx in kernels.items():
        assert sum(f.is_entry for f in rules.functions(ptx)) == 1, name
    assert {start for start in SIGNALS if any(name.startswith(start) for name in kernels)} == set(SIGNALS)


def test_no_rule_is_broken(kernels):
    found = [f"{name}: {text}" for name, ptx in kernels.items() for text in broken(ptx, name)]
    assert not found, "\n".join(found)


def test_every_signal_is_a_release_at_system_scope(kernels):
    """And only what other CTAs of the launch read is one at device scope."""
    for name, ptx in kernels.items():
        entries = rules.functions(ptx)
        assert sum(map(rules.signals, entries)) == expected_words(entries, name), name
        assert sum(map(rules.notes, entries)) == expected(NOTES, name), name
        if not name.startswith(AWAITS_NOTHING):
            assert sum(map(rules.awaits, entries)) >= 1, name
        counts = any("atom.acq_rel.gpu" in text for f in entries for text in f.lines)
        assert counts == (name != OUTSIDE_OF_ROUNDS), name


def test_warps_take_tickets_where_they_receive_chunks(kernels):
    """Few tokens have no chunks, ExpertSlots blocks; nothing else is a relaxed add at device scope."""
    for name, ptx in kernels.items():
        stage = name.removeprefix("gathered ").removeprefix(CELL_TABLES)
        takes = int(stage.startswith(("dispatch_wait", "dispatch fused")))
        takes += 2 * stage.startswith(("combine_wait", "combine fused"))  # the first batch, and the next ones
        found = re.findall(r"\batom\.relaxed\.gpu.*", ptx)
        assert len(found) == takes, name
        assert all(re.fullmatch(r"atom\.relaxed\.gpu\.global\.add\.u32 .*; // ticket", text) for text in found), name


def test_only_rounds_that_leave_ranks_out_look_at_masks(kernels):
    for name, ptx in kernels.items():
        looks = any("Head_masked" in f.name for f in rules.functions(ptx))
        assert looks == ((name.startswith(MASKING) or "padded" in name) and not name.startswith(CELL_TABLES)), name


def test_rows_move_in_bulk(kernels):
    for name, ptx in kernels.items():
        if name.startswith(FEW):
            continue
        if "async" in name or "fused" in name:
            assert "cp.async.bulk.global.shared::cta" in ptx, name
        if name not in SUMS_FROM_GLOBAL_MEMORY:
            assert "encoded" in name or "cp.async.bulk.shared::cluster.global" in ptx, name


def test_cells_are_single_accesses(kernels):
    """What a kernel stores besides in its peers' windows is announced by a release."""
    for name, ptx in kernels.items():
        sends, receives = ("async" in name or "fused" in name), ("wait" in name or "fused" in name)
        has_cells = name.startswith((FEW, CELL_TABLES))
        empties = has_cells and receives and "combine" in name
        stores = has_cells and sends or empties or name == OUTSIDE_OF_ROUNDS
        assert ("st.relaxed.sys.global.b128" in ptx) == stores, name
        assert ("ld.relaxed.sys.global.b128" in ptx) == (has_cells and receives), name
        alone = has_cells and sends and (2 if "combine" in name else 1)  # its header; how many rows each rank gets
        assert len(re.findall(r"// alone$", ptx, re.MULTILINE)) == alone, name
        assert len(re.findall(r"st\.relaxed\.sys\.global\.b64", ptx)) == alone, name
        assert set(re.findall(r"\b(?:st|ld)\.relaxed\.sys\S*", ptx)) <= {
            "st.relaxed.sys.global.b128",
            "ld.relaxed.sys.global.b128",
            "st.relaxed.sys.global.b64",
        }, name


def test_counts_are_single_words(kernels):
    """Only kernels whose CTAs map pieces have any: a piece's rows, and T of its source. A thread loads those of eight
    pieces at once; with layout "rank" it has one piece (and the compiler may write the loop's first turn apart)."""
    for name, ptx in kernels.items():
        maps = name.removeprefix(CELL_TABLES).startswith(("dispatch_wait", "dispatch fused"))
        accesses = re.findall(r"(?:st|ld)\.relaxed\.gpu.*", ptx)
        stores = [text for text in accesses if re.fullmatch(r"st\.relaxed\.gpu\.global\.b64 .*; // count", text)]
        loads = [text for text in accesses if re.fullmatch(r"ld\.relaxed\.gpu\.global\.b64 .*; // count", text)]
        assert len(accesses) == len(stores) + len(loads), name
        assert len(stores) == 2 * maps, name
        assert len(loads) in ((1, 2) if maps and name.endswith(" rank") else (8 * maps,)), name


@pytest.mark.parametrize("name", ["few dispatch fused", "cell tables dispatch fused"])
@pytest.mark.parametrize("access", ["st", "ld"])
def test_a_cell_in_two_accesses_is_found(kernels, name, access):
    ptx = kernels[name]
    cell = f"{access}.relaxed.sys.global.b128"
    assert cell in ptx
    assert broken(ptx.replace(cell, f"{access}.relaxed.sys.global.v2.b64"), name)


@pytest.mark.parametrize(
    "name", ["few dispatch_wait bf16 expert", "few dispatch fused fp8", "few gathered dispatch_wait"]
)
def test_a_message_is_fenced_by_those_who_wrote_it(kernels, name):
    """Threads put a message's payload into shared memory, and others store it to its rows in bulk."""
    ptx = kernels[name]
    assert not broken(ptx, name, writes_for_others=True)
    fences = [m.span() for m in re.finditer(r"fence\.proxy\.async\.shared::cta;", ptx)]
    without = [broken(ptx[:begin] + ptx[end:], name, writes_for_others=True) for begin, end in fences]
    assert any("other threads may have written" in text for found in without for text in found)


BREAKS = {
    "no wait before the signal": ("cp.async.bulk.wait_group 0;", "", "under way"),
    "a wait for reading only": ("cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;", "under way"),
    "no proxy fence before a store": ("fence.proxy.async.shared::cta;", "", "without a proxy fence"),
    "no proxy fence before a slot is loaded again": ("fence.proxy.async.shared::cta;", "", "may be reading"),
    "no proxy fence behind a credit": ("fence.proxy.async;", "", "hands on"),
    "a fence of shared memory alone": ("fence.proxy.async;", "fence.proxy.async.shared::cta;", "hands on"),
    "no warp barrier behind a credit": ("bar.warp.sync", "// bar.warp.sync", "without a warp barrier"),
    "no proxy fence before a load": ("fence.proxy.async;", "", "bulk load without"),
    "no wait before a slot is used again": ("cp.async.bulk.wait_group.read 0;", "", "a slot is written"),
    "a relaxed await": ("ld.acquire.sys", "ld.relaxed.sys", "acquires nothing"),
    "a relaxed arrival": ("atom.acq_rel.gpu", "atom.relaxed.gpu", "an arrival"),
    "release at CTA scope": ("st.release.sys", "st.release.cta", "too small a scope"),
    "a relaxed meeting": ("mbarrier.arrive.release", "mbarrier.arrive.relaxed", "orders nothing"),
    "a relaxed signal": ("st.release.sys", "st.relaxed.sys", "without a system fence"),
    "a non-coherent load": ("ld.global.b32", "ld.global.nc.b32", "non-coherent"),
}


@pytest.mark.parametrize("kernel", ["dispatch fused fp8", "cell tables dispatch fused fp8"])
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_rule_is_found(kernels, name, kernel):
    old, new, text = BREAKS[name]
    ptx = kernels[kernel]
    assert old in ptx
    assert any(text in error for error in broken(ptx.replace(old, new)))


@pytest.mark.parametrize(
    "name",
    [
        "dispatch_async bf16",
        "cell tables dispatch_async bf16",
        "combine_async expert",
        "combine fused",
        "expert slots combine_async",
    ],
)
def test_the_opening_fences_what_it_has_acquired(kernels, name):
    ptx = kernels[name]
    without = ptx.replace("fence.proxy.async;", "", 1)
    assert any("hands on" in error or "before it" in error for error in broken(without))


@pytest.mark.parametrize("store", ["st", "st.release.gpu"])
def test_a_signal_that_is_a_weaker_store_is_found(kernels, store):
    for name, ptx in kernels.items():
        if expected(SIGNALS, name) == 0:
            continue
        weak = re.sub(r"st\.release\.sys((?:\.global)?\.[bu]64)", rf"{store}\1", ptx, count=1)
        weakened = rules.functions(weak)
        assert sum(map(rules.signals, weakened)) != expected_words(weakened, name), name
        more = int(store == "st.release.gpu")
        assert sum(map(rules.notes, rules.functions(weak))) == expected(NOTES, name) + more, name


ARRIVALS = {
    "dispatch_async bf16": 1,  # the opening
    "dispatch_async fp8": 3,  # and two meetings of a crew
    "dispatch_async encoded": 1,
    "combine_async expert": 2,  # and one
    "combine_async": 1,
    "dispatch fused fp8": 5,  # two more where every warp sends first
    "dispatch fused padded": 5,
    "dispatch fused": 1,
    "combine fused": 2,
    "combine fused padded": 1,
    "gathered dispatch fused": 1,
    "gathered combine_async": 1,
    "gathered combine fused": 1,
    "few dispatch_async": 1,
    "few dispatch fused": 1,
    "few combine_async": 1,
    "few combine fused": 1,
    "few gathered dispatch fused": 1,
    "few gathered combine_async": 1,
    "few gathered combine fused": 1,
}
"""Where threads arrive at mbarriers, by the beginning of a kernel's name; the longest one counts."""


def arrivals_wanted(name: str) -> int:
    return ARRIVALS[max((start for start in ARRIVALS if name.startswith(start)), key=len)]


def test_launches_open_and_crews_meet_with_release_and_acquire(kernels):
    """An arrival with release for each, and waits, which acquire unless they say otherwise."""
    for name, ptx in kernels.items():
        stage = name.removeprefix(CELL_TABLES)
        arrivals = re.findall(r"mbarrier\.arrive\.(?!expect)\S*", ptx)
        assert set(arrivals) <= {"mbarrier.arrive.release.cta.shared::cta.b64"}, name
        assert len(arrivals) == (arrivals_wanted(stage) if stage.startswith(tuple(ARRIVALS)) else 0), (name, arrivals)
        assert set(re.findall(r"mbarrier\.try_wait\S*", ptx)) <= {"mbarrier.try_wait.parity.shared::cta.b64"}, name


@pytest.mark.parametrize("name", ["expert slots dispatch_wait", "expert slots combine_wait"])
def test_a_cta_meets_before_it_asks_whether_its_threads_have_failed(kernels, name):
    """All threads await words there, and thread 0 may be done first; it reads the record behind a barrier."""
    record = rf"ld\.acquire\.sys\S*\.b64\s+%\w+, \[%\w+\+{4 * layout.REC_STATE}\];"
    behind = re.split(rf"(?!{record})ld\.acquire\.sys\S*\.b64", kernels[name])[-1]
    steps = re.findall(rf"(bar)\.sync\s+0;|{record}", behind)
    text = "".join("m" if step else "r" for step in steps)  # meets, reads; at first within the wait
    assert re.match(r"r*mrmm", text), text


def test_a_fence_in_front_of_a_relaxed_store_is_allowed():
    body = ["st.global.b32 [%rd1], %r1;", "fence.acq_rel.sys;", "st.relaxed.sys.b64 [%rd2], %rd3;", "ret;"]
    ptx = "\n\t".join([".visible .entry k(\n)\n{", *body]) + "\n}\n"
    assert not broken(ptx)
    assert broken(ptx.replace("\tfence.acq_rel.sys;\n", ""))
