"""The order rules of docs/protocol.md, section 8, read off the PTX of a kernel.

A small data-flow analysis over the control-flow graph of each function. On some path to an instruction there may be

    pending    a bulk store to global memory that no full `wait_group 0` has followed
    dirty      an ordinary store to what may be shared memory that no proxy fence has followed
    unfenced   a store that no fence at system scope has followed
    reading    a bulk store whose source may still be read, since no `wait_group` of either kind has followed
    acquired   an acquire that no full proxy fence has followed
    apart      an acquire that no warp barrier has followed, nor one of the CTA
    taken      a bulk load into a slot, whose last row lanes may have read since, that no proxy fence has followed
    shared     a barrier of the CTA behind dirty stores, and none behind a fence since: other threads' may be unfenced

What follows from them is an error: a signal while stores are pending; a bulk store of dirty shared memory; a relaxed
store at system scope while unfenced, but for cells and words that cover nothing; a bulk load while acquired or taken;
while acquired an arrival at an mbarrier, which hands that on, and a bulk store, but in kernels whose peers get none;
such an arrival while apart, in all; an ordinary store to what may be shared memory, or a bulk load into it, while it
may be read. And without looking at paths: any non-coherent or relaxed load but that of a cell or a count, a release at
a scope below the device, an mbarrier at which threads meet without order, fewer signals than the kernel has, arithmetic
that flushes or approximates, and jumps that this analysis does not follow. In kernels where threads write shared memory
for one another's bulk stores, such a store while shared is an error, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PENDING, DIRTY, UNFENCED, READING, ACQUIRED, SHARED, TAKEN, APART = (1 << i for i in range(8))
FORBIDDEN = {
    r"\bld\S*\.nc": "non-coherent load",
    r"(?<!count\.)\bld\.(relaxed(?!\.sys\.global\.b128)|volatile|mmio)": "a load that acquires nothing",
    r"\bst\.release\.(cta|cluster)": "release at too small a scope",
    r"(?<!ticket\.)\batom\.relaxed\.gpu": "an arrival without acquire and release",
    r"\.(ftz|approx)\b|div\.full": "arithmetic that is not exact",
    r"\bmbarrier\.\S*\.(relaxed|cluster\.shared)": "an mbarrier that orders nothing, or of other CTAs",
    r"\bbar(rier)?\.sync\s+[1-9%]": "a barrier of some threads other than an mbarrier",
    r"\bbrx": "a jump that is not followed",
}
RING = "ring."
"""In front of a load into a warp's ring (`gpu/ring.mojo`), from which nothing is stored in bulk: so bulk stores may
still read other shared memory."""
ALONE = "alone."
"""In front of a store of a word that covers nothing (`cell.mojo`)."""
COUNT = "count."
"""In front of a store or load of a word that says how many rows there are, and covers nothing (`gpu/notes.mojo`)."""
TICKET = "ticket."
"""In front of an atomic add that gives out numbers (`gpu/turns.mojo`): a number covers no memory, so nothing is to be
ordered."""
CELL = ".relaxed.sys.global.b128"
"""A load or store of a cell: whoever has its word has its payload."""
LABEL = re.compile(r"^([$\w]+):$")
BRANCH = re.compile(r"^(@!?%?\w+\s+)?bra(?:\.uni)?\s+([$\w]+);$")


@dataclass
class Function:
    """One function of a PTX module: its instructions, and where each can go."""

    name: str
    is_entry: bool
    lines: list[str] = field(default_factory=list)


def functions(ptx: str) -> list[Function]:
    """The functions of a module with a body."""
    found: list[Function] = []
    current, head, depth = None, "", 0
    for raw in ptx.splitlines():
        line = raw.split("//")[0].strip()
        if not line:
            continue
        for mark in (RING, ALONE, COUNT, TICKET):
            if raw.rstrip().endswith(f"// {mark[:-1]}"):
                line = mark + line
        if current is None:
            match = re.match(r"^(?:\.visible |\.weak )*\.(entry|func)\b", line)
            if match or head:
                head += " " + line
                if "{" in line:
                    name = re.search(r"([A-Za-z_$][\w$]*)\s*\(", re.sub(r"\.func\s*\([^)]*\)", ".func", head))
                    current, head, depth = Function(name.group(1), ".entry" in head), "", 1
                elif line.endswith(";"):
                    head = ""
            continue
        depth += line.count("{") - line.count("}")
        if depth == 0:
            found.append(current)
            current = None
            continue
        current.lines += [part.strip() for part in re.split(r"(?<=;)\s+|(?<=:)\s+", line) if part.strip()]
    return found


def errors(function: Function, writes_for_others: bool = False, stores_to_peers: bool = True) -> list[str]:
    """What breaks a rule, one line each.

    Args:
        function: Of a kernel.
        writes_for_others: Whether threads write shared memory for bulk stores of other threads of the CTA.
        stores_to_peers: Whether its bulk stores may go to peers, and so must come behind what the opening has acquired.
    """
    lines = function.lines
    labels = {m.group(1): i for i, text in enumerate(lines) if (m := LABEL.match(text))}
    found = [
        f"{function.name}: {why}: {text}"
        for pattern, why in FORBIDDEN.items()
        for text in lines
        if re.search(pattern, text)
    ]
    states: dict[int, int] = {0: 0}
    work = [0]
    while work:
        i = work.pop()
        if i >= len(lines):
            continue
        text, state = lines[i], states[i]
        after = _after(text, state)
        for j in _next(text, i, labels):
            merged = states.get(j, 0) | after
            if j not in states or merged != states[j]:
                states[j] = merged
                work.append(j)
    for i, state in sorted(states.items()):
        if i < len(lines):
            looked_at = state if writes_for_others else state & ~SHARED
            found += [f"{function.name}: {why}: {lines[i]}" for why in _broken(lines[i], looked_at, stores_to_peers)]
    return found


def _next(text: str, i: int, labels: dict[str, int]) -> list[int]:
    branch = BRANCH.match(text)
    if branch:
        target = labels[branch.group(2)]
        return [target, i + 1] if branch.group(1) else [target]
    if re.match(r"^(ret|exit|trap);", text):
        return []
    return [i + 1]


def _after(text: str, state: int) -> int:
    if "cp.async.bulk.global.shared::cta" in text:
        state |= PENDING | READING
    elif re.match(r"^cp\.async\.bulk\.wait_group 0;", text):
        state &= ~(PENDING | READING)
    elif text.startswith("cp.async.bulk.wait_group.read 0;"):
        state &= ~READING
    elif text.startswith("fence.proxy.async;"):
        state &= ~(DIRTY | ACQUIRED | TAKEN)
    elif "fence.proxy.async" in text:
        state &= ~(DIRTY | TAKEN)
    elif "cp.async.bulk.shared::cluster.global" in text:
        state |= TAKEN
    elif "ld.acquire" in text:
        state |= ACQUIRED | APART
    elif re.match(r"^fence\.(sc|acq_rel)\.sys;", text):
        state &= ~UNFENCED
    elif text.startswith("bar.warp.sync"):
        state &= ~APART
    elif re.match(r"^bar(rier)?\.sync\s+0;", text):
        state = state | SHARED if state & DIRTY else state & ~SHARED
        state &= ~APART
    elif _is_store(text):
        state |= UNFENCED
        if _may_be_shared(text):
            state |= DIRTY
    return state


def _is_store(text: str) -> bool:
    return re.match(r"^(@!?%\w+ )?st\.", text) is not None and ".local" not in text and ".param" not in text


def _may_be_shared(text: str) -> bool:
    return _is_store(text) and not re.search(r"\.(global|release)\b", text)


def _broken(text: str, state: int, stores_to_peers: bool) -> list[str]:
    found = []
    if state & APART and "mbarrier.arrive.release" in text:
        found.append("hands on what other lanes may have acquired, without a warp barrier")
    if stores_to_peers and state & ACQUIRED:
        if "mbarrier.arrive.release" in text:
            found.append("hands on an acquire without a proxy fence")
        if "cp.async.bulk.global.shared::cta" in text:
            found.append("a bulk store that may overtake what allows it")
    if re.search(r"\bst\.release\.(sys|gpu)", text) and state & PENDING:
        found.append("a signal while bulk stores may be under way")
    covers = CELL not in text and not text.startswith(ALONE)
    if re.search(r"\bst\.(relaxed\.sys|mmio|volatile)", text) and covers:
        if state & UNFENCED:
            found.append("a relaxed store without a system fence before it")
        if state & PENDING:
            found.append("a signal while bulk stores may be under way")
    if "cp.async.bulk.global.shared::cta" in text and state & DIRTY:
        found.append("a bulk store of shared memory that ordinary stores may have written, without a proxy fence")
    if "cp.async.bulk.global.shared::cta" in text and state & SHARED:
        found.append("a bulk store of what other threads may have written without a proxy fence")
    if state & READING and (_may_be_shared(text) or text.startswith("cp.async.bulk.shared::cluster.global")):
        found.append("a slot is written while a bulk store may read it")
    if "cp.async.bulk.shared::cluster.global" in text and state & ACQUIRED:
        found.append("a bulk load without a proxy fence before it")
    if "cp.async.bulk.shared::cluster.global" in text and state & TAKEN:
        found.append("a bulk load of a slot that lanes may be reading")
    return found


def signals(function: Function) -> int:
    """Stores that publish a 64-bit word with release at system scope."""
    return sum(bool(re.search(r"\bst\.release\.sys(\.global)?\.(b|u)64", text)) for text in function.lines)


def notes(function: Function) -> int:
    """Stores that publish a 64-bit word with release at device scope: to other CTAs, not to peers."""
    return sum(bool(re.search(r"\bst\.release\.gpu(\.global)?\.(b|u)64", text)) for text in function.lines)


def awaits(function: Function) -> int:
    """Loads of a 64-bit word with acquire at system scope."""
    return sum(bool(re.search(r"\bld\.acquire\.sys(\.global)?\.(b|u)64", text)) for text in function.lines)
