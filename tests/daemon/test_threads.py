"""engine.threads: auto: what is tried, what is chosen, and that a real engine gets it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specblock.daemon import threads
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.threads import ThreadChoice, candidates, choose_threads, free_cores, use_threads
from tests.verifier.helpers import tiny_target


def config_of() -> DaemonConfig:
    return load_config(Path("configs/local.yaml"))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("most", "tried"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))]
)
def test_powers_of_two_and_the_most_are_tried(most: int, tried: tuple[int, ...]) -> None:
    assert candidates(most) == tried


@pytest.mark.parametrize(
    ("seconds", "chosen", "asked"),
    [
        ({1: 8.0, 2: 4.0, 4: 2.5, 8: 2.45, 16: 1.0}, 4, 4),  # stops where more do not help
        ({1: 8.0, 2: 7.9, 4: 1.0}, 1, 2),  # one that is worth little is not taken
        ({1: 8.0, 2: 12.0}, 1, 2),
        ({1: 8.0, 2: 4.0}, 2, 2),
    ],
)
def test_the_fewest_threads_that_no_more_beat(seconds: dict[int, float], chosen: int, asked: int) -> None:
    found = choose_threads(tuple(seconds), seconds.__getitem__)
    assert found.threads == chosen and len(found.measured) == asked
    assert f"CPU threads: {chosen}" in str(found) and "1: 8000.00" in str(found)


def test_a_single_candidate_is_not_measured() -> None:
    assert choose_threads((1,), {}.__getitem__) == ThreadChoice(1, ())


def test_a_trainer_on_the_cpu_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(6)))
    config = config_of()
    assert config.adaptation.enabled and config.drafter.has_weights
    assert free_cores(config) == 6 - config.trainer.threads
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"threads": 9})})
    assert free_cores(changed) == 1
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"device": "cuda"})})
    assert free_cores(changed) == 6
    still = config.model_copy(update={"adaptation": config.adaptation.model_copy(update={"enabled": False})})
    assert free_cores(still) == 6


def test_a_real_target_is_measured_and_its_threads_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2})
    ticks = iter(range(10_000))
    with caplog.at_level(logging.INFO):
        use_threads(config_of(), tiny_target(), lambda: float(next(ticks)))
    assert torch.get_num_threads() == 1, "by this clock more threads take just as long"
    assert (
        "engine runs on CPU threads: 1 (engine.threads: auto; ms per forward by threads: 1: 1000.00, 2:" in caplog.text
    )


def test_a_number_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    config = config_of()
    asked = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": 2})})
    use_threads(asked, tiny_target(), lambda: 0.0)
    assert torch.get_num_threads() == 2 and not caplog.text
