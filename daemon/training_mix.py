"""Which windows an update trains on, and how often: mostly the traffic it is made for, some of everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from specblock.drafter.window import Window

REHEARSAL = 0.25
"""Share of the windows drawn as they came, so that kinds of text that need no update are not forgotten."""

MOST_REPEATS = 4
"""A new kind of text has few windows at first; more repeats than this would only learn them by heart."""

FEWEST_WINDOWS = 8


def meant(windows: Sequence[Window], weights: Mapping[str, float]) -> list[Window]:
    """Windows of the domains that an update is meant for, oldest first; of all domains, if it is meant for none.

    Domains with fewer than ``FEWEST_WINDOWS`` are left out: an update that rehearses nothing would learn them by heart.
    """
    meant_for = {domain for domain, weight in weights.items() if weight > 0}
    sizes = Counter(window.domain for window in windows if not meant_for or window.domain in meant_for)
    wanted = [window for window in windows if sizes[window.domain] >= FEWEST_WINDOWS]
    return sorted(wanted, key=lambda window: window.time_s)


def mixed(windows: Sequence[Window], weights: Mapping[str, float]) -> list[Window]:
    """A training set as large as ``windows`` (at most) whose domains follow ``weights``.

    Args:
        windows: oldest first.
        weights: how much an update is meant for a domain, at least 0; missing domains and a sum of 0 weigh nothing.

    Returns:
        Oldest first; windows of wanted domains up to ``MOST_REPEATS`` times, the newest first to be repeated, and of
        the others the newest that their share of ``REHEARSAL`` has room for (at least one of each domain).
    """
    by_domain: dict[str, list[Window]] = {}
    for window in windows:
        by_domain.setdefault(window.domain, []).append(window)
    wanted = {domain: max(0.0, weights.get(domain, 0.0)) for domain in by_domain}
    total = sum(wanted.values())
    if total <= 0:
        return list(windows)
    chosen: list[Window] = []
    for domain, own in by_domain.items():
        share = (1 - REHEARSAL) * wanted[domain] / total + REHEARSAL * len(own) / len(windows)
        count = min(max(1, round(share * len(windows))), MOST_REPEATS * len(own))
        rounds, rest = divmod(count, len(own))
        chosen += own * rounds + (own[-rest:] if rest else [])
    return sorted(chosen, key=lambda window: window.time_s)
