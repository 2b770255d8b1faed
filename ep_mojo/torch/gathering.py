"""All-gather-v and reduce-scatter-v: every token goes to every rank, and every rank gives a row for every token.

The engine's layout "gathered". Rows come by source rank, then token, without gaps, and with them what each token has
chosen; what comes back is added up in float32, ranks ascending, and rounded once. Counts of ranks may differ, and
change from round to round; they stay on the device. R ranks, Tmax tokens of a rank at most, T tokens of this one, H
channels, K choices of a token, N = R*Tmax rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..comm.board import Board
from ..config import EPConfig
from ..errors import CapacityError, OrderError
from ..formats import BF16
from ..layout import MAX_EXPERTS
from .checks import check_tensor
from .graphs import CombineSet, DispatchSet, GraphSet
from .rounds import Rounds
from .session import InWords
from .tensors import Received, dense, part

IN_WORDS = InWords(
    (
        ("call comm.reset() on all ranks", "call reset() of the dispatchers on all ranks"),
        ("comm.check()", "check() of the dispatchers"),
        ("destroy() this communicator", "call allocate_buffers again"),
        ("and one over that", "over that"),
        ("raise timeout_s", "raise timeout_s of the dispatchers before allocate_buffers"),
    )
)
"""What the engine says, and what the same is for who has dispatchers."""


def most_experts(n_ranks: int) -> int:
    """Experts that choices may name: those from it on travel as -1."""
    return MAX_EXPERTS // n_ranks * n_ranks


class Gathering:
    """Gathers rows of one width, into tensors that stay where they are, and reduces rows of that width.

    Attributes:
        rows: bfloat16 [N, H], what was gathered.
        offsets: int32 [R + 1], the first row of each rank, and one past the last.
        counts: int32 [R], tokens of each rank.
        ids, weights: int32 and float32 [N, K], what the tokens have chosen; -1 and 0 behind the last one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        board: Board,
        device: torch.device,
        cfg: EPConfig,
        make_timeout_s: float,
        reduced: torch.dtype | None = None,
        more: Sequence[GraphSet] = (),
    ):
        """All ranks of the group call this, with equal configs.

        Args:
            group, board, device: Whose, and where tensors are.
            cfg: From `gather_config`.
            make_timeout_s: The longest wait for a peer here.
            reduced: Type of the rows that are reduced, bfloat16 or float32; None: nothing is going to be.
            more: Graphs of others, to be compiled together with these.

        Raises:
            ConfigMismatchError: Ranks pass different ones; on all of them.
            PeerTimeoutError, PeerLostError: A rank did not come, or is gone.
        """
        self._cfg = cfg
        self._dispatch = gather_graph(cfg.hidden_size)
        self._combine = reduce_graph(cfg.hidden_size, cfg.combine_dtype)
        sets: list[GraphSet] = [self._dispatch, *([self._combine] if reduced is not None else []), *more]
        self._rounds = Rounds.make(group, board, device, self._cfg, sets, make_timeout_s)
        self._device, self._reduced = device, reduced
        self._received = Received.empty(self._cfg, device)
        self._choices: torch.Tensor | None = None
        self.rows = self._received.tokens
        parts = functools.partial(part, self._received.memory, cfg=self._cfg)
        self.offsets, self.counts = parts("row_offsets"), parts("counts")
        self.ids, self.weights = parts("local_ids"), parts("local_weights")
        self._own_count = self.counts[group.rank() : group.rank() + 1]

    def gather(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        count: torch.Tensor | None = None,
    ) -> None:
        """Fill `rows`, `ids`, `weights`, `offsets` and `counts`. All ranks call this; the host waits for nothing.

        Args:
            x: bfloat16 [T, H].
            ids: int64 [T, K], unless K = 0.
            weights: float32 [T, K], unless K = 0.
            count: int32 [1], from 0 to T: rows of x from there on are padding; None: none is.

        Raises:
            CapacityError: T > Tmax. Nothing was sent.
            DTypeError, ShapeError, DeviceError: x, ids or weights are not such tensors. Nothing was sent.
            PeerTimeoutError, PeerLostError: A rank did not come in time, or failed; or is gone. With GPUs later.
        """
        self.check_rows("x", x)
        shape = [x.shape[0], self._cfg.top_k]
        if self._cfg.top_k:
            check_tensor("ids", ids, [torch.int64], shape, self._device)
            check_tensor("weights", weights, [torch.float32], shape, self._device)
        else:
            ids = weights = None
        if count is not None:
            check_tensor("count", count, [torch.int32], [1], self._device)
        self._choices = torch.empty(shape, dtype=torch.int64, device=self._device) if ids is None else dense(ids)
        given = dense(x), None, self._choices, None if weights is None else dense(weights), count
        self._run(self._dispatch, "dispatch", *self._received, *given)

    def check_rows(self, name: str, x: torch.Tensor) -> None:
        """Raise unless `x`, an argument of that name, can be gathered.

        Raises:
            CapacityError: T > Tmax.
            DTypeError, ShapeError, DeviceError: Not bfloat16 [T, H] where it has to be.
        """
        check_tensor(name, x, [torch.bfloat16], [None, self._cfg.hidden_size], self._device)
        if x.shape[0] > self._cfg.max_tokens_per_rank:
            raise CapacityError(
                "the buffers have no room for these tokens",
                field="tokens of this rank",
                value=x.shape[0],
                allowed=f"up to {self._cfg.max_tokens_per_rank}",
                remedy="allocate_buffers for as many on all ranks",
            )

    def reduce(self, rows: torch.Tensor) -> torch.Tensor:
        """Send row i of every rank back to where row i of the last gather came from, and add up. All ranks call this.

        Args:
            rows: [n, H] in the type given to `__init__`, n at least as many as were gathered.

        Returns:
            bfloat16 [T, H]; 0 where a row was padding.

        Raises:
            OrderError: Nothing has been gathered.
            DTypeError, ShapeError, DeviceError: Not such a tensor. Nothing was sent.
            PeerTimeoutError, PeerLostError: See `gather`.
        """
        if self._choices is None:
            raise OrderError("nothing has been gathered", allowed="after token_dispatch", remedy="call that first")
        check_tensor("hidden_states", rows, [self._reduced], [None, self._cfg.hidden_size], self._device)
        shape = self._choices.shape[0], self._cfg.hidden_size
        summed = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        given = dense(rows), self._received.memory, self._choices, None, None, None, self._own_count
        self._run(self._combine, "combine", summed, *given)
        return summed

    def _run(self, graphs: GraphSet, stage: str, *tensors: torch.Tensor | None) -> None:
        with IN_WORDS:
            self._rounds.run(graphs, stage, *tensors)

    def check(self) -> None:
        """Wait for all rounds, and raise what failed in them."""
        with IN_WORDS:
            self._rounds.check()

    def reset(self) -> None:
        """Go on after a failure. All ranks call this."""
        with IN_WORDS:
            self._rounds.reset()

    def destroy(self) -> None:
        """Give up the windows."""
        self._rounds.destroy()


def gather_config(
    n_ranks: int, tmax: int, hidden: int, top_k: int, timeout_s: float, reduced: torch.dtype | None = None
) -> EPConfig:
    """The engine's config of a `Gathering`; top_k 0 = rows travel alone.

    Raises:
        ConfigError: A number is out of range.
    """
    return EPConfig(
        hidden_size=hidden,
        top_k=top_k,
        n_experts=most_experts(n_ranks),
        max_tokens_per_rank=tmax,
        n_ranks=n_ranks,
        output_layout="gathered",
        reduce="expert",
        num_buffers=2,  # a round begins before its peers have ended the one before
        tokens_per_signal=1,
        combine_dtype="float32" if reduced == torch.float32 else "bfloat16",
        output_dtype="bfloat16",
        timeout_s=timeout_s,
    )


def gather_graph(hidden: int) -> DispatchSet:
    """What gathers rows of H channels."""
    return DispatchSet(hidden, "gathered", BF16(), False, False)


def reduce_graph(hidden: int, dtype: str) -> CombineSet:
    """What reduces rows of H channels, of type "bfloat16" or "float32"."""
    return CombineSet(hidden, "gathered", "expert", dtype)
