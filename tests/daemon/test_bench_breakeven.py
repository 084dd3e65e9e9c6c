"""Break-even arithmetic, and that the daemon's own rule changes its mind where the arithmetic says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.actions import CompareReport, PairedReplay, TrainReport
from specblock.bandit.config import Arm, CostConfig, GateConfig, PolicyConfig
from specblock.bandit.decision import ABANDON, CONTINUE, PROBE, SKIP
from specblock.bandit.parity import ParityEvidence
from specblock.daemon.breakeven import (
    SCORED_CONVERSATIONS,
    Traffic,
    Update,
    break_even,
    break_even_interval,
    make_row,
    net_s,
    own_rows,
    saving_draws,
)
from specblock.daemon.breakeven_ladder import Situation, arm_rung, cost_of, rung, trains_from_s

CYCLE_S = 0.02
HEAD = Arm(name="head", patterns=("*head*",), steps=20, learning_rate=1e-3)
FULL = Arm(name="full", patterns=("*",), steps=24, learning_rate=1e-3, prior_gain_sd=0.03, drop_recovery=0.7)
POLICY = PolicyConfig(
    arms=(Arm(name="skip"), HEAD, FULL),
    budget_device_s_per_hour=3600.0,
    probe_fraction=0.2,
    cost=CostConfig(price=1.0, interference=0.2),
)
TRAFFIC = Traffic(s_per_token=0.01, tokens_per_request=64.0)
PARITY = ParityEvidence(
    verdict="ok", difference=0.0, lower=0.0, upper=0.0, live_acceptance=2.0, replay_acceptance=2.0, conversations=32,
    live_cycles=1000,
)  # fmt: skip
SITUATION = Situation(
    domain="cpp", version="v000000-base", acceptance=1.8, reference=2.2, s_per_token=0.01, cycles=1000, num_train=64,
    num_heldout=32, parity=PARITY,
)  # fmt: skip


def report(pairs: list[tuple[int, int]], domain: str = "cpp", device_s: float = 5.0) -> CompareReport:
    rows = tuple(
        PairedReplay(
            conversation_id=f"{domain}-{i}", domain=domain, time_s=float(i), tokens=64, cycles_old=old, cycles_new=new,
            live_version="v0", live_cycles=old,
        )
        for i, (old, new) in enumerate(pairs)
    )  # fmt: skip
    return CompareReport(rows=rows, cycle_s_old=CYCLE_S, cycle_s_new=CYCLE_S, device_s=device_s)


def trained(seconds: float, positions: int) -> TrainReport:
    return TrainReport(
        candidate_version="c", positions=positions, train_s=seconds, device_s=seconds, cutoff_time_s=0.0
    )  # fmt: skip


def an_update(
    saved: int = 4, trial_saved: int = 2, count: int = 32, arm: str = "full", train_s: float = 100.0
) -> Update:
    """Conversations of 36 and 44 cycles in turn that all save ``saved`` of them, but for a little scatter."""
    old = [36 if i % 2 else 44 for i in range(count)]

    def pairs(less: int) -> list[tuple[int, int]]:
        return [(n, n - less + (i % 4 < 2) - (i % 4 > 1)) for i, n in enumerate(old)]

    return Update(
        domain="cpp",
        arm=arm,
        probe=trained(0.2 * train_s, 2000),
        rest=trained(0.8 * train_s, 8000),
        trial=report(pairs(trial_saved)),
        final=report(pairs(saved)),
        stall_s=0.02,
        publish_s=0.5,
        accepted=(1.8, 2.0),
        served_as_judged=1.0,
    )


def cost_s(update: Update) -> float:
    return cost_of(SITUATION, update, POLICY)


def test_break_even_is_where_net_value_changes_its_sign() -> None:
    phase_s = break_even(0.1, 120.0)
    assert phase_s is not None and phase_s == pytest.approx(1200.0)
    assert net_s(0.1, 120.0, phase_s) == pytest.approx(0.0)
    assert net_s(0.1, 120.0, 0.9 * phase_s) < 0 < net_s(0.1, 120.0, 1.1 * phase_s)
    assert break_even(0.0, 120.0) is None and break_even(-0.1, 120.0) is None
    assert break_even(0.1, 0.0) == 0.0


def test_cost_is_what_the_rule_charges() -> None:
    dear, cheap = (cost_s(an_update(train_s=seconds)) for seconds in (200.0, 100.0))
    assert dear - cheap == pytest.approx(1.2 * 100.0, rel=0.01), "training at its price, with interference"
    assert cheap > 120.0 + 5.0, "scoring is charged too"
    free = replace(POLICY, cost=replace(POLICY.cost, price=0.0))
    assert cost_of(SITUATION, an_update(), free) == pytest.approx(0.2 * 100.0 + 0.02, rel=0.01)
    more = an_update(count=4 * SCORED_CONVERSATIONS)
    assert more.score_s == pytest.approx(5.0 / 4), "conversations replayed for the interval alone are not charged"


def test_intervals_are_paired_over_conversations() -> None:
    rows = own_rows(report([(20, 18), (40, 36), (80, 72)]), "cpp")
    draws = saving_draws(rows, 0)
    assert draws.std() == pytest.approx(0.0, abs=1e-12), "every conversation saves a tenth, whatever its length"
    assert draws.mean() == pytest.approx(0.1)
    mixed = saving_draws(own_rows(report([(40, 30), (40, 42)] * 10), "cpp"), 0)
    expected_sd = 0.15 / np.sqrt(20)
    assert mixed.mean() == pytest.approx(0.1, abs=0.01) and mixed.std() == pytest.approx(expected_sd, rel=0.1)
    assert np.array_equal(mixed, saving_draws(own_rows(report([(40, 30), (40, 42)] * 10), "cpp"), 0))


def test_the_end_of_the_interval_that_may_never_come_is_said_so() -> None:
    sure = break_even_interval(np.linspace(0.05, 0.15, 1001), 100.0)
    assert sure[0] == pytest.approx(100.0 / 0.1475) and sure[1] == pytest.approx(100.0 / 0.0525)
    doubtful = break_even_interval(np.linspace(-0.05, 0.15, 1001), 100.0)
    assert doubtful[0] is not None and doubtful[1] is None
    assert break_even_interval(np.linspace(-0.15, -0.05, 1001), 100.0) == (None, None)


def test_a_row_holds_gain_cost_and_break_even_in_three_units() -> None:
    update = an_update(saved=4)
    row = make_row(update, TRAFFIC, cost_s(update), GateConfig(), seed=0)
    assert row.saving == pytest.approx(0.1) and row.s_per_token_new == pytest.approx(0.009)
    assert row.saving_interval[0] < 0.1 < row.saving_interval[1] and row.loses == 0
    assert row.break_even_s == pytest.approx(cost_s(update) / 0.1)
    assert row.tokens == pytest.approx(row.break_even_s / 0.01)
    # The same said without shares: that many tokens, each cheaper by the difference, win back the cost.
    assert row.tokens * (row.s_per_token_old - row.s_per_token_new) == pytest.approx(row.cost_s)
    assert row.requests == pytest.approx(row.tokens / 64)
    assert row.gate == "pass" and row.trial_saving == pytest.approx(0.05)


def test_other_kinds_of_text_count_neither_for_gain_nor_for_the_gate() -> None:
    update = an_update(saved=4)
    lost = report([(40, 50)] * 8, domain="python")
    both = replace(update, final=replace(update.final, rows=update.final.rows + lost.rows))
    row = make_row(both, TRAFFIC, cost_s(update), GateConfig(), seed=0)
    assert row.saving == pytest.approx(0.1) and row.conversations == 32 and row.gate == "pass"
    assert row.others == {"python": pytest.approx(-0.25)}
    with pytest.raises(ValueError, match="javascript"):
        make_row(replace(update, domain="javascript"), TRAFFIC, cost_s(update), GateConfig(), seed=0)


def test_an_update_that_saves_nothing_never_pays() -> None:
    update = an_update(saved=-4)
    row = make_row(update, TRAFFIC, cost_s(update), GateConfig(), seed=0)
    assert row.break_even_s is None and row.tokens is None and row.requests_interval == (None, None)
    assert row.loses == 1 and row.gate == "fail"
    assert trains_from_s(SITUATION, update, POLICY) is None


def test_the_rule_switches_at_the_measured_break_even() -> None:
    """Without a margin for doubt the daemon's rule and the arithmetic must draw about the same line.

    Not exactly: the rule charges the gate by how many conversations this very gain takes to be told from none.
    """
    undoubting = replace(POLICY, confidence=0.5)
    for update in (an_update(saved=4), an_update(saved=4, train_s=30.0, arm="head")):
        row = make_row(update, TRAFFIC, cost_s(update), GateConfig(), seed=0)
        assert row.break_even_s is not None
        assert trains_from_s(SITUATION, update, undoubting) == pytest.approx(row.break_even_s, rel=0.1)
        below = arm_rung(SITUATION, update, undoubting, 0.9 * row.break_even_s)
        above = arm_rung(SITUATION, update, undoubting, 1.1 * row.break_even_s)
        assert (below.action, above.action) == (SKIP, PROBE) and below.net_s < 0 < above.net_s
        assert above.net_s == pytest.approx(net_s(row.saving, row.cost_s, 1.1 * row.break_even_s), abs=0.1 * row.cost_s)


def test_doubt_moves_the_line_later() -> None:
    update = an_update(saved=4)
    sure, doubtful = (trains_from_s(SITUATION, update, replace(POLICY, confidence=c)) for c in (0.5, 0.9))
    assert sure is not None and doubtful is not None and doubtful > 1.05 * sure
    few = an_update(saved=4, count=4)
    noisier = trains_from_s(SITUATION, few, POLICY)
    assert noisier is None or noisier > doubtful


def test_a_choice_between_arms_and_what_keeps_the_rule_from_training() -> None:
    cheap, dear = an_update(saved=2, arm="head", train_s=5.0), an_update(saved=6, train_s=200.0)
    short, long = (rung(SITUATION, [cheap, dear], POLICY, s) for s in (1800.0, 86_400.0))
    assert (short.action, short.arm) == (PROBE, "head") and (long.action, long.arm) == (PROBE, "full")
    assert rung(SITUATION, [cheap, dear], POLICY, 60.0).action == SKIP
    thin = arm_rung(replace(SITUATION, num_train=4), dear, POLICY, 86_400.0)
    assert thin.action == SKIP and "training conversations" in thin.reason
    broken = arm_rung(replace(SITUATION, parity=replace(PARITY, verdict="broken")), dear, POLICY, 86_400.0)
    assert broken.action == SKIP, "a fault is never trained on, however long it stays"


def test_the_trial_is_judged_again() -> None:
    good = arm_rung(SITUATION, an_update(saved=4, trial_saved=3), POLICY, 7200.0)
    bad = arm_rung(SITUATION, an_update(saved=4, trial_saved=-8), POLICY, 7200.0)
    assert (good.action, good.after_trial) == (PROBE, CONTINUE)
    assert (bad.action, bad.after_trial) == (PROBE, ABANDON)
