"""Offsets: no two regions overlap, the mirror in Mojo has the same constants, records become the right errors."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from ep_mojo import layout
from ep_mojo.config import BlockwiseFP8, EPConfig
from ep_mojo.errors import (
    CapacityError,
    ConfigMismatchError,
    CorruptHeadError,
    OrderError,
    PeerTimeoutError,
    ShapeError,
)
from ep_mojo.layout import CombineWindow, DispatchWindow, Record
from ep_mojo.records import record_to_error

MIRROR = Path(__file__).parents[2] / "kernels" / "ep_mojo"


def config(**changes):
    fields = {
        "hidden_size": 128,
        "top_k": 3,
        "n_experts": 6,
        "max_tokens_per_rank": 10,
        "n_ranks": 3,
        "tokens_per_signal": 4,
    }
    return EPConfig(**fields | changes)


CONFIGS = [
    config(),
    config(n_ranks=1, num_buffers=1, max_tokens_per_rank=1),
    config(n_ranks=6, n_experts=12, num_buffers=8, tokens_per_signal=1, max_tokens_per_rank=33),
    config(dispatch_format=BlockwiseFP8(), combine_dtype="float32", reduce="expert"),
    config(reduce="source", top_k=7),
    config(max_tokens_per_rank=200),
]


HASHES = (0xBAB9379C541B6501, 0x5F184D49D0F57588, 0x10E0B1A69EC88C98)


def regions(cfg, window):
    """(start, end) of everything in a count window."""
    for rank in range(cfg.n_ranks):
        yield window.credit(rank), 8
    pairs = cfg.max_tokens_per_rank * cfg.top_k
    for buffer, source in itertools.product(range(cfg.num_buffers), range(cfg.n_ranks)):
        yield window.header(buffer, source), 8
        for chunk in range(cfg.n_signals):
            yield window.signal(buffer, source, chunk), 8
        if isinstance(window, DispatchWindow):
            yield window.table_ids(buffer, source), 2 * pairs
            yield window.table_weights(buffer, source), 4 * pairs
            if cfg.table_room:
                yield window.table_cell(buffer, source, 0), 16 * pairs


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
@pytest.mark.parametrize("cls", [DispatchWindow, CombineWindow])
def test_count_window_regions(cfg, cls):
    window = cls(cfg)
    spans = sorted(regions(cfg, window))
    for (start, size), (following, _) in itertools.pairwise(spans):
        assert start + size <= following
    assert spans[-1][0] + spans[-1][1] <= window.count_bytes
    assert window.count_bytes % 128 == 0
    assert window.total_bytes == window.count_bytes + window.recv_bytes
    for buffer, source in itertools.product(range(cfg.num_buffers), range(cfg.n_ranks)):
        assert window.signal(buffer, source, 0) % 128 == 0
        if cls is DispatchWindow:
            assert window.table_ids(buffer, source) % 128 == window.table_weights(buffer, source) % 128 == 0


def test_worked_example():
    cfg = config()  # R=3, B=2, Tmax=10, K=3, C=3
    window = DispatchWindow(cfg)
    # credits 24 -> 128, headers 48 -> 128, signals 6 * 128, ids 6 * align128(60), weights 6 * align128(120), and since
    # R * Tmax * K is below 1024, cells 6 * align128(480), and messages of twice 256 bytes
    assert (window.credit(2), window.header(1, 2), window.signal(0, 1, 2)) == (16, 128 + 40, 256 + 128 + 16)
    assert (window.table_ids(1, 0), window.table_weights(0, 1)) == (256 + 768 + 3 * 128, 256 + 768 + 768 + 128)
    assert window.table_cell(1, 2, 3) == 256 + 3 * 768 + 5 * 512 + 3 * 16
    assert window.count_bytes == 256 + 3 * 768 + 6 * 512
    assert window.recv_bytes == 2 * 3 * 10 * 512
    assert window.message(1, 2, 9) == window.recv_bytes - 512
    combine = CombineWindow(cfg)
    assert combine.count_bytes == 256 + 768
    assert combine.recv_bytes == 2 * 10 * 3 * 256
    assert combine.partial(1, 2, 9) == combine.row(1, 9, 2) == combine.recv_bytes - 256


def test_few_tokens():
    """Where there is room for cells: R * Tmax * K up to 1024; a gathered token counts as 8 choices."""
    few = {n: config(n_ranks=2, top_k=4, max_tokens_per_rank=n) for n in (1, 128, 129)}
    assert [few[n].few_tokens for n in (1, 128, 129)] == [True, True, False]
    gathered = [
        config(n_ranks=2, top_k=k, max_tokens_per_rank=n, output_layout="gathered") for k, n in ((0, 64), (1, 65))
    ]
    assert [cfg.few_tokens for cfg in gathered] == [True, False]
    assert not config(slots="expert", max_tokens_per_rank=1).few_tokens
    assert (few[128].dispatch_message_stride, few[129].dispatch_message_stride) == (512, 256)


def test_table_room():
    """Tables travel as cells up to Tmax * K = 2048, at any number of ranks; gathered ones with few tokens alone."""
    some = {n: config(n_ranks=8, n_experts=8, top_k=4, max_tokens_per_rank=n) for n in (1, 32, 33, 512, 513)}
    assert [some[n].table_room for n in (1, 32, 33, 512, 513)] == [True, True, True, True, False]
    assert [some[n].few_tokens for n in (1, 32, 33, 512, 513)] == [True, True, False, False, False]
    assert some[512].dispatch_message_stride == some[513].dispatch_message_stride == 256
    blocks = 2 * 8 * 16 * 4 * 512
    assert DispatchWindow(some[512]).cells_block * 2 * 8 == blocks
    assert DispatchWindow(some[513]).cells_block == 0
    gathered = [config(n_ranks=2, top_k=1, max_tokens_per_rank=n, output_layout="gathered") for n in (64, 65)]
    assert [cfg.table_room for cfg in gathered] == [True, False]
    assert not config(slots="expert", max_tokens_per_rank=1).table_room
    assert config(max_tokens_per_rank=200, output_layout="expert_padded").table_room


def test_rows_in_cells():
    """Combine's rows travel as cells up to Tmax * K = 2048, at any number of ranks."""
    few = {n: config(n_ranks=8, n_experts=8, top_k=4, max_tokens_per_rank=n) for n in (1, 512, 513)}
    assert [few[n].rows_in_cells for n in (1, 512, 513)] == [True, True, False]
    gathered = [
        config(n_ranks=2, top_k=k, max_tokens_per_rank=n, output_layout="gathered") for k, n in ((0, 256), (1, 257))
    ]
    assert [cfg.rows_in_cells for cfg in gathered] == [True, False]
    assert not config(slots="expert", max_tokens_per_rank=1).rows_in_cells


