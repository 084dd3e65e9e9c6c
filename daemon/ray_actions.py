"""The bandit's actions, carried out by engine and trainer actors; windows travel through the object store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from specblock.bandit.actions import (
    CompareReport,
    Focus,
    Mix,
    ParityReport,
    SwapReport,
    TrainReport,
    WindowSummary,
)
from specblock.bandit.config import Arm
from specblock.daemon.engine_host import SwapResult
from specblock.daemon.messages import EngineStatus
from specblock.daemon.windows import HELDOUT_WINDOWS, PARITY_WINDOWS, TRAIN_WINDOWS, window_summary


class RayActions:
    """Implements ``specblock.bandit.actions.Actions``; every call blocks the bandit's thread, never decoding."""

    def __init__(self, engine: Any, trainer: Any, train_positions: int, timeout_s: float = 1800.0) -> None:
        self._engine, self._trainer, self._timeout_s = engine, trainer, timeout_s
        self._train_positions = train_positions

    def windows(self) -> WindowSummary:
        """What could be trained on right now."""
        return window_summary(self._get(self._engine.window_summary.remote()))

    def parity(self, version: str, after_time_s: float | None = None) -> ParityReport:
        """Replays ``version`` on the newest conversations that it served live."""
        windows = self._engine.pull_windows.remote(None, after_time_s, version, PARITY_WINDOWS)
        report: ParityReport = self._get(self._trainer.parity.remote(version, windows))
        return report

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        """Trains on the newest windows of the training side of the split, above all on those it is meant for."""
        windows = self._engine.pull_windows.remote(False, None, None, TRAIN_WINDOWS, self._train_positions)
        report: TrainReport = self._get(
            self._trainer.train.remote(decision_id, arm, base_version, fraction, resume, windows, dict(focus))
        )
        return report

    def compare(
        self, old_version: str, new_version: str, after_time_s: float | None, mix: Mix | None = None
    ) -> CompareReport:
        """Paired replay on the held-out side, newer than ``after_time_s``."""
        windows = self._engine.pull_windows.remote(True, after_time_s, None, HELDOUT_WINDOWS, None, mix)
        status: EngineStatus = self._get(self._engine.status.remote())
        report: CompareReport = self._get(
            self._trainer.compare.remote(old_version, new_version, windows, status.cycle_s)
        )
        return report

    def promote(self, decision_id: str, candidate_version: str) -> SwapReport:
        """Stores the candidate, swaps it in between two cycles, then makes it what a restart comes back with."""
        version = self._get(self._trainer.store.remote(candidate_version, decision_id))
        report = self._swap(version)
        self._get(self._trainer.discard.remote(candidate_version))
        return report

    def versions(self) -> tuple[str, ...]:
        """What the registry has stored."""
        names: tuple[str, ...] = self._get(self._trainer.versions.remote())
        return names

    def restore(self, decision_id: str, version: str) -> SwapReport:
        """Swaps a stored version in."""
        return self._swap(version)

    def rollback(self, decision_id: str, to_version: str) -> SwapReport:
        """Swaps an earlier version back in."""
        return self._swap(to_version)

    def discard(self, candidate_version: str) -> None:
        """Forgets a candidate."""
        self._get(self._trainer.discard.remote(candidate_version))

    def serving_version(self) -> str:
        """What the engine serves now."""
        status: EngineStatus = self._get(self._engine.status.remote())
        return status.drafter_version

    def _swap(self, version: str) -> SwapReport:
        weights = self._trainer.weights.remote(version)
        result: SwapResult = self._get(self._engine.swap.remote(version, weights))
        self._get(self._trainer.promote.remote(version))
        detail = "cached rows stay valid" if result.rows_stay_valid else "running requests keep older rows"
        return SwapReport(ok=True, stall_s=result.stall_s, detail=detail, version=version)

    def _get(self, reference: Any) -> Any:
        return ray.get(reference, timeout=self._timeout_s)
