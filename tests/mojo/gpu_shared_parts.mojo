"""What CPU and GPU share, compiled for a GPU that need not be there: `./task gpu-compile` runs this program.

The driver passes the architecture as `-D EP_GPU_TARGET=sm_90a` and as `--target-accelerator`. For every kernel the program
prints one line, `kernel NAME BYTES`, where BYTES is the size of its assembly (PTX on NVIDIA, GCN on AMD). Code that does not
compile for the architecture ends the run with the compiler's message. Nothing is executed on a device.
"""

from max.gpu import block_dim, block_idx, thread_idx
from max.gpu.host import get_gpu_target
from std.compile import compile_info
from std.sys import get_defined_string

comptime TARGET = get_defined_string["EP_GPU_TARGET"]()


def copy_words(
    destination: Pointer[UInt32, MutUntrackedOrigin],
    source: Pointer[UInt32, MutUntrackedOrigin],
    count: Int32,
):
    """Copies `count` words: shows that the way from here to the assembly works.

    Args:
        destination: First word written.
        source: First word read.
        count: Number of words.
    """
    var i = Int(block_idx.x * block_dim.x + thread_idx.x)
    if i < Int(count):
        destination.unsafe_store(i, source.unsafe_load(i))


def main():
    """Prints one line for every kernel."""
    var copy = compile_info[
        copy_words, emission_kind="asm", target=get_gpu_target[TARGET]()
    ]()
    print("kernel copy_words", String(copy.asm).byte_length())