@pytest.mark.parametrize("cfg", CONFIGS, ids=repr)
def test_recv_windows_are_full(cfg):
    dispatch, combine = DispatchWindow(cfg), CombineWindow(cfg)
    ranks, tokens, buffers = range(cfg.n_ranks), range(cfg.max_tokens_per_rank), range(cfg.num_buffers)
    messages = sorted(dispatch.message(b, s, t) for b in buffers for s in ranks for t in tokens)
    assert messages == list(range(0, dispatch.recv_bytes, cfg.dispatch_message_stride))
    assert combine.recv_bytes == len(buffers) * len(tokens) * cfg.combine_slots * cfg.combine_row_bytes
    if cfg.reduce != "source":
        rows = [combine.partial(b, s, t) for b in buffers for s in ranks for t in tokens]
        assert len(set(rows)) == len(rows)
        assert max(rows) + cfg.combine_row_bytes <= combine.recv_bytes
    if cfg.reduce != "expert":
        rows = [combine.row(b, t, k) for b in buffers for t in tokens for k in range(cfg.top_k)]
        assert len(set(rows)) == len(rows)
        assert max(rows) + cfg.combine_row_bytes <= combine.recv_bytes


def test_expert_slots_sizes():
    cfg = config(slots="expert")
    dispatch, combine = DispatchWindow(cfg), CombineWindow(cfg)
    assert dispatch.recv_bytes == 2 * 3 * 10 * (256 + 16)
    assert dispatch.count_bytes == 2 * 3 * 8
    assert combine.recv_bytes == 10 * 3 * 256
    assert combine.count_bytes == 6 * 8
    assert dispatch.expert_slot(1, 2, 9) == dispatch.recv_bytes - 272
    assert dispatch.expert_count(1, 2) == dispatch.count_bytes - 8
    assert combine.row(0, 9, 2) == combine.recv_bytes - 256
    assert combine.expert_signal(5) == combine.count_bytes - 8
    assert layout.counters_words(cfg) == 64 + 10 + 2 * cfg.n_experts
    assert layout.counters_words(config()) == 64 + 592 + 2 * 8 * (config().n_experts + config().n_ranks)
    assert layout.counters_words(config(output_layout="gathered")) == 64 + 592  # nothing is mapped


