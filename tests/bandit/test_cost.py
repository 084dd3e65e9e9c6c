"""Net value in device-seconds, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.bandit.config import Arm, CostConfig, HorizonConfig
from specblock.bandit.cost import (
    Belief,
    CostTerms,
    DomainGain,
    MeanSums,
    NetValue,
    TrainingSums,
    break_even_s,
    charge_s,
    horizon_value_s,
    mean_seconds,
    net_value,
    training_seconds,
    update_belief,
)

ARM = Arm(
    name="head", patterns=("*",), steps=100, learning_rate=1e-3, positions_per_step=1000, prior_s_per_position=1e-4
)


def value(**changes: object) -> NetValue:
    values: dict[str, object] = {
        "busy_devices": 2.0,
        "hazard_per_s": 1e-3,
        "z": 1.0,
        "cost": CostConfig(price=0.5, interference=0.1, serving_devices=2.0),
        "horizon": HorizonConfig(cap_s=1000.0),
        **changes,
    }
    gains = (
        DomainGain(domain="a", share=0.75, mean=0.2, sd=0.04),
        DomainGain(domain="b", share=0.25, mean=-0.1, sd=0.02),
    )
    terms = CostTerms(
        train=Belief(mean=10.0, sd=2.0),
        probe=Belief(mean=1.0, sd=0.2),
        score=Belief(mean=4.0, sd=1.0),
        stall=Belief(mean=0.5, sd=0.1),
    )
    return net_value("head", gains, terms, **values)  # type: ignore[arg-type]


def test_every_term_by_hand() -> None:
    found = value()
    lasting = (1 - math.exp(-1.0)) / 1e-3
    assert found.gain == pytest.approx(0.75 * 0.2 - 0.25 * 0.1)
    assert found.benefit == pytest.approx(2.0 * 0.125 * lasting)
    assert found.cost == pytest.approx(0.6 * 11 + 0.5 * 4 + 2.0 * 0.5)
    sd = math.hypot(2.0 * lasting * (0.75 * 0.04 + 0.25 * 0.02), 0.6 * 2.2, 0.5 * 1.0, 2.0 * 0.1)
    assert found.net_lower == pytest.approx(found.benefit - found.cost - sd)


@given(st.floats(1e-6, 1.0), st.floats(0, 1e-2), st.floats(1.0, 1e5))
def test_the_horizon_is_below_its_cap_and_below_the_mean_regime(hazard: float, discount: float, cap: float) -> None:
    found = horizon_value_s(hazard, HorizonConfig(cap_s=cap, discount_per_s=discount))
    assert 0 < found <= cap * (1 + 1e-9) and found <= 1 / (hazard + discount) * (1 + 1e-9)


def test_break_even_solves_its_own_equation() -> None:
    config, hazard = HorizonConfig(), 1e-3
    seconds = break_even_s(0.1, 20.0, hazard, config)
    assert seconds is not None
    assert 0.1 * (1 - math.exp(-hazard * seconds)) / hazard == pytest.approx(20.0)
    assert break_even_s(0.1, 200.0, hazard, config) is None and break_even_s(-0.1, 1.0, hazard, config) is None
    assert break_even_s(0.1, 0.0, hazard, config) == 0.0


def test_the_first_measurement_counts_as_much_as_the_guess_and_many_replace_it() -> None:
    config = CostConfig()
    guess = training_seconds(TrainingSums(), ARM, 1.0, 0.1, config)
    assert guess.mean == pytest.approx(10.0)
    once = training_seconds(TrainingSums().observe(10, 10_000, 3.0), ARM, 1.0, 0.1, config)
    assert once.mean == pytest.approx((1.0 + 3.0) / 20_000 * 100_000)
    sums = TrainingSums()
    for _ in range(50):
        sums = sums.observe(100, 100_000, 30.0)
    many = training_seconds(sums, ARM, 1.0, 0.1, config)
    assert many.mean == pytest.approx(30.0, rel=0.01) and many.sd < once.sd
    assert TrainingSums().observe(10, 0, 1.0) == TrainingSums()


def test_costs_without_a_size_are_learned_too() -> None:
    sums = MeanSums()
    for seconds in (1.0, 1.2, 0.8, 1.0):
        sums = sums.observe(seconds)
    found, guess = mean_seconds(sums, 9.0, CostConfig()), mean_seconds(MeanSums(), 9.0, CostConfig())
    assert found.mean == pytest.approx((9.0 + 4.0) / 5) and guess == Belief(mean=9.0, sd=4.5)


def test_charges_weigh_price_interference_and_stall() -> None:
    config = CostConfig(price=0.5, interference=0.1, serving_devices=4.0)
    assert charge_s(config, device_s=10.0, train_s=6.0, stall_s=0.25) == pytest.approx(5.0 + 0.6 + 1.0)


def test_a_belief_moves_towards_what_is_seen_by_precision() -> None:
    found = update_belief(Belief(mean=0.0, sd=1.0), 4.0, 1.0)
    assert found.mean == pytest.approx(2.0) and found.sd == pytest.approx(math.sqrt(0.5))
    assert update_belief(Belief(mean=0.3, sd=0.1), 9.0, 1e6).mean == pytest.approx(0.3)


def test_idle_training_devices_cost_only_interference() -> None:
    idle = value(cost=CostConfig(price=0.0, interference=0.1, serving_devices=2.0))
    assert idle.cost == pytest.approx(0.1 * 11 + 2.0 * 0.5)
