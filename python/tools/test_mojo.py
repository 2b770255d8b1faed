"""Run the Mojo tests: `./task test-mojo [FILE or part of a name ...]`.

Each tests/mojo/test_*.mojo is compiled and run by itself with `mojo run -I kernels`. A suite that finds no test counts
as a failure here, since Mojo's own runner calls it a success. Exit status 0 only if every file ran at least one test
and none failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from ep_mojo.errors import EPError
from ep_mojo.kernels import Compiler, compiler_report, find_compiler

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "mojo"
TIMEOUT_S = 600
SUMMARY = re.compile(r"^Summary .*?(\d+) tests? run: (\d+) passed\s*, (\d+) failed\s*, (\d+) skipped", re.MULTILINE)


def select(patterns: list[str], directory: Path = TESTS) -> list[Path]:
    """The test files whose path or name holds one of the patterns; all of them without patterns."""
    files = sorted(directory.glob("test_*.mojo"))
    if not patterns:
        return files
    named = {Path(pattern).resolve() for pattern in patterns}
    return [file for file in files if file in named or any(pattern in file.name for pattern in patterns)]


def run_file(compiler: Compiler, file: Path) -> tuple[int, int, str]:
    """Run one file. Returns (passed, failed, report); the report is empty when all is well."""
    try:
        done = compiler.run("run", "-I", ROOT / "kernels", file, cwd=ROOT, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return 0, 1, f"no result after {TIMEOUT_S} s"
    found = SUMMARY.findall(done.stdout + done.stderr)
    passed, failed = (sum(int(summary[column]) for summary in found) for column in (1, 2))
    if done.returncode != 0 or failed:
        return passed, max(failed, 1), compiler_report(done)
    if passed == 0:
        what = "it found no test" if found else "it printed no summary: does main() call TestSuite...run()?"
        return 0, 1, f"{what}\n{compiler_report(done)}"
    return passed, 0, ""


def main(argv: list[str] | None = None) -> int:
    """Run the selected files one after the other and print a line for each."""
    parser = argparse.ArgumentParser(prog="./task test-mojo", description="Run the Mojo tests of tests/mojo.")
    parser.add_argument("patterns", nargs="*", metavar="FILE", help="files, or parts of their names (default: all)")
    args = parser.parse_args(argv)
    files = select(args.patterns)
    if not files:
        print(f"no test_*.mojo in {TESTS} matches {args.patterns or 'anything'}", file=sys.stderr)
        return 1
    try:
        compiler = find_compiler()
    except EPError as error:
        print(error, file=sys.stderr)
        return 1
    passed = failed = 0
    for file in files:
        started = time.monotonic()
        good, bad, report = run_file(compiler, file)
        passed, failed = passed + good, failed + bad
        if report:
            print(report.strip())
        print(
            f"{'FAIL' if bad else 'ok  '} {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}: "
            f"{good} passed, {bad} failed ({time.monotonic() - started:.1f} s)",
            flush=True,
        )
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
