"""Which events of each producer were learned: exactly once, in any order, with losses counted.

``next_sequence`` is one past the highest sequence seen; ``gaps`` holds the missing ones below it and when each was
first noticed. An event that is neither at the front nor in a gap was seen before.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class ProducerMark:
    """Progress of one producer incarnation.

    Attributes:
        next_sequence: one past the highest sequence seen.
        gaps: missing sequence (as text, for JSON) -> wall clock when it was noticed.
        lost: sequences given up.
        last_s: wall clock of the last new event.
    """

    next_sequence: int = 0
    gaps: dict[str, float] = field(default_factory=dict)
    lost: int = 0
    last_s: float = 0.0


@dataclass(slots=True)
class Watermarks:
    """Marks of all producers; part of the bandit's snapshot.

    Attributes:
        marks: by producer incarnation.
        retired_lost: losses of producers that were forgotten.
    """

    marks: dict[str, ProducerMark] = field(default_factory=dict)
    retired_lost: int = 0

    @property
    def lost(self) -> int:
        """Events that were sent and will not be learned."""
        return self.retired_lost + sum(mark.lost for mark in self.marks.values())

    @property
    def open_gaps(self) -> int:
        """Events that are missing but may still arrive."""
        return sum(len(mark.gaps) for mark in self.marks.values())

    def accept(self, producer: str, sequence: int, now_s: float, max_gaps: int) -> bool:
        """Record (producer, sequence); False when it was seen, or given up, before.

        At most ``max_gaps`` missing sequences are remembered per producer; the oldest beyond that are given up.
        """
        mark = self.marks.setdefault(producer, ProducerMark())
        if sequence < mark.next_sequence:
            if mark.gaps.pop(str(sequence), None) is None:
                return False
        else:
            first = max(mark.next_sequence, sequence - max_gaps)
            mark.lost += first - mark.next_sequence
            mark.gaps.update((str(missing), now_s) for missing in range(first, sequence))
            mark.next_sequence = sequence + 1
            while len(mark.gaps) > max_gaps:
                del mark.gaps[min(mark.gaps, key=int)]
                mark.lost += 1
        mark.last_s = now_s
        return True

    def expire(self, now_s: float, max_gap_age_s: float, max_silence_s: float) -> None:
        """Give up gaps older than ``max_gap_age_s``; forget producers silent for ``max_silence_s``."""
        for producer in sorted(self.marks):
            mark = self.marks[producer]
            old = [sequence for sequence, seen_s in mark.gaps.items() if now_s - seen_s > max_gap_age_s]
            for sequence in old:
                del mark.gaps[sequence]
            mark.lost += len(old)
            if now_s - mark.last_s > max_silence_s:
                self.retired_lost += mark.lost + len(mark.gaps)
                del self.marks[producer]
