"""The planner against known laws: it finds the best sizes, gives up on a useless drafter, and comes back."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specblock.cuda_ext.tree import DraftTree, Offers, place_rows
from specblock.daemon.cost_curve import CostCurve, Phase
from specblock.daemon.cycle_cost import CycleCost
from specblock.daemon.cycle_price import CyclePrice
from specblock.daemon.extensions import compare
from specblock.daemon.planner_types import Cycle, CycleResult, Extension, PlannerSettings
from specblock.daemon.probe_budget import ProbeBudget
from specblock.daemon.speculation import GateSettings, Participant, SpeculationGate
from specblock.daemon.standing_choice import StandingChoice
from specblock.daemon.tree_outlook import Growth, Stop, TreeOutlook
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.plan import NO_SPECULATION, DraftPlan
from specblock.drafter.survival import Floats, LeafGain
from tests.daemon.drafting_world import BUDGET, LEAF_CAP, SETTINGS, Clock, World, curve, run


def planner_of(costs: CostCurve, clock: Clock, seed: int = 0, **changes: object) -> TreePlanner:
    return TreePlanner(costs, SETTINGS, clock, Random(seed), replace(PlannerSettings(), **changes))  # type: ignore[arg-type]


# Sizes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 120), st.floats(0, 1))
def test_sizes_stay_within_the_settings(seed: int, batch: int, width: int, share_valid: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    clock = Clock()
    planner = planner_of(curve(), clock, seed, explore_share=0.5, plain_share=0.0)
    scores = -5 * torch.rand(batch, width, generator=generator)
    scores = scores.masked_fill(torch.rand(batch, width, generator=generator) > share_valid, -torch.inf)
    planner.begin([Participant(f"r{b}", "any") for b in range(batch)])
    leaves = planner.leaves(0, scores)
    assert 0 <= leaves <= min(LEAF_CAP, width)
    if not bool(torch.isfinite(scores).any()):
        assert leaves == 0
    later = scores.new_full((batch, 3 * leaves), -2.0)
    nodes = planner.nodes(torch.cat([scores, later], dim=1))
    assert 1 <= nodes <= BUDGET
    assert not planner.more(1), "no block beyond the settings'"


def test_node_budget_is_the_optimum_over_all_budgets() -> None:
    """With nothing learned yet, survival is the prior and the optimum can be computed by hand."""
    clock, costs = Clock(), curve()
    planner = planner_of(costs, clock, explore_share=0.0, plain_share=0.0)
    scores = -4 * torch.rand(2, 60, generator=torch.Generator().manual_seed(3))
    planner.begin([Participant("a", "any"), Participant("b", "any")])
    clock.now_s += 0.003
    chosen = planner.nodes(scores)
    p = planner.survival.probability(scores.sort(dim=1, descending=True).values, block=0).double()

    rate = 2 * GateSettings().prior_speed / costs.plain_s(2)

    def value(n: int) -> float:
        return float(p[:, :n].sum()) / rate - costs.verify_s(n + 1, 2)

    assert chosen == max(range(1, BUDGET + 1), key=value)


def test_dearer_rows_never_mean_more_nodes() -> None:
    scores = -4 * torch.rand(1, 60, generator=torch.Generator().manual_seed(3))
    chosen = []
    for per_row_s in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3):
        clock = Clock()
        planner = planner_of(curve(verify_per_row_s=per_row_s, flat_rows=4), clock, explore_share=0.0, plain_share=0.0)
        planner.begin([Participant("a", "any")])
        clock.now_s += 0.003
        chosen.append(planner.nodes(scores))
    assert chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]


@pytest.mark.parametrize(
    ("costs", "boast", "batch"),
    [
        (curve(), 1.0, 1),
        (curve(block_s=5e-4), 1.0, 1),  # drafting is cheap: a second block pays
        (curve(verify_per_row_s=1e-4, flat_rows=32), 1.6, 1),  # the drafter's scores are far too low
        (curve(), 0.6, 4),  # too high, and a batch
    ],
)
def test_it_comes_within_2_5_percent_of_the_best_fixed_plan(costs: CostCurve, boast: float, batch: int) -> None:
    world = World(cycles=1300, boast=boast)
    rates = world.fixed_rates(costs, batch)
    reached = []
    for seed in range(3):  # what it explores is chance, and one seed may be lucky
        clock = Clock()
        planner = planner_of(costs, clock, seed=seed)
        run(planner, clock, world, costs, batch, range(400))
        reached.append(run(planner, clock, world, costs, batch).rate / max(rates.values()))
    assert sum(reached) / len(reached) > 0.975 and min(reached) > 0.95
    status = planner.status()
    assert status.explored_cycles > 0 and status.plain_share < 0.05
    best = max(rates, key=lambda plan: rates[plan])
    assert status.mean_nodes == pytest.approx(best.node_budget, rel=0.35)


def test_a_run_can_be_repeated() -> None:
    ledgers = []
    for _ in range(2):
        clock = Clock()
        ledgers.append(run(planner_of(curve(), clock, seed=5), clock, World(cycles=150), curve()))
    assert ledgers[0] == ledgers[1]


def test_wrong_profiles_are_corrected() -> None:
    """The curve says that a second block is nearly free; it costs two thirds of a verification."""
    told, real = curve(block_s=1e-3), curve(block_s=6e-3)
    world = World(cycles=1000)
    clock = Clock()
    planner = planner_of(told, clock)
    run(planner, clock, world, real, 1, range(300))
    ledger = run(planner, clock, world, real)
    assert ledger.rate > 0.97 * max(world.fixed_rates(real, 1).values())


# Whether to speculate


@pytest.mark.parametrize("batch", [1, 4])
def test_a_useless_drafter_costs_next_to_nothing(batch: int) -> None:
    world, costs, clock = World(cycles=2000, quality=0.0), curve(), Clock()
    planner = planner_of(costs, clock)
    run(planner, clock, world, costs, batch, range(100 * batch))
    ledgers = [run(planner, clock, world, costs, batch) for _ in range(3 * batch)]
    plain = batch / costs.plain_s(batch)
    assert sum(x.tokens for x in ledgers) / sum(x.seconds for x in ledgers) > 0.97 * plain
    status = planner.status()
    assert 0 < status.probe_share < 0.1 and 0 < planner.gate.lost_share <= 1.05 * GateSettings().probe_share
    assert status.plain_share > 0.95
    assert planner.gate.probes > 0


@pytest.mark.parametrize("batch", [1, 4])
def test_a_hopeless_drafter_goes_off_early(batch: int) -> None:
    gate = SpeculationGate(GateSettings(min_cycles=24))
    cycles = 0
    while gate.is_on("x"):
        gate.record([Participant(f"r{b}", "x") for b in range(batch)], [True] * batch, [1] * batch, 0.02, 0.02, 0.01)
        cycles += 1
    assert cycles == {1: 33, 4: 4}[batch], "one request alone may just suit the drafter badly"


@pytest.mark.parametrize(("every", "stall_s", "goes_off"), [(5, 0.1, True), (100, 0.1, False)])
def test_cycles_that_the_curves_do_not_explain_are_charged_all_the_same(
    every: int, stall_s: float, goes_off: bool
) -> None:
    """Drafting that takes far longer every now and then: the corrected curve, a geometric mean, hardly sees it."""
    costs, clock = curve(), Clock()
    planner = planner_of(costs, clock, explore_share=0.0, plain_share=0.1)
    for number in range(600):
        drafts = planner.begin([Participant("r", "x")])[0]
        if not drafts:
            clock.now_s += costs.plain_s(1)
            planner.record(CycleResult(0.0, costs.plain_s(1), 0.0, committed_tokens=[1]))
            continue
        begin_s = clock.now_s
        clock.now_s += 2e-3 + (stall_s if number % every == every - 1 else 0.0)
        nodes = planner.nodes(torch.log(torch.tensor([[0.9, 0.7, 0.2]])))
        draft_s, verify_s = clock.now_s - begin_s, costs.verify_s(nodes + 1, 1)
        clock.now_s += verify_s
        planner.record(CycleResult(draft_s, verify_s, 5e-4, [2], *_accepting_one(nodes)))
    assert planner.speculates("x") != goes_off


def _accepting_one(nodes: int) -> tuple[DraftTree, torch.Tensor, list[int]]:
    rows = torch.arange(nodes + 1)[None]
    tree = DraftTree(
        rows,
        (rows - 1).clamp(min=0),
        rows,
        -0.1 * rows.float(),
        0 * rows - (rows == 0).long(),
        rows,
        torch.tensor([nodes + 1]),
    )
    return tree, torch.tensor([[0, 1]]), [1]


def test_one_stall_does_not_end_speculation_of_a_batch() -> None:
    gate, eight = SpeculationGate(), [Participant(f"r{b}", "x") for b in range(8)]
    for number in range(6):  # pays 1.3 times, but the first cycle takes twice as long, the most that is counted
        seconds = 0.0154 * (2 if number == 0 else 1)
        gate.record(eight, [True] * 8, [2] * 8, seconds, seconds, 0.01)
        assert gate.is_on("x")


@pytest.mark.parametrize(("acceptance", "speed"), [(1.6, 1.2), (2.2, 1.2), (3.0, 1.2), (3.0, 1.3)])
def test_what_pays_is_hardly_ever_taken_for_hopeless(acceptance: float, speed: float) -> None:
    wrong = 0
    for seed in range(200):
        draws, gate = np.random.default_rng(seed), SpeculationGate()
        for tokens in draws.geometric(1 / acceptance, size=23).tolist():
            gate.record([Participant("r", "x")], [True], [tokens], acceptance / speed, acceptance / speed, 1.0)
        wrong += not gate.is_on("x")
    assert wrong <= 8


def test_bad_luck_alone_does_not_end_speculation_early() -> None:
    gate = SpeculationGate(GateSettings(min_cycles=24))
    gate.record([Participant("r0", "x")], [True], [4], 0.02, 0.02, 0.01)
    for number in range(11):  # 2.0 tokens a cycle pay here; a dozen of cycles at 1.6 may be chance
        gate.record([Participant(f"r{number % 3}", "x")], [True], [2], 0.02, 0.02, 0.01)
        gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
        assert gate.is_on("x")
    gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
    gate.record([Participant("r1", "x")], [True], [1], 0.02, 0.02, 0.01)
    assert not gate.is_on("x")  # by now the estimate itself counts


def test_one_request_that_suits_the_drafter_badly_does_not_end_speculation() -> None:
    """It would have to win 1.9 tokens a cycle and wins 1.35; the others win 3."""
    gate, owed = SpeculationGate(), 0.0
    for name, tokens in (("first", 1.35), ("good", 3.0), ("bad", 1.35), ("good again", 3.0)):
        for _ in range(45):
            owed += tokens
            gate.record([Participant(name, "x")], [True], [int(owed)], 0.019, 0.019, 0.01)
            owed -= int(owed)
            assert gate.is_on("x"), name
    for number in range(200):
        gate.record([Participant(f"bad {number // 45}", "x")], [True], [1], 0.019, 0.019, 0.01)
    assert not gate.is_on("x"), "several of them do"


def test_it_comes_back_when_a_new_version_is_good() -> None:
    costs, clock = curve(), Clock()
    planner = planner_of(costs, clock)
    run(planner, clock, World(cycles=400, quality=0.0), costs)
    assert planner.status().plain_share > 0.4 and not planner.speculates("any")
    planner.drafter_changed()
    good = World(cycles=60)
    ledger = run(planner, clock, good, costs)
    assert (
        ledger.drafted >= 48
    )  # the probe starts at once, speculation stays on, and some cycles are looks at plain ones
    assert planner.speculates("any")


def test_it_notices_a_better_drafter_without_being_told() -> None:
    costs, clock = curve(), Clock()
    planner = planner_of(costs, clock)
    run(planner, clock, World(cycles=400, quality=0.0), costs)
    good = World(cycles=2500)
    run(planner, clock, good, costs)
    assert planner.speculates("any")
    assert planner.gate.lost_share <= 1.05 * GateSettings().probe_share


def test_domains_are_judged_apart() -> None:
    costs, clock = curve(), Clock()
    planner = planner_of(costs, clock, plain_share=0.0)  # or the last cycle may be a look
    for _ in range(12):
        run(planner, clock, World(cycles=20, seed=1), costs, domain="known")
        run(planner, clock, World(cycles=20, seed=2, quality=0.0), costs, domain="strange")
    assert planner.speculates("known") and not planner.speculates("strange")
    speeds = planner.status().speed_by_domain
    assert speeds["known"] > 1.5 and speeds["strange"] < 1
    both = planner.begin([Participant("a", "known"), Participant("b", "strange")])
    assert both == (True, False)


def test_a_cycle_without_speculation_has_that_plan() -> None:
    clock, costs = Clock(), curve()
    planner = planner_of(costs, clock, plain_share=1.0)
    assert planner.begin([Participant("a", "any")]) == (False,)
    assert planner.plan == NO_SPECULATION
    planner.record(CycleResult(0.0, 0.01, 0.0005, [1]))
    assert planner.status().plain_share == 1.0


# The gate by itself


@given(st.floats(0.002, 0.1), st.lists(st.floats(0.001, 0.1), min_size=50, max_size=400), st.integers(1, 10))
def test_probes_never_lose_more_than_their_share(share: float, cycle_s: list[float], length: int) -> None:
    budget = ProbeBudget(share)
    left, total_s, lost_s = 0, 0.0, 0.0
    for seconds in cycle_s:
        if not left and budget.take(length * 0.05):
            left = length
        budget.earn(seconds)
        total_s += seconds
        if left:
            budget.lose(0.5 * seconds)
            lost_s += 0.5 * seconds
        left = max(0, left - 1)
        assert lost_s <= share * total_s + 1e-9


def test_a_grant_is_paid_back() -> None:
    budget = ProbeBudget(0.01)
    assert not budget.take(1.0)
    budget.grant()
    assert budget.is_near() and budget.take(1.0)
    budget.lose(1.0)
    assert not budget.take(1.0)
    budget.earn(150.0)  # 1.5 s earned: the grant is paid, the next probe is not
    assert budget.is_near() and not budget.take(1.0)
    budget.earn(60.0)
    assert budget.take(1.0)


def test_quiet_time_does_not_pile_up_probes() -> None:
    budget, probes = ProbeBudget(0.01), 0
    budget.take(1.0)
    budget.earn(1e6)
    while budget.take(1.0):
        budget.lose(1.0)
        probes += 1
    assert probes == 2


def feed(gate: SpeculationGate, domain: str, tokens: float, cycles: int, seconds: float = 0.01) -> None:
    """Cycles of one request that commit ``tokens`` on average; a plain cycle takes 10 ms, a drafted one 20 ms."""
    owed = 0.0
    for _ in range(cycles):
        requests = [Participant("r", domain)]
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        owed += tokens if speculate[0] else 1.0
        cycle_s = 0.02 if speculate[0] else 0.01
        gate.record(requests, speculate, [int(owed)], cycle_s, cycle_s, 0.01)
        owed -= int(owed)


def test_hysteresis_needs_a_clear_gain_to_come_back() -> None:
    gate = SpeculationGate(GateSettings(on_above=1.2))
    feed(gate, "d", 1.5, 200)
    assert not gate.is_on("d")
    feed(gate, "d", 2.2, 8000)  # 1.1 times plain: enough to stay on, too little to come back
    assert not gate.is_on("d") and gate.probes > 0
    feed(gate, "d", 3.0, 8000)
    assert gate.is_on("d")
    feed(gate, "d", 2.2, 1000)
    assert gate.is_on("d")


def test_a_probe_is_one_request_in_consecutive_cycles() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=5))
    feed(gate, "d", 0.0, 100)
    gate.drafter_changed()
    requests = [Participant(name, "d") for name in "abc"]
    chosen = []
    for _ in range(5):
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        assert sum(speculate) == 1 and gate.is_probe(requests, speculate)
        chosen.append(speculate.index(True))
        gate.record(requests, speculate, [1, 1, 1], 0.02, 0.02, 0.01)
    assert len(set(chosen)) == 1
    assert gate.decide(requests, lambda: (0.02, 0.01)) == (False, False, False)


def test_an_ended_request_hands_its_probe_on() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=4))
    feed(gate, "d", 0.0, 100)
    gate.drafter_changed()
    for name in "aabb":
        requests = [Participant(name, "d")]
        speculate = gate.decide(requests, lambda: (0.02, 0.01))
        assert speculate == (True,)
        gate.record(requests, speculate, [4], 0.02, 0.02, 0.01)
    assert gate.is_on("d")


@pytest.mark.parametrize(("tokens", "comes_back"), [(1, False), (3, True)])
def test_a_domain_that_is_off_is_probed_beside_one_that_is_on(tokens: int, comes_back: bool) -> None:
    """Busy servers always decode something that speculates: an off domain must not have to wait for a quiet moment."""
    gate = SpeculationGate()
    feed(gate, "off", 0.0, 100)
    assert not gate.is_on("off")
    for cycle in range(8000):
        crowd = [Participant("a", "on"), Participant(f"b{cycle // 7}", "off")]
        speculate = gate.decide(crowd, lambda: (0.02, 0.01))
        assert speculate[0] and not (speculate[1] and gate.is_probe(crowd, speculate)), "the others are not probed"
        gate.record(crowd, speculate, [3, tokens if speculate[1] else 1], 0.02, 0.02, 0.0125)
        if gate.is_on("off"):
            break
    assert gate.is_on("off") == comes_back and gate.is_on("on")
    assert gate.probes > 0 and gate.lost_share <= 1.05 * GateSettings().probe_share


def test_after_a_swap_an_off_domain_is_probed_at_once_beside_others() -> None:
    gate = SpeculationGate(GateSettings(probe_cycles=4))
    feed(gate, "off", 0.0, 100)
    gate.drafter_changed()
    crowd = [Participant("a", "on"), Participant("b", "off")]
    for _ in range(4):
        assert gate.decide(crowd, lambda: (0.02, 0.01)) == (True, True)
        gate.record(crowd, (True, True), [3, 3], 0.02, 0.02, 0.0125)
    assert gate.is_on("off")


def test_speculating_requests_are_charged_for_holding_up_the_others() -> None:
    """Two tokens a cycle of 15 ms instead of 10 ms: worth it alone, not with three who wait."""
    gate = SpeculationGate()
    alone, crowd = [Participant("a", "alone")], [Participant("a", "crowd"), *[Participant(n, "other") for n in "xyz"]]
    for _ in range(100):
        gate.record(alone, (True,), [2], 0.015, 0.015, 0.01)
        gate.record(crowd, (True, False, False, False), [2, 1, 1, 1], 0.015, 0.015, 0.01)
    assert gate.is_on("alone") and not gate.is_on("crowd")


def test_the_number_of_domains_is_bounded() -> None:
    gate = SpeculationGate(GateSettings(max_domains=3))
    for index in range(50):
        gate.record([Participant("r", f"d{index}")], (True,), [1], 0.02, 0.02, 0.01)
    assert len(gate.speeds()) <= 4


def test_a_domain_not_seen_for_long_gives_its_place_to_a_new_one() -> None:
    gate = SpeculationGate(GateSettings(max_domains=3, forget_cycles=10))
    for name in ("a", "b", "c", "d"):
        gate.is_on(name)
    assert set(gate.speeds()) == {"a", "b", "c", ""}
    for _ in range(12):
        gate.record([Participant("r", "b")], [True], [2], 1.0, 1.0, 1.0)
    gate.is_on("d")
    assert {"b", "d"} <= set(gate.speeds()) and len(gate.speeds()) == 4


def test_a_domain_pays_for_the_prompts_its_drafter_absorbs() -> None:
    """3 % faster cycles, but ten plain cycles of absorbing for every 60 that are made."""
    request = [Participant("r", "x")]
    for prompt_cycles, stays_on in ((0.0, True), (10.0, False)):
        gate = SpeculationGate(GateSettings(min_cycles=24))
        for cycle in range(600):
            if cycle % 60 == 0:
                gate.absorbed("x", prompt_cycles)
            gate.record(request, [gate.is_on("x")], [2 if gate.is_on("x") else 1], 2 / 1.03, 2 / 1.03, 1.0)
        assert gate.is_on("x") == stays_on
        if not stays_on:  # and a probe, which absorbs nothing by itself, does not forget it
            gate._state("x").budget.grant()
            for _ in range(gate.settings.probe_cycles):
                assert gate.decide(request, lambda: (0.01, 0.01)) == (True,)
                gate.record(request, [True], [2], 2 / 1.06, 2 / 1.06, 1.0)
            assert not gate.is_on("x")


def test_a_batch_of_which_some_draft_learns_what_later_blocks_brought() -> None:
    """Trees and paths come for all requests of a cycle, proposals only for those that drafted."""
    world, clock = World(60, seed=3), Clock()
    planner = planner_of(curve(block_s=1e-4), clock, explore_share=0.0, plain_share=0.0)
    planner.gate._state("off").on = False
    planner.gate._state("off").budget.take(1e9)
    everyone = [Participant("a", "on"), Participant("z", "off"), Participant("b", "on")]
    blocks = []
    for start in range(0, 60, 2):
        speculate = planner.begin(everyone)
        members = [b for b, yes in enumerate(speculate) if yes]
        assert 0 in members and 2 in members
        these = torch.tensor([start, start + 1, start][: len(members)])
        tree, offers = world.draft(these, planner)
        path, accepted = world.accept(tree, these)
        whole = place_rows(tree, torch.tensor(members), torch.zeros(3, dtype=torch.int64))
        rows = torch.arange(path.shape[1]).repeat(3, 1)
        rows[members] = path
        counts = [0, 0, 0]
        for member, count in zip(members, accepted, strict=True):
            counts[member] = count
        blocks.append(planner.plan.blocks)
        planner.record(CycleResult(1e-3, 0.01, 5e-4, [1 + n for n in counts], whole, rows, counts, offers))
        clock.now_s += 0.02
    assert max(blocks) > 1, "later blocks were drafted"
    assert planner.gain.tokens(1, LEAF_CAP) != LeafGain().tokens(1, LEAF_CAP), "and learned from"


class Counted:
    """Counts how often another block was asked about."""

    def __init__(self, planner: TreePlanner) -> None:
        self.planner, self.asked, self.cycles = planner, 0, 0
        self._leaves, planner.leaves = planner.leaves, self.leaves  # type: ignore[method-assign]

    def leaves(self, block: int, score: torch.Tensor) -> int:
        self.asked += 1
        return self._leaves(block, score)


def test_another_block_is_not_asked_about_where_it_never_pays_until_one_does() -> None:
    world, dear, cheap = World(cycles=1300), curve(block_s=1e-2), curve(block_s=5e-4)
    clock = Clock()
    planner = planner_of(dear, clock)
    run(planner, clock, world, dear, 1, range(400))
    counted = Counted(planner)
    run(planner, clock, world, dear, 1)
    assert counted.asked < 0.45 * 1300, "learned cycles ask, hardly any other"
    planner.cost = CycleCost(cheap)
    planner.drafter_changed()
    counted.asked = 0
    run(planner, clock, world, cheap, 1)
    assert counted.asked > 0.9 * 1300
    assert run(planner, clock, world, cheap, 1).rate > 0.96 * max(world.fixed_rates(cheap, 1).values())


def test_where_thinking_takes_long_the_best_fixed_sizes_stand() -> None:
    """Every question takes 2 ms here, a fifth of a cycle, and answers hardly differ."""
    world, costs, clock = World(cycles=1300), curve(block_s=5e-4), Clock()
    planner = planner_of(costs, clock, explore_share=0.0)

    class Slow(TreeOutlook):
        def stop(self, growth: Growth, block: int, score_Bm: Floats) -> Stop:
            clock.now_s += 2e-3
            return super().stop(growth, block, score_Bm)

        def kept(self, growth: Growth, score_BM: Floats) -> Floats:
            clock.now_s += 2e-3
            return super().kept(growth, score_BM)

    planner.outlook = Slow(planner.survival, BUDGET)
    run(planner, clock, world, costs, 1, range(600))
    ledger = run(planner, clock, world, costs)
    rates = world.fixed_rates(costs, 1)
    assert ledger.rate > 0.93 * max(rates.values()), "one cycle in 32 is learned from: 1.2 % for thinking"
    best = max(rates, key=lambda plan: rates[plan])
    assert planner.status().mean_nodes == pytest.approx(best.node_budget, rel=0.35)


def test_what_a_waiting_device_does_is_no_price_of_verification() -> None:
    """Where nobody reads scores, an accelerator drafts while verification waits for it."""
    costs, clock = curve(), Clock()
    planner = planner_of(costs, clock, explore_share=0.0, plain_share=0.0, settle_cycles=20, learn_every=1000)
    score = torch.log(torch.tensor([[0.9, 0.7, 0.2]]))

    class Elsewhere:
        """Scores on another device: all that a planner that does not read them asks of them."""

        shape, device = score.shape, torch.device("cuda")

    for number in range(400):
        planner.begin([Participant("r", "x")])
        begin_s = clock.now_s
        reads = number < 20
        clock.now_s += 2e-3 if reads else 1e-4
        nodes = planner.nodes(score if reads else Elsewhere())  # type: ignore[arg-type]
        draft_s, verify_s = clock.now_s - begin_s, costs.verify_s(nodes + 1, 1) + (0.0 if reads else 1.9e-3)
        clock.now_s += verify_s
        planner.record(CycleResult(draft_s, verify_s, 5e-4, [2], *_accepting_one(nodes)))
    assert planner.cost.correction.factor(Phase.VERIFY) == pytest.approx(1, rel=0.01)


def test_sizes_are_those_of_the_kind_of_text() -> None:
    planner = planner_of(curve(), Clock(), explore_share=0.0, plain_share=0.0)
    python, cpp = Participant("a", "python"), Participant("b", "cpp")

    def asked(*participants: Participant) -> StandingChoice:
        planner.begin(participants)
        return planner._leaves_asked(planner._under_way(), 0)

    asked(python).answered(np.array([0.0, 1.0]), 0.0)
    assert asked(python).choice == 1 and asked(cpp).choice == 0
    assert asked(python, python) is not asked(python), "two requests are another kind of cycle"
    asked(python, cpp).answered(np.array([0.0, 1.0]), 0.0)
    assert asked(cpp, python).choice == 1 and asked(cpp, cpp).choice == 0


def test_trees_of_three_blocks_are_priced_by_all_their_blocks() -> None:
    """An earlier block that coasts is followed by blocks that coast: a later one could not be judged."""
    planner = TreePlanner(curve(), replace(SETTINGS, blocks=4), Clock(), Random(0), PlannerSettings(explore_share=0.0))
    planner.begin([Participant("r", "x")])
    cycle = planner._under_way()
    cycle.learns = False
    for _ in range(20):
        planner._leaves_asked(cycle, 0).answered(np.array([0.0, 1.0, 0.5, 0.2]), 1e-4)
    assert planner.more(0) and planner.leaves(0, torch.zeros(1, 20)) == 4
    assert not planner.more(1) and not cycle.asks, "never answered, and not asked behind a block nobody looked at"


def test_early_cycles_explore_and_again_after_every_new_drafter_but_probes_never() -> None:
    world, costs, clock = World(cycles=1300), curve(block_s=5e-4), Clock()
    planner = planner_of(costs, clock)
    run(planner, clock, world, costs, 1, range(150))
    first = planner.status().explored_cycles
    assert first >= 20
    run(planner, clock, world, costs, 1, range(150, 300))
    assert planner.status().explored_cycles - first <= 10
    planner.drafter_changed()
    run(planner, clock, world, costs, 1, range(300, 450))
    assert planner.status().explored_cycles - first >= 20
    nothing = planner_of(costs, Clock(), explore_share=0.0)
    run(nothing, nothing.clock, world, costs, 1, range(150))  # type: ignore[arg-type]
    assert nothing.status().explored_cycles == 0


def test_of_many_blocks_some_are_asked_about_and_some_are_not() -> None:
    """The first question is worth asking, the second stands at extending: nobody reads its scores."""
    clock, costs = Clock(), curve()
    changes = {"explore_share": 0.0, "plain_share": 0.0, "settle_cycles": 0, "learn_every": 1000}
    sizes = replace(SETTINGS, blocks=4)
    planner = TreePlanner(costs, sizes, clock, Random(0), replace(PlannerSettings(), **changes))  # type: ignore[arg-type]
    first, second = (planner._choices.of("leaves", "x", 1, 1, block) for block in range(2))
    for number in range(40):
        first.answered(np.array([0.0, 0.05 if number % 2 else -0.05, -1.0, -1.0]), 1e-6)
        second.answered(np.array([0.0, 1e-3, -1.0, -1.0]), 1e-6)
    assert first.worth_asking() and not second.worth_asking() and second.choice == 1
    planner._choices.of("leaves", "x", 1, 1, 2).seen = 100  # stands at stopping
    before = first.corrected(np.array([0.0, 0.0]))[1]
    assert planner.begin([Participant("r", "x")]) == (True,)
    widths = (12, 30, 20)
    assert planner.more(0) and planner.leaves(0, torch.full((1, widths[0]), -0.01)) > 0
    assert planner.more(1) and planner.leaves(1, torch.full((1, widths[1]), -0.01)) == 4
    assert not planner.more(2)
    every = sum(widths)
    nodes = planner.nodes(torch.full((1, every), -0.01))
    offers = Offers(torch.full((1, every), -1), torch.zeros(1, every, dtype=torch.int64), torch.zeros(1, every))
    planner.record(CycleResult(2e-3, 0.01, 5e-4, [2], *_accepting_one(nodes), offers))
    assert first.corrected(np.array([0.0, 0.0]))[1] < before, "it brought nothing"


def test_one_stall_does_not_end_extensions() -> None:
    """A second of verification among milliseconds: recording a graph, a swap, another process."""
    costs, clock, world = curve(block_s=5e-4), Clock(), World(cycles=900)
    planner = planner_of(costs, clock, explore_share=0.0, plain_share=0.0)
    run(planner, clock, world, costs, 1)
    question = planner._choices.of("leaves", "any", 1, 1, 0)
    before = question.corrected(np.array([0.0, 0.0]))[1]
    planner.begin([Participant("r", "any")])
    cycle = planner._under_way()
    cycle.extensions.append(Extension(question, 0, 1e-3, 0.0, 0.012))
    cycle.nodes, cycle.spent_s = 3, 2e-3
    compare(cycle, CycleResult(2e-3, 1.0, 5e-4, [1]), [0.0])
    assert question.corrected(np.array([0.0, 0.0]))[1] > before - 1e-3, "as if it had taken a tenth of that"


def _serve(gate: SpeculationGate, name: str, domain: str, cycles: int, tokens: float, drafted_s: float) -> None:
    """One request alone; a plain cycle takes a second."""
    owed = 0.0
    for _ in range(cycles):
        requests = [Participant(name, domain)]
        speculate = gate.decide(requests, lambda: (drafted_s, 1.0))
        owed += tokens if speculate[0] else 1.0
        seconds = drafted_s if speculate[0] else 1.0
        gate.record(requests, speculate, [int(owed)], seconds, seconds, 1.0)
        owed -= int(owed)


@pytest.mark.parametrize("length", [50, 200])
def test_probes_that_lose_little_do_not_spend_what_others_save_for(length: int) -> None:
    gate = SpeculationGate()
    for number in range(6):
        _serve(gate, f"a{number}", "near", 80, 1.8, 2.0)
        _serve(gate, f"b{number}", "far", 80, 1.0, 2.0)
    assert not gate.is_on("near") and not gate.is_on("far")
    for number in range(40_000 // length):
        _serve(gate, f"c{number}", "near", length, 1.9, 2.0)
        _serve(gate, f"d{number}", "far", length, 3.2, 2.0)
    assert gate.is_on("far") and gate.probes > 4


def test_where_drafts_nearly_pay_there_are_many_probes_whatever_others_lose() -> None:
    gate, probes = SpeculationGate(), {"near": 0, "far": 0}
    for number in range(6):
        _serve(gate, f"a{number}", "near", 80, 1.8, 2.0)
        _serve(gate, f"b{number}", "far", 80, 1.0, 2.0)
    for number in range(200):
        for domain, tokens in (("near", 1.9), ("far", 1.0)):
            before = gate.probes
            _serve(gate, f"{domain}{number}", domain, 200, tokens, 2.0)
            probes[domain] += gate.probes - before
    assert probes["near"] > 3 * probes["far"] > 0
    assert not gate.is_on("near") and not gate.is_on("far")


def test_what_a_probe_takes_is_no_price_of_other_cycles() -> None:
    """A probe of one among four is priced as if all four drafted; a cycle in which one of four drafts is not."""
    costs, four = curve(), [Participant(f"r{b}", "x" if b else "y") for b in range(4)]
    price, cost, plan = CyclePrice(), CycleCost(costs), DraftPlan((), 5)
    for probing in (True, False):
        cycle = Cycle(tuple(four), (True, False, False, False), costs.plain_s(4), probing=probing)
        cycle.nodes, cycle.block_s, cycle.spent_s = 5, [2e-3], 2e-3
        assert price.is_due(cycle), "another kind of cycle"
        price.drafted(
            cycle, CycleResult(2e-3, costs.verify_s(6, 4), 5e-4, [2, 1, 1, 1], *_accepting_one(5)), 0.02, cost
        )
        assert price.usual_s == pytest.approx(cost.cycle_s(plan, 4 if probing else 1, 4), rel=0.05)
        assert not price.is_due(cycle)


def test_probes_of_short_requests_add_up() -> None:
    gate = SpeculationGate()
    for number in range(6):
        _serve(gate, f"a{number}", "short", 80, 1.0, 2.0)
    assert not gate.is_on("short")
    gate.is_on("other")
    for number in range(3000):
        _serve(gate, f"b{number}", "short", 9, 3.0, 2.0)
        _serve(gate, f"c{number}", "other", 5, 4.0, 2.0)
    assert gate.is_on("short")


def test_one_dear_prompt_is_not_charged_to_probes_for_ever() -> None:
    gate = SpeculationGate()
    gate.absorbed("x", 100.0)
    _serve(gate, "first", "x", 60, 1.0, 2.0)
    assert not gate.is_on("x")
    gate.drafter_changed()
    for number in range(400):
        _serve(gate, f"r{number}", "x", 50, 4.0, 2.0)
    assert gate.is_on("x")
