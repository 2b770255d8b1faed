"""T of a launch: what it was given, and whether that is in range."""

from .launch import Endpoint
from .layout import FIELD_NUM_TOKENS, FIELD_TOKENS, KIND_SHAPE
from .peers import View


@always_inline
def given_tokens(rows: Int, num_tokens: View[DType.int32]) -> Int:
    """T of a launch as it is given; `tokens_fit` finds out whether it is in range.

    Args:
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        T.
    """
    return Int(num_tokens[0]) if num_tokens.present() else rows


@always_inline
def readable_tokens(rows: Int, num_tokens: View[DType.int32]) -> Int:
    """Tokens that may be read before it is known whether T is in range: T where it is.

    Args:
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        0 to rows.
    """
    return max(0, min(rows, given_tokens(rows, num_tokens)))


def token_count(
    ep: Endpoint, stage: Int32, rows: Int, num_tokens: View[DType.int32]
) -> Int:
    """T of this launch; records a failure where it is out of range.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        rows: Rows of the tensor.
        num_tokens: [1], or absent.

    Returns:
        T, or 0 after a failure.
    """
    var given = given_tokens(rows, num_tokens)
    if not tokens_fit(ep, stage, rows, given) or ep.head.failed():
        return 0
    return given


def tokens_fit(ep: Endpoint, stage: Int32, rows: Int, given: Int) -> Bool:
    """Record a failure where T is out of range.

    Args:
        ep: The rank.
        stage: `STAGE_*`.
        rows: Rows of the tensor.
        given: What the launch was told.

    Returns:
        Whether it is in range.
    """
    if rows > ep.s.max_tokens:
        ep.head.fail(
            KIND_SHAPE,
            stage,
            chunk=FIELD_TOKENS,
            value=rows,
            limit=ep.s.max_tokens,
        )
        return False
    if given < 0 or given > rows:
        ep.head.fail(
            KIND_SHAPE, stage, chunk=FIELD_NUM_TOKENS, value=given, limit=rows
        )
        return False
    return True
