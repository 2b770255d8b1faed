"""The graphs that several files share, compiled by a process of its own while earlier tests run.

MAX compiles on one core most of the time, and finds in its cache what another process has compiled. Nothing depends on
it: a fixture waits for the process, then compiles as it would have anyway, which is quick where all went well.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("together", "stages")
"""Fixtures, in the order in which they are compiled."""
MEANWHILE = ("test_programs", "test_readme_example", "test_stress", "test_user_format")
"""Files that compile their own, and so come before all others of this directory."""
WORTH_IT = 100
"""Tests that must come before the first that needs one of the fixtures."""


class Ahead:
    """The process; absent until `start`, and where it is not worth it."""

    process: subprocess.Popen | None = None

    @staticmethod
    def order(items: list) -> None:
        """Sort the tests: those of other directories, those that do not need the fixtures, the rest."""
        here = Path(__file__).parent
        items.sort(key=lambda item: (item.path.parent == here) * (1 + (item.path.stem not in MEANWHILE)))

    def start(self, items: list) -> None:
        """Begin, if the tests chosen give it time and there is a core for it."""
        needs = [name for name in SHARED if any(name in item.fixturenames for item in items)]
        first = next((i for i, item in enumerate(items) if set(SHARED) & set(item.fixturenames)), 0)
        if first < WORTH_IT or (os.cpu_count() or 1) < 2:
            return
        files = dict.fromkeys(item.path.stem for item in items if item.path.parent == Path(__file__).parent)
        command = [sys.executable, "-m", "graph.ahead", ",".join(needs), ",".join(files)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self.process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def wait(self, name: str) -> None:
        """Until the graphs of a fixture are compiled, or the process has ended."""
        while self.process is not None:
            line = self.process.stdout.readline()
            if line.strip() in (name, ""):
                return

    def stop(self) -> None:
        """End the process, if it still runs."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def main(needs: list[str], files: list[str]) -> None:
    """Compile, and print the name of each fixture as it is ready."""
    from graph import stages, together

    for name in files:  # a file notes its graphs when it is imported
        importlib.import_module(f"graph.{name}")
    compile_all = {"together": together.compile_all, "stages": lambda: stages.compile_all(stages.all_variants())}
    for name in needs:
        compile_all[name]()
        print(name, flush=True)


if __name__ == "__main__":
    main(*(text.split(",") for text in sys.argv[1:3]))
