"""Which events of each producer were learned: exactly once, in any order, with losses counted.

Per producer incarnation: one past the highest sequence seen, and the set of missing ones below it. An event that is
neither at the front nor missing was seen before (or given up). Nothing here depends on a clock, so the marks after a
set of events do not depend on the order they came in, as long as none was more than ``patience`` late.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class IncarnationMark:
    """Progress of one life of one producer.

    Attributes:
        next_sequence: one past the highest sequence seen.
        missing: sequences below it that may still arrive, ascending.
        lost: sequences given up.
        last_time_s: newest event time seen.
    """

    next_sequence: int = 0
    missing: list[int] = field(default_factory=list)
    lost: int = 0
    last_time_s: float = 0.0


@dataclass(slots=True)
class Watermarks:
    """Marks of all producers; part of the bandit's snapshot.

    Attributes:
        marks: by incarnation.
        retired_lost: losses of incarnations that were forgotten.
    """

    marks: dict[str, IncarnationMark] = field(default_factory=dict)
    retired_lost: int = 0

    @property
    def lost(self) -> int:
        """Events that were sent and will not be learned."""
        return self.retired_lost + sum(mark.lost for mark in self.marks.values())

    @property
    def missing(self) -> int:
        """Events that may still arrive."""
        return sum(len(mark.missing) for mark in self.marks.values())

    def accept(self, incarnation: str, sequence: int, time_s: float, patience: int) -> bool:
        """Record an event; False when it was seen, or given up, before.

        Sequences more than ``patience`` behind the newest are given up.
        """
        mark = self.marks.setdefault(incarnation, IncarnationMark())
        if sequence < mark.next_sequence:
            if sequence not in mark.missing:
                return False
            mark.missing.remove(sequence)
        else:
            oldest = max(mark.next_sequence, sequence - patience)
            mark.lost += oldest - mark.next_sequence
            mark.missing.extend(range(oldest, sequence))
            mark.next_sequence = sequence + 1
            while mark.missing and mark.missing[0] < sequence - patience:
                del mark.missing[0]
                mark.lost += 1
        mark.last_time_s = max(mark.last_time_s, time_s)
        return True

    def forget(self, max_incarnations: int) -> None:
        """Drop the longest silent incarnations beyond ``max_incarnations``; what they still missed is lost."""
        silent = sorted(self.marks, key=lambda name: (self.marks[name].last_time_s, name))
        for name in silent[: max(0, len(silent) - max_incarnations)]:
            mark = self.marks.pop(name)
            self.retired_lost += mark.lost + len(mark.missing)
