"""What processes run for the tests of the Megatron-Core adapter. Each call checks its own rank.

Megatron-Core 0.16 on a machine without GPUs and without Transformer Engine: its router's gate needs either, so tests
give another router; its own dispatcher asks for the current GPU to make tensors on, and is told "cpu".
"""

from __future__ import annotations

import contextlib
import functools
import math
from types import SimpleNamespace
from unittest import mock

import ep_mojo_megatron as adapter
import pytest
import torch
import torch.distributed as dist
from ep_mojo_megatron import EPMojoMoELayer, EPMojoTokenDispatcher, allocate_buffers, choices_of_map, with_ep_mojo
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

import ep_mojo.torch as ept
from ep_mojo import errors
from tests.torch import plain

HIDDEN, WIDTH, EXPERTS, TOPK, TMAX = 64, 96, 8, 3, 32
V, EQUAL = ept.AllGatherVDispatcher, ept.AllGatherDispatcher
KINDS = {"any": V, "equal": EQUAL}
TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
AGAINST_MEGATRON = 2**-6
"""Of the largest element. Megatron-Core adds up to three local rows in bfloat16, which rounds partial sums twice, each
time by 2^-9 of what may be larger than the result; ours are float32."""
AGAINST_DENSE = 0.01
"""Of the norm: rows within an expert are rounded to bfloat16 (2^-9) three times, and twice more on the way back."""


class Router(TopKRouter):
    """With a gate that runs anywhere."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """float32 [..., E]."""
        return torch.nn.functional.linear(input.float(), self.weight.float())


def begin(ep: int) -> None:
    """Groups of Megatron-Core with `ep` ranks for experts."""
    V._delete_buffers()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)


def config(**more) -> TransformerConfig:
    """Of a small layer of gated experts in bfloat16."""
    ep = parallel_state.get_expert_model_parallel_world_size()
    fixed = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": WIDTH,
        "moe_ffn_hidden_size": WIDTH,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": ep,
        "use_cpu_initialization": True,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    if more.get("moe_router_topk") == 1:
        fixed["moe_router_pre_softmax"] = True
    return TransformerConfig(**(fixed | more))


def moe_spec():
    """Megatron-Core's spec of an MoE layer, with our router."""
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    moe_submodules(spec).router = Router
    return spec


def moe_submodules(spec):
    """Of a `ModuleSpec`, or of a partial call as in newer versions."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def weights() -> SimpleNamespace:
    """Of the router and of all experts, bfloat16: rows of about the size of what comes in."""
    g = plain.generator(7)
    fc1 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=g) / math.sqrt(HIDDEN) * 2
    fc2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=g) / math.sqrt(WIDTH)
    router = torch.randn(EXPERTS, HIDDEN, generator=g) / math.sqrt(HIDDEN)
    return SimpleNamespace(fc1=fc1.bfloat16(), fc2=fc2.bfloat16(), router=router.bfloat16())


def make(cfg: TransformerConfig, spec) -> MoELayer:
    """The layer that a spec describes, with `weights`."""
    layer, w = spec(config=cfg), weights()
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(w.router)
        for e, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
            expert.linear_fc1.weight.copy_(w.fc1[e])
            expert.linear_fc2.weight.copy_(w.fc2[e])
    return layer.eval()


def ours(cfg: TransformerConfig, kind: str = "any", reduce_dtype: str = "bfloat16") -> MoELayer:
    """A layer over our dispatchers, and buffers for it."""
    layer = make(cfg, with_ep_mojo(moe_spec(), dispatcher=KINDS[kind]))
    assert isinstance(layer, EPMojoMoELayer)
    assert isinstance(layer.token_dispatcher, EPMojoTokenDispatcher)
    ept.AllGatherDispatcherBase.reduce_dtype = TYPES[reduce_dtype]
    try:
        allocate_buffers(cfg, TMAX)
    finally:
        ept.AllGatherDispatcherBase.reduce_dtype = torch.bfloat16
    return layer


def tokens(seed: int, length: int, batch: int = 2) -> torch.Tensor:
    """bfloat16 [length, batch, H], others on each rank."""
    g = plain.generator(100 * seed + dist.get_rank())
    return torch.randn(length, batch, HIDDEN, generator=g).bfloat16()


def dense(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """float32: every expert for every token, times its probability."""
    w, flat = weights(), x.reshape(-1, HIDDEN).float()
    probs, _ = layer.router(x)
    total = torch.zeros_like(flat)
    for e in range(EXPERTS):
        gate, up = (flat @ w.fc1[e].float().T).chunk(2, 1)
        total += probs[:, e : e + 1] * ((torch.nn.functional.silu(gate) * up) @ w.fc2[e].float().T)
    return total.view(x.shape)


@torch.no_grad()
def check_like_megatron(kind: str, topk: int, reduce_dtype: str) -> None:
    """The same layer with Megatron-Core's own dispatcher: equal, bit for bit where nothing is added up."""
    cfg = config(moe_router_topk=topk)
    layer, other = ours(cfg, kind, reduce_dtype), make(cfg, moe_spec())
    assert type(other) is MoELayer
    for step in range(3):
        x = tokens(step, 4 + step)
        got, bias = layer(x)
        with mock.patch("torch.cuda.current_device", return_value="cpu"):
            want, _ = other(x)
        assert bias is None
        if topk == 1:
            plain.same("output", got, want)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        error = (got.float() - want.float()).abs().max()
        assert error <= AGAINST_MEGATRON * want.abs().max(), float(error / want.abs().max())


