"""Everything that needs a GPU, by one command: `python python/tools/gpu_check.py [--output FILE.json]`.

Runs the GPU tests on one GPU and on as many as there are (conformance, shapes of models, bad input), many checked
rounds (`gpu_stress.py`), and NVIDIA's compute-sanitizer over one-GPU tests where it is installed, and prints a table
last. Needs MAX, NumPy, pytest, hypothesis and ml_dtypes; the checkout itself need not be installed. Exit status 1 where
a step failed, 2 where there is no GPU or no step of that name; a step that could not be run is named as such.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZER = "compute-sanitizer"
SANITIZED = ("tests/gpu/test_one_gpu.py", "-k", "test_round or budget or more_messages")
"""One small case of every kernel variant of the split stages."""
BAD_INPUT = ("tests/gpu/test_bad_input_gpu.py", "-k", "not arguments_that_do_not_fit")
"""What kernels get that they must not follow: for memcheck, which sees reads and writes out of bounds."""
TOOLS = {"memcheck": [], "racecheck": [], "synccheck": ["--num-cuda-barriers", "4096"]}
CLEAN = re.compile(r"(?:ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)")


def pytest(*args: str) -> list[str]:
    """A pytest command over tests/gpu."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]


def steps(gpus: int) -> dict[str, tuple[list[str], int] | str]:
    """Name of each step, with its command and most seconds, or why it cannot be run."""
    shapes, bad = "tests/gpu/test_large_shapes.py", "tests/gpu/test_bad_input_gpu"
    stress = [sys.executable, "python/tools/gpu_stress.py"]
    found: dict[str, tuple[list[str], int] | str] = {
        "one GPU": (pytest("tests/gpu/test_one_gpu.py", "tests/gpu/test_user_format_gpu.py"), 600),
        "Mojo program": (pytest("tests/gpu/test_mojo_program.py"), 600),
        "shapes, one GPU": (pytest(shapes, "-k", "virtual_ranks"), 900),
        "program of docs/gpus.md": (pytest("tests/gpu/test_page_program.py"), 900),
        "bad input, one GPU": (pytest(f"{bad}.py"), 600),
    }
    several = {
        "": (pytest("tests/gpu/test_gpus.py"), 1800),
        "shapes, ": (pytest(shapes, "-k", "each_gpu"), 900),
        "bad input, ": (pytest(f"{bad}s.py"), 900),
        "stress, ": ([*stress, "--limit-s", "800"], 900),
        "benchmarks, ": (pytest("tests/gpu/test_gpu_programs.py"), 900),
        "MoE layer, ": (pytest("tests/gpu/test_moe_layer.py"), 1600),
        "PyTorch, ": (pytest("tests/gpu/test_torch_gpus.py"), 900),
    }
    for name, step in several.items():
        found[f"{name}{gpus if gpus > 1 else 'several'} GPUs"] = step if gpus > 1 else "needs two GPUs"
    if gpus == 1:
        found["stress, one GPU"] = ([*stress, "--on", "one-gpu", "--rounds", "2000", "--limit-s", "800"], 900)
    sanitized = [(tool, options, SANITIZED) for tool, options in TOOLS.items()]
    for tool, options, tests in [*sanitized, ("memcheck", [], BAD_INPUT)]:
        name = tool if tests == SANITIZED else f"{tool}, bad input"
        if shutil.which(SANITIZER) is None:
            found[name] = f"{SANITIZER} is not installed"
            continue
        found[name] = ([SANITIZER, "--tool", tool, *options, *pytest(*tests)], 900)
    return found


def run(command: list[str], seconds: int, env: dict[str, str]) -> dict[str, object]:
    """Run a step; its last line of pytest, and whether all went well."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, status = str(error.stdout or ""), -1
    good = status == 0 and (command[0] != SANITIZER or CLEAN.search(output) is not None)
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|rounds of)|SUMMARY", line)]
    if not good:
        print(output[-8000:], file=sys.stderr, flush=True)
    return {"ok": good, "seconds": round(time.monotonic() - started, 1), "said": "; ".join(lines).strip(" =")}


def main(argv: list[str] | None = None) -> int:
    """Run the steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", metavar="FILE.json", help="write the table as JSON")
    parser.add_argument("--only", action="append", help="only the steps whose name contains this (may be repeated)")
    parser.add_argument("--skip", action="append", default=[], help="not the steps whose name contains this")
    args = parser.parse_args(argv)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    count = "from max.driver import accelerator_count; print(accelerator_count())"
    asked = subprocess.run([sys.executable, "-c", count], env=env, capture_output=True, text=True, check=False)
    gpus = int(asked.stdout.split()[-1]) if asked.returncode == 0 and asked.stdout.split() else 0
    known = steps(gpus)
    names = list(known)
    for word in args.only or []:
        if not any(word in name for name in names):
            parser.error(f"--only = {word!r}: no step has that in its name. Steps: {'; '.join(names)}")
    chosen = [name for name in names if not args.only or any(word in name for word in args.only)]
    chosen = [name for name in chosen if not any(word in name for word in args.skip)]
    if not chosen:
        parser.error(f"--only and --skip leave no step. Steps: {'; '.join(names)}")
    if gpus == 0:
        print("MAX sees no GPU here: nothing to check.", asked.stderr[-2000:], file=sys.stderr)
        return 2
    rows = []
    for name in chosen:
        step = known[name]
        found = {"ok": None, "seconds": 0.0, "said": f"not run: {step}"} if isinstance(step, str) else run(*step, env)
        rows.append({"step": name} | found)
        if args.output:  # after every step, so that what cuts the run off does not take all results with it
            Path(args.output).write_text(json.dumps({"gpus": gpus, "steps": rows}, indent=1) + "\n")
    print(f"{'step':<20} {'result':<8} {'seconds':>8}  said")
    for row in rows:
        result = {True: "ok", False: "FAILED", None: "not run"}[row["ok"]]
        print(f"{row['step']:<20} {result:<8} {row['seconds']:>8}  {row['said']}")
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
