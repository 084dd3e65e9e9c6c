"""Stands in for CUDA's recording of graphs, on any device."""

from __future__ import annotations

from collections.abc import Callable


class FakeRecorder:
    """A graph is a closure here: it reads and writes the memory that a graph would."""

    def __init__(self, fail_at: int = -1, error: Exception | None = None) -> None:
        """``error`` is raised instead of recording the graph with number ``fail_at``."""
        self.recorded, self.replayed, self._fail_at = 0, 0, fail_at
        self._error = error or RuntimeError("operation not permitted\nwhen stream is capturing")

    def __call__(self, action: Callable[[], None]) -> Callable[[], None]:
        if self.recorded == self._fail_at:
            self._fail_at = -1
            raise self._error
        action()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            action()

        return replay