def test_rank_slots_payload_is_smaller_by_local_experts():
    big = {"hidden_size": 1024, "n_experts": 24, "dispatch_format": BlockwiseFP8(), "max_tokens_per_rank": 200}
    rank, expert = config(**big, num_buffers=1), config(**big, slots="expert")
    ratio = DispatchWindow(expert).recv_bytes / DispatchWindow(rank).recv_bytes
    assert ratio == pytest.approx(8 * expert.dispatch_message_bytes / rank.dispatch_message_bytes)


def test_signal_words():
    for epoch, value in [(0, 0), (1, 0), (1, 5), (2**40 - 1, layout.FAILED), (7, 2**24 - 2)]:
        signal = layout.word(epoch, value)
        assert 0 <= signal < 2**64
        assert (layout.epoch_of(signal), layout.value_of(signal)) == (epoch, value)
        assert layout.epoch_of(np.uint64(signal)) == epoch
    for bad in [(-1, 0), (0, -1), (0, 2**24), (2**40, 0)]:
        with pytest.raises(ShapeError):
            layout.word(*bad)


def test_mirror_has_the_same_constants():
    pattern = r"^comptime ([A-Z][A-Z0-9_]*)(?:: \w+)? = (-?(?:0x[0-9A-Fa-f]+|\d+)|HEAD_WORDS(?: \+ \d+)?)$"
    text = "".join((MIRROR / name).read_text() for name in ("layout.mojo", "counters.mojo", "settings.mojo"))
    found = [(name, value.replace("HEAD_WORDS", "64")) for name, value in re.findall(pattern, text, re.M)]
    mojo = {name: sum(int(n, 0) for n in value.split(" + ")) for name, value in found}
    prefixes = ("MAX_", "HEAD_", "REC_", "KIND_", "STAGE_", "CHUNK_", "FIELD_", "WORK_", "CELL_", "NOTE_")
    assert sum(name.startswith(prefixes) for name in mojo) >= 30
    kernels_alone = {"NARROW_TOKENS"} | {name for name in mojo if name.startswith(("REDUCE_", "SLOTS_"))}
    kernels_alone |= {name for name in mojo if name.endswith("_UNHASHED")}
    assert {"FEW_CHOICES", "CELL_CHOICES", "GATHERED_CHOICES"} <= set(mojo)
    for name in set(mojo) - kernels_alone:
        assert getattr(layout, name) == mojo[name], name
    ours = {n for n, v in vars(layout).items() if n.startswith(prefixes) and isinstance(v, int)} - {"REC_END"}
    assert ours <= set(mojo)


def test_ways_to_wait_are_the_same_in_settings():
    text = (MIRROR / "settings.mojo").read_text()
    for name in ("WAITS_VIRTUAL", "WAITS_SHRINK"):
        assert int(re.search(rf"^comptime {name} = (\d+)$", text, re.M).group(1)) == getattr(layout, name)
        read = f"Int(words[{layout.SETTING_WAITS}]) & {name} != 0"
        assert read in text, read
    assert config().settings(virtual=True)[layout.SETTING_WAITS] == layout.WAITS_VIRTUAL
    assert config().settings(virtual=False)[layout.SETTING_WAITS] == 0


