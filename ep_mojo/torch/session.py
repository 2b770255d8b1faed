"""What the modes of a `Buffer` share: the group, its queue, and the rounds that have been made so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..comm.board import board_of
from ..config import EPConfig
from ..errors import DTypeError, EPError, OrderError, PeerLostError, ShapeError
from ..formats import check_int
from .graphs import GraphSet
from .rounds import Rounds, TooMany
from .sizes import LARGEST_BYTES
from .streams import check_not_capturing, queue_for

Handle = TypeVar("Handle")
WORDS = (
    ("call comm.reset() on all ranks", "call reset() of the Buffer on all ranks"),
    ("comm.check()", "check() of its Buffer"),
    ("destroy() this communicator", "destroy() this Buffer"),
    ("and one over that", "and a Buffer over that"),
    ("raise max_rows, or leave it None for the worst case", "raise num_worst_tokens, or leave it out"),
    ("max_rows", "num_worst_tokens"),
    ("raise timeout_s", "raise Buffer.timeout_s"),
)
"""What the engine says, and what the same is for who has a Buffer."""


def put_in_words(error: EPError, words: Sequence[tuple[str, str]]) -> None:
    """Replace the first of each pair by the second in an error's text."""

    def said(text: Any) -> Any:
        for old, new in words:
            text = text.replace(old, new) if isinstance(text, str) else text
        return text

    error.args = tuple(map(said, error.args))
    for name in ("field", "allowed", "remedy"):
        if getattr(error, name) is not None:
            setattr(error, name, said(getattr(error, name)))


class InWords:
    """Around what may raise an error of the engine: says it in the words of who calls. A class, since a generator costs
    every call a microsecond more.

    Args:
        words: See `put_in_words`.
    """

    __slots__ = ("_words",)

    def __init__(self, words: Sequence[tuple[str, str]]):
        self._words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, raised: BaseException | None, trace: object) -> None:
        if isinstance(raised, EPError):
            self.explain(raised)

    def explain(self, raised: EPError) -> None:
        """Change the error, or raise another one in its place."""
        put_in_words(raised, self._words)


class Explaining(InWords):
    """See `Session.explaining`."""

    __slots__ = ("_rounds", "_session")

    def __init__(self, session: Session, rounds: Rounds):
        super().__init__(WORDS)
        self._session, self._rounds = session, rounds

    def explain(self, raised: EPError) -> None:
        """See `InWords.explain`."""
        notes = self._session.notes(self._rounds, raised)
        if not notes:
            super().explain(raised)
            return
        rank = max(notes, key=lambda r: int(notes[r]))
        raise self._rounds.too_many(self._rounds.cfg, rank, int(notes[rank])) from raised


