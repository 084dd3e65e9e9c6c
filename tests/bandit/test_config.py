"""Bad numbers are refused by their dotted name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from specblock.bandit.config import (
    Arm,
    CostConfig,
    DetectorConfig,
    GateConfig,
    HorizonConfig,
    ParityConfig,
    PolicyConfig,
    ServiceConfig,
    StatisticsConfig,
    StreamConfig,
)

HEAD = {"name": "head", "patterns": ("*",), "steps": 1, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("build", "values", "named"),
    [
        (Arm, {**HEAD, "patterns": ()}, "policy.arms[head].patterns"),
        (Arm, {**HEAD, "learning_rate": 0.0}, "policy.arms[head].learning_rate"),
        (Arm, {**HEAD, "drop_recovery": 1.5}, "policy.arms[head].drop_recovery"),
        (CostConfig, {"price": -1.0}, "policy.cost.price"),
        (CostConfig, {"price": float("nan")}, "policy.cost.price"),
        (HorizonConfig, {"cap_s": float("inf")}, "policy.horizon.cap_s"),
        (DetectorConfig, {"min_blocks": 1}, "policy.detector.min_blocks"),
        (ParityConfig, {"tolerance": 0.0}, "policy.parity.tolerance"),
        (GateConfig, {"alpha": 1.0}, "policy.gate.alpha"),
        (GateConfig, {"max_conversations": 1}, "policy.gate.max_conversations"),
        (GateConfig, {"look_growth": float("inf")}, "policy.gate.look_growth"),
        (PolicyConfig, {"backoff_factor": float("inf")}, "policy.backoff_factor"),
        (PolicyConfig, {"evidence_growth": float("nan")}, "policy.evidence_growth"),
        (StatisticsConfig, {"max_domains": 0}, "policy.statistics.max_domains"),
        (PolicyConfig, {"confidence": 0.2}, "policy.confidence"),
        (PolicyConfig, {"arms": (Arm(name="skip"), Arm(name="skip"))}, "policy.arms"),
        (PolicyConfig, {"arms": (Arm(**HEAD),)}, "policy.arms"),  # type: ignore[arg-type]
        (StreamConfig, {"url": "http://x"}, "stream.url"),
        (StreamConfig, {"url": "redis://x", "socket_timeout_s": 4.0}, "stream.socket_timeout_s"),
        (ServiceConfig, {"directory": ""}, "bandit.directory"),
        (ServiceConfig, {"directory": "d", "keep_snapshots": 1}, "bandit.keep_snapshots"),
    ],
)
def test_a_bad_value_is_named(build: Callable[..., Any], values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as error:
        build(**values)
    assert str(error.value).startswith(named + " must be")


def test_a_password_in_the_address_is_not_repeated() -> None:
    with pytest.raises(ValueError) as error:
        StreamConfig(url="http://user:secret@x")
    assert "secret" not in str(error.value)


def test_arms_are_found_by_name() -> None:
    policy = PolicyConfig()
    assert policy.arm("head").steps > 0 and policy.arm("skip").steps == 0
    with pytest.raises(ValueError, match="nothing"):
        policy.arm("nothing")