def test_addresses_have_complements_and_outlive_records():
    head = np.zeros(64, np.int32)
    layout.put_address(head, layout.HEAD_MASKS, 0x7FFF_1234_5678_9ABC)
    layout.put_address(head, layout.HEAD_NOTE, 16)
    layout.clear_record(head)
    layout.put_epochs(head, 2**39)
    assert layout.get_u64(head, layout.HEAD_MASKS) == 0x7FFF_1234_5678_9ABC
    assert layout.get_u64(head, layout.HEAD_MASKS_CHECK) == 2**64 - 1 - 0x7FFF_1234_5678_9ABC
    assert layout.get_u64(head, layout.HEAD_NOTE_CHECK) == 2**64 - 17


def test_head_round_trip():
    cfg = config(timeout_s=1.5)
    head = np.full(layout.counters_words(cfg), -1, np.int32)
    layout.write_head(head, cfg, 2, epoch=2**39 + 7)
    layout.check_head(head, cfg, 2)
    assert layout.read_epochs(head) == (2**39 + 7,) * 4
    assert layout.get_u64(head, layout.HEAD_DEADLINE_NS) == 1_500_000_000
    assert layout.get_u64(head, layout.HEAD_CONFIG_HASH) == cfg.config_hash()
    assert layout.get_u64(head, layout.HEAD_DISPATCH_HASH) == cfg.config_hash("dispatch") != cfg.config_hash()
    assert layout.get_u64(head, layout.HEAD_COMBINE_HASH) == cfg.config_hash("combine") != cfg.config_hash("dispatch")
    assert head[layout.HEAD_TOP_K] == 3
    assert layout.decode_record(head) is None


def test_hashes_of_a_known_config():
    """The same numbers stand in tests/mojo/test_layout.mojo: a Mojo program fits a communicator made in Python."""
    sizes = {"hidden_size": 256, "top_k": 4, "n_experts": 12, "max_tokens_per_rank": 20, "n_ranks": 3}
    sizes = {"hidden_size": 256, "top_k": 4, "n_experts": 12, "max_tokens_per_rank": 20, "n_ranks": 3}
    cfg = EPConfig(**sizes, slots="expert", dispatch_format=BlockwiseFP8())
    assert (cfg.config_hash(), cfg.config_hash("dispatch"), cfg.config_hash("combine")) == HASHES


def test_side_hashes_leave_out_what_the_side_does_not_know():
    cfg = config(slots="expert")
    for side, same, other in (
        ("dispatch", {"combine_dtype": "float32", "top_k": 2, "tokens_per_signal": 1}, {"max_tokens_per_rank": 11}),
        ("combine", {"dispatch_format": BlockwiseFP8(), "n_sms": 3}, {"top_k": 2}),
    ):
        assert cfg.config_hash(side) == cfg.replace(**same).config_hash(side)
        assert cfg.config_hash(side) != cfg.replace(**other).config_hash(side)


@pytest.mark.parametrize(
    "index", [layout.HEAD_MAGIC, layout.HEAD_LAYOUT_VERSION, layout.HEAD_MY_RANK, layout.HEAD_N_RANKS]
)
def test_corrupt_heads(index):
    cfg = config()
    head = np.zeros(64, np.int32)
    layout.write_head(head, cfg, 1)
    head[index] += 1
    with pytest.raises(CorruptHeadError, match="atomic_counters"):
        layout.check_head(head, cfg, 1)


def test_short_and_foreign_heads():
    cfg = config()
    words = layout.counters_words(cfg)
    for bad in (np.zeros(words - 1, np.int32), np.zeros(words, np.int64), np.zeros((words, 1), np.int32)):
        with pytest.raises(CorruptHeadError, match="int32"):
            layout.check_head(bad, cfg, 0)
    head = np.zeros(words, np.int32)
    layout.write_head(head, config(top_k=4), 0)
    with pytest.raises(ConfigMismatchError, match="config_hash"):
        layout.check_head(head, cfg, 0)


