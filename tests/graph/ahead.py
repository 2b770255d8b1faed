"""The graphs that several files share, compiled by a process of its own while earlier tests run.

MAX compiles on one core most of the time, and finds in its cache what another process has compiled. Nothing depends on
it: a fixture waits for the process, then compiles as it would have anyway, which is quick where all went well.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHARED = ("together", "stages")
"""Fixtures, in the order in which they are compiled."""
MEANWHILE = ("test_programs", "test_readme_example", "test_stress", "test_user_format")
"""Files that compile their own, and so come before all others of this directory."""
WORTH_IT = 100
"""Tests that must come before the first that needs one of the fixtures."""
PATIENCE_S = 600
"""The longest that a fixture waits."""


class Ahead:
    """The process; absent until `start`, and where it is not worth it."""

    process: subprocess.Popen | None = None
    folder: tempfile.TemporaryDirectory | None = None
    files: tuple[str, ...] = ()

    def order(self, items: list) -> None:
        """Note the files of this directory, and sort: tests of other directories, those of `MEANWHILE`, the rest, and
        those of process groups, whose ranks wait for a compilation no longer than their group's timeout."""
        self.files = tuple(dict.fromkeys(item.path.stem for item in items if item.path.parent == HERE))
        items.sort(
            key=lambda item: (
                3
                if item.path.parent.name == "torch"
                else (item.path.parent == HERE) * (1 + (item.path.stem not in MEANWHILE))
            )
        )

    def start(self, items: list) -> None:
        """Begin, if the tests chosen give it time and there is a core for it."""
        needs = [name for name in SHARED if any(name in item.fixturenames for item in items)]
        first = next((i for i, item in enumerate(items) if set(SHARED) & set(item.fixturenames)), 0)
        if first < WORTH_IT or (os.cpu_count() or 1) < 2:
            return
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "graph.ahead", self.folder.name, ",".join(needs), ",".join(self.files)]
        places = [*map(str, (ROOT, ROOT / "tests", ROOT / "python" / "tools")), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        with open(Path(self.folder.name, "log"), "wb") as log:
            self.process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, name: str) -> None:
        """Until the graphs of a fixture are compiled, or the process has ended, or for `PATIENCE_S`."""
        until = time.monotonic() + PATIENCE_S
        while self.process is not None and time.monotonic() < until:
            if Path(self.folder.name, name).exists():
                return
            if self.process.poll() is not None:
                log = Path(self.folder.name, "log").read_text(errors="replace")
                print(f"graph.ahead ended with status {self.process.returncode}\n{log}", file=sys.stderr)
                return
            time.sleep(0.1)

    def stop(self) -> None:
        """End the process and what it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.folder.cleanup()
            self.process = None


def end_with_parent(parent: int) -> None:
    """Do not outlive the tests."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(folder: str, needs: str, files: str) -> None:
    """Compile, and make a file of each fixture's name as it is ready."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    from graph import stages, together

    for name in files.split(","):  # a file notes its graphs when it is imported
        importlib.import_module(f"graph.{name}")
    compile_all = {"together": together.compile_all, "stages": lambda: stages.compile_all(stages.all_variants())}
    for name in needs.split(","):
        compile_all[name]()
        Path(folder, name).touch()


if __name__ == "__main__":
    main(*sys.argv[1:4])
