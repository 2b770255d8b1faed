"""Compile what CPU and GPU share for GPUs, without one: `./task gpu-compile [--all] [--target ARCH]`.

Runs tests/mojo/gpu_shared_parts.mojo once for each architecture (all variants for sm_90a, a choice of them elsewhere)
and prints how large each assembly became. Exit status 0 only if every architecture compiled and gave at least one
kernel, and none lacks one that another gave.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from ep_mojo.errors import EPError
from ep_mojo.kernels import Compiler, compiler_report, find_compiler

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "mojo" / "gpu_shared_parts.mojo"
TARGETS = ("sm_90a", "sm_100a", "gfx942")
EVERYTHING = ("sm_90a",)
"""Architectures for which every variant is compiled, also without --all."""
TIMEOUT_S = 900
LINE = re.compile(r"^kernel (\S+) (\d+)$", re.MULTILINE)


class CompileError(Exception):
    """The program did not compile, did not run, or printed no kernel; the text holds its output."""


def compile_for(compiler: Compiler, target: str, every: bool, program: Path = PROGRAM) -> dict[str, int]:
    """Compile the program's kernels for one architecture.

    Args:
        compiler: From `find_compiler`.
        target: Architecture, such as "sm_90a".
        every: Every variant instead of a choice: defines EP_GPU_ALL.
        program: The Mojo program.

    Returns:
        Bytes of assembly of each kernel.

    Raises:
        CompileError: See there.
    """
    defines = ["-D", f"EP_GPU_TARGET={target}", *(["-D", "EP_GPU_ALL"] if every else [])]
    command = ["run", "-I", ROOT / "kernels", *defines, "--target-accelerator", target, program]
    try:
        done = compiler.run(*command, cwd=ROOT, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CompileError(f"no result after {TIMEOUT_S} s") from None
    kernels = {name: int(size) for name, size in LINE.findall(done.stdout)}
    if done.returncode != 0 or not kernels:
        raise CompileError(compiler_report(done))
    empty = [name for name, size in kernels.items() if size == 0]
    if empty:
        raise CompileError(f"no assembly came out for {', '.join(empty)}")
    return kernels


def main(argv: list[str] | None = None) -> int:
    """Print a table with a row for each architecture and kernel."""
    parser = argparse.ArgumentParser(
        prog="./task gpu-compile", description="Compile what CPU and GPU share for GPUs. Needs no GPU."
    )
    parser.add_argument("--all", action="store_true", help="every variant on all architectures")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this architecture (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    try:
        compiler = find_compiler()
    except EPError as error:
        print(error, file=sys.stderr)
        return 1
    every = {target: args.all or target in EVERYTHING for target in TARGETS}
    rows, failed = [], []
    if not args.json:
        print(f"{'target':<8} {'kernel':<40} {'bytes':>9} {'seconds':>8}")
    for target in dict.fromkeys(args.target or TARGETS):
        started = time.monotonic()
        try:
            kernels = compile_for(compiler, target, every[target])
        except CompileError as error:
            failed.append(target)
            print(f"{error}\n{target}: FAILED", file=sys.stderr, flush=True)
            continue
        seconds = time.monotonic() - started
        for index, (name, size) in enumerate(kernels.items()):
            rows.append({"target": target, "kernel": name, "bytes": size, "seconds": seconds})
            if not args.json:  # the time is that of the whole program: shown once
                print(f"{target:<8} {name:<40} {size:>9} {f'{seconds:.1f}' if index == 0 else '':>8}", flush=True)
    for target in {row["target"] for row in rows}:
        wanted = {row["kernel"] for row in rows if every[row["target"]] <= every[target]}
        missing = wanted - {row["kernel"] for row in rows if row["target"] == target}
        if missing:
            failed.append(target)
            print(f"{target}: FAILED: no assembly for {', '.join(sorted(missing))}", file=sys.stderr)
    if args.json:
        print(json.dumps({"ok": not failed, "rows": rows}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
