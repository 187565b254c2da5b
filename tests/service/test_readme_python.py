"""README's Python works as it stands there: its snippets, one after the other, as a script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    """Catches a first page whose code fails. Shortened are only the numbers of steps."""
    section = README.partition("## Five minutes in Python")[2].partition("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len(snippets) == 6
    code = re.sub(r"total_env_steps=[0-9_]+", "total_env_steps=2_000", "\n".join(snippets))
    (tmp_path / "readme.py").write_text(f"{code}\nprint('reached the end', policy.get_memory()[0][0].shape)\n")
    done = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reached the end (2, 128)" in done.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 5
