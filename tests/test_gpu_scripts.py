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
        "copy bandwidth",
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
