"""Chooses every cycle's speculation: whether to draft, how many blocks and leaves, how many nodes to verify.

What counts is all tokens over all seconds. A choice therefore saves ``tokens / rate - seconds``, the rate being that
of the text at large: comparing ratios of single cycles would stop promising trees too early and grow poor ones too far.
Seconds come from the cost curve measured at start-up and its online correction, tokens from calibrated survival of
nodes. Working a choice out takes time itself, and is done where it has paid. Nothing here can change text.

Legend: B requests in the cycle, of which D draft; m nodes of the last block, M raw candidates, N node budgets.
Source: design section 4; measured cost in place of a count as in Sequoia (Chen et al., arXiv 2402.12374); the ratio of
sums as in Dinkelbach 1967 and renewal reward theory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from specblock.daemon.cost_curve import CostCurve
from specblock.daemon.cycle_cost import CycleCost
from specblock.daemon.cycle_price import CyclePrice
from specblock.daemon.extensions import brought, compare
from specblock.daemon.learning_pace import LearningPace
from specblock.daemon.plain_price import PlainLooks
from specblock.daemon.planner_types import Cycle, CycleResult, Extension, PlannerSettings, PlannerStatus
from specblock.daemon.speculation import Participant, SpeculationGate
from specblock.daemon.standing_choice import StandingChoice, StandingChoices
from specblock.daemon.tree_outlook import Stop, TreeOutlook
from specblock.drafter.config import DraftSettings
from specblock.drafter.forgetting import ForgettingRatio
from specblock.drafter.plan import DraftPlan
from specblock.drafter.survival import Floats, LeafGain, SurvivalTable

Clock = Callable[[], float]

_LEAF_CHOICES = (4, 8, 16)
_STATUS_HALF_LIFE_CYCLES = 500.0
_EAGER_SHARE, _ENOUGH_EXPLORED = 0.2, 24  # of learned cycles; until so many of them made another choice
_KEEP_ON_CHANGE = 0.25  # share of calibration that outlives a drafter version: the next one is similar


class TreePlanner:
    """Implements ``drafter.plan.Limits`` for one cycle at a time: ``begin``, then drafting, then ``record``.

    Args:
        curve: measured costs.
        settings: largest sizes; caches and noise windows were allocated for them.
        clock: the engine's clock in seconds.
        generator: the only source of randomness, for exploration.
        planner: exploration and gate.
    """

    def __init__(
        self,
        curve: CostCurve,
        settings: DraftSettings,
        clock: Clock,
        generator: Random,
        planner: PlannerSettings | None = None,
    ) -> None:
        self.cost, self._settings = CycleCost(curve), settings
        self.clock, self._generator = clock, generator
        self._planner = planner or PlannerSettings()
        self.survival, self.gain = SurvivalTable(), LeafGain()
        self.gate = SpeculationGate(self._planner.gate)
        self.outlook = TreeOutlook(self.survival, settings.node_budget)
        self._typical = DraftPlan((), min(8, settings.node_budget))
        self._cycle: Cycle | None = None
        self._looks = PlainLooks(self._planner.plain_share)
        self._pace = LearningPace(self._planner.settle_cycles, self._planner.learn_every)
        self._choices = StandingChoices()
        self._explored = self._explored_before = 0  # ever; before the present drafter
        self._every_count = np.arange(settings.node_budget + 1)
        self._leaf_choices = (0, *(leaves for leaves in _LEAF_CHOICES if leaves < settings.leaf_cap), settings.leaf_cap)
        self._price = CyclePrice()
        self._nodes, self._leaves, self._blocks, self._plain = (
            ForgettingRatio(_STATUS_HALF_LIFE_CYCLES) for _ in range(4)
        )

    def begin(self, participants: Sequence[Participant], new_positions: Sequence[int] = ()) -> tuple[bool, ...]:
        """Starts a cycle and says which requests speculate.

        Args:
            participants: the B requests, B >= 1.
            new_positions: positions each one's drafter cache is behind, if known.
        """
        batch = len(participants)
        plain_s = self.cost.plain_s(batch)
        speculate = self.gate.decide(participants, lambda: (self.cost.cycle_s(self._typical, 1, batch), plain_s))
        if not any(speculate):
            self._cycle = Cycle(tuple(participants), speculate, plain_s, begin_s=self.clock())
            return speculate
        probing = self.gate.is_probe(participants, speculate)
        speed = self.gate.speed_of_all(participants)
        explore, check = self._generator.random(), self._generator.random()
        look = None
        if not probing:
            look = self._looks.next(check, self.cost.plain.seen(batch), speed / batch)
        if look is not None:
            speculate = (False,) * batch
        due = any(speculate) and self._pace.due((batch, sum(speculate)))
        explores = due and not self.gate.probing and self._settings.blocks > 1 and explore < self._explore_share
        behind = [count for count, yes in zip(new_positions, speculate, strict=False) if yes]
        self._cycle = Cycle(
            tuple(participants),
            speculate,
            plain_s,
            positions=max([1, *behind]),
            text=self._text(participants, speculate),
            probing=probing,
            look=look,
            explores=explores,
            learns=due,
            tokens_per_s=speed / plain_s,
            begin_s=self.clock(),
        )
        self._cycle.last_s = self._cycle.begin_s
        return speculate

    def more(self, block: int) -> bool:
        """See Limits."""
        cycle = self._under_way()
        if block + 1 >= self._settings.blocks:
            return False
        question = self._leaves_asked(cycle, block)
        # What is known of a tree whose earlier nodes nobody read says nothing about where to go on.
        cycle.asks = cycle.learns or (cycle.asks and question.worth_asking())
        return cycle.asks or question.choice > 0

    def leaves(self, block: int, score_Bm: Tensor) -> int:
        """See Limits."""
        cycle = self._under_way()
        cycle.growth.widths.append(score_Bm.shape[1])
        if score_Bm.shape[1] == 0:
            return 0
        question = self._leaves_asked(cycle, block)
        if not cycle.asks:
            self._tick_unread(cycle, score_Bm)
            cycle.growth.leaf_caps.append(self._leaf_choices[question.choice])
            return cycle.growth.leaf_caps[-1]
        scores = _on_host(score_Bm)
        self._tick(cycle)
        stop = self.outlook.stop(cycle.growth, block, scores)
        predicted, expected_s, stop_verify_s = self._outcomes(cycle, block, stop)
        saved_s = question.corrected(expected_s)
        available = len(stop.mass_m)
        index = int(saved_s.argmax()) if available else 0
        if not question.worth_asking():  # as in cycles that do not ask, or what is learned would be of promising ones
            index = question.choice
        # One decision of a cycle is another than the best, at the latest the last that there can be.
        last = index == 0 or block + 2 >= self._settings.blocks
        if cycle.explores and not cycle.explored and available and (last or self._generator.random() < 0.5):
            index = self._other(index, available)
            cycle.explored = True
            self._explored += 1
        choice = min(self._leaf_choices[index], available)
        cycle.growth.predicted_tokens = predicted[index]
        now_s = self._think(cycle)
        if available and not cycle.probing:  # a probe's values are those of another batch
            question.answered(saved_s, now_s - cycle.last_s)
        if choice:
            cycle.growth.leaf_caps.append(choice)
            cycle.growth.leaf_mass.append(float(stop.mass_m[choice - 1]))
            more_s = float(expected_s[index] - expected_s[0])
            at_s = now_s - cycle.begin_s - cycle.thought_s
            cycle.extensions.append(Extension(question, block, more_s, at_s, stop_verify_s))
        cycle.last_s = now_s
        return choice

    def nodes(self, score_BM: Tensor) -> int:
        """See Limits."""
        cycle = self._under_way()
        caps = cycle.growth.leaf_caps
        question = self._choices.of("nodes", cycle.text, cycle.batch, cycle.drafting, *caps)
        stands = not question.worth_asking()
        if stands and not cycle.learns:
            self._tick_unread(cycle, score_BM)
            if cycle.timed:
                cycle.spent_s = cycle.last_s - cycle.begin_s
            cycle.nodes = question.choice + 1
            return cycle.nodes
        scores = _on_host(score_BM)
        self._tick(cycle)
        gain_N = self.outlook.kept(cycle.growth, scores)
        tokens_N = self._scale(cycle) * self.outlook.budget_bias(1 + len(caps)) * gain_N
        saved_s_N = tokens_N / cycle.tokens_per_s - self.cost.verify_s(len(gain_N), cycle.batch)[1:]
        cycle.nodes = 1 + (question.choice if stands else int(saved_s_N.argmax()))
        cycle.growth.kept_tokens = float(gain_N[cycle.nodes - 1])
        if not cycle.probing:
            question.answered(saved_s_N, self.clock() - cycle.last_s)
        if cycle.learns:
            self.outlook.chosen(cycle.growth, scores, cycle.nodes)
        cycle.spent_s = self._think(cycle) - cycle.begin_s
        return cycle.nodes

    def record(self, result: CycleResult) -> None:
        """Learns from the cycle that ``begin`` started."""
        cycle, self._cycle = self._under_way(), None
        seconds = usual_s = result.draft_s + result.verify_s + result.other_s
        if result.tree is None:
            self._price.plain(cycle, result, seconds, self.cost)
        else:
            if self._price.is_due(cycle):
                self._price.drafted(cycle, result, seconds, self.cost)
                self._learn(cycle, result)
            usual_s = self._price.usual_s
        self._plain.add(result.tree is None)
        if cycle.explored:  # chosen to be worse: it says what it cost, not what drafting is worth
            self.gate.spent(cycle.participants, seconds)
            return
        self.gate.record(cycle.participants, cycle.speculate, result.committed_tokens, seconds, usual_s, cycle.plain_s)

    def _learn(self, cycle: Cycle, result: CycleResult) -> None:
        """What a cycle with drafts says about tokens."""
        assert result.tree is not None and result.accepted_rows is not None
        growth = cycle.growth
        extra = brought(cycle, result) if cycle.learns or cycle.extensions else []
        if not cycle.explored and not cycle.probing:
            compare(cycle, result, extra)
        if cycle.learns:
            self.survival.observe(result.tree, result.accepted_rows, result.num_accepted)
            self.gain.observe(extra, cycle.drafting, growth.leaf_caps, growth.leaf_mass)
            self.outlook.accepted(growth, sum(result.num_accepted), extra)
        if not cycle.explored:
            self._typical = cycle.plan
            self._nodes.add(cycle.nodes)
            self._leaves.add(sum(growth.leaf_caps))
            self._blocks.add(self._typical.blocks)

    def absorbed(self, domain: str, seconds: float, batch: int) -> None:
        """Charges a kind of text for a prompt that was absorbed while so many requests waited, its own included."""
        self._looks.disturbed()
        self.gate.absorbed(domain, seconds / self.cost.plain_s(batch) * batch)

    def drafter_changed(self) -> None:
        """A new drafter version serves from the next cycle on."""
        self.survival.fade(_KEEP_ON_CHANGE)
        self.gain.fade(_KEEP_ON_CHANGE)
        self.gate.drafter_changed()
        self._pace.begin_anew()
        self._explored_before = self._explored
        self._choices.begin_anew()
        self._price.drafter_changed()

    def speculates(self, domain: str) -> bool:
        """Whether requests of a domain draft at present, so that their prompt is worth absorbing."""
        return self.gate.is_on(domain)

    @property
    def plan(self) -> DraftPlan:
        """The sizes chosen in the cycle under way, to be stored for replay."""
        return self._under_way().plan

    def status(self) -> PlannerStatus:
        """Numbers for metrics."""
        return PlannerStatus(
            cycles=self._plain.count,
            mean_nodes=self._nodes.value(),
            mean_leaves=self._leaves.value(),
            mean_blocks=self._blocks.value(),
            plain_share=self._plain.value(),
            probe_share=self.gate.probe_share,
            probe_lost_share=self.gate.lost_share,
            explored_cycles=self._explored,
            speed_by_domain=self.gate.speeds(),
        )

    @property
    def _explore_share(self) -> float:
        share = self._planner.explore_share
        eager = share > 0 and self._explored - self._explored_before < _ENOUGH_EXPLORED
        return max(share, _EAGER_SHARE) if eager else share

    def _leaves_asked(self, cycle: Cycle, block: int) -> StandingChoice:
        """How many leaves the block after this one extends."""
        return self._choices.of("leaves", cycle.text, cycle.batch, cycle.drafting, block)

    @staticmethod
    def _text(participants: Sequence[Participant], speculate: Sequence[bool]) -> str:
        """The kind of text that all of a cycle's drafts are for; nothing if there are several."""
        kinds = {p.domain for p, yes in zip(participants, speculate, strict=True) if yes}
        return kinds.pop() if len(kinds) == 1 else ""

    def _outcomes(self, cycle: Cycle, block: int, stop: Stop) -> tuple[list[float], Floats, float]:
        """Uncorrected accepted drafts, and seconds saved, by choice of leaves that the next block extends.

        The last is what verification takes if none are.
        """
        growth, outlook, scale = cycle.growth, self.outlook, self._scale(cycle)
        most = self._settings.node_budget
        verify_s_N = self.cost.verify_s(most, cycle.batch)
        nodes_N = np.arange(1, len(stop.gain_by_nodes) + 1, dtype=np.float64) + stop.closed_nodes
        bias = scale * outlook.decision_bias(block + 1) / cycle.tokens_per_s
        known_N = stop.gain_by_nodes + stop.closed_tokens
        stop_s_N = np.interp(nodes_N, self._every_count, verify_s_N)  # closed nodes are a mean, no whole number
        saved_s_N = bias * known_N - stop_s_N
        best = int(saved_s_N.argmax())
        stop_nodes = min(float(nodes_N[best]), float(most))
        growth.stop_nodes.append(stop_nodes)
        predicted, saved_s = [float(known_N[best])], [float(saved_s_N[best])]
        growth.stop_tokens.append(predicted[0])
        bias = scale * outlook.decision_bias(block + 2) / cycle.tokens_per_s
        verify_s = float(verify_s_N[round(min(stop_nodes + outlook.extra_nodes(block + 1), most))])
        available = len(stop.mass_m)
        for choice in self._leaf_choices[1:]:
            leaves = min(choice, available)
            mass = float(stop.mass_m[leaves - 1]) if leaves else 0.0
            predicted.append(predicted[0] + self.gain.tokens(block + 1, leaves) * mass if leaves else predicted[0])
            draft_s = self.cost.block_s(block + 1, max(leaves, 1), cycle.batch if cycle.probing else cycle.drafting)
            saved_s.append(bias * predicted[-1] - draft_s - verify_s)
        return predicted, np.array(saved_s), float(stop_s_N[best])

    def _other(self, best: int, available: int) -> int:
        """Another choice: whether to extend at all is what must stay known, so it is tried half of the time."""
        if best and self._generator.random() < 0.5:
            return 0
        caps = [min(leaves, available) for leaves in self._leaf_choices]
        return self._generator.choice(
            [index for index in range(len(caps)) if caps[index] not in (0, caps[best])] or [0]
        )

    @staticmethod
    def _scale(cycle: Cycle) -> float:
        """Factor on the gain of those that draft: a probe of one request grows the trees that all would grow."""
        return cycle.batch / cycle.drafting if cycle.probing else 1.0

    def _tick(self, cycle: Cycle) -> None:
        """Notes the seconds of the block that just ended; the scores have been read, so the device is done with it."""
        now_s = self.clock()
        if cycle.timed:
            cycle.block_s.append(now_s - cycle.last_s)
        cycle.last_s = now_s

    def _think(self, cycle: Cycle) -> float:
        """Notes the seconds of thinking since the last tick; the time now."""
        now_s = self.clock()
        cycle.thought = True
        cycle.thought_s += now_s - cycle.last_s
        return now_s

    def _tick_unread(self, cycle: Cycle, scores: Tensor) -> None:
        """The same where nobody reads the scores: on an accelerator the block may still run, and is not timed."""
        cycle.timed &= scores.device.type == "cpu"
        self._tick(cycle)

    def _under_way(self) -> Cycle:
        assert self._cycle is not None, "begin() starts a cycle, record() ends it"
        return self._cycle


def _on_host(scores: Tensor) -> Floats:
    """Waits for the device: what follows needs the numbers, and the clock is read next."""
    result: Floats = scores.to(torch.float64).cpu().numpy()
    return result
