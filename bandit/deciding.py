"""Taking a decision: read the state, apply the rule, write it down before anything is done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from specblock.bandit.accrual import close_accrual
from specblock.bandit.actions import Actions
from specblock.bandit.config import PolicyConfig
from specblock.bandit.context import base_s_per_token, build_context
from specblock.bandit.cost import charge_s
from specblock.bandit.decision import CHECK, PROBE, SKIP, Decision, DecisionContext, PolicyState
from specblock.bandit.forecast import score_s
from specblock.bandit.ledger import DECIDED, Ledger, LedgerRecord
from specblock.bandit.lifecycle import Lifecycle
from specblock.bandit.outside import attempt
from specblock.bandit.policy import decide, inputs_digest
from specblock.bandit.state import BanditState, PendingUpdate


class Decider:
    """Decides when no update is under way.

    Args:
        state: read and moved on.
        ledger: every decision is recorded there.
        lifecycle: carries parity checks out.
        actions: the outside world.
        policy: decision rule.
        save: makes the state durable at once, at a time.
        sync_every_s: repeated identical skips reach the disk at least this often.
    """

    def __init__(
        self,
        state: BanditState,
        ledger: Ledger,
        lifecycle: Lifecycle,
        actions: Actions,
        policy: PolicyConfig,
        save: Callable[[float], None],
        sync_every_s: float,
    ) -> None:
        self.state, self._ledger, self._lifecycle, self._actions = state, ledger, lifecycle, actions
        self._policy, self._save, self._sync_every_s = policy, save, sync_every_s
        self._last_skip = ""
        self._last_known: PolicyState | None = None
        self._parts = ledger.parts
        self._synced_s = float("-inf")

    def decide(self, now_s: float) -> str:
        """Take one decision (two, if the first is a parity check); returns what failed.

        Raises:
            ActionError: nobody outside said what serves or what could be trained on.
        """
        serving = attempt(self._actions.serving_version)
        close_accrual(self.state, self._ledger, serving, now_s)
        windows, stored = attempt(self._actions.windows), attempt(self._actions.versions)
        since_s = max(now_s - self.state.last_decision_s, 0.0) if self.state.last_decision_s else 0.0
        self.state.last_decision_s = now_s
        self.state.learned_at_decision = self.state.learned
        error = ""
        # A parity check is a decision of its own; the second decision has its result to go by.
        for _ in range(2):
            context = build_context(self.state, windows, serving, now_s, self._policy, since_s, stored)
            known = self.state.policy
            decision_id = f"d{known.decisions:06d}"
            decision, self.state.policy = decide(context, known, self._policy)
            self._record(decision_id, decision, context, known)
            if decision.action != CHECK:
                break
            self._save(now_s)
            error = self._lifecycle.check_parity(decision_id, serving, now_s)
            if error:
                break
        if decision.action == PROBE:
            self.state.pending = _pending(decision_id, decision, context)
        self._save(now_s)
        return error

    def _record(self, decision_id: str, decision: Decision, context: DecisionContext, known: PolicyState) -> None:
        if self._ledger.parts != self._parts:  # every file says for itself what the rule knew
            self._parts, self._last_known = self._ledger.parts, None
        # The number of the decision changes every time and decides nothing.
        uncounted = replace(known, decisions=0)
        checking = decision.action == CHECK
        expected_s = score_s(self.state.policy, self._policy).mean if checking else 0.0
        skip = decision.verdict if decision.action == SKIP else ""
        fresh = skip != self._last_skip or not skip
        durable = fresh or context.now_s - self._synced_s >= self._sync_every_s
        self._ledger.append(
            LedgerRecord(
                decision_id=decision_id,
                stage=DECIDED,
                time_s=context.now_s,
                action=decision.action,
                arm=decision.arm,
                verdict=decision.verdict,
                reason=decision.reason,
                base_version=context.serving_version,
                expected_s=charge_s(self._policy.cost, device_s=expected_s),
                options=decision.options,
                probability=decision.probability,
                inputs_sha256=inputs_digest(context, known, self._policy),
                context=context,
                policy_state=known if uncounted != self._last_known else None,
            ),
            durable=durable,
        )
        self._last_skip, self._last_known = skip, uncounted
        self._synced_s = context.now_s if durable else self._synced_s


def _pending(decision_id: str, decision: Decision, context: DecisionContext) -> PendingUpdate:
    option = decision.option()
    assert option is not None
    return PendingUpdate(
        decision_id=decision_id,
        stage="probing",
        ledger_stage=DECIDED,
        arm=decision.arm,
        base_version=context.serving_version,
        candidate_version=option.version,
        started_s=context.now_s,
        targets=decision.targets,
        scale_s=base_s_per_token(context),
        option=option,
        explored=decision.probability < 1,
    )
