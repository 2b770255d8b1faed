"""The words of `atomic_counters`: a rank's own head, and what one launch notes for itself. Mirrored by
`ep_mojo/layout.py`.
"""

from .settings import Settings

comptime MAGIC: Int32 = 0x45504D4A
"""First word of a valid counters head."""
comptime LAYOUT_VERSION: Int32 = 9
"""Changes with any offset in this file."""
comptime HEAD_WORDS = 64
"""Words (int32) of the counters head."""


# Indices of int32 words in the counters head; u64 and i64 fields take two.
comptime HEAD_MAGIC = 0
"""`MAGIC`."""
comptime HEAD_LAYOUT_VERSION = 1
"""`LAYOUT_VERSION`."""
comptime HEAD_CONFIG_HASH = 2
"""(u64) FNV-1a of the settings."""
comptime HEAD_MY_RANK = 4
"""The rank that owns these counters."""
comptime HEAD_N_RANKS = 5
"""R."""
comptime HEAD_DEADLINE_NS = 6
"""(i64) longest wait of one launch in nanoseconds, 0 = none."""
comptime HEAD_DISPATCH_SENT = 8
"""(u64) epoch of the last dispatch_async."""
comptime HEAD_DISPATCH_WAITED = 10
"""(u64) epoch of the last dispatch_wait."""
comptime HEAD_COMBINE_SENT = 12
"""(u64) epoch of the last combine_async."""
comptime HEAD_COMBINE_WAITED = 14
"""(u64) epoch of the last combine_wait."""
comptime HEAD_DISPATCH_HASH = 16
"""(u64) FNV-1a of the settings that the seed-named dispatch functions know."""
comptime HEAD_COMBINE_HASH = 18
"""(u64) FNV-1a of the settings that the seed-named combine functions know."""
comptime HEAD_TOP_K = 20
"""K."""
comptime HEAD_TIMELINE = 22
"""(u64) Where launches on this GPU note when their parts happen; 0 = nowhere."""
comptime ARRIVED = 24
"""Four words, 0 between launches: CTAs of a GPU launch that are done. See `arrival`."""
comptime HEAD_TIMELINE_CHECK = 28
"""(u64) The complement of `HEAD_TIMELINE`, without which it counts as 0."""
comptime HEAD_NOTE = 30
"""(u64) Where a failure is noted beside the record, an Int32 that the host can read at any time; 0 = nowhere."""
comptime REC_STATE = 32
"""0 no failure, 1 being written, 2 set. Launches access it and the next word as one of 64 bits."""
comptime REC_KIND = 33
"""One of `KIND_*`."""
comptime REC_STAGE = 34
"""One of `STAGE_*`."""
comptime REC_RANK = 35
"""The rank that failed."""
comptime REC_PEER = 36
"""The peer it waited for, -1 = none."""
comptime REC_CHUNK = 37
"""Token / G: the index of its signal, where there are any; or `CHUNK_HEADER`, `CHUNK_CREDIT`, or a `FIELD_*` for
`KIND_SHAPE`."""
comptime REC_EXPECTED = 38
"""(u64) the epoch waited for."""
comptime REC_SEEN = 40
"""(u64) the epoch seen."""
comptime REC_VALUE = 42
"""(i64) rows needed, or the size given."""
comptime REC_LIMIT = 44
"""(i64) rows available, or the size allowed."""
comptime HEAD_NOTE_CHECK = 46
"""(u64) The complement of `HEAD_NOTE`, without which it counts as 0."""
comptime HEAD_MASKS = 48
"""(u64) Where the masks of this rank's peers are, Int32 [R] in memory of its device; 0 = nowhere. See `head.mojo`."""
comptime HEAD_MASKS_CHECK = 50
"""(u64) The complement of `HEAD_MASKS`, without which it counts as 0."""
comptime HEAD_COMBINE_BEGUN = 52
"""(u64) Epoch of the last combine on a GPU of which headers have left, where peers can be masked."""
comptime TICKETS = 54
"""Two words, 0 between launches: chunks that the warps of a GPU launch have taken beyond their first ones; combine's,
then dispatch's. See `gpu/turns.mojo`."""

