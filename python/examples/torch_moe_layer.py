#!/usr/bin/env python3
"""A Mixture-of-Experts layer in PyTorch, experts spread over the ranks of a process group, checked against a dense one.

    torchrun --nproc-per-node 4 python/examples/torch_moe_layer.py
    torchrun --nproc-per-node 2 python/examples/torch_moe_layer.py --train

Every rank has its own tokens and its own experts; `Buffer.dispatch` brings tokens to experts, `Buffer.combine` brings
what they give back. On a GPU for each rank where there are as many, else (or with --cpu) on the CPU. The check computes
every expert for every token, on every rank, which is what the layer is there to avoid.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import silu

import ep_mojo.torch as ept

TOLERANCE = 0.01
"""Relative: what travels is rounded to bfloat16, 8 bits, once on the way out and once for each rank on the way back."""


class MoELayer(nn.Module):
    """Router, experts of this rank (each a gated FFN), and the buffer between the ranks."""

    def __init__(self, buffer: ept.Buffer, hidden: int, width: int, n_experts: int, top_k: int):
        super().__init__()
        self.buffer, self.n_experts, self.top_k = buffer, n_experts, top_k
        self.n_local = n_experts // buffer.group_size
        # All ranks draw all experts and keep their own, so that the check knows the others.
        g = generator(0)
        gate, up, down = (torch.randn(n_experts, *s, generator=g) / s[0] ** 0.5 for s in
                          ((hidden, width), (hidden, width), (width, hidden)))  # fmt: skip
        own = slice(buffer.rank * self.n_local, (buffer.rank + 1) * self.n_local)
        self.gate, self.up, self.down = (nn.Parameter(w[own].clone()) for w in (gate, up, down))
        self.router = nn.Parameter(torch.randn(hidden, n_experts, generator=g) / hidden**0.5)
        self.everything = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(torch.softmax(x.float() @ self.router, 1), self.top_k)
        rows, local_ids, row_weights, _, handle = ept.autograd.dispatch(self.buffer, x, ids, weights, self.n_experts)
        y = torch.zeros_like(rows, dtype=torch.float32)
        for e in range(self.n_local):
            here, k = torch.nonzero(local_ids == e, as_tuple=True)
            out = ffn(rows[here].float(), self.gate[e], self.up[e], self.down[e])
            y = y.index_add(0, here, row_weights[here, k, None] * out)
        return ept.autograd.combine(self.buffer, y.to(torch.bfloat16), handle)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """The same by computing every expert for every token."""
        weights, ids = torch.topk(torch.softmax(x.float() @ self.router, 1), self.top_k)
        per_expert = torch.zeros(len(x), self.n_experts).scatter_add(1, ids, weights)
        outputs = torch.stack([ffn(x.float(), *(w[e] for w in self.everything)) for e in range(self.n_experts)], 1)
        return (per_expert[:, :, None] * outputs).sum(1)


def generator(seed: int) -> torch.Generator:
    """Of random numbers on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def ffn(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A gated feed-forward network."""
    return (silu(x @ gate) * (x @ up)) @ down


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, by the norms."""
    return float((got.float() - want).norm() / want.norm().clamp_min(1e-6))


def main() -> None:
    """Run the layer, compare, and with --train the gradients as well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="of rank 0; each further rank has 5 fewer")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--width", type=int, default=128, help="of an expert")
    parser.add_argument("--experts", type=int, default=8, help="of each rank")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="also compare the gradients of tokens and router")
    parser.add_argument("--cpu", action="store_true", help="also where there are GPUs")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("a process for each rank: torchrun --nproc-per-node 2 python/examples/torch_moe_layer.py")

    on_gpus = not args.cpu and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_default_device("cuda")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    # The hint is for 8192 tokens a rank, which is more than there are here.
    room = ept.Config().get_nvl_buffer_size_hint(2 * args.hidden, n_ranks)
    buffer = ept.Buffer(dist.group.WORLD, num_nvl_bytes=room * min(args.tokens + 64, 8192) // 8192)
    layer = MoELayer(buffer, args.hidden, args.width, args.experts * n_ranks, args.top_k)

    n_tokens = max(args.tokens - 5 * rank, 0)
    x = torch.randn(n_tokens, args.hidden, generator=generator(rank + 1)).to(torch.bfloat16)
    x.requires_grad_(args.train)
    out = layer(x)
    want = layer.dense(x)
    found = {"output": difference(out.detach(), want.detach())}
    if args.train:
        (out.float() ** 2).sum().backward()
        got = x.grad.clone(), layer.router.grad.clone()
        x.grad = layer.router.grad = None
        (want**2).sum().backward()
        found |= {"gradient of x": difference(got[0], x.grad.float())}
        found |= {"gradient of the router": difference(got[1], layer.router.grad)}
    buffer.destroy()
    dist.barrier()
    dist.destroy_process_group()
    text = ", ".join(f"{name} {value:.2g}" for name, value in found.items())
    print(f"rank {rank}: {n_tokens} tokens; relative difference from the dense layer: {text}")
    if max(found.values()) > TOLERANCE:
        raise SystemExit(f"rank {rank}: more than rounding explains")


if __name__ == "__main__":
    main()
