"""The stress run of GPUs, on the host: its checker finds what is spoilt, its law is that of NumPy, rounds are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_virtual_ranks_of_the_host(tmp_path):
    """The self-test, and split rounds of which two are in flight; the last of them is compared with the reference."""
    tool, file = ROOT / "python" / "tools" / "gpu_stress.py", tmp_path / "stress.json"
    options = ["--on", "cpu", "--ranks", "3", "--rounds", "24", "--only", "2 in flight", "--output", str(file)]
    command = [sys.executable, str(tool), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert [line["spoilt"] for line in result["self_test"]] == [
        "tokens",
        "scales",
        "row_map",
        "src_info",
        "counts",
        "recv_weights",
        "y",
    ]
    (case,) = result["cases"]
    assert case["wrong"] == ""
    assert case["rounds"] >= 24
    assert case["rows"] > 1000
    assert "24 rounds of 1 cases, 0 replayed: all equal" in done.stdout
