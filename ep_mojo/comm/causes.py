"""Of the errors of several ranks, the one to raise."""

from __future__ import annotations

from ..errors import CapacityError, PeerTimeoutError


def raise_first(errors: dict[int, Exception]) -> None:
    """Raise the error that explains most; it carries all of them as `by_rank`. Nothing to raise: return."""
    if not errors:
        return
    rank = min(errors, key=lambda r: (_weight(errors[r]), -_rows(errors[r]), r))
    error = errors[rank]
    error.by_rank = dict(errors)  # type: ignore[attr-defined]
    raise error


def _weight(error: Exception) -> int:
    """Causes before consequences: a peer that failed makes others fail, or wait in vain."""
    if not isinstance(error, PeerTimeoutError):
        return 0
    return 2 if getattr(error, "peer_failed", False) else 1


def _rows(error: Exception) -> int:
    """Rows that a `CapacityError` asks for: who has raised `max_rows` for one rank need not come back for the next."""
    return error.rows if isinstance(error, CapacityError) else 0
