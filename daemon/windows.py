"""Training windows in memory: one byte budget, a quota per domain, a time to live, a split fixed at birth."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from specblock.bandit.actions import DomainWindows, Mix, WindowSummary
from specblock.drafter.window import Window

PARITY_WINDOWS, HELDOUT_WINDOWS, TRAIN_WINDOWS = 32, 128, 1024
"""The newest windows that a parity check, a comparison of two versions and an update take at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLimits:
    """Attributes:
    budget_bytes: all windows together.
    per_domain_quota: share of the budget one domain may fill while another needs room.
    heldout_fraction: share of conversations that is only ever replayed.
    max_window_tokens: longer conversations are cut here (and say so).
    ttl_s: older windows are dropped.
    """

    budget_bytes: int
    per_domain_quota: float = 0.5
    heldout_fraction: float = 0.25
    max_window_tokens: int = 512
    ttl_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCount:
    """What is kept of one domain; ``train_positions`` counts generated tokens of training windows."""

    domain: str
    num_train: int
    num_heldout: int
    train_positions: int


def window_summary(counts: Iterable[DomainCount]) -> WindowSummary:
    """The counts as the bandit reads them."""
    return WindowSummary(domains=tuple(DomainWindows(**asdict(count)) for count in counts))


def in_mix(windows: list[Window], mix: Mix | None) -> list[Window]:
    """The windows, oldest first, that a candidate is judged on; without a mix all of them."""
    return windows if mix is None else [windows[i] for i in mix.chosen([w.domain for w in windows])]


class WindowStore:
    """Bounded store of finished conversations; the decode loop adds, the trainer pulls copies by reference."""

    def __init__(self, limits: WindowLimits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: OrderedDict[str, Window] = OrderedDict()  # oldest first
        self._bytes_by_domain: dict[str, int] = {}
        self.num_bytes = 0
        self.dropped = 0

    def is_heldout(self, conversation_id: str) -> bool:
        """The split, a function of the conversation alone."""
        digest = hashlib.blake2b(conversation_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.limits.heldout_fraction * 2**64

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._windows)

    def add(self, window: Window) -> None:
        """Keeps a window and drops what no longer fits: expired first, then the oldest of domains over quota."""
        with self._lock:
            if window.num_bytes > self.limits.budget_bytes:
                self.dropped += 1
                return
            self._remove(window.conversation_id)
            self._windows[window.conversation_id] = window
            self._count(window.domain, window.num_bytes)
            self._expire()
            while self.num_bytes > self.limits.budget_bytes:
                self._drop(self._victim())

    def pull(
        self, *, heldout: bool | None = None, after_time_s: float | None = None, version: str | None = None
    ) -> list[Window]:
        """Windows, oldest first, optionally only one side of the split, newer than a time, or served by a version."""
        with self._lock:
            self._expire()
            return [
                w
                for w in self._windows.values()
                if (heldout is None or w.heldout == heldout)
                and (after_time_s is None or w.time_s > after_time_s)
                and (version is None or w.drafter_version == version)
            ]

    def summary(self) -> tuple[DomainCount, ...]:
        """Counts per domain, by name."""
        with self._lock:
            self._expire()
            windows = list(self._windows.values())
        counts = []
        for domain in sorted({w.domain for w in windows}):
            own = [w for w in windows if w.domain == domain]
            train = [w for w in own if not w.heldout]
            counts.append(
                DomainCount(
                    domain=domain,
                    num_train=len(train),
                    num_heldout=len(own) - len(train),
                    train_positions=sum(w.num_generated for w in train),
                )
            )
        return tuple(counts)

    def forget(self, keep: Callable[[Window], bool]) -> int:
        """Drops every window that ``keep`` refuses (a tenant's deletion, a new target); returns how many."""
        with self._lock:
            gone = [key for key, window in self._windows.items() if not keep(window)]
            for key in gone:
                self._remove(key)
            return len(gone)

    def _expire(self) -> None:
        """Drops what is too old, also when no traffic comes any more. Windows are added in the order they finished."""
        horizon = self._clock() - self.limits.ttl_s
        while self._windows and next(iter(self._windows.values())).time_s < horizon:
            self._drop(next(iter(self._windows)))

    def _victim(self) -> str:
        quota = self.limits.per_domain_quota * self.limits.budget_bytes
        over = {domain for domain, size in self._bytes_by_domain.items() if size > quota}
        if over and len(self._bytes_by_domain) > 1:
            return next(key for key, window in self._windows.items() if window.domain in over)
        return next(iter(self._windows))

    def _drop(self, key: str) -> None:
        self._remove(key)
        self.dropped += 1

    def _remove(self, key: str) -> None:
        window = self._windows.pop(key, None)
        if window is not None:
            self._count(window.domain, -window.num_bytes)

    def _count(self, domain: str, num_bytes: int) -> None:
        """Sums are kept, not recomputed: the decode thread adds windows, and it must not wait for thousands of them."""
        self.num_bytes += num_bytes
        left = self._bytes_by_domain.get(domain, 0) + num_bytes
        if left:
            self._bytes_by_domain[domain] = left
        else:
            self._bytes_by_domain.pop(domain, None)
