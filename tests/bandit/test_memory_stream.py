"""The in-memory stream keeps the contract."""

from __future__ import annotations

import time

import pytest

from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from tests.bandit.stream_contract import Bounds, Harness, StreamContract


class TestMemoryStream(StreamContract):
    @pytest.fixture
    def harness(self) -> Harness:
        log = MemoryLog(clock=time.monotonic)

        def open_stream(consumer: str, bounds: Bounds) -> MemoryStream:
            return MemoryStream(
                log,
                consumer,
                max_entries=bounds.max_entries,
                max_parked=bounds.max_parked,
                claim_idle_s=bounds.claim_idle_s,
            )

        def flush() -> None:
            log.entries.clear()
            log.pending.clear()
            log.parked.clear()

        return Harness(open_stream, flush)
