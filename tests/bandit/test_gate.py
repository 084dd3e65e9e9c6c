"""The gate: its error is what it promises, its power is useful, and no domain may pay for the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.actions import CompareReport, PairedReplay
from specblock.bandit.config import GateConfig
from specblock.bandit.gate import GateRow, gate_rows, judge, lower_bound, pooled_saving

SCALE_S = 0.01


def rows(random: np.random.Generator, count: int, effect: float, sd: float = 0.12, domain: str = "a") -> list[GateRow]:
    """Conversations of 64 tokens; the new version saves ``effect`` of the old one's cost, with paired noise."""
    found = []
    for i in range(count):
        old = 64 * SCALE_S * (1 + 0.2 * random.normal())
        new = old - 64 * SCALE_S * (effect + sd * random.normal())
        found.append(
            GateRow(
                conversation_id=f"{domain}{i}",
                domain=domain,
                time_s=float(i),
                tokens=64,
                cost_old_s=max(old, 1e-6),
                cost_new_s=max(new, 1e-6),
            )
        )
    return found


def ever_passes(found: list[GateRow], config: GateConfig) -> bool:
    """Looks after every conversation, as an impatient operator would; a decision ends it."""
    for count in range(config.min_conversations, len(found) + 1, 4):
        verdict = judge(found[:count], SCALE_S, config).verdict
        if verdict != "undecided":
            return verdict == "pass"
    return False


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_a_candidate_that_saves_nothing_passes_at_most_at_rate_alpha_under_repeated_looks(alpha: float) -> None:
    random = np.random.default_rng(7)
    config = GateConfig(alpha=alpha, max_domain_loss=0.9)
    runs = 200
    passed = sum(ever_passes(rows(random, 60, 0.0), config) for _ in range(runs))
    # Two standard errors above alpha would still be a fair coin of that bias.
    assert passed <= runs * alpha + 2 * (runs * alpha * (1 - alpha)) ** 0.5


def test_ten_per_cent_is_mostly_found_with_sixty_conversations() -> None:
    random = np.random.default_rng(8)
    passed = sum(ever_passes(rows(random, 60, 0.1), GateConfig()) for _ in range(60))
    assert passed >= 48


def test_a_slower_candidate_fails() -> None:
    evidence = judge(rows(np.random.default_rng(9), 80, -0.1), SCALE_S, GateConfig(max_domain_loss=0.9))
    assert evidence.verdict == "fail" and evidence.upper < 0 and "slower" in evidence.reason


def test_the_bound_covers_the_mean() -> None:
    random = np.random.default_rng(10)
    missed = sum(lower_bound(np.clip(random.normal(0.55, 0.2, 80), 0, 1), 0.1) > 0.55 + 0.005 for _ in range(200))
    assert missed <= 20 + 2 * 18**0.5


def test_the_bound_rises_with_evidence_and_is_zero_without() -> None:
    units = np.full(200, 0.7)
    bounds = [lower_bound(units[:n], 0.05) for n in (0, 20, 100, 200)]
    assert bounds[0] == 0 and bounds == sorted(bounds) and 0.65 < bounds[-1] < 0.7


def test_a_domain_that_loses_fails_the_candidate_whatever_the_others_gain() -> None:
    random = np.random.default_rng(11)
    found = [*rows(random, 60, 0.3, 0.03), *rows(random, 20, -0.2, 0.03, "b")]
    evidence = judge(found, SCALE_S, GateConfig())
    assert evidence.verdict == "fail" and "domain b" in evidence.reason
    few = [*rows(random, 60, 0.3, 0.03), *rows(random, 2, -0.2, 0.03, "b")]
    assert judge(few, SCALE_S, GateConfig()).verdict == "pass", "two conversations are no evidence against it"


def test_too_few_and_too_many_conversations() -> None:
    random = np.random.default_rng(12)
    assert judge(rows(random, 4, 0.9, 0.01), SCALE_S, GateConfig()).verdict == "undecided"
    assert judge([], SCALE_S, GateConfig()).verdict == "undecided"
    nothing = judge(rows(random, 60, 0.0), SCALE_S, GateConfig(max_conversations=60, max_domain_loss=0.9))
    assert nothing.verdict == "fail" and "no saving shown" in nothing.reason


def test_costs_are_cycles_times_the_time_of_a_cycle_in_order_of_arrival() -> None:
    def replay(name: str, time_s: float, old: int, new: int) -> PairedReplay:
        return PairedReplay(
            conversation_id=name,
            domain="a",
            time_s=time_s,
            tokens=64,
            cycles_old=old,
            cycles_new=new,
            live_version="v1",
            live_cycles=old,
        )

    report = CompareReport(
        rows=(replay("late", 9.0, 20, 10), replay("early", 1.0, 40, 30), replay("empty", 0.0, 0, 0)),
        cycle_s_old=0.1,
        cycle_s_new=0.2,
        device_s=1.0,
    )
    first, second = gate_rows(report)
    assert (first.conversation_id, second.conversation_id) == ("early", "late")
    assert (first.cost_old_s, first.cost_new_s) == (4.0, 6.0)
    saving = pooled_saving([first, second])
    assert saving.relative == pytest.approx(1 - 8 / 6) and saving.s_per_token == pytest.approx(-2 / 128)


def test_a_few_conversations_that_look_bad_by_chance_neither_fail_nor_pass_a_candidate() -> None:
    """A twentieth may be lost; six conversations that lost 8 % on average with a scatter of 12 % do not show it."""
    random = np.random.default_rng(12)
    gains, config = rows(random, 60, 0.3, 0.03), GateConfig()
    few = rows(random, 6, 0.0, 0.12, "b")
    off = 0.08 * 64 * SCALE_S - sum(r.cost_new_s - r.cost_old_s for r in few) / len(few)
    few = [replace(row, cost_new_s=row.cost_new_s + off) for row in few]
    evidence = judge([*gains, *few], SCALE_S, config)
    assert evidence.lower > 0 and evidence.verdict == "undecided" and "it may cost 7.8%" in evidence.reason
    more = rows(random, 60, 0.0, 0.03, "b")
    assert judge([*gains, *more], SCALE_S, config).verdict == "pass"
    last = replace(config, max_conversations=66)
    assert judge([*gains, *few], SCALE_S, last).verdict == "fail", "and it does not pass at the end"
