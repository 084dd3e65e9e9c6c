"""Two-sided Page-Hinkley change detection on a signal standardised by its own running robust scale.

The textbook thresholds assume 0/1 errors; here slack and threshold are in standard deviations of the signal, whatever
its unit, so the false-alarm rate does not depend on it: with slack d and threshold h a stationary normal signal raises
about one false alarm in exp(2 d h) / (2 d^2) samples (defaults: ten thousand blocks).

Source: Page 1954; Hinkley 1971; average run length after Siegmund 1985, chapter 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from specblock.bandit.config import DetectorConfig

MAD_TO_SD = math.sqrt(math.pi / 2)
"""Standard deviation over mean absolute deviation of a normal variable."""

CLIP_SD = 4.0
"""One sample counts for no more than this."""

MIN_RELATIVE_SCALE = 1e-3
"""Floor of the scale relative to the mean: a signal that never moved must not alarm on its first rounding error."""


@dataclass(slots=True)
class PageHinkley:
    """Detector state; plain numbers, so it lives in the snapshot.

    Attributes:
        count: samples since the last restart.
        mean: running mean of the (clipped) signal.
        deviation: running mean absolute deviation.
        down: evidence for a fall, in standard deviations.
        up: evidence for a rise.
        alarms_down: falls reported so far.
        alarms_up: rises reported so far.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    down: float = 0.0
    up: float = 0.0
    alarms_down: int = 0
    alarms_up: int = 0

    def update(self, value: float, config: DetectorConfig) -> bool:
        """Take one sample; True when a change (either way) is reported. The detector then starts over."""
        warm = self.count >= config.min_blocks
        scale = max(MAD_TO_SD * self.deviation, MIN_RELATIVE_SCALE * abs(self.mean), 1e-12)
        score = min(max((value - self.mean) / scale, -CLIP_SD), CLIP_SD) if warm else 0.0
        # Outliers move mean and scale no further than they may move the evidence.
        sample = self.mean + score * scale if warm else value
        self.count += 1
        self.mean += (sample - self.mean) / self.count
        self.deviation += (abs(sample - self.mean) - self.deviation) / self.count
        if warm:
            self.down = max(0.0, self.down - score - config.delta_sd)
            self.up = max(0.0, self.up + score - config.delta_sd)
        return self._report(config)

    def _report(self, config: DetectorConfig) -> bool:
        fell, rose = self.down > config.threshold_sd, self.up > config.threshold_sd
        if not (fell or rose):
            return False
        self.alarms_down += fell
        self.alarms_up += rose
        self.count, self.mean, self.deviation, self.down, self.up = 0, 0.0, 0.0, 0.0, 0.0
        return True