def check_counts(kind: str, lengths: list[list[int]], probs: str | None = "fp32", inference: bool = True) -> None:
    """Any numbers of tokens, two layers in turn, against a dense computation."""
    cfg = config(moe_router_dtype=probs)
    layers = ours(cfg, kind), make(cfg, with_ep_mojo(moe_spec(), dispatcher=KINDS[kind]))
    mode = torch.inference_mode if inference else torch.no_grad
    me = parallel_state.get_expert_model_parallel_rank()
    for step, now in enumerate(lengths):
        x = tokens(10 + step, now[me])
        for layer in layers:
            with mode():
                got, _ = layer(x)
                want = dense(layer, x)
            assert got.dtype == torch.bfloat16
            assert got.shape == x.shape
            error = (got.float() - want).norm() / want.norm().clamp(min=1e-6)
            assert error <= AGAINST_DENSE, (step, now, float(error))


@torch.no_grad()
def check_shared_experts() -> None:
    """Run by the layer, or beside the step by the dispatcher."""
    cfg = config(moe_shared_expert_intermediate_size=WIDTH)
    torch.manual_seed(3)  # Megatron-Core draws the shared expert
    layer = ours(cfg)
    x = tokens(5, 6)
    routed = dense(layer, x)
    want = routed + layer.shared_experts(x).float()
    got, _ = layer(x)
    assert (got.float() - want).norm() <= AGAINST_DENSE * want.norm()
    beside = make(config(), with_ep_mojo(moe_spec()))
    beside.config.moe_shared_expert_overlap = True  # the config itself wants another dispatcher for it
    beside.token_dispatcher.set_shared_experts(lambda rows: 2 * rows)
    want = routed + 2 * x.float()
    got, _ = beside(x)
    assert (got.float() - want).norm() <= AGAINST_DENSE * want.norm()


@torch.no_grad()
def check_transformer_layer() -> None:
    """A transformer layer whose spec was replaced runs through our dispatcher."""
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    moe_submodules(spec.submodules.mlp).router = Router
    replaced = with_ep_mojo(spec)
    cfg = config(attention_dropout=0.0, hidden_dropout=0.0)
    layers = []
    for each in (spec, replaced):
        torch.manual_seed(1 + dist.get_rank())
        layers.append(each.module(cfg, each.submodules).eval())
    assert [type(layer.mlp) for layer in layers] == [MoELayer, EPMojoMoELayer]
    layers[1].load_state_dict(layers[0].state_dict())
    allocate_buffers(cfg, TMAX)
    dice = mock.Mock(fork=contextlib.nullcontext)  # attention asks for the GPU's, of which dropout has no need here
    with (
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch("megatron.core.tensor_parallel.get_cuda_rng_tracker", return_value=dice),
    ):
        mask = torch.ones(5, 5).triu(1).bool()[None, None]
        want, got = (layer(tokens(1, 5), attention_mask=mask)[0].float() for layer in layers)
    assert (got - want).abs().max() <= AGAINST_MEGATRON * want.abs().max()


