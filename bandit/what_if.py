"""What another rule would have decided on a recorded ledger, and what that would have cost and brought: *modelled*.

The recorded contexts are those of the rule that ran. Where the other rule decides the same, the recorded measurements
stand. What it would not have done is taken out. What it would have done in addition nobody measured: it is credited
with what the other rule itself predicts, and because the contexts after it no longer describe what would have been
seen, no second addition is counted before the first is expected to have lost its worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from specblock.bandit.config import PolicyConfig
from specblock.bandit.cost import charge_s
from specblock.bandit.decision import ABANDON, CHECK, CONTINUE, FAULT, PROBE, Decision, Option, PolicyState
from specblock.bandit.forecast import score_s
from specblock.bandit.ledger import DECIDED, Balance, LedgerRecord
from specblock.bandit.policy import decide
from specblock.bandit.replay import PROBED, decided_action, recorded_action, recorded_inputs

TRIAL_STAGES = frozenset({DECIDED, "probing", "scoring", PROBED})
"""Stages of an update up to its second decision."""

CONTINUED_STAGES = frozenset({"training", "gating-1"})
"""Stages that only an update reaches that went on after its trial; a restored version is not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A recorded decision that the other rule would not have taken, with both reasons."""

    decision_id: str
    stage: str
    time_s: float
    recorded: str
    recorded_why: str
    other: str
    other_why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledBalance:
    """What the other rule's decisions would have cost and brought, device-seconds.

    Attributes:
        measured_charged_s: charges of what both rules do, as recorded.
        measured_saved_s: savings of what both rules do, as recorded.
        predicted_charged_s: cost of what only the other rule does, as it predicts it itself.
        predicted_saved_s: benefit of the same, as it predicts it itself.
        kept: recorded updates that the other rule starts too.
        dropped: recorded updates that it does not start or does not finish.
        added: updates that only it starts or finishes.
    """

    measured_charged_s: float = 0.0
    measured_saved_s: float = 0.0
    predicted_charged_s: float = 0.0
    predicted_saved_s: float = 0.0
    kept: int = 0
    dropped: int = 0
    added: int = 0

    @property
    def charged_s(self) -> float:
        """Everything charged."""
        return self.measured_charged_s + self.predicted_charged_s

    @property
    def saved_s(self) -> float:
        """Everything saved."""
        return self.measured_saved_s + self.predicted_saved_s

    @property
    def net_s(self) -> float:
        """Savings minus charges."""
        return self.saved_s - self.charged_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A ledger under another rule."""

    decisions: int
    without_inputs: int
    differences: tuple[Difference, ...]
    recorded: Balance
    modelled: ModelledBalance


@dataclass(slots=True)
class _Recorded:
    """What one recorded update or check cost and brought, up to its second decision and after it."""

    trial_s: float = 0.0
    rest_s: float = 0.0
    saved_s: float = 0.0
    continued: bool = False


