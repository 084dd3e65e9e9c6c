"""Page-Hinkley: finds changes in any unit, seldom cries wolf."""

from __future__ import annotations

import numpy as np
import pytest

from specblock.bandit.codec import dumps, loads
from specblock.bandit.config import DetectorConfig
from specblock.bandit.detect import PageHinkley

CONFIG = DetectorConfig()


def first_alarm(signal: np.ndarray) -> int | None:  # type: ignore[type-arg]
    detector = PageHinkley()
    return next((i for i, x in enumerate(signal.tolist()) if detector.update(x, CONFIG)), None)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_shift_of_one_deviation_is_found_within_forty_blocks_in_any_unit(unit: float, sign: float) -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        signal = unit * (10 + np.concatenate([random.normal(0, 1, 200), random.normal(1.5 * sign, 1, 80)]))
        found = first_alarm(signal)
        assert found is not None and 200 <= found < 245, (seed, found)


def test_direction_is_told() -> None:
    random = np.random.default_rng(0)
    detector = PageHinkley()
    for x in np.concatenate([random.normal(10, 1, 100), random.normal(7, 1, 30)]):
        detector.update(float(x), CONFIG)
    assert (detector.alarms_down, detector.alarms_up) == (1, 0)


def test_a_stationary_signal_seldom_alarms() -> None:
    random = np.random.default_rng(1)
    false = sum(first_alarm(random.normal(3, 0.4, 500)) is not None for _ in range(100))
    assert false <= 6


def test_single_outliers_do_not_alarm() -> None:
    random = np.random.default_rng(2)
    signal = random.normal(1, 0.05, 400)
    signal[100::40] = 50.0
    assert first_alarm(signal) is None


def test_a_constant_signal_is_no_change() -> None:
    assert first_alarm(np.full(500, 0.1)) is None


def test_it_starts_over_after_an_alarm_and_survives_a_snapshot() -> None:
    random = np.random.default_rng(3)
    signal = np.concatenate([random.normal(m, 1, 120) for m in (10, 5, 10)])
    plain, stored = PageHinkley(), PageHinkley()
    for x in signal.tolist():
        plain.update(x, CONFIG)
        stored = loads(PageHinkley, dumps(stored))
        stored.update(x, CONFIG)
    assert (plain.alarms_down, plain.alarms_up) == (1, 1)
    assert stored == plain