class IdExperts(torch.nn.Module):
    """Experts of one weight each that take gathered rows with ids, as Megatron-Core's for inference do."""

    def __init__(self, num_local_experts, config, pg_collection=None, name=None):
        super().__init__()
        self.first, self.last = ((pg_collection.ep.rank() + i) * num_local_experts for i in (0, 1))

    def forward(self, hidden, tokens_per_expert, probs, routing_map):
        """hidden [n, H] times (id + 1) * probability, summed over the choices of a local expert."""
        assert tokens_per_expert is None
        valid = int(adapter.InferenceAllGatherDispatcherBase._valid_tokens())
        assert valid == int(V._valid_tokens())
        here = (routing_map >= self.first) & (routing_map < self.last)
        scale = torch.where(here, (routing_map + 1) * probs, 0).sum(1, keepdim=True)
        out = hidden.float() * scale
        out[valid:] = float("nan")
        return out, None


@torch.no_grad()
def check_inference_mode() -> None:
    """Newer versions: in an engine ids go to experts for inference, else Megatron-Core's own dispatcher works."""
    from megatron.core.inference.utils import InferenceMode

    spec = with_ep_mojo(moe_spec())
    spec.keywords["submodules"].router, spec.keywords["submodules"].experts = IdRouter, IdExperts
    cfg = config(normalization="RMSNorm")
    cfg.transformer_impl, cfg.inference_moe_token_dispatcher_type = "inference_optimized", "nccl"
    layer = spec(config=cfg).eval()
    layer.router.weight.copy_(weights().router)
    allocate_buffers(cfg, TMAX)
    me = parallel_state.get_expert_model_parallel_rank()
    with InferenceMode.active():
        for step, now in enumerate(([3, 5], [0, 4], [8, 8])):
            x = tokens(step, now[me], 1)
            got, _ = layer(x)
            probs, ids = layer.router(x)
            want = x.float() * ((ids + 1) * probs).sum(1)[:, None, None]
            assert (got.float() - want).norm() <= AGAINST_DENSE * want.norm() + 1e-6
    assert type(layer.token_dispatcher) is EPMojoTokenDispatcher
    assert type(layer._training_token_dispatcher) is not EPMojoTokenDispatcher


class IdRouter(Router):
    """Gives ids, as the router for inference does."""

    def forward(self, input, padding_mask=None):
        """float32 and int64 [T, K]."""
        probs, routing_map = super().forward(input, padding_mask)
        ids, probs = choices_of_map(routing_map, probs, TOPK)
        return probs, ids


@torch.no_grad()
def check_ids() -> None:
    """A router that gives top-k ids: experts get the gathered rows as they are, with the ids."""
    cfg = config()
    ours(cfg)
    n, me = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
    local = EXPERTS // n
    d = EPMojoTokenDispatcher(local, list(range(local * me, local * (me + 1))), cfg, get_default_pg_collection())
    counts = [3 + 2 * r for r in range(n)]
    g = plain.generator(1)
    x, ids = ([torch.randn(t, 1, HIDDEN, generator=g).bfloat16() for t in counts],
              [torch.randint(0, EXPERTS, (t, TOPK), generator=g) for t in counts])  # fmt: skip
    probs = [torch.rand(t, TOPK, generator=g) for t in counts]
    rows = d.token_dispatch(*d.dispatch_preprocess(x[me], ids[me], probs[me]))
    hidden, none, given = d.dispatch_postprocess(*rows)
    assert none is None
    plain.same("hidden", hidden[: sum(counts)], torch.cat(x).view(-1, HIDDEN))
    plain.same("ids", d.routing_map[: sum(counts)], torch.cat(ids))
    plain.same("probs", given[: sum(counts)], torch.cat(probs))
    out = d.combine_postprocess(d.token_combine(d.combine_preprocess(hidden)))
    plain.same("sum over ranks", out, (x[me].float() * n).bfloat16())


