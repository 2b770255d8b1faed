"""Every byte offset of the protocol: the mirror of `kernels/ep_mojo/{layout,counters}.mojo`, tested equal.

A rank owns four windows that its peers write. `DispatchWindow(cfg)` and `CombineWindow(cfg)` lay out a recv window
(payload) and a count window (signals) each, for the slot policy of the config:

    RankSlots        dispatch recv    [B][R][Tmax] messages
                     dispatch count   credits u64[R] | headers u64[B][R] | signals u64[B][R][C] | ids i16 | weights f32
                                      [| cells [B][R][Tmax * K], up to Tmax * K = 2048]
                     combine recv     [B][Tmax * S] rows, S = cfg.combine_slots
                     combine count    credits u64[R] | headers u64[B][R] | signals u64[B][R][C]
    ExpertSlots      dispatch recv    [L][R][Tmax] messages          dispatch count   u64 [L][R]
                     combine recv     [Tmax][K] rows                 combine count    u64 [E]

Regions and per-source blocks of a RankSlots count window start at multiples of 128 bytes. All offsets are in bytes;
`buffer` is epoch mod B. A rank's own `atomic_counters` (int32) begin with a head of 64 words: see `HEAD_*` and `REC_*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import (
    ConfigMismatchError,
    CorruptHeadError,
    ShapeError,
)

if TYPE_CHECKING:
    from .config import EPConfig

MAGIC = 0x45504D4A
LAYOUT_VERSION = 9
ALIGNMENT = 128
HEAD_WORDS = 64
SETTINGS_WORDS = 17

# Limits. MAX_RANKS stands in config.py and in peers.mojo.
MAX_EXPERTS = 2048
MAX_TOP_K = 32
MAX_TOKENS = 4194304
MAX_PIECES = 32
MAX_SOURCE_PIECES = 8
CELL_BYTES = 16
CELL_PAYLOAD = 8
"""Bytes of payload in a cell with a signal word."""
FEW_CHOICES = 1024
"""R * Tmax * K, at most, where there are few tokens."""
CELL_CHOICES = 2048
"""Tmax * K, at most, where routing tables and combine's rows travel as cells."""
GATHERED_CHOICES = 8
"""Choices that a token counts as which goes to all ranks."""
EXPERT_SLOTS_HEADER = 16
"""Bytes in front of an ExpertSlots message: token (i32), k mask (u32), 8 unused."""
EXPERT_SLOTS_TOKEN = 0
EXPERT_SLOTS_MASK = 4

# int32 indices in the counters head; u64 and i64 fields take two words, low word first.
HEAD_MAGIC = 0
HEAD_LAYOUT_VERSION = 1
HEAD_CONFIG_HASH = 2
HEAD_MY_RANK = 4
HEAD_N_RANKS = 5
HEAD_DEADLINE_NS = 6
HEAD_DISPATCH_SENT = 8
HEAD_DISPATCH_WAITED = 10
HEAD_COMBINE_SENT = 12
HEAD_COMBINE_WAITED = 14
HEAD_DISPATCH_HASH = 16
HEAD_COMBINE_HASH = 18
HEAD_TOP_K = 20
HEAD_TIMELINE = 22
ARRIVED = 24
HEAD_TIMELINE_CHECK = 28
HEAD_NOTE = 30
REC_STATE = 32
REC_KIND = 33
REC_STAGE = 34
REC_RANK = 35
REC_PEER = 36
REC_CHUNK = 37
REC_EXPECTED = 38
REC_SEEN = 40
REC_VALUE = 42
REC_LIMIT = 44
REC_END = 46
HEAD_NOTE_CHECK = 46
HEAD_MASKS = 48
HEAD_MASKS_CHECK = 50
HEAD_COMBINE_BEGUN = 52
TICKETS = 54
WORK_COUNTED = HEAD_WORDS
NOTE_COPIES = 8
WORK_MAPPED = HEAD_WORDS + 64
WORK_TABLED = HEAD_WORDS + 576
WORK_COUNTS = HEAD_WORDS + 592
ROUTED_MASKS = HEAD_WORDS

KIND_TIMEOUT = 1
KIND_CAPACITY = 2
KIND_ORDER = 3
KIND_PEER_FAILED = 4
KIND_SHAPE = 5
KIND_ABORTED = 6
STAGE_DISPATCH_ASYNC = 1
STAGE_DISPATCH_WAIT = 2
STAGE_COMBINE_ASYNC = 3
STAGE_COMBINE_WAIT = 4
STAGE_DISPATCH = 5
STAGE_COMBINE = 6
CHUNK_HEADER = -1
CHUNK_CREDIT = -2
FIELD_TOKENS = 1
FIELD_NUM_TOKENS = 2
FIELD_SRC_INFO = 3
FIELD_ROW_MAP = 4
FIELD_RECV_NUM_TOKENS = 5
FIELD_HANDLE_TOKENS = 6
FIELD_REDUCE = 7
FIELD_ROWS = 8

