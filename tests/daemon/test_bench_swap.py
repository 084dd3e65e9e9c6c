"""``specblockd bench swap``: stalls, memory, and the same text whatever is swapped in."""

from __future__ import annotations

import json
from mmap import mmap
from pathlib import Path

import numpy as np
import pytest

from specblock.daemon.bench_swap import SwapSettings, lines, resident_bytes, run, summary

MIB = 2**20


def test_growth_is_told_from_noise_and_warming_up_is_left_out() -> None:
    random = np.random.default_rng(0)
    flat = [int((900 + random.normal()) * MIB) for _ in range(500)]
    leaking = [size + number * MIB // 10 for number, size in enumerate(flat)]
    warming = [*(300 * MIB for _ in range(90)), *flat[90:]]
    still, grown, warm = (summary([0.002] * 500, one, 0.02, 7, 1) for one in (flat, leaking, warming))
    assert abs(still.growth_mib_per_100_swaps) < 4 * still.growth_se < 0.5
    assert grown.growth_mib_per_100_swaps == pytest.approx(10, abs=0.5)
    assert grown.resident_mib_last - grown.resident_mib_first == pytest.approx(35, abs=3)
    assert warm.resident_mib_first == pytest.approx(900, abs=1)
    assert (still.stall_ms_p50, still.stall_ms_max, still.cycle_ms) == (2.0, 2.0, 20.0)
    assert "1 of 7 answers differ" in lines(still)[-1]
    with pytest.raises(ValueError, match="at least 10"):
        summary([0.1] * 9, flat[:9], 0.02, 1, 0)


def test_memory_of_this_process_is_seen() -> None:
    before = resident_bytes()
    with mmap(-1, 64 * MIB) as fresh:  # an allocator may hand out what an earlier test has given back
        fresh.write(b"\1" * (64 * MIB))
        assert resident_bytes() - before > 48 * MIB


def test_the_command_swaps_while_requests_run(tmp_path: Path) -> None:
    said: list[str] = []
    assert run(SwapSettings(swaps=10, clients=2, new_tokens=8, out=tmp_path), True, said.append) == 0
    result = json.loads(said[-1])
    [row] = result["rows"]
    assert row["swaps"] == len(result["stall_ms"]) == len(result["resident_mib"]) == 10
    assert row["compared"] >= 10 and row["different_answers"] == 0
    assert 0 < row["stall_ms_p50"] <= row["stall_ms_max"] and row["cycle_ms"] > 0
    page = (tmp_path / "swap.html").read_text()
    assert page.count("<svg") == 1 and "stall_ms_max" in page and (tmp_path / "swap.json").is_file()
