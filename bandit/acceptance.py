"""What the bandit remembers of acceptance, per domain and drafter version. Mutable, plain numbers, snapshot-ready.

Everything here depends only on the order of events *within* a domain, so domains may be interleaved in any way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from specblock.bandit.config import DetectorConfig, StatisticsConfig
from specblock.bandit.detect import PageHinkley
from specblock.bandit.events import NUM_RANK_BUCKETS, AcceptanceEvent
from specblock.bandit.intervals import RatioSums, agree

EXACT = 4
"""A level is averaged over this many times the cycles that establish it, whatever they show."""

STEADY = 32
"""And over this many as long as what comes agrees with it. A drop is only as exact as what it is a drop from."""

STEADY_Z = 2.0
"""Standard errors within which it agrees. A level is compared three times, so that this seldom ends it by chance."""

OLDER = 15
"""Windows kept in sums behind the newest one: half an hour at the demo's load, in which little drifts."""

TOGETHER = 4
"""Windows behind these that are kept as one."""

OLDEST = 48
"""So many of them: six hours and a half at the demo's load, in which slow drift shows."""

OTHER = "(other)"
"""Where domains and strata beyond the bounds are pooled."""


@dataclass(slots=True)
class DecayedSum:
    """A sum that halves every ``half_life_s``; gives a rate per second."""

    value: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    def add(self, amount: float, time_s: float, half_life_s: float) -> None:
        """Add ``amount`` that happened at ``time_s`` (late arrivals count for less)."""
        if self.last_s == 0.0:
            self.first_s = self.last_s = time_s
        if time_s >= self.last_s:
            self.value = self.value * math.exp2((self.last_s - time_s) / half_life_s) + amount
            self.last_s = time_s
        else:
            self.value += amount * math.exp2((time_s - self.last_s) / half_life_s)
            self.first_s = min(self.first_s, time_s)

    def rate(self, now_s: float, half_life_s: float) -> float:
        """Recent mean per second. A sum younger than a tenth of the half-life is taken to be that old."""
        age_s = max(now_s - self.first_s, half_life_s / 10)
        kept = math.exp2(-max(now_s - self.last_s, 0.0) / half_life_s)
        # Integral of the decay over the observed age: an exact mean for a steady flow, however young.
        weight_s = half_life_s / math.log(2) * -math.expm1(-age_s * math.log(2) / half_life_s)
        return self.value * kept / weight_s


@dataclass(slots=True)
class Level:
    """Pooled acceptance of the first cycles of a version in one stratum.

    It counts once ``enough`` cycles are in, and goes on getting more exact for a while: the best of several levels is
    a reference, and the best of inexact ones is too high.

    Attributes:
        sums: of the segments' cycles and tokens.
        coming: the same of those that are not in yet: as many as are in are taken together, if they agree with those.
        closed: they did not, so that nothing later belongs to it either.
    """

    cycles: int = 0
    tokens: int = 0
    sums: RatioSums = field(default_factory=RatioSums)
    coming: RatioSums = field(default_factory=RatioSums)
    closed: bool = False

    def fill(self, cycles: int, tokens: int, enough: int) -> None:
        """Take a segment until ``EXACT`` times ``enough`` cycles are in, and ``STEADY`` times while nothing changes."""
        if self.cycles < EXACT * enough:
            self._take(cycles, tokens)
            self.sums.add(cycles, tokens)
        elif self.cycles < STEADY * enough and not self.closed:
            self.coming.add(cycles, tokens)
            # Small portions would each be too inexact to show a change, and the level would follow it.
            if self.coming.x >= self.cycles and self.coming.units > 1:
                come, self.coming = self.coming, RatioSums()
                self.closed = not agree(come, self.sums, STEADY_Z)
                if not self.closed:
                    self._take(round(come.x), round(come.y))
                    self.sums = self.sums.plus(come)

    def _take(self, cycles: int, tokens: int) -> None:
        self.cycles += cycles
        self.tokens += tokens

    def acceptance(self, enough: int) -> float:
        """Tokens per cycle, 0 while not established."""
        return self.tokens / self.cycles if self.cycles >= enough else 0.0


