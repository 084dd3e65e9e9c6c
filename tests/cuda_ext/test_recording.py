from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from specblock.cuda_ext.recording import Recordings
from tests.recorders import FakeRecorder


def one() -> tuple[Tensor, ...]:
    return (torch.zeros(1),)


def recorded(recordings: Recordings[int], sizes: list[int]) -> list[bool]:
    """Which of the sizes ran as graphs."""
    ran = []
    for size in sizes:
        recording = recordings.of(size, one)
        ran.append(recording is not None and recordings.run(recording, lambda: None, f"size {size}"))
    return ran


def test_a_size_without_memory_leaves_the_smaller_ones_alone(caplog: pytest.LogCaptureFixture) -> None:
    recordings = Recordings[int](FakeRecorder(0, torch.OutOfMemoryError("out of memory")), most=8)
    with caplog.at_level(logging.WARNING):
        assert recorded(recordings, [8, 4, 8, 4]) == [False, True, False, True], "and is not tried again"
    assert recordings.sizes == (4,) and recordings.failures == 0
    assert [r.getMessage() for r in caplog.records] == ["no memory for a CUDA graph of size 8: out of memory"]


def test_what_cannot_be_recorded_is_the_last_that_is_tried() -> None:
    recorder = FakeRecorder(1)
    recordings = Recordings[int](recorder, most=8)
    assert recorded(recordings, [1, 2, 3, 1]) == [True, False, False, True], "what was recorded before stays"
    assert recordings.sizes == (1,) and recordings.failures == 1 and recorder.recorded == 1


def test_there_are_no_more_than_the_limit() -> None:
    recordings = Recordings[int](FakeRecorder(), most=2)
    assert recorded(recordings, [1, 2, 3, 2]) == [True, True, False, True]