@dataclass(slots=True)
class _Model:
    """The sums while the ledger is walked through."""

    known: dict[str, _Recorded]
    config: PolicyConfig
    balance: ModelledBalance = field(default_factory=ModelledBalance)
    started: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    closed_until_s: float = float("-inf")

    def at_rest(self, record: LedgerRecord, decision: Decision, state: PolicyState) -> None:
        """Account for one decision at rest."""
        mine = self.known.get(record.decision_id, _Recorded())
        same = decision.action == record.action and (record.action != PROBE or decision.arm == record.arm)
        if record.action == PROBE and same:
            self.started.add(record.decision_id)
            self._measured(mine.trial_s, 0.0)
        elif record.action == PROBE:
            self.dropped.add(record.decision_id)
        elif record.action == CHECK and same:
            self._measured(mine.trial_s + mine.rest_s, 0.0)
        if same:
            return
        if decision.action == CHECK:
            cost_s = charge_s(self.config.cost, device_s=score_s(state, self.config).mean)
            self._predicted(cost_s, 0.0, 0)
            # The recorded run was not asked for this check; its outcome is taken to be that nothing is broken.
            self._add(record, _wanted(decision))
        elif decision.action == PROBE:
            self._add(record, decision.option())

    def after_trial(self, record: LedgerRecord, decision: Decision | None) -> None:
        """Account for the decision after a micro-profile that both rules started."""
        if record.decision_id not in self.started:
            return
        mine = self.known[record.decision_id]
        goes_on = decision is not None and decision.action == CONTINUE
        if goes_on and mine.continued:
            self._measured(mine.rest_s, mine.saved_s)
        elif mine.continued:
            self.dropped.add(record.decision_id)
        elif goes_on and decision is not None:
            self._add(record, decision.option())
        else:
            self._measured(mine.rest_s, 0.0)

    def result(self) -> ModelledBalance:
        """The balance, with the updates counted."""
        kept = len(self.started - self.dropped)
        return replace(self.balance, kept=kept, dropped=len(self.dropped))

    def _add(self, record: LedgerRecord, option: Option | None) -> None:
        if option is None or record.time_s < self.closed_until_s:
            return
        self.closed_until_s = record.time_s + option.value.horizon_value_s
        self._predicted(option.value.cost, option.value.benefit, 1)

    def _measured(self, charged_s: float, saved_s: float) -> None:
        old = self.balance
        self.balance = replace(
            old,
            measured_charged_s=old.measured_charged_s + charged_s,
            measured_saved_s=old.measured_saved_s + saved_s,
        )

    def _predicted(self, charged_s: float, saved_s: float, added: int) -> None:
        old = self.balance
        self.balance = replace(
            old,
            predicted_charged_s=old.predicted_charged_s + charged_s,
            predicted_saved_s=old.predicted_saved_s + saved_s,
            added=old.added + added,
        )


def _wanted(decision: Decision) -> Option | None:
    """The update that a parity check stands before; None if it stands before none."""
    allowed = [o for o in decision.options if not o.blocked and o.value.net_lower > 0]
    return max(allowed, key=lambda o: o.value.net_lower, default=None) if decision.verdict != FAULT else None


def what_if(read: Callable[[], Iterable[LedgerRecord]], config: PolicyConfig) -> WhatIf:
    """Decides every recorded context with ``config``.

    Args:
        read: the records from the ledger's beginning, oldest first; called twice, so that months of inputs need not
            be in memory at once.
        config: the other rule.
    """
    known, recorded = _recorded(read())
    model = _Model(known, config)
    differences: list[Difference] = []
    count = without = 0
    for record, state in recorded_inputs(read()):
        count += 1
        context = record.context
        if context is None or state is None:
            without += 1
            continue
        unknown = context.probed is not None and context.probed.arm not in {arm.name for arm in config.arms}
        decision = None if unknown else decide(context, state, config)[0]
        if record.stage == PROBED:
            model.after_trial(record, decision)
        elif decision is not None:
            model.at_rest(record, decision, state)
        before = recorded_action(record, known.get(record.decision_id, _Recorded()).continued)
        now = decided_action(decision) if decision else f"{ABANDON} {record.arm}"
        if before != now:
            why = decision.reason if decision else f"it has no arm {record.arm}"
            differences.append(
                Difference(
                    decision_id=record.decision_id,
                    stage=record.stage,
                    time_s=record.time_s,
                    recorded=before,
                    recorded_why=record.reason,
                    other=now,
                    other_why=why,
                )
            )
    return WhatIf(
        decisions=count,
        without_inputs=without,
        differences=tuple(differences),
        recorded=recorded,
        modelled=model.result(),
    )


def _recorded(records: Iterable[LedgerRecord]) -> tuple[dict[str, _Recorded], Balance]:
    """Costs and savings of every recorded update and check, and of all of them."""
    known: dict[str, _Recorded] = {}
    balance = Balance()
    for record in records:
        balance = balance.add(record)
        if record.action not in (CHECK, PROBE):
            continue
        mine = known.setdefault(record.decision_id, _Recorded())
        if record.stage in TRIAL_STAGES:
            mine.trial_s += record.charged_s
        else:
            mine.rest_s += record.charged_s
        mine.saved_s += record.numbers.get("realised_s", 0.0)
        mine.continued = mine.continued or record.stage in CONTINUED_STAGES
    return known, balance
