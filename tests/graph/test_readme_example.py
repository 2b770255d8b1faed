"""The README's example runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_example_prints_true(tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"## Example\n\n```python\n(.*?)```", text, re.DOTALL)
    assert ".venv/bin/python example.py" in text
    program = tmp_path / "example.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "True"
    assert len(code.strip().splitlines()) <= 25
