"""Measurements meant for a GPU run through on a CPU with a tiny model: time on a GPU is not to be lost to typos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_measurements_at_the_8b_shape_run_through_in_tiny() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_8b.py"), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [row for row in rows if "error" in row]
    names = " ".join(row["what"] for row in rows)
    for part in (
        "bandwidth",
        "forward of transformers' layers, 8 rows",
        "forward, 8 rows",
        "drafting, specblock",
        "drafting, eagle3",
        "cycle, plain",
        "swap",
    ):
        assert part in names
    assert all(row["iqr_ms"] >= 0 and row["ms"] > 0 for row in rows if "ms" in row)
    swap = next(row for row in rows if "cycle_ms" in row)
    assert swap["running"] > 0 and swap["tensors_moved"] == 0


_WITHOUT_EXTRAS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hypothesis", "ray", "redis", "pydantic", "fastapi", "typer", "uvicorn"}:
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, "scripts")
import pytest
import gpu_check
gpu_check.import_from_checkout()
own_main = pytest.main
pytest.main = lambda args: own_main([*args, "--collect-only", "-p", "no:hypothesispytest", "-p", "no:timeout"])
sys.exit(0 if gpu_check.run_tests("cuda") else 1)
"""


def test_the_tests_for_a_gpu_need_nothing_that_a_bare_machine_has_not() -> None:
    command = [sys.executable, "-c", _WITHOUT_EXTRAS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_synchronisation" in done.stdout and "test_graphs" in done.stdout
