"""The stress run of GPUs, on the host: its checker finds what is spoilt, its law is that of NumPy, rounds are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


CHOSEN = "2 in flight", "gathered"


def test_virtual_ranks_of_the_host(tmp_path):
    """The self-tests, split rounds of which two are in flight, and gathered ones; the last of them is compared with the
    reference."""
    tool, file = ROOT / "python" / "tools" / "gpu_stress.py", tmp_path / "stress.json"
    options = ["--on", "cpu", "--ranks", "3", "--rounds", "160", "--output", str(file)]
    command = [sys.executable, str(tool), *options, *(f"--only={word}" for word in CHOSEN)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    spoilt = {}
    for line in result["self_test"]:
        spoilt.setdefault(line["case"], []).append(line["spoilt"])
    checked = ["tokens", "scales", "row_map", "src_info", "counts", "recv_weights", "y"]
    of_gathered = ["tokens", "scales", "row_offsets", "counts", "src_info", "local_ids", "local_weights", "y"]
    assert spoilt == {"self-test": checked, "gathered self-test": of_gathered}
    cases = result["cases"]
    for word in CHOSEN:
        assert sum(case["rounds"] for case in cases if word in case["case"]) >= 24
    assert {case["wrong"] for case in cases} == {""}
    assert sum(case["rounds"] for case in cases) >= 160
    assert all(case["rows"] > 100 for case in cases)
    assert f"of {len(cases)} cases, 0 replayed: all equal" in done.stdout
