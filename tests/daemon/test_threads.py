"""engine.threads: auto: what is tried, what is chosen, and that a real engine gets it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specblock.cuda_ext.native import native_available
from specblock.daemon import threads
from specblock.daemon.config import DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.errors import ConfigError
from specblock.daemon.threads import ThreadChoice, candidates, choose_threads, cpu_quota, free_cores, use_threads
from specblock.verifier.model import TargetModel
from tests.verifier.helpers import tiny_hf_model, tiny_target


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
    ("seconds", "chosen"),
    [
        ({1: 8.0, 2: 4.0, 4: 2.5, 8: 2.45, 16: 2.9}, 4),  # more that are worth little are not taken
        ({1: 8.0, 2: 7.9, 4: 1.0}, 4),
        ({1: 8.0, 2: 12.0}, 1),
        ({1: 8.0, 2: 4.0}, 2),
    ],
)
def test_the_fewest_threads_that_no_other_number_beats(seconds: dict[int, float], chosen: int) -> None:
    found = choose_threads(tuple(seconds), seconds.__getitem__)
    assert found.threads == chosen and dict(found.measured) == seconds
    assert f"CPU threads: {chosen}" in str(found) and "1: 8000.00" in str(found)


def test_what_disturbs_one_try_does_not_decide() -> None:
    asked: list[int] = []

    def seconds(count: int) -> float:
        asked.append(count)
        return 8.0 / count if asked.count(count) > 1 else 20.0

    assert choose_threads((1, 2, 4), seconds).threads == 4
    assert asked == [1, 2, 4] * 3


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_is_read(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_a_single_candidate_is_not_measured() -> None:
    assert choose_threads((1,), {}.__getitem__) == ThreadChoice(1, ())


def test_a_trainer_on_the_cpu_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(6)))
    config = config_of()
    assert config.adaptation.enabled and config.drafter.has_weights
    assert free_cores(config, None) == 6 - config.trainer.threads
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"threads": 9})})
    assert free_cores(changed, None) == 1
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"device": "cuda"})})
    assert free_cores(changed, None) == 6
    still = config.model_copy(update={"adaptation": config.adaptation.model_copy(update={"enabled": False})})
    assert free_cores(still, None) == 6
    assert (free_cores(still, 3.7), free_cores(still, 0.4), free_cores(still, 64.0)) == (3, 1, 6)


def measured_threads(native: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """What a clock on which more threads are faster makes of a real target on three cores."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2})
    model = tiny_hf_model("llama", torch.float32, head_dim=16)
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0 / torch.get_num_threads()
        return now

    said = use_threads(config_of(), TargetModel.from_model(model, native=native), clock)
    return torch.get_num_threads(), said


@pytest.mark.skipif(not native_available(), reason="native operations were not built")
def test_a_real_target_is_measured_and_its_threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    threads_set, said = measured_threads(True, monkeypatch)
    assert threads_set == 2, "one of three is the trainer's"
    assert said == "CPU threads: 2 (engine.threads: auto; ms per forward by threads: 1: 1000.00, 2: 500.00)"


def test_layers_whose_bits_depend_on_threads_keep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_threads(False, monkeypatch) == (1, "CPU threads: 1 (engine.threads: auto)")


def test_a_number_is_taken_as_it_is() -> None:
    config = config_of()
    asked = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": 2})})
    assert use_threads(asked, tiny_target(), lambda: 0.0) == "CPU threads: 2"
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("value", ["0", "aut", "1.5", "true", "513"])
def test_what_is_neither_auto_nor_a_number_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.threads: must be auto or a whole number from 1 to 512"):
        load_config(Path("configs/local.yaml"), [f"engine.threads={value}"])
    for good in ("auto", "7"):
        assert str(load_config(Path("configs/local.yaml"), [f"engine.threads={good}"]).engine.threads) == good
