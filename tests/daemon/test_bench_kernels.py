from __future__ import annotations

import json

import pytest

from specblock.cuda_ext.native import native_available
from specblock.daemon import bench_kernels
from specblock.daemon.bench_kernels import KernelRow, compare, run, table


def test_sides_alternate_and_medians_are_kept() -> None:
    order: list[str] = []
    row = compare("one", "1 row", lambda: order.append("native"), lambda: order.append("reference"))
    assert order[:4] == ["native", "reference"] * 2 and len(order) == 2 * 34
    assert row.native_middle_ms[0] <= row.native_ms <= row.native_middle_ms[1]


def test_the_table_says_how_many_times_quicker() -> None:
    assert "2.50" in table({}, [KernelRow("one", "1 row", 2.0, (1, 3), 5.0, (4, 6))])


def test_without_the_library_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "native_available", lambda: False)
    said: list[str] = []
    assert run("nowhere", False, said.append) == 4 and "not built" in said[0]


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_the_whole_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "_ROUNDS", 2)
    monkeypatch.setattr(bench_kernels, "_ROWS", (1, bench_kernels._ROWS[-1]))  # the largest must fit what is built
    monkeypatch.setattr(bench_kernels, "_PREFIX_TOKENS", (16,))
    monkeypatch.setattr(bench_kernels, "_LAYERS", 1)
    said: list[str] = []
    assert run("models/demo-target", True, said.append) == 0
    found = json.loads(said[-1])
    assert {row["operation"] for row in found["rows"]} >= {
        "tree attention", "norm", "target forward, float32", "best drafts", "expansion", "the target's choice",
        "acceptance walk", "KV commit", "1 layers",
    }  # fmt: skip
    assert found["facts"]["native_kernels"]
