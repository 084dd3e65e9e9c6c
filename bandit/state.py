"""Everything the bandit knows: the content of a snapshot."""

from __future__ import annotations

from dataclasses import dataclass, field

from specblock.bandit.acceptance import OTHER, DomainStatistics
from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import Option, PolicyState, Target
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.gate import GateRow, Saving
from specblock.bandit.presence import Presence
from specblock.bandit.watermark import Watermarks

MAX_VERSION_TOTALS = 64

DOMAIN_SILENT_S = 24 * 3600.0
"""A domain without traffic for this long gives way to a new one; sooner, a burst of names could push out the others."""


@dataclass(slots=True)
class VersionTotals:
    """What one drafter version has served over all domains."""

    requests: int = 0
    tokens: int = 0
    last_time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingUpdate:
    """The update under way. Replaced as it moves on; the snapshot keeps the newest.

    Attributes:
        decision_id: of the decision to probe.
        stage: what comes next: probing, training, gating, promoting, verifying or settling.
        ledger_stage: newest stage this state has recorded; a ledger that is ahead means an interrupted action.
        arm: name.
        base_version: what served when it was decided.
        candidate_version: what the trainer made.
        new_version: the registry's name of the candidate once it serves.
        started_s: time of the decision.
        targets: domains it is made for.
        scale_s: the base version's device-seconds per token, at the decision.
        option: newest predicted net value.
        cutoff_s: newest conversation trained on.
        deadline_s: when waiting ends.
        requests_mark: finished requests at the start of the present wait.
        next_look: finished requests since then before the next look.
        looks: looks taken at the gate.
        meant: domains that a trained candidate is made for and judged on; those whose requests are counted at the gate,
            all if it is empty.
        around_s: when it was looked at last whether other text needs an update.
        rows: gate conversations, in the order they became known.
        trial: what the micro-profile measured.
        promoted_s: time of the promotion.
        tokens_mark: tokens the new version had served by then.
        explored: it was tried by chance.
    """

    decision_id: str
    stage: str
    ledger_stage: str
    arm: str
    base_version: str
    candidate_version: str = ""
    new_version: str = ""
    started_s: float
    targets: tuple[Target, ...]
    scale_s: float
    option: Option
    cutoff_s: float = 0.0
    deadline_s: float = 0.0
    requests_mark: int = 0
    next_look: int = 0
    looks: int = 0
    meant: tuple[str, ...] = ()
    around_s: float = 0.0
    rows: tuple[GateRow, ...] = ()
    trial: Saving | None = None
    promoted_s: float = 0.0
    tokens_mark: int = 0
    explored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Accrual:
    """A settled update that still serves: its measured saving goes on.

    Attributes:
        saving_s_per_token: measured device-seconds saved per committed token.
        tokens_mark: tokens the version had served when it was settled.
    """

    decision_id: str
    version: str
    saving_s_per_token: float
    tokens_mark: int


@dataclass(slots=True)
class BanditState:
    """The whole state. Needs no generator state: what the policy draws depends on the time of the decision only.

    Attributes:
        learned: events learned (flagged ones included).
        flagged: of these, events of mixed versions.
        first_event_s: oldest event time; 0 before any.
        retired_changes: changes reported in domains that were forgotten.
        presence: of every domain.
        watched_s: when presence was looked at last.
    """

    domains: dict[str, DomainStatistics] = field(default_factory=dict)
    versions: dict[str, VersionTotals] = field(default_factory=dict)
    watermarks: Watermarks = field(default_factory=Watermarks)
    policy: PolicyState = field(default_factory=PolicyState)
    pending: PendingUpdate | None = None
    accrual: Accrual | None = None
    learned: int = 0
    flagged: int = 0
    first_event_s: float = 0.0
    last_decision_s: float = 0.0
    learned_at_decision: int = 0
    paused: bool = False
    retired_changes: int = 0
    presence: dict[str, Presence] = field(default_factory=dict)
    watched_s: float = 0.0

    @property
    def changes(self) -> int:
        """Changes of acceptance that the detectors reported so far."""
        return self.retired_changes + sum(domain.changes for domain in self.domains.values())

    @property
    def requests(self) -> int:
        """Requests finished under any remembered version."""
        return sum(totals.requests for totals in self.versions.values())

    def totals(self, version: str) -> VersionTotals:
        """What ``version`` has served."""
        return self.versions.get(version, VersionTotals())

    def serves_again(self, version: str) -> None:
        """A version begins to serve: what it accepted when it served before is not what it accepts now."""
        for domain in self.domains.values():
            if known := domain.versions.get(version):
                known.resumed = True

    def learn(self, event: AcceptanceEvent, config: PolicyConfig) -> bool:
        """Take one event; False (and no effect) when it was learned before."""
        if not self.watermarks.accept(event.incarnation, event.sequence, event.time_s, config.statistics.gap_patience):
            return False
        self.watermarks.forget(config.statistics.max_incarnations)
        self.learned += 1
        self.flagged += event.flagged
        self.first_event_s = min(self.first_event_s or event.time_s, event.time_s)
        known = event.domain in self.domains or self._room(event.time_s, config.statistics.max_domains)
        domain = self.domains.setdefault(event.domain if known else OTHER, DomainStatistics())
        domain.learn(event, config.statistics, config.detector)
        self._total(event)
        return True

    def _room(self, now_s: float, max_domains: int) -> bool:
        """Whether a new domain may have a place of its own; one that is silent for long gives way."""
        named = {name: domain.tokens.last_s for name, domain in self.domains.items() if name != OTHER}
        if len(named) < max_domains - 1:
            return True
        oldest = min(named, key=lambda name: (named[name], name), default="")
        if not named or now_s - named[oldest] < DOMAIN_SILENT_S:
            return False
        self.retired_changes += self.domains.pop(oldest).changes
        self.presence.pop(oldest, None)
        return True

    def _total(self, event: AcceptanceEvent) -> None:
        totals = self.versions.setdefault(event.drafter_version, VersionTotals())
        totals.requests += event.last
        totals.tokens += event.committed_tokens
        totals.last_time_s = max(totals.last_time_s, event.time_s)
        if len(self.versions) > MAX_VERSION_TOTALS:
            del self.versions[min(self.versions, key=lambda name: (self.versions[name].last_time_s, name))]
