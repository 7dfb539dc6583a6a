"""Every tutorial runs, as the docs run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs(path):
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
