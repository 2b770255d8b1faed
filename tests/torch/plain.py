"""What a `Buffer` has to give, in plain torch: every rank's inputs from a seed, and an all-to-all by index.

Every process draws the inputs of all ranks, so that it knows what must arrive without asking anybody. Tensors are made
on the default device: the host, or the GPU of a process that has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ep_mojo.torch as ept


def generator(seed: int) -> torch.Generator:
    """Of random numbers, where tensors are made: processes with a GPU have set the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def from_numpy(array) -> torch.Tensor:
    """An array as a tensor where tensors are made."""
    return torch.from_numpy(array).to(torch.get_default_device())


def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Raise unless both are equal bit for bit; says where they differ first."""
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, not {want.dtype}"
    assert got.shape == want.shape, f"{name}: {list(got.shape)}, not {list(want.shape)}"
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differ = (got.contiguous().view(words) != want.contiguous().view(words)).nonzero()
    if len(differ):
        at = tuple(differ[0].tolist())
        raise AssertionError(f"{name}: {len(differ)} differ, first at {at}: {got[at]}, not {want[at]}")


@dataclass
class Step:
    """Inputs of all ranks for one round.

    Attributes:
        n_experts: E.
        x: bfloat16 [T, H] a rank.
        ids: int64 [T, K] a rank.
        weights: float32 [T, K] a rank.
    """

    n_experts: int
    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]

    @property
    def n_ranks(self) -> int:
        return len(self.x)

    @property
    def n_local(self) -> int:
        return self.n_experts // self.n_ranks

    def local(self, rank: int, source: int) -> torch.Tensor:
        """int64 [T, K]: local ids on `rank` of the choices of `source`, -1 elsewhere."""
        ids = self.ids[source]
        here = (ids >= rank * self.n_local) & (ids < (rank + 1) * self.n_local)
        return torch.where(here, ids - rank * self.n_local, -1)


def draw(seed: int, sizes: list[int], hidden: int, top_k: int, n_experts: int, kind: str = "mixed") -> Step:
    """Inputs for a round.

    Args:
        seed: Of everything.
        sizes: T of each rank.
        hidden, top_k, n_experts: H, K, E.
        kind: "mixed": some choices are none, some name an expert twice; "none": all are -1; "one": all name expert 0.
    """
    g = generator(seed)
    x = [torch.randn(t, hidden, generator=g).to(torch.bfloat16) for t in sizes]
    ids = [torch.randint(0, n_experts, (t, top_k), generator=g) for t in sizes]
    weights = [torch.rand(t, top_k, generator=g) for t in sizes]
    for each in ids:
        if kind == "none":
            each.fill_(-1)
        elif kind == "one":
            each.zero_()
        else:
            each[torch.rand(each.shape, generator=g) < 0.2] = -1
            each[::5] = each[::5, :1]
            each[3::7] = -1
    return Step(n_experts, x, ids, weights)


def rows(step: Step, rank: int, source: int) -> torch.Tensor:
    """Tokens of `source` that have an expert on `rank`."""
    return (step.local(rank, source) >= 0).any(1).nonzero().flatten()


def received(step: Step, rank: int, values: list[torch.Tensor] | None = None) -> torch.Tensor:
    """`values` (None: x) of all tokens that `rank` receives, in its rows of normal mode."""
    values = step.x if values is None else values
    return torch.cat([values[s][rows(step, rank, s)] for s in range(step.n_ranks)])


def local_choices(step: Step, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Local ids int64 [N, K] and weights float32 [N, K] of the same rows."""
    locals_ = [step.local(rank, s) for s in range(step.n_ranks)]
    ids = received(step, rank, locals_)
    weights = received(step, rank, step.weights)
    return ids, torch.where(ids >= 0, weights, 0)


def reduced(step: Step, source: int, outputs: list[torch.Tensor], biases: tuple = ()) -> torch.Tensor:
    """float32 sums of the rows that ranks hold of the tokens of `source`: biases, then ranks ascending.

    Args:
        step: The round.
        source: Whose tokens.
        outputs: [N, C] a rank, in the rows of normal mode.
        biases: [T, C] each.
    """
    total = torch.zeros(step.x[source].shape[0], outputs[0].shape[1])
    for bias in biases:
        total += bias.float()
    for rank, y in enumerate(outputs):
        before = sum(len(rows(step, rank, s)) for s in range(source))
        mine = rows(step, rank, source)
        total[mine] += y[before : before + len(mine)].float()
    return total


def outputs(step: Step, seed: int, dtype: torch.dtype = torch.bfloat16, width: int | None = None) -> list[torch.Tensor]:
    """Some expert output [N, H] for each rank."""
    g = generator(seed)
    width = step.x[0].shape[1] if width is None else width
    return [torch.randn(len(received(step, r)), width, generator=g).to(dtype) for r in range(step.n_ranks)]


def layout(buffer: ept.Buffer, step: Step) -> dict[str, torch.Tensor]:
    """What `dispatch` takes from `get_dispatch_layout`."""
    return layout_of(buffer, step.ids[buffer.rank], step.n_experts)


def layout_of(buffer: ept.Buffer, ids: torch.Tensor, n_experts: int) -> dict[str, torch.Tensor]:
    """`layout` of these choices."""
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, n_experts)
    return {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
