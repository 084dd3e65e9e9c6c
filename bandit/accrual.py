"""What a settled update goes on saving while it still serves."""

from __future__ import annotations

from specblock.bandit.decision import PROBE
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.state import Accrual, BanditState


def accrued_s(state: BanditState, accrual: Accrual) -> float:
    """Device-seconds a settled version has saved since, if it goes on saving per token what was measured then."""
    return accrual.saving_s_per_token * (state.totals(accrual.version).tokens - accrual.tokens_mark)


def close_accrual(state: BanditState, ledger: Ledger, serving_version: str, now_s: float) -> None:
    """Book what a settled version saved since, once it no longer serves."""
    accrual = state.accrual
    if accrual is None or accrual.version == serving_version:
        return
    saved_s = accrued_s(state, accrual)
    if not ledger.knows(accrual.decision_id, "closed"):
        ledger.append(
            LedgerRecord(
                decision_id=accrual.decision_id,
                stage="closed",
                time_s=now_s,
                action=PROBE,
                candidate_version=accrual.version,
                reason=f"after it was settled it saved {saved_s:.1f} device-seconds at the rate measured then",
                numbers={"realised_s": saved_s},
            )
        )
    state.accrual = None