def check_choices() -> None:
    """`choices_of_map` against a loop; rows with fewer than K, with none, with more."""
    g = plain.generator(2)
    routing_map = torch.rand(40, EXPERTS, generator=g) < 0.3
    routing_map[0], routing_map[1] = False, True
    probs = torch.rand(40, EXPERTS, generator=g).bfloat16()
    ids, weights_of = choices_of_map(routing_map, probs, TOPK)
    for t in range(40):
        there = routing_map[t].nonzero().flatten().tolist()[:TOPK]
        missing = TOPK - len(there)
        assert ids[t].tolist() == there + [-1] * missing
        assert weights_of[t].tolist() == [float(probs[t, e]) for e in there] + [0.0] * missing


def refused(error: type, match: str, call, *args, **how) -> None:
    """`call` raises this error, and nothing else."""
    with pytest.raises(errors.EPError, match=match) as found:
        call(*args, **how)
    assert type(found.value) is error, repr(found.value)


def check_settings_refused() -> None:
    """What the dispatcher cannot do is named when the layer is made."""
    spec = with_ep_mojo(moe_spec())
    for name, value in {
        "sequence_parallel": True,
        "moe_expert_capacity_factor": 1.5,
        "moe_pad_expert_input_to_capacity": True,
        "moe_token_dropping": True,
        "moe_router_padding_for_quantization": True,
    }.items():
        cfg = config()
        setattr(cfg, name, value)  # behind the back of the config, which has rules of its own for some
        refused(errors.UnsupportedError, name, spec, config=cfg)
    cfg = config()
    cfg.moe_router_dtype = "fp64"
    refused(errors.DTypeError, "moe_router_dtype", spec, config=cfg)
    cfg = config()
    cfg.cuda_graph_scope = ["moe_router", "moe_preprocess"]
    refused(errors.UnsupportedError, "moe_preprocess", spec, config=cfg)
    groups = get_default_pg_collection()
    for name in ("tp", "expt_tp"):
        whole = dist.group.WORLD
        with mock.patch.object(groups, name, whole):
            refused(errors.UnsupportedError, f"group {name}", spec, config=config(), pg_collection=groups)
    refused(errors.ConfigError, "MoELayer", with_ep_mojo, get_gpt_layer_local_spec())


def check_steps_refused() -> None:
    """What is wrong in a step is named; the next one is right."""
    layer = make(config(), with_ep_mojo(moe_spec()))
    x = tokens(1, 4)
    V._delete_buffers()
    with torch.no_grad():
        refused(errors.OrderError, "allocate_buffers", layer, x)
    layer = ours(config())
    refused(errors.UnsupportedError, "gradient", layer, x)
    refused(errors.UnsupportedError, "gradient", layer.train(), x)
    layer.eval()
    d, t = layer.token_dispatcher, 8
    routing_map = torch.zeros(t, EXPERTS, dtype=torch.bool)
    with torch.no_grad():
        refused(errors.ShapeError, "routing_map", d.dispatch_preprocess, x, routing_map[1:], torch.rand(t, EXPERTS))
        refused(errors.ShapeError, "probs", d.dispatch_preprocess, x, routing_map, torch.rand(t, 2))
        double = torch.rand(t, EXPERTS).double()
        refused(errors.DTypeError, "probs", d.dispatch_preprocess, x, routing_map, double)
        refused(errors.DTypeError, "hidden_states", layer, x.float())
        refused(errors.CapacityError, "tokens", layer, tokens(1, TMAX))
        routing_map[:, : TOPK + 1] = True  # on all ranks, so that none waits for another
        rows = d.token_dispatch(*d.dispatch_preprocess(x, routing_map, torch.rand(t, EXPERTS)))
        refused(errors.ShapeError, "moe_router_topk", d.dispatch_postprocess, *rows)
        V.reset()
        x = tokens(2, 4)
        assert (layer(x)[0].float() - dense(layer, x)).norm() <= AGAINST_DENSE * x.float().norm() * 4


@torch.no_grad()
def check_unequal_refused() -> None:
    """The dispatcher for equal counts says so where they are not; with `_use_allgather_v` it takes them."""
    layer = ours(config(), "equal")
    me = parallel_state.get_expert_model_parallel_rank()
    refused(errors.ShapeError, "different numbers of tokens", layer, tokens(1, 4 + me))
    V.reset()
    EQUAL._use_allgather_v = True
    try:
        x = tokens(2, 4 + me)
        want = dense(layer, x)
        assert (layer(x)[0].float() - want).norm() <= AGAINST_DENSE * want.norm()
    finally:
        EQUAL._use_allgather_v = False
