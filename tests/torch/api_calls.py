"""What processes run for the tests of the package's own interface, of torch.compile and of gradients."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist

import ep_mojo as ep
import ep_mojo.torch as ept
from ep_mojo import errors, reference
from ep_mojo.handle import HANDLE_TENSORS
from ep_mojo.reference.compare import handle_differences
from tests.torch import buffers, plain
from tests.torch.buffer_calls import raises
from tests.torch.buffers import HIDDEN, TMAX, TOP_K
from tests.torch.launch import kept


def communicator(n: int, name: str) -> ep.Communicator:
    if ("comm", n, name) not in kept:
        cfg, device = buffers.api_config(n, name), torch.get_default_device()
        kept["comm", n, name] = ep.Communicator.process_group(cfg, kept["group", n], device=device)
    return kept["comm", n, name]


def bits(t: torch.Tensor):
    """As the reference has it."""
    as_bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return t.contiguous().view(as_bits.get(t.dtype, t.dtype)).cpu().numpy()


def check_api(n: int, name: str, seed: int, ids_dtype: torch.dtype, weighted: bool, biases: int = 0) -> None:
    """A round, and the handle a second time, against the NumPy reference."""
    if dist.get_rank() >= n:
        return
    comm, cfg = communicator(n, name), buffers.api_config(n, name)
    me, s = comm.rank, buffers.step(n, seed, [(seed + 13 * r) % (TMAX + 1) for r in range(n)])
    ids = [i.to(ids_dtype) for i in s.ids]
    weights = s.weights if weighted else None
    h = ept.dispatch(comm, s.x[me], ids[me], s.weights[me] if weighted else None)
    given = [[bits(x) for x in s.x], [i.cpu().numpy() for i in ids], weights and [w.cpu().numpy() for w in weights]]
    wanted = reference.dispatch(cfg, *given)
    got = SimpleNamespace(**{field: bits(getattr(h, field)) for field in HANDLE_TENSORS})
    got.row_offsets = got.row_offsets.view("uint32")
    assert not (differences := handle_differences(cfg, wanted[me], got)), "\n".join(differences)
    assert h.tokens.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    g = plain.generator(seed)
    shape = [*wanted[me].tokens.shape[:-1], HIDDEN]
    ys = [torch.randn(shape, generator=g).bfloat16() for _ in range(n)]
    added = [[torch.randn(x.shape, generator=g).bfloat16() for x in s.x] for _ in range(biases)]
    more = {f"bias{i}": [bits(b) for b in each] for i, each in enumerate(added)}
    want = reference.combine(cfg, [bits(y) for y in ys], wanted, **more)[me]
    for bias in [tuple(each[me] for each in added), *([added[0][me]] if biases == 1 else [None] if not biases else [])]:
        out = ept.combine(comm, ys[me], h, bias=bias)
        assert bits(out).dtype == want.dtype
        assert bits(out).tobytes() == want.tobytes(), f"combine with {biases} biases differs"


def check_api_bad_input(n: int) -> None:
    """Rank 0 passes what is wrong, then all make a round."""
    comm, s = communicator(n, "expert"), buffers.step(n, 1)
    me = comm.rank
    x, ids, weights = s.x[me], s.ids[me], s.weights[me]
    h = ept.dispatch(comm, x, ids, weights)
    if me == 0:
        for error, field, call in (
            (errors.DTypeError, "x", lambda: ept.dispatch(comm, x.float(), ids, weights)),
            (errors.ShapeError, "x", lambda: ept.dispatch(comm, x[:, 8:], ids, weights)),
            (errors.DTypeError, "topk_ids", lambda: ept.dispatch(comm, x, ids.float(), weights)),
            (errors.ShapeError, "topk_ids", lambda: ept.dispatch(comm, x, ids[1:], weights)),
            (errors.ShapeError, "weights", lambda: ept.dispatch(comm, x, ids, weights[:, 1:])),
            (errors.UnsupportedError, "x_scales", lambda: ept.dispatch(comm, x, ids, x_scales=weights)),
            (errors.UnsupportedError, "comm", lambda: ept.dispatch(3, x, ids)),
            (errors.ShapeError, "y", lambda: ept.combine(comm, h.tokens[1:], h)),
            (errors.DTypeError, "y", lambda: ept.combine(comm, h.tokens.float(), h)),
            (errors.ShapeError, "bias", lambda: ept.combine(comm, h.tokens, h, bias=(x, x, x))),
            (errors.DTypeError, "bias1", lambda: ept.combine(comm, h.tokens, h, bias=(x, x.float()))),
            (errors.ShapeError, "memory", lambda: ept.combine(comm, h.tokens, h._replace(memory=h.memory[1:]))),
            (errors.DTypeError, "handle", lambda: ept.combine(comm, h.tokens, tuple(h))),
            (errors.OrderError, "communicator", lambda: ept.combine(comm, h.tokens, h._replace(comm=h.comm + 1))),
        ):
            raises(error, call, field)
        cfg = buffers.api_config(1, "expert").replace(n_ranks=1, n_experts=1, slots="expert")
        virtual = ep.Communicator.cpu(cfg)
        raises(errors.UnsupportedError, lambda: ept.dispatch(virtual, x, ids), "comm")
        virtual.destroy()
    check_api(n, "expert", 2, torch.int64, True)


def check_forgotten(n: int) -> None:
    """A communicator that nobody holds any more goes at once."""
    if dist.get_rank() >= n:
        return
    s, was_on = buffers.step(n, 1), gc.isenabled()
    gc.disable()
    try:
        device = torch.get_default_device()
        comm = ep.Communicator.process_group(buffers.api_config(n, "rank"), kept["group", n], device=device)
        me = comm.rank
        h = ept.dispatch(comm, s.x[me], s.ids[me], s.weights[me])
        plain.same("recv_x", h.tokens[: int(h.row_offsets[-1])], plain.received(s, me))
        seen = weakref.ref(comm)
        del comm, h
        assert seen() is None
    finally:
        if was_on:
            gc.enable()


def check_compiled(n: int, backend: str) -> None:
    """torch.compile takes a layer as one graph, for any T, and gives the same bytes; no op is dropped or moved."""
    comm = communicator(n, "expert")
    me = comm.rank

    def layer(x, ids, weights):
        h = ept.dispatch(comm, x, ids, weights)
        again = ept.dispatch(comm, x * 2, ids, weights)  # its result is not used; the peers wait for it all the same
        y = torch.relu(h.tokens.float() * 1.5).bfloat16()
        return ept.combine(comm, y, h) + ept.combine(comm, y, h, bias=x) * 0.5, again.counts.sum()

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for seed in (1, 2, 3):
        s = buffers.step(n, seed, [4 + 3 * seed + r for r in range(n)])
        given = s.x[me], s.ids[me], s.weights[me]
        want, got = layer(*given), compiled(*given)
        plain.same(f"compiled with {backend}", got[0], want[0])
        assert got[1] == want[1]


def check_broken_graphs(n: int) -> None:
    """Without fullgraph torch.compile goes on in front of and behind the calls of a Buffer."""
    if (b := buffers.shared(n)) is None:
        return
    me, s = b.rank, buffers.step(n, 1)

    def layer(x, ids, weights):
        per_rank, _, per_expert, in_rank, _ = b.get_dispatch_layout(ids, s.n_experts)
        sizes = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
        rows, _, _, _, handle, _ = b.dispatch(x * 2, topk_idx=ids, topk_weights=weights, **sizes)
        return b.combine(rows * 2, handle)[0] + 1

    given = s.x[me], s.ids[me], s.weights[me]
    plain.same("compiled in parts", torch.compile(layer, backend="eager")(*given), layer(*given))

    def decode(x, ids, weights):
        rows, _, handle, _, hook = b.low_latency_dispatch(
            x * 2, ids, buffers.TMAX, s.n_experts, use_fp8=False, return_recv_hook=True
        )
        hook()
        return b.low_latency_combine(rows * 2, ids, weights, handle)[0] + 1

    plain.same("low latency in parts", torch.compile(decode, backend="eager")(*given), decode(*given))
    raises(errors.DTypeError, lambda: ept.autograd.combine(b, s.x[me], None, (s.x[me], s.x[me])), "bias")


def check_library(n: int) -> None:
    """What torch checks of an op by itself: the schema, the fake implementations, tracing."""
    comm, s = communicator(n, "expert"), buffers.step(n, 1)
    me = comm.rank
    number = ept.library.number_of(comm)
    order = torch.zeros(1, dtype=torch.int32, device="cpu")
    given = order, s.x[me], None, s.ids[me], s.weights[me], number
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.ep_mojo.dispatch.default, given, test_utils=checks)
    h = ept.dispatch(comm, s.x[me], s.ids[me], s.weights[me])
    back = order, h.tokens, h.memory, s.ids[me], s.weights[me], None, None, number
    torch.library.opcheck(torch.ops.ep_mojo.combine.default, back, test_utils=checks)


def check_gradients(n: int) -> None:
    """A layer and its gradients against a dense one, with numbers for which every sum is exact."""
    if dist.get_rank() >= n:
        return
    b = buffers.shared(n)
    me, s = b.rank, buffers.step(n, 3)
    g = plain.generator(me)
    x = torch.randint(-4, 5, s.x[me].shape, generator=g).bfloat16().requires_grad_()
    weights = (torch.randint(1, 3, s.weights[me].shape, generator=g) / 2).requires_grad_()
    bias = torch.randint(-4, 5, s.x[me].shape, generator=g).bfloat16().requires_grad_()
    upstream = torch.randint(-2, 3, s.x[me].shape, generator=g).bfloat16()
    recv_x, recv_ids, recv_weights, _, handle = ept.autograd.dispatch(b, x, s.ids[me], weights, s.n_experts)
    factor = (recv_ids + 1) * recv_weights  # each local expert multiplies by its number
    y = (recv_x.float() * factor.sum(1, keepdim=True)).bfloat16()
    out = ept.autograd.combine(b, y, handle, bias)
    out.backward(upstream)
    got = [out.detach(), x.grad, weights.grad, bias.grad]

    dense = [t.detach().clone().requires_grad_() for t in (x, weights, bias)]
    local = torch.where(s.ids[me] >= 0, s.ids[me] % s.n_local + 1, 0)
    want = dense[2].float() + dense[0].float() * (local * dense[1]).sum(1, keepdim=True)
    want.backward(upstream.float())
    wanted = [want.detach().bfloat16(), *(t.grad for t in dense)]
    for name, a, c in zip(("out", "x.grad", "weights.grad", "bias.grad"), got, wanted, strict=True):
        plain.same(name, a + 0, c + 0)  # + 0: of zeros the sign depends on how many were added
    assert not recv_ids.requires_grad


def check_gradients_of_each(n: int) -> None:
    """The backward of dispatch is combine, that of combine is dispatch, byte for byte, also for numbers that round."""
    if (b := buffers.shared(n)) is None:
        return
    me, s = b.rank, buffers.step(n, 4)
    x = s.x[me].clone().requires_grad_()
    recv_x, *_, handle = ept.autograd.dispatch(b, x, s.ids[me], s.weights[me], s.n_experts)
    ys = plain.outputs(s, 1)
    recv_x.backward(ys[me])
    plain.same("dispatch's backward", x.grad, plain.reduced(s, me, ys).bfloat16())
    y = ys[me].clone().requires_grad_()
    ept.autograd.combine(b, y, handle).backward(s.x[me])
    plain.same("combine's backward", y.grad, plain.received(s, me))


def check_execute_between(n: int) -> None:
    """Graphs of `execute`, which have a queue of their own on GPUs, between rounds of tensors, on whatever queues."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    if dist.get_rank() >= n:
        return
    comm, me = communicator(n, "expert"), dist.get_rank()
    ref, s = comm.device_refs()[0], buffers.step(n, 5)
    kinds = (DType.bfloat16, HIDDEN), (DType.int64, TOP_K), (DType.float32, TOP_K)
    types = [*(TensorType(dtype, ["T", size], ref) for dtype, size in kinds), *comm.input_types()]
    with Graph("between", input_types=types, custom_extensions=[ep.kernel_library()]) as graph:
        ranks = comm.bind(graph.inputs[-comm.num_inputs :])
        x, ids, weights = (v.tensor for v in graph.inputs[:3])
        handles = ep.dispatch(ranks, [x], [ids], [weights])
        graph.output(*ep.combine(ranks, [handles[0].tokens], handles))
    model = comm.compile(graph)
    given = [bits(s.x[me]), s.ids[me].cpu().numpy(), s.weights[me].cpu().numpy()]
    on_host = ref.is_cpu()
    for i in range(4):
        with nullcontext() if on_host or i == 2 else torch.cuda.stream(torch.cuda.Stream()):
            if not on_host:
                torch.ones(4096, 4096).matmul(torch.ones(4096, 4096))
            for _ in range(3):
                h = ept.dispatch(comm, s.x[me], s.ids[me], s.weights[me])
                y = ept.combine(comm, h.tokens, h)
            out = comm.execute(model, *given)[0]
            assert out.tobytes() == bits(y).tobytes(), f"turn {i}"