def put_record(head, record):
    head[layout.REC_STATE] = 2
    for index, value in zip(
        (layout.REC_KIND, layout.REC_STAGE, layout.REC_RANK, layout.REC_PEER, layout.REC_CHUNK),
        (record.kind, record.stage, record.rank, record.peer, record.chunk),
        strict=True,
    ):
        head[index] = value
    for index, value in zip(
        (layout.REC_EXPECTED, layout.REC_SEEN, layout.REC_VALUE, layout.REC_LIMIT),
        (record.expected, record.seen, record.value, record.limit),
        strict=True,
    ):
        layout.put_u64(head, index, value)


def test_record_round_trip():
    head = np.zeros(64, np.int32)
    record = Record(layout.KIND_TIMEOUT, 2, 1, 0, 3, expected=2**39, seen=2**39 - 1, value=-5, limit=2**40)
    put_record(head, record)
    assert layout.decode_record(head) == record
    layout.clear_record(head)
    assert layout.decode_record(head) is None
    assert not head.any()


def record(kind, stage=2, rank=1, peer=0, chunk=-1, expected=7, seen=6, value=0, limit=0):
    return Record(kind, stage, rank, peer, chunk, expected, seen, value, limit)


PADDED = config(output_layout="expert_padded")
RECORDS = [
    (record(1), config(), PeerTimeoutError, ["rank 1", "dispatch_wait", "header", "rank 0", "30 s", "7", "6"]),
    (record(1, chunk=4, stage=4), config(), PeerTimeoutError, ["combine_wait", "signal 4"]),
    (record(1, chunk=-2, stage=1), config(), PeerTimeoutError, ["dispatch_async", "credit"]),
    (record(4, peer=2, stage=3), config(), PeerTimeoutError, ["combine_async", "rank 2 failed"]),
    (record(2, value=99, limit=90, peer=-1), config(max_rows=90), CapacityError, ["max_rows = 90", "at least 99"]),
    (record(2, value=31, limit=30), PADDED, CapacityError, ["= 30", "31", "max_tokens_per_rank"]),
    (record(3, peer=2), config(), OrderError, ["dispatch_wait", "rank 2", "sends of all ranks"]),
    (record(3, peer=-1, stage=1), config(), OrderError, ["dispatch_async", "num_buffers = 2"]),
    (record(3, peer=-1, stage=4), config(), OrderError, ["combine_wait", "async"]),
    (
        record(5, chunk=1, value=11, limit=10),
        config(),
        ShapeError,
        ["rows of x = 11", "0 to 10", "max_tokens_per_rank"],
    ),
    (record(5, chunk=2, value=-1, limit=10), config(), ShapeError, ["num_tokens = -1"]),
    (record(5, chunk=3, stage=3, value=77, limit=59), config(), ShapeError, ["src_info = 77", "dispatch_wait gave"]),
    (
        record(5, chunk=6, stage=4, value=9, limit=10),
        config(),
        ShapeError,
        ["tokens of this rank in the handle of rank 0 = 9", "10: the tokens of this combine", "one dispatch"],
    ),
    (
        record(5, chunk=7, stage=4, value=1, limit=0),
        config(),
        ShapeError,
        ["reduce of rank 0 = 'source'", "expert, as"],
    ),
    (record(3, peer=-1, stage=1), config(slots="expert"), OrderError, ["alternate", "all four stages"]),
    (record(6, stage=0, peer=-1), config(), OrderError, ["rank 1: an op", "in the middle of a run"]),
    (record(77), config(), CorruptHeadError, ["77"]),
    (record(1, stage=9, rank=2), config(), PeerTimeoutError, ["stage 9", "rank 2"]),
]


@pytest.mark.parametrize(("rec", "cfg", "cls", "words"), RECORDS, ids=lambda v: getattr(v, "__name__", ""))
def test_record_to_error(rec, cfg, cls, words):
    error = record_to_error(rec, cfg)
    assert type(error) is cls
    for word in words:
        assert word in str(error), str(error)
    if cls is not CorruptHeadError:
        assert "comm.reset()" in error.remedy
