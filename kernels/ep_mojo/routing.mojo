"""Who gets what: destination sets, counts, row starts and row maps. One worker a source; no order by arrival anywhere.

A source's routing table is ids i16 [T, K], -1 where a choice names no expert. Rows of the output are sorted by (group,
source rank, source token, k); so a row is the start of (group, source) plus the number of rows before it within the
same source, and each source can be mapped by itself once all counts are known.
"""

from .numeric import quotient
from .peers import View
from .settings import Settings

comptime NO_EXPERT: Int16 = -1
"""An id that is skipped everywhere."""
comptime NO_ROW: Int32 = -1
"""A choice that has no row on this rank."""


@always_inline
def normal_id[
    n: SIMDLength
](id: SIMD[DType.int64, n], n_experts: Int) -> SIMD[DType.int16, n]:
    """Ids as they travel.

    Parameters:
        n: Vector width.

    Args:
        id: What the router chose.
        n_experts: E.

    Returns:
        The ids, or `NO_EXPERT` where they are outside [0, E).
    """
    var known = id.ge(0) & id.lt(Int64(n_experts))
    return known.select(id.cast[DType.int16](), SIMD[DType.int16, n](NO_EXPERT))


@always_inline
def destination(id: Int16, n_local: Int) -> UInt32:
    """The rank that owns an expert, as a bit.

    Args:
        id: The id as it travels.
        n_local: L.

    Returns:
        Bit id // L, or 0 for `NO_EXPERT`.
    """
    return UInt32(1) << UInt32(
        quotient(Int(id), n_local)
    ) if id >= 0 else UInt32(0)


@always_inline
def everyone(s: Settings) -> UInt32:
    """All ranks.

    Args:
        s: The settings.

    Returns:
        Bits 0 to R - 1.
    """
    return (UInt32(1) << UInt32(s.n_ranks)) - 1


@always_inline
def by_source[layout: StaticString]() -> Bool:
    """Whether rows are grouped by the ranks that they come from, one for a token, and not by expert.

    Parameters:
        layout: Output layout.

    Returns:
        True with "rank" and "gathered".
    """
    return layout == "rank" or layout == "gathered"


@always_inline
def may_shrink[layout: StaticString]() -> Bool:
    """Whether kernels of a layout can leave masked ranks out: that of low-latency mode.

    Parameters:
        layout: Output layout.

    Returns:
        True with "expert_padded".
    """
    return layout == "expert_padded"


@always_inline
def destinations(
    ids: View[DType.int16], token: Int, top_k: Int, n_local: Int
) -> UInt32:
    """The ranks that a token goes to.

    Args:
        ids: The source's table.
        token: The token.
        top_k: K.
        n_local: L.

    Returns:
        Bit r is set where rank r owns one of the token's experts.
    """
    var mask: UInt32 = 0
    for k in range(top_k):
        mask |= destination(ids[token * top_k + k], n_local)
    return mask


@always_inline
def choices_mapped[layout: StaticString](s: Settings) -> Int:
    """How many choices a handle has rows and weights for.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.

    Returns:
        R * Tm * K; 0 with "gathered", where the sources' T say it all.
    """
    return 0 if layout == "gathered" else s.n_ranks * s.max_tokens * s.top_k


@always_inline
def local_group(s: Settings, id: Int16, rank: Int) -> Int:
    """The group of rows that a choice adds to.

    Args:
        s: The settings.
        id: An id of a table.
        rank: The rank whose output it is.

    Returns:
        The group, or -1 where the expert lives elsewhere.
    """
    var local = Int(id) - rank * s.n_local_experts()
    if id < 0 or local < 0 or local >= s.n_local_experts():
        return -1
    return local + Int(s.shared_expert)


@always_inline
def group_name(s: Settings, group: Int, rank: Int) -> Int32:
    """What `expert_ids` says of a group.

    Args:
        s: The settings.
        group: A group of rows.
        rank: The rank whose output it is.

    Returns:
        The global id of its expert; E for the shared expert.
    """
    var local = group - Int(s.shared_expert)
    return Int32(
        s.n_experts if local < 0 else rank * s.n_local_experts() + local
    )