class Session:
    """One Buffer's side of the group. Handles refer to it, so that a handle of another Buffer is noticed.

    Attributes:
        group, board: The ranks.
        rank, size: This process among them.
        device: Where all tensors are.
        queue: Where rounds run.
        masks: int32 [R], 1 for a rank that rounds leave out; None: no rank can be.
        timeout_s: The longest wait for a peer in a round, in seconds.
        make_timeout_s: The same where something is made together.
        destroyed: Whether `destroy` was called.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float, make_timeout_s: float):
        self.group, self.board = group, board_of(group)
        self.rank, self.size = group.rank(), group.size()
        self.device, self.queue = device, queue_for(device)
        self.timeout_s, self.make_timeout_s = timeout_s, make_timeout_s
        self._rounds: dict[tuple[EPConfig, Any], Rounds] = {}
        self.masks: torch.Tensor | None = None
        self.destroyed = False

    def live(self) -> None:
        """Raise `OrderError` after `destroy`."""
        if self.destroyed:
            raise OrderError(
                "the Buffer was destroyed", allowed="use before destroy()", remedy="make a new Buffer, on all ranks"
            )

    def own(self, handle: Any, kind: type[Handle]) -> Handle:
        """`handle`, if it is one of this kind and of this Buffer.

        Raises:
            DTypeError, OrderError: It is not.
        """
        if not isinstance(handle, kind):
            raise DTypeError.wrong_kind(
                "handle",
                handle,
                allowed=f"a {kind.__name__}: what the dispatch of the same mode returned",
                remedy="pass the handle as it is",
            )
        if handle.session is not self:
            raise OrderError(
                "the handle comes from another Buffer",
                field="handle",
                value="of another Buffer",
                allowed="handles of this Buffer",
                remedy="combine with the Buffer that dispatched",
            )
        return handle

    def rounds(self, cfg: EPConfig, sets: Sequence[GraphSet], shrink: bool = False) -> Rounds:
        """The rounds of a config, with these graphs. The first call makes them, together with all ranks.

        Args:
            cfg: The config.
            sets: The graphs.
            shrink: Whether they leave out masked ranks, if there are masks.

        Raises:
            ConfigMismatchError, OrderError, PeerTimeoutError, EPError: See `Rounds.make`.
        """
        key = cfg, tuple(sets)
        if key not in self._rounds:
            made = Rounds.make(self.group, self.board, self.device, cfg, sets, self.make_timeout_s)
            if shrink and self.masks is not None:
                made.shrink(self.masks)
            self._rounds[key] = made
        return self._rounds[key]

    def made(self) -> list[Rounds]:
        """All rounds so far, in the order in which all ranks made them."""
        return list(self._rounds.values())

    def announcing(self, rounds: Rounds, tokens: int, error: TooMany) -> Explaining:
        """Around a dispatch: tokens over the maximum are a `CapacityError` on all ranks, whichever has them.

        The engine refuses such a dispatch on the rank that has them, and says to all peers that this round has failed;
        the note that it left says why. Where nobody has too many, nothing is asked or sent.

        Args:
            rounds: Whose dispatch it is.
            tokens: T of this rank.
            error: The error, of a config, a rank and its T.
        """
        rounds.too_many = error
        if tokens > rounds.cfg.max_tokens_per_rank:
            self.board.leave(rounds.name, str(tokens))
        return Explaining(self, rounds)

    def explaining(self, rounds: Rounds) -> Explaining:
        """Around whatever may raise a failure of rounds: say it in the words of a Buffer."""
        return Explaining(self, rounds)

    def notes(self, rounds: Rounds, raised: EPError) -> dict[int, str]:
        """What ranks have left to explain a failure: the tokens of those that had too many."""
        failed = isinstance(raised, ShapeError) or getattr(raised, "peer_failed", False)
        if not failed or rounds.too_many is None:
            return {}
        masked = [] if self.masks is None else self.masks.tolist()
        with suppress(PeerLostError):  # then nobody can say why
            return {r: note for r, note in self.board.notes(rounds.name).items() if not (masked and masked[r])}
        return {}

    def check(self) -> None:
        """Wait for all rounds, and raise what failed in them."""
        self._check_may_wait()
        for rounds in self.made():
            with self.explaining(rounds):
                rounds.check()

    def window(self, dtype: torch.dtype, size: Sequence[int] | None, offset: int, low_latency: bool) -> torch.Tensor:
        """See `Buffer.get_local_buffer_tensor`."""
        layout = "expert_padded" if low_latency else "rank"
        found = [rounds for (cfg, _), rounds in self._rounds.items() if cfg.output_layout == layout]
        if not found:
            raise OrderError(
                "there are no windows yet",
                field="use_rdma_buffer",
                value=low_latency,
                allowed="after the first round of that mode",
                remedy="dispatch first",
            )
        memory = max((rounds.window() for rounds in found), key=torch.Tensor.numel)
        flat = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]
        if size is None:
            return flat
        sizes = [size] if isinstance(size, int) else list(size)
        size = [check_int("size", n, 0, LARGEST_BYTES) for n in sizes]
        wanted = math.prod(size)
        if wanted > flat.numel():
            raise ShapeError(
                field="size",
                value=list(size),
                allowed=f"up to {flat.numel()} elements behind offset {offset}",
                remedy="ask for less",
            )
        return flat[:wanted].view(*size)

    def reset(self) -> None:
        """Let all rounds work again after a failure. All ranks call it."""
        self.live()
        self._check_may_wait()
        for rounds in self.made():
            with self.explaining(rounds):
                rounds.reset()
            self.board.take_back(rounds.name)  # all ranks are past the failure: their resets began
        if self.masks is not None:
            with self.queue.launching():
                self.masks.zero_()  # all ranks are here

    def _check_may_wait(self) -> None:
        check_not_capturing(self.device, "the host cannot wait for rounds", "end the capture first")

    def destroy(self) -> None:
        """Give up all windows. Can be called again."""
        self.destroyed = True
        made, self._rounds = self.made(), {}
        with ExitStack() as all_of_them:  # each, also where one raises
            for rounds in made:
                all_of_them.callback(rounds.destroy)
