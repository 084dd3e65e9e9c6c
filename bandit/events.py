"""Acceptance events and their wire format: one JSON payload with a schema version per stream entry.

An event is one segment of one request. It carries scalars only: no text, no tokens.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

SCHEMA_VERSION = 1
_RANK_BUCKETS = (1, 4, 10)  # 0-based ranks below: 1, 2-4, 5-10
NUM_RANK_BUCKETS = len(_RANK_BUCKETS) + 1


class EventError(ValueError):
    """An entry that cannot be understood; the reader parks it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceEvent:
    """What the verifier accepted in one segment (request end, or every few dozen cycles).

    A cycle is a draft tree plus one verification and commits ``accepted + 1`` tokens (fewer where the text ends).

    Attributes:
        incarnation: names one life of one producing process; stamped by ``EventProducer``.
        sequence: counts from 0 within the incarnation; stamped by ``EventProducer``.
        time_s: end of the segment, seconds since the epoch.
        accepted_histogram: index a counts the cycles that accepted a draft tokens; sums to ``cycles``.
        rank_histogram: rank of the target's token among the drafter's candidates where acceptance stopped: 1, 2-4,
            5-10, above or not among them. Cycles that stopped where the drafter had not gone on count nowhere, so the
            sum is at most ``cycles``.
        draft_s, verify_s, other_s: device-seconds of this request's share of its cycles; over all requests they add
            up to the device's time, so a batch of four books a quarter of each cycle on each request.
        flagged: cycles of mixed drafter versions; kept out of the statistics.
        last: the request ended with this segment.
    """

    incarnation: str = ""
    sequence: int = -1
    time_s: float
    request_id: str
    engine: str
    drafter_version: str
    tenant: str = "default"
    domain: str = "default"
    sampling_class: str = "greedy"
    batch_band: str = "1"
    context_band: str = "0"
    cycles: int
    committed_tokens: int
    accepted_histogram: tuple[int, ...]
    rank_histogram: tuple[int, ...] = (0, 0, 0, 0)
    draft_s: float
    verify_s: float
    other_s: float
    draft_nodes: int
    flagged: bool = False
    last: bool = True

    @property
    def device_s(self) -> float:
        """Device-seconds of the whole segment."""
        return self.draft_s + self.verify_s + self.other_s


def rank_bucket(rank: int) -> int:
    """Index into ``rank_histogram`` of a 0-based rank."""
    return bisect_right(_RANK_BUCKETS, rank)


def encode(event: AcceptanceEvent) -> dict[str, str]:
    """The fields of a stream entry."""
    return {
        "v": str(SCHEMA_VERSION),
        "type": "acceptance",
        "event_id": f"{event.incarnation}:{event.sequence}",
        # ``asdict`` would copy every value: most of what telling an event costs.
        "data": json.dumps({name: getattr(event, name) for name in _NAMES}, separators=(",", ":"), allow_nan=False),
    }


def decode(entry: Mapping[str, str]) -> AcceptanceEvent:
    """The event of a stream entry.

    Raises:
        EventError: naming what is wrong; unknown keys are wrong too, because a new key means a new version.
    """
    if entry.get("v") != str(SCHEMA_VERSION) or entry.get("type") != "acceptance":
        raise EventError(f"unknown version or type: v={entry.get('v')!r} type={entry.get('type')!r}")
    try:
        data = json.loads(entry["data"])
    except (KeyError, ValueError, RecursionError) as error:
        raise EventError(f"unreadable data: {error!r}") from error
    if not isinstance(data, dict) or data.keys() != _CHECKS.keys():
        odd = sorted(set(data) ^ set(_NAMES)) if isinstance(data, dict) else type(data).__name__
        raise EventError(f"missing or unknown keys: {odd}")
    values: dict[str, Any] = {name: check(name, data[name]) for name, check in _CHECKS.items()}
    event = AcceptanceEvent(**values)
    _check(event)
    return event


_STRINGS = {
    "incarnation",
    "request_id",
    "engine",
    "drafter_version",
    "tenant",
    "domain",
    "sampling_class",
    "batch_band",
    "context_band",
}
_COUNTS = {"sequence", "cycles", "committed_tokens", "draft_nodes"}
_SECONDS = {"time_s", "draft_s", "verify_s", "other_s"}
_HISTOGRAMS = {"accepted_histogram", "rank_histogram"}
_MAX_COUNT = 2**53
_MAX_TEXT_CHARS = 256
_MAX_BUCKETS = 1024


def _seconds(name: str, value: object) -> float:
    finite = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < 1e15
    if not finite or not math.isfinite(value):  # type: ignore[arg-type]
        raise EventError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _histogram(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_BUCKETS:
        raise EventError(f"{name} must be a list of at most {_MAX_BUCKETS} counts")
    return tuple([_count(name, item) for item in value])


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise EventError(f"{name} must be true or false, got {value!r}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT_CHARS:
        raise EventError(f"{name} must be a string of 1 to {_MAX_TEXT_CHARS} characters, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EventError(f"{name} is not valid Unicode") from error
    return value


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_COUNT:
        raise EventError(f"{name} must be a count, got {value!r:.80}")
    return value


def _checker(name: str) -> Callable[[str, object], object]:
    if name in _STRINGS:
        return _text
    if name in _COUNTS:
        return _count
    if name in _SECONDS:
        return _seconds
    return _histogram if name in _HISTOGRAMS else _flag


_NAMES = tuple(f.name for f in fields(AcceptanceEvent))
_CHECKS = {name: _checker(name) for name in _NAMES}
"""How each field is read; JSON lists become tuples."""


def _check(event: AcceptanceEvent) -> None:
    if sum(event.accepted_histogram) != event.cycles:
        raise EventError("accepted_histogram must sum to cycles")
    if event.committed_tokens > sum((a + 1) * n for a, n in enumerate(event.accepted_histogram)):
        raise EventError("committed_tokens exceeds what the accepted_histogram can commit")
    if len(event.rank_histogram) != NUM_RANK_BUCKETS:
        raise EventError(f"rank_histogram must have {NUM_RANK_BUCKETS} buckets")
