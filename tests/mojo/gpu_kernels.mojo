"""Prints the assembly of every GPU kernel, each behind `//// NAME`. Build for EP_GPU_TARGET; runs without a GPU."""

from ep_mojo.formats import BF16, BlockwiseFP8
from ep_mojo.gpu.combine_async import combine_async_stage
from ep_mojo.gpu.combine_wait import combine_wait_stage
from ep_mojo.gpu.dispatch_async import dispatch_async_stage
from ep_mojo.gpu.dispatch_wait import dispatch_wait_stage
from ep_mojo.gpu.expert_slots_combine_async import (
    expert_slots_combine_async_stage,
)
from ep_mojo.gpu.expert_slots_combine_wait import (
    expert_slots_combine_wait_stage,
)
from ep_mojo.gpu.expert_slots_dispatch_async import (
    expert_slots_dispatch_async_stage,
)
from ep_mojo.gpu.expert_slots_dispatch_wait import (
    expert_slots_dispatch_wait_stage,
)
from ep_mojo.gpu.few_combine import (
    few_combine_async_stage,
    few_combine_stage,
    few_combine_wait_stage,
)
from ep_mojo.gpu.few_dispatch import (
    few_dispatch_async_stage,
    few_dispatch_stage,
    few_dispatch_wait_stage,
)
from ep_mojo.gpu.fused import combine_stage, dispatch_stage
from ep_mojo.gpu.push import push_stage
from max.gpu.host import get_gpu_target
from std.compile import compile_info
from std.sys.defines import get_defined_string

comptime TARGET = get_gpu_target[get_defined_string["EP_GPU_TARGET"]()]()
comptime BF = DType.bfloat16
comptime F32 = DType.float32
comptime Plain = BF16[7168]
comptime Row = BlockwiseFP8[7168]
comptime Column = BlockwiseFP8[7168, "ue8m0", True]


def print_dispatch[cells: Bool]():
    comptime prefix = "//// cell tables " if cells else "//// "
    print(prefix + "dispatch_async bf16")
    print(
        compile_info[
            dispatch_async_stage[Plain, DType.int32, False, cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch_async fp8")
    print(
        compile_info[
            dispatch_async_stage[Row, DType.int64, False, cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch_async encoded")
    print(
        compile_info[
            dispatch_async_stage[Row, DType.int32, True, cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch_wait bf16 expert")
    print(
        compile_info[
            dispatch_wait_stage[Plain, "expert", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch_wait fp8 expert_padded")
    print(
        compile_info[
            dispatch_wait_stage[Column, "expert_padded", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch_wait fp8 rank")
    print(
        compile_info[
            dispatch_wait_stage[Row, "rank", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch fused")
    print(
        compile_info[
            dispatch_stage[Plain, DType.int32, False, "expert", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch fused fp8")
    print(
        compile_info[
            dispatch_stage[Column, DType.int32, False, "expert", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print(prefix + "dispatch fused padded")
    print(
        compile_info[
            dispatch_stage[Column, DType.int64, False, "expert_padded", cells],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )


def main():
    print_dispatch[False]()
    print_dispatch[True]()
    print("//// combine_async expert")
    print(
        compile_info[
            combine_async_stage[BF, 7168, "expert", "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_async source")
    print(
        compile_info[
            combine_async_stage[F32, 72, "expert", "source"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_async rank")
    print(
        compile_info[
            combine_async_stage[BF, 7168, "rank", "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_wait expert")
    print(
        compile_info[
            combine_wait_stage[
                BF, BF, BF, DType.int32, 7168, "expert", "expert"
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_wait source")
    print(
        compile_info[
            combine_wait_stage[
                F32, F32, F32, DType.int64, 72, "expert", "source"
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine fused")
    print(
        compile_info[
            combine_stage[BF, BF, BF, DType.int32, 7168, "expert", "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine fused padded")
    print(
        compile_info[
            combine_stage[
                BF, BF, BF, DType.int64, 7168, "expert_padded", "source"
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_async padded")
    print(
        compile_info[
            combine_async_stage[BF, 7168, "expert_padded", "source"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// combine_wait padded")
    print(
        compile_info[
            combine_wait_stage[
                BF, BF, BF, DType.int64, 7168, "expert_padded", "source"
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// gathered dispatch_wait")
    print(
        compile_info[
            dispatch_wait_stage[Column, "gathered", False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// gathered combine_async")
    print(
        compile_info[
            combine_async_stage[F32, 72, "gathered", "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// gathered dispatch fused")
    print(
        compile_info[
            dispatch_stage[Plain, DType.int32, False, "gathered", False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// gathered combine fused")
    print(
        compile_info[
            combine_stage[BF, BF, BF, DType.int32, 7168, "gathered", "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// expert slots dispatch_async")
    print(
        compile_info[
            expert_slots_dispatch_async_stage[Plain, DType.int32, False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// expert slots dispatch_wait")
    print(
        compile_info[
            expert_slots_dispatch_wait_stage[Row, "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// expert slots combine_async")
    print(
        compile_info[
            expert_slots_combine_async_stage[BF, 7168],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// expert slots combine_wait")
    print(
        compile_info[
            expert_slots_combine_wait_stage[BF, BF, BF, DType.int32, 7168],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// push")
    print(
        compile_info[
            push_stage[14336, True], emission_kind="asm", target=TARGET
        ]().asm
    )
    print("//// few dispatch_async bf16")
    print(
        compile_info[
            few_dispatch_async_stage[Plain, DType.int32, False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few dispatch_async fp8")
    print(
        compile_info[
            few_dispatch_async_stage[Row, DType.int64, False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few dispatch_wait bf16 expert")
    print(
        compile_info[
            few_dispatch_wait_stage[Plain, "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few dispatch_wait fp8 rank")
    print(
        compile_info[
            few_dispatch_wait_stage[Row, "rank"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few combine_async expert")
    print(
        compile_info[
            few_combine_async_stage[BF, 7168, "expert", "expert", True],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few combine_async source")
    print(
        compile_info[
            few_combine_async_stage[F32, 72, "expert", "source", False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few combine_wait expert")
    print(
        compile_info[
            few_combine_wait_stage[
                BF, BF, BF, DType.int32, 7168, "expert", "expert", False
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few combine_wait source")
    print(
        compile_info[
            few_combine_wait_stage[
                F32, F32, F32, DType.int64, 72, "expert", "source", True
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few dispatch fused")
    print(
        compile_info[
            few_dispatch_stage[Plain, DType.int32, False, "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few dispatch fused fp8")
    print(
        compile_info[
            few_dispatch_stage[Column, DType.int32, False, "expert"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few combine fused")
    print(
        compile_info[
            few_combine_stage[
                BF, BF, BF, DType.int32, 7168, "expert", "expert", False
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few gathered dispatch_wait")
    print(
        compile_info[
            few_dispatch_wait_stage[Column, "gathered"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few gathered combine_async")
    print(
        compile_info[
            few_combine_async_stage[F32, 72, "gathered", "expert", False],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few gathered dispatch fused")
    print(
        compile_info[
            few_dispatch_stage[Plain, DType.int32, False, "gathered"],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
    print("//// few gathered combine fused")
    print(
        compile_info[
            few_combine_stage[
                BF, BF, BF, DType.int32, 7168, "gathered", "expert", False
            ],
            emission_kind="asm",
            target=TARGET,
        ]().asm
    )
