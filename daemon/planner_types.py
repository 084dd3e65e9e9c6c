"""What goes into the planner and comes out of it: settings, a cycle under way, what it did, numbers for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from specblock.cuda_ext.tree import DraftTree, Offers
from specblock.daemon.plain_price import Look
from specblock.daemon.speculation import GateSettings, Participant
from specblock.daemon.standing_choice import StandingChoice
from specblock.daemon.tree_outlook import Growth
from specblock.drafter.plan import NO_SPECULATION, DraftPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerSettings:
    """How the planner explores.

    Attributes:
        explore_share: of cycles that are learned from, those that make another choice of leaves than the best one; more
            of them while few have, none at all if 0.
        plain_share: cycles without speculation while it is on, to keep the price of plain decoding known: so many where
            that is 1.1 times as fast, fewer where faster, more where slower or unknown, none at all if 0.
        settle_cycles: cycles with drafts of a new drafter, or of another number of requests, that are all learned from.
        learn_every: of later ones every so many is; learning takes time, and little of it is news.
        gate: when speculation goes off and on.
    """

    explore_share: float = 0.08
    plain_share: float = 0.01
    settle_cycles: int = 192
    learn_every: int = 32
    gate: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        if not (0 <= self.explore_share <= 1 and 0 <= self.plain_share <= 1):
            raise ValueError("planner: explore_share and plain_share must be in [0, 1]")
        if self.settle_cycles < 0 or self.learn_every < 1:
            raise ValueError("planner: settle_cycles must be at least 0, learn_every at least 1")


@dataclass(frozen=True, slots=True)
class CycleResult:
    """What a cycle did.

    Attributes:
        draft_s: measured seconds of drafting, refresh included.
        verify_s: of verification.
        other_s: of everything else.
        committed_tokens: per request of the cycle, bonus included.
        tree: the verified trees, of all B requests or of the D that drafted; None without speculation.
        accepted_rows: int64, rows of their accepted paths as in Acceptance.
        num_accepted: accepted drafts of the same requests.
        offers: everything that was proposed for the trees.
    """

    draft_s: float
    verify_s: float
    other_s: float
    committed_tokens: Sequence[int]
    tree: DraftTree | None = None
    accepted_rows: Tensor | None = None
    num_accepted: Sequence[int] = ()
    offers: Offers | None = None


@dataclass(frozen=True, slots=True)
class PlannerStatus:
    """Running means over recent cycles, for metrics.

    Sizes are means over cycles that speculated; of those in which standing sizes were taken one in four counts.

    Attributes:
        cycles: cycles recorded, ever.
        mean_nodes: node budget.
        mean_leaves: leaves extended in all later blocks together.
        mean_blocks: drafter forwards.
        plain_share: share of cycles without speculation.
        probe_share: seconds spent probing over all device seconds, ever.
        probe_lost_share: seconds that probes lost against plain decoding over all, ever; below 0 if they won more.
        explored_cycles: cycles that explored, ever.
        speed_by_domain: estimated speed over plain decoding.
    """

    cycles: int
    mean_nodes: float
    mean_leaves: float
    mean_blocks: float
    plain_share: float
    probe_share: float
    probe_lost_share: float
    explored_cycles: int
    speed_by_domain: dict[str, float]


@dataclass(frozen=True, slots=True)
class Extension:
    """A decision to extend trees.

    Attributes:
        question: what was decided.
        block: the last one before the extension.
        expected_s: seconds that it was expected to save over stopping, before the question's own correction.
        at_s: seconds since the cycle began when it was made, without those spent on thinking.
        stop_verify_s: expected seconds of verification had the trees stopped growing.
    """

    question: StandingChoice
    block: int
    expected_s: float
    at_s: float
    stop_verify_s: float


@dataclass(slots=True)
class Cycle:
    """Scratch of the cycle under way."""

    participants: tuple[Participant, ...]
    speculate: tuple[bool, ...]
    plain_s: float
    positions: int = 1
    text: str = ""
    probing: bool = False
    look: Look | None = None
    explores: bool = False
    learns: bool = False
    tokens_per_s: float = 0.0
    begin_s: float = 0.0
    explored: bool = False
    asks: bool = True  # whether scores are read and answers worked out
    timed: bool = True  # False once an accelerator may still have been drafting when the clock was read
    growth: Growth = field(default_factory=Growth)
    block_s: list[float] = field(default_factory=list)
    extensions: list[Extension] = field(default_factory=list)
    last_s: float = 0.0
    thought: bool = False  # whether anything was worked out, and the seconds that took
    thought_s: float = 0.0
    spent_s: float | None = None  # from the beginning to the final sizes; None where that is not known
    nodes: int = 0

    @property
    def batch(self) -> int:
        """B."""
        return len(self.participants)

    @property
    def drafting(self) -> int:
        """D."""
        return sum(self.speculate)

    @property
    def plan(self) -> DraftPlan:
        """The sizes chosen so far."""
        return DraftPlan(tuple(self.growth.leaf_caps), self.nodes) if self.nodes else NO_SPECULATION
