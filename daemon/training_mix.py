"""Which windows an update trains on, and how often: mostly the traffic it is made for, some of everything else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from specblock.bandit.actions import Focus
from specblock.bandit.reach import FEWEST_WINDOWS, MOST_REPEATS, REHEARSAL, num_hardest
from specblock.daemon.feedback import sampling_class
from specblock.drafter.window import Window


def meant(windows: Sequence[Window], focus: Mapping[str, Focus]) -> list[Window]:
    """Windows of the domains that an update is meant for, oldest first; of all domains, if it is meant for none.

    Domains with fewer than ``FEWEST_WINDOWS`` are left out: an update that rehearses nothing would learn them by heart.
    """
    meant_for = {domain for domain, one in focus.items() if one.weight > 0}
    sizes = Counter(window.domain for window in windows if not meant_for or window.domain in meant_for)
    wanted = [window for window in windows if sizes[window.domain] >= FEWEST_WINDOWS]
    return sorted(wanted, key=lambda window: window.time_s)


def mixed(windows: Sequence[Window], focus: Mapping[str, Focus]) -> list[Window]:
    """A training set as large as ``windows`` (at most) whose domains follow the focus.

    Args:
        windows: oldest first.
        focus: what an update is meant for; missing domains and weights whose sum is 0 weigh nothing.

    Returns:
        Oldest first; of wanted domains the windows that are ``hardest``, up to ``MOST_REPEATS`` times, the newest first
        to be repeated; and of the domains to be rehearsed, or else of all, the newest that their share of ``REHEARSAL``
        has room for (at least one).
    """
    by_domain: dict[str, list[Window]] = {}
    for window in windows:
        by_domain.setdefault(window.domain, []).append(window)
    wanted = {domain: max(0.0, focus[domain].weight) if domain in focus else 0.0 for domain in by_domain}
    total = sum(wanted.values())
    if total <= 0:
        return list(windows)
    kept = {domain: focus[domain].rehearsed if domain in focus else 0.0 for domain in by_domain}
    # What stays: some domains by their weight, or everything as it came.
    staying = math.fsum(kept.values())
    chosen: list[Window] = []
    for domain, own in by_domain.items():
        meant_for = (1 - REHEARSAL) * wanted[domain] / total * len(windows)
        as_they_came = REHEARSAL * (kept[domain] / staying * len(windows) if staying > 0 else len(own))
        hard = hardest(own, focus[domain].part) if wanted[domain] else own
        if len(hard) == len(own):
            chosen += _newest(own, max(1, round(meant_for + as_they_came)))
        else:
            chosen += _newest(hard, round(meant_for)) + _newest(own, max(1, round(as_they_came)))
    return sorted(chosen, key=lambda window: window.time_s)


def hardest(windows: Sequence[Window], part: float) -> list[Window]:
    """About that part of the windows that took the most cycles per token, oldest first.

    Cycles with drafts are held against the mean of what the same drafter version needed at the same temperatures: a
    later version drafts better, and hot text is harder. Windows without such cycles are as hard as the mean.
    """
    count = num_hardest(part, len(windows))
    if count >= len(windows):
        return list(windows)
    drafted = [_drafted(window) for window in windows]
    alike = [(window.drafter_version, sampling_class(window.sampling.temperature)) for window in windows]
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for key, (cycles, tokens) in zip(alike, drafted, strict=True):
        before = totals.get(key, (0, 0))
        totals[key] = before[0] + cycles, before[1] + tokens
    # Tokens per cycle over those of windows alike.
    ease = [
        tokens / cycles * totals[key][0] / totals[key][1] if cycles else 1.0
        for key, (cycles, tokens) in zip(alike, drafted, strict=True)
    ]
    easiest_last = sorted(range(len(windows)), key=lambda index: ease[index])
    return [windows[index] for index in sorted(easiest_last[:count])]


def _drafted(window: Window) -> tuple[int, int]:
    """Whole cycles that had drafts, and the tokens they committed; of old windows, whose plans are unknown, all."""
    plans = window.plans or ((1,),) * len(window.accepted)
    accepted = [count for count, plan in zip(window.accepted, plans, strict=False) if plan[0] > 0]
    return len(accepted), len(accepted) + sum(accepted)


def _newest(windows: Sequence[Window], count: int) -> list[Window]:
    """So many of the windows, the newest first to be taken and to be repeated."""
    rounds, rest = divmod(min(count, MOST_REPEATS * len(windows)), len(windows))
    return [*windows] * rounds + (list(windows[-rest:]) if rest else [])
