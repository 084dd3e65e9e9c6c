"""Two-sided Page-Hinkley change detection on a signal standardised by its own running robust scale.

The textbook thresholds assume 0/1 errors; here slack and threshold are in standard deviations of the signal, whatever
its unit, so the false-alarm rate does not depend on it: with slack d and threshold h a stationary normal signal raises
about one false alarm in exp(2 d h) / (2 d^2) samples (defaults: tens of thousands).

Source: Page 1954; Hinkley 1971; average run length after Siegmund 1985, chapter 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from specblock.bandit.config import DetectConfig

MAD_TO_SD = 1.2533141373155003
"""sqrt(pi / 2): standard deviation over mean absolute deviation of a normal variable."""


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

    def update(self, value: float, config: DetectConfig) -> bool:
        """Take one sample; True when a change (either way) is reported. The detector then starts over."""
        warm = self.count >= config.min_samples
        scale = max(MAD_TO_SD * self.deviation, config.min_scale)
        score = (value - self.mean) / scale if warm else 0.0
        clipped = min(max(score, -config.clip_sd), config.clip_sd)
        # Outliers move mean and scale no further than they may move the evidence.
        sample = self.mean + clipped * scale if warm else value
        self.count += 1
        self.mean += (sample - self.mean) / self.count
        self.deviation += (abs(sample - self.mean) - self.deviation) / self.count
        if warm:
            self.down = max(0.0, self.down - clipped - config.slack_sd)
            self.up = max(0.0, self.up + clipped - config.slack_sd)
        return self._report(config)

    def _report(self, config: DetectConfig) -> bool:
        fell, rose = self.down > config.threshold_sd, self.up > config.threshold_sd
        if not (fell or rose):
            return False
        self.alarms_down += fell
        self.alarms_up += rose
        self.count, self.mean, self.deviation, self.down, self.up = 0, 0.0, 0.0, 0.0, 0.0
        return True