STAGE_NAMES = {
    STAGE_DISPATCH_ASYNC: "dispatch_async",
    STAGE_DISPATCH_WAIT: "dispatch_wait",
    STAGE_COMBINE_ASYNC: "combine_async",
    STAGE_COMBINE_WAIT: "combine_wait",
    STAGE_DISPATCH: "dispatch",
    STAGE_COMBINE: "combine",
}

# Settings: the words of the SM budget and of how waits end, and the bits of that; they stand in settings.mojo.
SETTING_N_SMS = 11
SETTING_WAITS = 12
WAITS_VIRTUAL = 1
WAITS_SHRINK = 2

# Signal words: u64 = epoch << 24 | value.
VALUE_BITS = 24
FAILED = (1 << VALUE_BITS) - 1
"""The value that a failed rank publishes instead of a count."""


def align_up(n: int, to: int = ALIGNMENT) -> int:
    """The least multiple of `to` that is not less than `n`."""
    return -(-n // to) * to


def word(epoch: int, value: int) -> int:
    """The signal word of `value` (0 to 2^24 - 1) in `epoch` (0 to 2^40 - 1)."""
    if not 0 <= value <= FAILED or not 0 <= epoch < 1 << 40:
        raise ShapeError(
            field="(epoch, value)",
            value=(epoch, value),
            allowed="epoch below 2^40 and value below 2^24",
            remedy="make a new communicator if the epochs are used up",
        )
    return epoch << VALUE_BITS | value


def epoch_of(signal: int) -> int:
    """The epoch of a signal word."""
    return int(signal) >> VALUE_BITS


def value_of(signal: int) -> int:
    """The value of a signal word."""
    return int(signal) & FAILED


def counters_words(cfg: EPConfig) -> int:
    """int32 words of `atomic_counters`: the head, and a launch's notes to itself."""
    if cfg.slots == "expert":
        return align_up(ROUTED_MASKS + cfg.max_tokens_per_rank, 2) + 2 * cfg.n_experts
    if cfg.output_layout == "gathered":
        return WORK_COUNTS  # nothing is mapped
    return WORK_COUNTS + 2 * MAX_SOURCE_PIECES * (cfg.n_experts + cfg.n_ranks)


class _Window:
    """Offsets in a count window, common to dispatch and combine.

    Attributes:
        recv_bytes: Bytes of the recv window.
        count_bytes: Bytes of the count window.
    """

    recv_bytes: int
    count_bytes: int

    def __init__(self, cfg: EPConfig, table_pairs: int):
        self.cfg = cfg
        blocks = cfg.num_buffers * cfg.n_ranks
        if cfg.slots == "expert":
            return
        self.headers = align_up(8 * cfg.n_ranks)
        self.signals = self.headers + align_up(8 * blocks)
        self.signal_block = align_up(8 * cfg.n_signals)
        self.ids = self.signals + blocks * self.signal_block
        self.ids_block = align_up(2 * table_pairs)
        self.weights = self.ids + blocks * self.ids_block
        self.weights_block = align_up(4 * table_pairs)
        self.cells = self.weights + blocks * self.weights_block
        self.cells_block = align_up(CELL_BYTES * table_pairs) if cfg.table_room else 0
        self.count_bytes = self.cells + blocks * self.cells_block

    @property
    def total_bytes(self) -> int:
        """Bytes of both windows."""
        return self.recv_bytes + self.count_bytes

    def _block(self, buffer: int, source: int) -> int:
        return buffer * self.cfg.n_ranks + source

    def credit(self, rank: int) -> int:
        """u64: the last epoch that `rank` has read of what this window's owner sent. RankSlots only."""
        return 8 * rank

    def header(self, buffer: int, source: int) -> int:
        """u64: `source` has begun the epoch; the value is T. RankSlots only."""
        return self.headers + 8 * self._block(buffer, source)

    def signal(self, buffer: int, source: int, chunk: int) -> int:
        """u64: tokens [chunk * G, (chunk + 1) * G) of `source` have arrived. RankSlots only."""
        return self.signals + self._block(buffer, source) * self.signal_block + 8 * chunk


class DispatchWindow(_Window):
    """Layout of the dispatch windows of one rank.

    Attributes:
        recv_bytes: Bytes of the recv window.
        count_bytes: Bytes of the count window.
    """

    def __init__(self, cfg: EPConfig):
        super().__init__(cfg, cfg.max_tokens_per_rank * cfg.top_k)
        tokens = cfg.n_ranks * cfg.max_tokens_per_rank
        if cfg.slots == "expert":
            self.recv_bytes = cfg.n_local_experts * tokens * cfg.dispatch_message_bytes
            self.count_bytes = 8 * cfg.n_local_experts * cfg.n_ranks
        else:
            self.recv_bytes = cfg.num_buffers * tokens * cfg.dispatch_message_stride

    def table_ids(self, buffer: int, source: int) -> int:
        """i16 [T, K]: the expert ids of `source`, -1 = no expert. RankSlots only."""
        return self.ids + self._block(buffer, source) * self.ids_block

    def table_weights(self, buffer: int, source: int) -> int:
        """f32 [T, K]: the weights of `source`. RankSlots only."""
        return self.weights + self._block(buffer, source) * self.weights_block

    def message(self, buffer: int, source: int, token: int) -> int:
        """The message of `token` of rank `source` in the recv window. RankSlots."""
        return (self._block(buffer, source) * self.cfg.max_tokens_per_rank + token) * self.cfg.dispatch_message_stride

    def table_cell(self, buffer: int, source: int, choice: int) -> int:
        """A choice of `source` as a cell: id (i16) and weight (f32), T as the word's value. With `cfg.table_room`."""
        return self.cells + self._block(buffer, source) * self.cells_block + CELL_BYTES * choice

    def expert_slot(self, expert: int, source: int, slot: int) -> int:
        """Message number `slot` from `source` to local expert `expert` in the recv window. ExpertSlots."""
        cfg = self.cfg
        return ((expert * cfg.n_ranks + source) * cfg.max_tokens_per_rank + slot) * cfg.dispatch_message_bytes

    def expert_count(self, expert: int, source: int) -> int:
        """u64 in the count window: messages from `source` to local expert `expert`. ExpertSlots."""
        return 8 * (expert * self.cfg.n_ranks + source)


class CombineWindow(_Window):
    """Layout of the combine windows of one rank.

    Attributes:
        recv_bytes: Bytes of the recv window.
        count_bytes: Bytes of the count window.
    """

    def __init__(self, cfg: EPConfig):
        super().__init__(cfg, 0)
        self.recv_bytes = cfg.num_buffers * cfg.max_tokens_per_rank * cfg.combine_slots * cfg.combine_row_bytes
        if cfg.slots == "expert":
            self.count_bytes = 8 * cfg.n_experts

    def _buffer(self, buffer: int) -> int:
        return buffer * self.cfg.combine_slots * self.cfg.max_tokens_per_rank

    def partial(self, buffer: int, rank: int, token: int) -> int:
        """The sum that `rank` sends for `token`, in the recv window. reduce="expert"."""
        return (self._buffer(buffer) + rank * self.cfg.max_tokens_per_rank + token) * self.cfg.combine_row_bytes

    def row(self, buffer: int, token: int, k: int) -> int:
        """The row of expert choice `k` of `token`, in the recv window. reduce="source", and ExpertSlots."""
        return (self._buffer(buffer) + token * self.cfg.top_k + k) * self.cfg.combine_row_bytes

    def expert_signal(self, expert: int) -> int:
        """u64 in the count window: the rows of global expert `expert` have arrived. ExpertSlots."""
        return 8 * expert


# The counters head


def get_u64(counters: np.ndarray, index: int) -> int:
    """The unsigned 64-bit field at int32 index `index`."""
    low, high = (int(w) & 0xFFFFFFFF for w in counters[index : index + 2])
    return high << 32 | low


def put_u64(counters: np.ndarray, index: int, value: int) -> None:
    """Store a 64-bit field (signed values as two's complement) at int32 index `index`."""
    counters[index : index + 2] = np.array([value & 0xFFFFFFFFFFFFFFFF], dtype="<u8").view(np.int32)


def _get_i64(counters: np.ndarray, index: int) -> int:
    value = get_u64(counters, index)
    return value - (1 << 64) if value >> 63 else value


EPOCH_FIELDS = (HEAD_DISPATCH_SENT, HEAD_DISPATCH_WAITED, HEAD_COMBINE_SENT, HEAD_COMBINE_WAITED)


def write_head(counters: np.ndarray, cfg: EPConfig, rank: int, epoch: int = 0) -> None:
    """Fill `counters` (int32 [counters_words(cfg)]) with a fresh head: all epochs `epoch`, no record, the rest zero."""
    counters[:] = 0
    counters[HEAD_MAGIC] = MAGIC
    counters[HEAD_LAYOUT_VERSION] = LAYOUT_VERSION
    counters[HEAD_MY_RANK] = rank
    counters[HEAD_N_RANKS] = cfg.n_ranks
    counters[HEAD_TOP_K] = cfg.top_k
    put_u64(counters, HEAD_CONFIG_HASH, cfg.config_hash())
    put_u64(counters, HEAD_DISPATCH_HASH, cfg.config_hash("dispatch"))
    put_u64(counters, HEAD_COMBINE_HASH, cfg.config_hash("combine"))
    put_u64(counters, HEAD_DEADLINE_NS, round(cfg.timeout_s * 1e9))
    put_epochs(counters, epoch)


def put_address(counters: np.ndarray, index: int, address: int) -> None:
    """Store an address (of masks, note or time line: `HEAD_*`) and its complement, without which it counts as 0."""
    checks = {HEAD_MASKS: HEAD_MASKS_CHECK, HEAD_NOTE: HEAD_NOTE_CHECK, HEAD_TIMELINE: HEAD_TIMELINE_CHECK}
    put_u64(counters, index, address)
    put_u64(counters, checks[index], address ^ 0xFFFFFFFFFFFFFFFF)


def put_epochs(counters: np.ndarray, epoch: int) -> None:
    """Let all four epochs be this one."""
    for index in EPOCH_FIELDS:
        put_u64(counters, index, epoch)


def read_epochs(counters: np.ndarray) -> tuple[int, int, int, int]:
    """Epochs of the last dispatch sent and waited for, and of the last combine sent and waited for."""
    return tuple(get_u64(counters, index) for index in EPOCH_FIELDS)


def check_head(counters: np.ndarray, cfg: EPConfig, rank: int) -> None:
    """Check that `counters` begins with a head of this version, config and rank.

    Raises:
        CorruptHeadError: Too short, wrong magic, layout version, rank or number of ranks.
        ConfigMismatchError: Made for another config.
    """
    remedy = "make a new communicator; nothing but the ops may write to atomic_counters"
    if counters.dtype != np.int32 or counters.ndim != 1 or counters.size < counters_words(cfg):
        raise CorruptHeadError(
            field="atomic_counters",
            value=f"{counters.dtype} {list(counters.shape)}",
            allowed=f"int32 [{counters_words(cfg)}]",
            remedy=remedy,
        )
    fields = (
        ("magic", HEAD_MAGIC, MAGIC),
        ("layout_version", HEAD_LAYOUT_VERSION, LAYOUT_VERSION),
        ("my_rank", HEAD_MY_RANK, rank),
        ("n_ranks", HEAD_N_RANKS, cfg.n_ranks),
    )
    for name, index, expected in fields:
        if int(counters[index]) != expected:
            raise CorruptHeadError(
                field=f"atomic_counters.{name}", value=int(counters[index]), allowed=str(expected), remedy=remedy
            )
    seen = get_u64(counters, HEAD_CONFIG_HASH)
    if seen != cfg.config_hash():
        raise ConfigMismatchError(
            f"rank {rank} was made for another config",
            field="config_hash",
            value=hex(seen),
            allowed=hex(cfg.config_hash()),
            remedy="build graph and communicator from the same EPConfig on every rank",
        )


@dataclass(frozen=True)
class Record:
    """The error record of a rank: the first failure since the last reset.

    Attributes:
        kind: One of `KIND_*`.
        stage: One of `STAGE_*`.
        rank: The rank that failed.
        peer: The rank it waited for, -1 = none.
        chunk: Token / G, the index of its signal, `CHUNK_HEADER`, `CHUNK_CREDIT`, or `FIELD_*` for `KIND_SHAPE`.
        expected: The epoch waited for.
        seen: The epoch seen.
        value: Rows needed, or the size given.
        limit: Rows available, or the size allowed.
    """

    kind: int
    stage: int
    rank: int
    peer: int
    chunk: int
    expected: int
    seen: int
    value: int
    limit: int


def decode_record(counters: np.ndarray) -> Record | None:
    """The error record in `counters` (int32, at least the head), or None where nothing failed."""
    if int(counters[REC_STATE]) == 0:
        return None
    kind, stage, rank, peer, chunk = (int(counters[i]) for i in (REC_KIND, REC_STAGE, REC_RANK, REC_PEER, REC_CHUNK))
    return Record(
        kind=kind,
        stage=stage,
        rank=rank,
        peer=peer,
        chunk=chunk,
        expected=get_u64(counters, REC_EXPECTED),
        seen=get_u64(counters, REC_SEEN),
        value=_get_i64(counters, REC_VALUE),
        limit=_get_i64(counters, REC_LIMIT),
    )


def clear_record(counters: np.ndarray) -> None:
    """Erase the error record. The rank works again once its epochs and credits are agreed anew."""
    counters[REC_STATE:REC_END] = 0