@dataclass(slots=True)
class Segment:
    """One event of the recent window."""

    stratum: str
    cycles: int
    tokens: int
    device_s: float
    time_s: float = 0.0


@dataclass(slots=True)
class Block:
    """Events that are only remembered together.

    Attributes:
        windows: that it holds, the newest of which may not be complete.
        time_s: mean time of its events.
        strata: sums of their cycles and tokens.
    """

    windows: int = 1
    time_s: float = 0.0
    strata: dict[str, RatioSums] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Events."""
        return sum(sums.units for sums in self.strata.values())

    def add(self, segment: Segment) -> None:
        """Take one event."""
        self.time_s += (segment.time_s - self.time_s) / (self.units + 1)
        self.strata.setdefault(segment.stratum, RatioSums()).add(segment.cycles, segment.tokens)

    def plus(self, other: Block) -> Block:
        """Both as one."""
        names, units = self.strata.keys() | other.strata.keys(), self.units + other.units
        return Block(
            self.windows + other.windows,
            (self.units * self.time_s + other.units * other.time_s) / max(units, 1),
            {n: self.strata.get(n, RatioSums()).plus(other.strata.get(n, RatioSums())) for n in sorted(names)},
        )


@dataclass(slots=True)
class VersionStatistics:
    """One drafter version in one domain.

    Attributes:
        cycles: cycles, exponentially forgotten by cycles; so are tokens, seconds, nodes and the two histograms.
        survival: ``[k]`` cycles that accepted at least k + 1 draft tokens.
        ranks: rank buckets at the first rejection.
        level: the first cycles over all strata.
        strata: the first cycles per sampling class and load band.
        recent: newest segments.
        older: the windows before them, the newest last.
        oldest: what was before these, ``TOGETHER`` windows in a block, the newest last.
        block_cycles: the detector's unfinished block.
        total_cycles: all cycles; never forgotten, like tokens and requests.
        last_time_s: newest event time.
        resumed: it has begun to serve again; what it accepted before is kept until something newer is known.
    """

    cycles: float = 0.0
    tokens: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    draft_nodes: float = 0.0
    survival: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=lambda: [0.0] * NUM_RANK_BUCKETS)
    level: Level = field(default_factory=Level)
    strata: dict[str, Level] = field(default_factory=dict)
    recent: list[Segment] = field(default_factory=list)
    older: list[Block] = field(default_factory=list)
    oldest: list[Block] = field(default_factory=list)
    block_cycles: int = 0
    block_tokens: int = 0
    block_expected: float = 0.0
    detector: PageHinkley = field(default_factory=PageHinkley)
    total_cycles: int = 0
    total_tokens: int = 0
    requests: int = 0
    last_time_s: float = 0.0
    resumed: bool = False

    def learn(self, event: AcceptanceEvent, config: StatisticsConfig, detector: DetectorConfig) -> bool:
        """Take one event; True when the detector reports a change of acceptance."""
        if self.resumed:
            self.resumed = False
            self.recent.clear()
            self.older.clear()
            self.oldest.clear()
            self.block_cycles, self.block_tokens, self.block_expected = 0, 0, 0.0
        self._forget_and_add(event, config)
        stratum = self._stratum(event, config)
        level = self.strata.setdefault(stratum, Level())
        expected = level.acceptance(config.reference_cycles)
        level.fill(event.cycles, event.committed_tokens, config.reference_cycles)
        self.level.fill(event.cycles, event.committed_tokens, config.reference_cycles)
        self.recent.append(Segment(stratum, event.cycles, event.committed_tokens, event.device_s, event.time_s))
        for segment in self.recent[: -config.window_events]:
            self._pool(segment, config.window_events)
        del self.recent[: -config.window_events]
        self.total_cycles += event.cycles
        self.total_tokens += event.committed_tokens
        self.requests += event.last
        self.last_time_s = max(self.last_time_s, event.time_s)
        return expected > 0 and self._block(event, expected, detector)

    def _pool(self, segment: Segment, window: int) -> None:
        if not self.older or self.older[-1].units >= window:
            self.older.append(Block())
            for block in self.older[:-OLDER]:
                fits = bool(self.oldest) and self.oldest[-1].windows < TOGETHER
                self.oldest.append(self.oldest.pop().plus(block) if fits else block)
            del self.older[:-OLDER], self.oldest[:-OLDEST]
        self.older[-1].add(segment)

    def _stratum(self, event: AcceptanceEvent, config: StatisticsConfig) -> str:
        stratum = f"{event.sampling_class}|{event.batch_band}"
        return stratum if stratum in self.strata or len(self.strata) < config.max_strata - 1 else OTHER

    def _forget_and_add(self, event: AcceptanceEvent, config: StatisticsConfig) -> None:
        kept = math.exp2(-event.cycles / config.half_life_cycles)
        self.cycles = self.cycles * kept + event.cycles
        self.tokens = self.tokens * kept + event.committed_tokens
        self.draft_s = self.draft_s * kept + event.draft_s
        self.verify_s = self.verify_s * kept + event.verify_s
        self.other_s = self.other_s * kept + event.other_s
        self.draft_nodes = self.draft_nodes * kept + event.draft_nodes
        self.ranks = [old * kept + new for old, new in zip(self.ranks, event.rank_histogram, strict=True)]
        reached = [sum(event.accepted_histogram[k + 1 :]) for k in range(len(event.accepted_histogram) - 1)]
        longest = max(len(reached), len(self.survival))
        old_survival = self.survival + [0.0] * (longest - len(self.survival))
        new_survival = reached + [0] * (longest - len(reached))
        self.survival = [old * kept + new for old, new in zip(old_survival, new_survival, strict=True)]

    def _block(self, event: AcceptanceEvent, expected: float, config: DetectorConfig) -> bool:
        """Feed the detector one sample per block: tokens over what the strata's references promise."""
        self.block_cycles += event.cycles
        self.block_tokens += event.committed_tokens
        self.block_expected += event.cycles * expected
        if self.block_cycles < config.block_cycles:
            return False
        sample = self.block_tokens / self.block_expected
        self.block_cycles, self.block_tokens, self.block_expected = 0, 0, 0.0
        return self.detector.update(sample, config)


@dataclass(slots=True)
class DomainStatistics:
    """One traffic domain: versions, and the flow of tokens and device-seconds."""

    versions: dict[str, VersionStatistics] = field(default_factory=dict)
    tokens: DecayedSum = field(default_factory=DecayedSum)
    device_s: DecayedSum = field(default_factory=DecayedSum)
    changes: int = 0
    requests: int = 0

    def learn(self, event: AcceptanceEvent, config: StatisticsConfig, detector: DetectorConfig) -> None:
        """Take one event; a flagged one (mixed versions) counts as traffic only."""
        self.requests += event.last
        self.tokens.add(event.committed_tokens, event.time_s, config.rate_half_life_s)
        self.device_s.add(event.device_s, event.time_s, config.rate_half_life_s)
        if event.flagged or event.cycles == 0:
            return
        if event.drafter_version not in self.versions:
            self.versions[event.drafter_version] = VersionStatistics()
            for other in self.versions.values():  # only of what serves a slow drift is of interest
                other.oldest.clear()
        version = self.versions[event.drafter_version]
        self.changes += version.learn(event, config, detector)
        if len(self.versions) > config.max_versions:
            oldest = min(self.versions, key=lambda name: (self.versions[name].last_time_s, name))
            del self.versions[oldest]
