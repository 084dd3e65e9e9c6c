"""The demo's arithmetic and page on made-up answers; the real thing runs in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from specblock.bandit.ledger import LedgerRecord
from specblock.daemon.collect import Prompt
from specblock.daemon.demo_report import write_report
from specblock.daemon.demo_summary import Run, paired_gain, summary
from specblock.daemon.demo_traffic import Answer, phase


def answers(version: str, cycles: list[int], charged_s: float = 0.0) -> tuple[Answer, ...]:
    prompts = [Prompt("cpp", f"int x{i}") for i in range(20)]
    return tuple(
        Answer(
            question=question, version=version, tokens=64, cycles=count, serving_s=0.5 * (i + 1),
            charged_s=charged_s, at_s=float(i),
        )
        for i, (question, count) in enumerate(zip(phase("cpp", prompts, 0, 20, 10), cycles, strict=True))
    )  # fmt: skip


def test_phase_repeats_the_head_and_asks_the_tail_once() -> None:
    plan = phase("cpp", [Prompt("cpp", str(i)) for i in range(10)], 100, 12, 4)
    assert [q.prompt for q in plan[:7]] == ["0", "1", "2", "3", "4", "5", "0"]
    assert [q.prompt for q in plan if q.fresh] == ["6", "7", "8", "9"]
    assert len({q.seed for q in plan}) == 16 and plan[0].number == 100


def test_gain_is_paired_and_counts_only_updated_fresh_answers() -> None:
    static = Run(name="static", answers=answers("v000000-base", [40, 32] * 15), records=(), parity=None)
    adaptive = Run(name="adaptive", answers=answers("v000001-full", [32, 32] * 15), records=(), parity=None)
    row = paired_gain(static, adaptive, "cpp")
    assert row["requests"] == 10
    assert row["gain"] == pytest.approx(36 / 32 - 1) and row["lower"] < row["gain"] < row["upper"]
    assert paired_gain(static, static, "cpp") == {"requests": 0}


def test_page_holds_both_plots_and_the_decisions(tmp_path: Path) -> None:
    record = LedgerRecord(
        decision_id="d000001", stage="promoted", time_s=0.0, action="probe", candidate_version="v000001-full",
        base_version="v000000-base",
    )  # fmt: skip
    static = Run(name="static", answers=answers("v000000-base", [40] * 30), records=(), parity=None)
    adaptive = Run(
        name="adaptive",
        answers=answers("v000000-base", [40] * 30)[:15] + answers("v000001-full", [30] * 30, 5.0)[15:],
        records=(record,),
        parity=None,
    )
    facts = summary(static, adaptive, 1, "cpu", "float32")
    assert (facts["facts"]["threads"], facts["facts"]["dtype"]) == (1, "float32")
    assert facts["promoted"] == ["v000001-full"]
    assert facts["static"]["net_tokens_per_s"] == pytest.approx(30 * 64 / 15)
    assert facts["adaptive"]["net_tokens_per_s"] == pytest.approx(30 * 64 / 20)
    page = write_report(tmp_path / "report.html", static, adaptive, facts).read_text()
    assert page.count("<svg") == 2 and "v000001-full serves instead of v000000-base" in page
    assert "http://" not in page.split("</style>")[1].replace("http://www.w3.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("http://purl.org", "")