def count_rows[
    layout: StaticString
](
    s: Settings,
    ids: View[DType.int16],
    tokens: Int,
    source: Int,
    rank: Int,
    counts: View[DType.int32],
):
    """Count the rows that a source adds to each group of a rank.

    Parameters:
        layout: Output layout; "rank" and "gathered" count tokens, in group 0.

    Args:
        s: The settings.
        ids: The source's table.
        tokens: The source's T.
        source: The source.
        rank: The rank whose output it is.
        counts: Int32 [groups], out.
    """
    counts.fill(0)
    comptime if layout == "gathered":
        counts[0] = Int32(tokens)
    elif layout == "rank":
        for t in range(tokens):
            if (
                destinations(ids, t, s.top_k, s.n_local_experts())
                >> UInt32(rank)
            ) & 1 == 1:
                counts[0] += 1
    else:
        for i in range(tokens * s.top_k):
            var group = local_group(s, ids[i], rank)
            if group >= 0:
                counts[group] += 1
        if s.shared_expert and source == rank:
            counts[0] = Int32(tokens)


def row_starts[
    layout: StaticString
](
    s: Settings,
    counts: View[DType.int32],
    row_offsets: View[DType.uint32],
    totals: View[DType.int32],
) -> Int:
    """Turn counts into row starts, in place.

    Parameters:
        layout: Output layout.

    Args:
        s: The settings.
        counts: Int32 [R, groups]: counts in, first row of each (source, group) out.
        row_offsets: Uint32, out: [groups + 1], or [R + 1] with rows by source.
        totals: Int32, out: true counts, [groups], or [R] with rows by source.

    Returns:
        Rows that the output must hold; with "expert_padded" the largest group.
    """
    var run = 0
    comptime if by_source[layout]():
        for r in range(s.n_ranks):
            var n = Int(counts[r])
            row_offsets[r] = UInt32(run)
            totals[r] = Int32(n)
            counts[r] = Int32(run)
            run += n
        row_offsets[s.n_ranks] = UInt32(run)
        return run
    var groups = s.n_groups()
    var room = s.n_ranks * s.max_tokens
    var largest = 0
    for g in range(groups):
        comptime if layout == "expert_padded":
            run = g * room
        row_offsets[g] = UInt32(run)
        var first = run
        for r in range(s.n_ranks):
            var n = Int(counts[r * groups + g])
            counts[r * groups + g] = Int32(run)
            run += n
        totals[g] = Int32(run - first)
        largest = max(largest, run - first)
        comptime if layout == "expert":
            run = (
                first
                + (run - first + s.alignment - 1) // s.alignment * s.alignment
            )
    comptime if layout == "expert_padded":
        row_offsets[groups] = UInt32(groups * room)
        return largest
    row_offsets[groups] = UInt32(run)
    return run


def map_rows[
    layout: StaticString
](
    s: Settings,
    ids: View[DType.int16],
    tokens: Int,
    rank: Int,
    next_row: View[DType.int32],
    row_map: View[DType.int32],
):
    """Give every choice of a source its row.

    Parameters:
        layout: Output layout; with "rank" only a token's first local choice has a row.

    Args:
        s: The settings.
        ids: The source's table.
        tokens: The source's T.
        rank: The rank whose output it is.
        next_row: Int32 [groups]: the source's row starts; used up.
        row_map: Int32 [Tm, K], out; `NO_ROW` where there is none.
    """
    var K = s.top_k
    for t in range(tokens):
        var taken = False
        for k in range(K):
            var group = local_group(s, ids[t * K + k], rank)
            var row = NO_ROW
            comptime if layout == "rank":
                if group >= 0 and not taken:
                    row = next_row[0]
                    next_row[0] += 1
                    taken = True
            else:
                if group >= 0:
                    row = next_row[group]
                    next_row[group] += 1
            row_map[t * K + k] = row
    for i in range(tokens * K, s.max_tokens * K):
        row_map[i] = NO_ROW
