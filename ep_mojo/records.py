"""The named error for what a rank put on record: see `layout.Record`, and docs/protocol.md, section 5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import layout
from .errors import CapacityError, CorruptHeadError, EPError, OrderError, PeerTimeoutError, ShapeError

if TYPE_CHECKING:
    from .config import EPConfig

RESET = "call comm.reset() on all ranks"


def record_to_error(record: layout.Record, cfg: EPConfig) -> EPError:
    """The named error for a record: stage, ranks, what was expected and seen, what to do. Returned, not raised."""
    stage = layout.STAGE_NAMES.get(record.stage, f"stage {record.stage}")
    where = f"rank {record.rank}, {stage}"
    if record.kind == layout.KIND_TIMEOUT:
        return PeerTimeoutError(
            f"{where}: no {_signal_name(record.chunk)} from rank {record.peer} within {cfg.timeout_s:g} s "
            f"(waited for round {record.expected}, last seen round {record.seen})",
            remedy=f"see whether rank {record.peer} runs the same stages, or raise timeout_s; then {RESET}",
        )
    if record.kind == layout.KIND_PEER_FAILED:
        return PeerTimeoutError(
            f"{where}: rank {record.peer} failed, as its {_signal_name(record.chunk)} of round {record.expected} says",
            remedy=f"read the error of rank {record.peer} (comm.check() there), remove its cause, then {RESET}",
        )
    if record.kind == layout.KIND_CAPACITY:
        name, allowed, fix = _capacity_words(cfg)
        error = CapacityError(
            f"{where}: {record.value} rows arrived",
            field=name,
            value=record.limit,
            allowed=allowed.format(record.value),
            remedy=f"{fix}; then {RESET}",
        )
        error.rows = record.value
        return error
    if record.kind == layout.KIND_ORDER:
        return OrderError(_order_words(record, where, cfg), remedy=f"{_order_remedy(record, cfg)}; then {RESET}")
    if record.kind == layout.KIND_ABORTED:
        return OrderError(
            f"rank {record.rank}: an op of this rank's graph raised in the middle of a run",
            remedy=f"remove the cause of the error that the run raised; then {RESET}",
        )
    if record.kind == layout.KIND_SHAPE:
        if record.chunk in (layout.FIELD_HANDLE_TOKENS, layout.FIELD_REDUCE, layout.FIELD_ROWS):
            return _peer_mismatch(record, where)
        name, limit = {
            layout.FIELD_TOKENS: ("rows of x", "max_tokens_per_rank"),
            layout.FIELD_NUM_TOKENS: ("num_tokens", "rows of x"),
            layout.FIELD_SRC_INFO: ("src_info", "source rank * Tmax + token; 0 <= k < top_k; or (-1, -1)"),
            layout.FIELD_ROW_MAP: ("row_map", "rows of the tensor, or -1"),
            layout.FIELD_RECV_NUM_TOKENS: ("recv_num_tokens", "max_tokens_per_rank"),
        }.get(record.chunk, (f"field {record.chunk}", "limit"))
        fix = "pass fewer tokens, or raise max_tokens_per_rank"
        if record.chunk == layout.FIELD_SRC_INFO:
            fix = "pass the src_info that dispatch_wait gave"
        elif record.chunk in (layout.FIELD_ROW_MAP, layout.FIELD_RECV_NUM_TOKENS):
            fix = "pass the handle of the dispatch that the rows come from, with all its rows"
        return ShapeError(
            where,
            field=name,
            value=record.value,
            allowed=f"0 to {record.limit} ({limit})",
            remedy=f"{fix}; then {RESET}",
        )
    return CorruptHeadError(
        f"the error record of {where} cannot be read",
        field="kind",
        value=record.kind,
        allowed=f"{layout.KIND_TIMEOUT} to {layout.KIND_ABORTED}",
        remedy="make a new communicator; nothing but the ops may write to atomic_counters",
    )


def _peer_mismatch(record: layout.Record, where: str) -> ShapeError:
    """What a peer's combine header says does not fit this rank's combine_wait."""
    modes = ("expert", "source")
    field, value, allowed, fix = {
        layout.FIELD_REDUCE: (
            f"reduce of rank {record.peer}",
            modes[record.value & 1],
            f"{modes[record.limit & 1]}, as here",
            "give all ranks the same reduce, or set EPConfig.reduce",
        ),
        layout.FIELD_ROWS: (
            f"rows that rank {record.peer} sends back",
            record.value,
            f"{record.limit}: what the choices of this combine await from it",
            "combine with the topk_ids of the dispatch, unchanged",
        ),
        layout.FIELD_HANDLE_TOKENS: (
            f"tokens of this rank in the handle of rank {record.peer}",
            record.value,
            f"{record.limit}: the tokens of this combine",
            "combine with the handle, topk_ids and num_tokens of one dispatch on all ranks",
        ),
    }[record.chunk]
    return ShapeError(where, field=field, value=value, allowed=allowed, remedy=f"{fix}; then {RESET}")


def _signal_name(chunk: int) -> str:
    return {layout.CHUNK_HEADER: "header", layout.CHUNK_CREDIT: "credit"}.get(chunk, f"signal {chunk}")


def _capacity_words(cfg: EPConfig) -> tuple[str, str, str]:
    if cfg.output_layout == "expert_padded":
        fix = "raise max_tokens_per_rank, or use output_layout='expert'"
        return "rows of one expert (n_ranks * max_tokens_per_rank)", "at least {}", fix
    return "max_rows", "at least {}", "raise max_rows, or leave it None for the worst case"


def _order_words(record: layout.Record, where: str, cfg: EPConfig) -> str:
    epochs = f"(expected round {record.expected}, seen round {record.seen})"
    if record.peer >= 0:
        return f"{where}: the {_signal_name(record.chunk)} of rank {record.peer} is not there {epochs}"
    if record.stage in (layout.STAGE_DISPATCH_WAIT, layout.STAGE_COMBINE_WAIT):
        return f"{where}: nothing was sent that this could wait for {epochs}"
    if cfg.slots == "expert":
        return f"{where}: dispatch and combine do not alternate, as slots='expert' needs {epochs}"
    return f"{where}: more than num_buffers = {cfg.num_buffers} rounds are in flight {epochs}"


def _order_remedy(record: layout.Record, cfg: EPConfig) -> str:
    if record.peer >= 0:
        return "emit the sends of all ranks before the first wait (ep_mojo.dispatch and combine do)"
    if record.stage in (layout.STAGE_DISPATCH_WAIT, layout.STAGE_COMBINE_WAIT):
        return "call the matching *_async first, once for each wait"
    if cfg.slots == "expert":
        return "run all four stages of a round before the next dispatch_async, or use slots='rank'"
    return "wait for a round before the next one is sent, or raise num_buffers"
