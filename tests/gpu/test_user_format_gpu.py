"""A format of one's own on a GPU, with more parts than a crew has warps: every part is encoded, whoever does it."""

import numpy as np
import pytest

import ep_mojo as ep
from ep_mojo.dtypes import to_numpy

H, K, E, R, PARTS = 512, 2, 8, 2, 8
SOURCE = f"""
from ep_mojo import Bytes, Team, TokenFormat, copy_bytes


struct Slices[hidden: Int](TokenFormat):
    comptime hidden_size = Self.hidden
    comptime input_dtype = DType.bfloat16
    comptime token_dtype = DType.bfloat16
    comptime token_bytes = 2 * Self.hidden
    comptime scale_dtype = DType.float32
    comptime scales_per_token = 0
    comptime scales_by_column = False
    comptime message_bytes = 2 * Self.hidden
    comptime encode_parts = {PARTS}

    @staticmethod
    def encode[T: Team](token: Bytes, factor: Float32, message: Bytes):
        for part in range(Self.encode_parts):
            Self.encode_part[T](token, factor, message, part)

    @staticmethod
    def encode_part[T: Team](token: Bytes, factor: Float32, message: Bytes, part: Int):
        comptime size = Self.message_bytes // Self.encode_parts
        copy_bytes[T](token.unsafe_offset(part * size), message.unsafe_offset(part * size), size)

    @staticmethod
    def pack[T: Team](token: Bytes, scales: Bytes, message: Bytes):
        copy_bytes[T](token, message, Self.token_bytes)

    @staticmethod
    def unpack[T: Team](message: Bytes, token: Bytes, scales: Bytes, stride: Int):
        copy_bytes[T](message, token, Self.token_bytes)
"""


def config(tokens: int, **fields) -> ep.EPConfig:
    return ep.EPConfig(
        hidden_size=H,
        top_k=K,
        n_experts=E,
        max_tokens_per_rank=tokens,
        n_ranks=R,
        dispatch_format=ep.CustomFormat("sliced.Slices", token_dtype="bfloat16", message_size=2 * H),
        tokens_per_signal=1,
        timeout_s=20,
        **fields,
    )


def graph(comm, library, T):
    """Dispatch of T tokens a rank alone; tokens and src_info of all ranks out."""
    from max.dtype import DType
    from max.graph import Graph, TensorType

    refs = comm.device_refs()
    own = [TensorType(d, [T, n], ref) for d, n in ((DType.bfloat16, H), (DType.int32, K)) for ref in refs]
    with Graph(f"sliced_{T}", input_types=[*own, *comm.input_types()], custom_extensions=[library]) as g:
        ranks, v = comm.bind(g.inputs[-comm.num_inputs :]), [i.tensor for i in g.inputs[: 2 * R]]
        hs = ep.dispatch(ranks, v[:R], v[R:])
        g.output(*[h.tokens for h in hs], *[h.src_info for h in hs])
    return g


@pytest.mark.parametrize(("tokens", "most"), [(6, 6), (6, 300), (90, 300), (500, 500)])
def test_all_parts_are_encoded(tmp_path, tokens, most):
    """As cells, by all warps of a CTA; with room for more tokens by crews of four warps, of two, and at last by one."""
    source = tmp_path / "sliced.mojo"
    source.write_text(SOURCE)
    library = ep.kernel_library(extra_sources=[source])
    rng = np.random.default_rng(tokens)
    with ep.Communicator.one_gpu(config(most, n_sms=24)) as comm:
        model = comm.compile(graph(comm, library, tokens))
        for _ in range(2):
            xs = [rng.integers(0, 2**16, (tokens, H), np.uint16) for _ in range(R)]
            ids = [rng.integers(0, E, (tokens, K), np.int32) for _ in range(R)]
            out = [to_numpy(o) for o in comm.execute(model, *xs, *ids)]
            for rows, info in zip(out[:R], out[R:], strict=True):
                used = info[:, 0] >= 0
                assert used.any()
                source_rank, token = np.divmod(info[used, 0], most)
                assert (rows[used] == np.stack(xs)[source_rank, token]).all()