comptime KIND_TIMEOUT: Int32 = 1
"""A peer's signal did not come within the deadline."""
comptime KIND_CAPACITY: Int32 = 2
"""More rows than the output holds."""
comptime KIND_ORDER: Int32 = 3
"""Stages called in a wrong order."""
comptime KIND_PEER_FAILED: Int32 = 4
"""A peer published FAILED."""
comptime KIND_SHAPE: Int32 = 5
"""A size that is only known at run time is out of range."""
comptime KIND_ABORTED: Int32 = 6
"""An op of the rank raised in the middle of a run; written by the host."""

comptime STAGE_DISPATCH_ASYNC: Int32 = 1
"""The split dispatch, sending half."""
comptime STAGE_DISPATCH_WAIT: Int32 = 2
"""The split dispatch, receiving half."""
comptime STAGE_COMBINE_ASYNC: Int32 = 3
"""The split combine, sending half."""
comptime STAGE_COMBINE_WAIT: Int32 = 4
"""The split combine, receiving half."""
comptime STAGE_DISPATCH: Int32 = 5
"""The fused dispatch."""
comptime STAGE_COMBINE: Int32 = 6
"""The fused combine."""

comptime CHUNK_HEADER: Int32 = -1
"""The wait was for a header."""
comptime CHUNK_CREDIT: Int32 = -2
"""The wait was for a credit."""

comptime FIELD_TOKENS: Int32 = 1
"""Rows of x against max_tokens_per_rank."""
comptime FIELD_NUM_TOKENS: Int32 = 2
"""The num_tokens input against the rows of x."""
comptime FIELD_SRC_INFO: Int32 = 3
"""A pair of src_info that names no source token and choice."""
comptime FIELD_ROW_MAP: Int32 = 4
"""A row of row_map against the rows of the tensor."""
comptime FIELD_RECV_NUM_TOKENS: Int32 = 5
"""A source's T in recv_num_tokens against max_tokens_per_rank."""
comptime FIELD_HANDLE_TOKENS: Int32 = 6
"""T of this rank in a peer's handle against T of this launch."""
comptime FIELD_REDUCE: Int32 = 7
"""A peer sends with another reduce mode: 1 = a row for each choice, 0 = a partial sum."""
comptime FIELD_ROWS: Int32 = 8
"""Rows, or partial sums, that a peer sends against those that this launch awaits from it."""

comptime MAX_PIECES = 32
"""Pieces that a dispatch_wait on a GPU maps by themselves, at most: a lane of a warp for each."""
comptime MAX_SOURCE_PIECES = 8
"""Those of one source, at most."""
comptime WORK_COUNTED = HEAD_WORDS
"""RankSlots on a GPU: (u64 [`MAX_PIECES`]) a dispatch_wait has counted a piece's rows; the value is its source's T."""
comptime NOTE_COPIES = 8
"""Copies of what all warps of a launch await, in lines of their own: so many polls of one line would hold up others."""
comptime WORK_MAPPED = HEAD_WORDS + 64
"""(u64 [`NOTE_COPIES`, `MAX_PIECES`]) and has mapped them."""
comptime WORK_TABLED = HEAD_WORDS + 576
"""(u64 [R]) a dispatch_async has sent a peer its table; the value is T."""
comptime WORK_COUNTS = HEAD_WORDS + 592
"""(u64 [pieces, groups]) rows of each (piece, group), in words of the launch's epoch."""
comptime ROUTED_MASKS = HEAD_WORDS
"""ExpertSlots: first of Tm words behind the head; word t says which choices of this rank's token t were sent."""


@always_inline
def expert_rows(s: Settings) -> Int:
    """ExpertSlots on a GPU: first of E (u64) words behind the masks, one for each (local expert, source).

    A dispatch_wait publishes there how many rows a source's messages give beyond one each.

    Args:
        s: The settings.

    Returns:
        Index of an int32 word, even.
    """
    return (ROUTED_MASKS + s.max_tokens + 1) // 2 * 2


@always_inline
def counters_words(s: Settings) -> Int:
    """Size of `atomic_counters`.

    Args:
        s: The settings.

    Returns:
        Words (int32): the head, and a launch's notes to itself.
    """
    if s.expert_slots:
        return expert_rows(s) + 2 * s.n_experts
    if s.everywhere:
        return WORK_COUNTS  # nothing is mapped
    return WORK_COUNTS + 2 * MAX_SOURCE_PIECES * (s.n_experts + s.n_ranks)
