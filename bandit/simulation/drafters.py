"""What training does to a drafter: levels of acceptance per kind of text, gained and forgotten. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.actions import Focus
from specblock.bandit.config import Arm
from specblock.bandit.reach import MOST_REPEATS, REHEARSAL, num_hardest
from specblock.bandit.simulation.curves import Curves

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Levels:
    """Curves as arrays over the kinds of text, in the order of ``Curves.kinds``."""

    base: Floats
    ceiling: Floats
    floor: Floats

    @staticmethod
    def of(curves: Curves, kinds: Sequence[str]) -> Levels:
        """The levels of ``kinds``."""
        known = [curves.kinds[name] for name in kinds]
        return Levels(
            np.array([kind.base for kind in known]),
            np.array([kind.ceiling for kind in known]),
            np.array([curves.floor(name) for name in kinds]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """What can be trained on: domains and kinds of text as indices, and cycles over those usual for their version."""

    domain: Ints
    kind: Ints
    hardness: Floats


def training_mix(given: Conversations, num_kinds: int, focus: Mapping[int, Focus]) -> Floats:
    """Shares of the kinds of text in the trainer's set (``daemon/training_mix.py``); uniform without conversations.

    Args:
        given: the conversations, oldest first.
        num_kinds: kinds of text in all.
        focus: what the update is meant for, by domain; empty: conversations are taken as they came.
    """
    domain_N, kind_N = given.domain, given.kind
    mix_K = np.zeros(num_kinds)
    if not len(domain_N):
        return np.full(num_kinds, 1 / num_kinds)
    wanted = {d: max(0.0, focus[d].weight) if d in focus else 0.0 for d in np.unique(domain_N).tolist()}
    total = sum(wanted.values())
    kept = {d: focus[d].rehearsed if d in focus else 0.0 for d in wanted}
    staying = sum(kept.values())
    for domain, weight in wanted.items():
        own = domain_N == domain
        count = float(own.sum())
        rehearsed = REHEARSAL * (kept[domain] / staying * len(domain_N) if staying > 0 else count)
        hard = _hardest(given.hardness[own], focus[domain].part) if weight > 0 else np.ones(int(count), dtype=bool)
        of_hard, as_they_came = 0.0, count
        if total > 0:
            of_hard, as_they_came = (1 - REHEARSAL) * weight / total * len(domain_N), max(1.0, rehearsed)
        if hard.all():  # a conversation repeated too often would only be learned by heart
            of_hard, as_they_came = 0.0, of_hard + as_they_came
        own_K, hard_K = (np.bincount(k, minlength=num_kinds) for k in (kind_N[own], kind_N[own][hard]))
        as_they_came = min(as_they_came, MOST_REPEATS * count)
        mix_K += own_K / count * as_they_came + hard_K / hard.sum() * min(of_hard, MOST_REPEATS * float(hard.sum()))
    mix: Floats = mix_K / mix_K.sum()
    return mix


def _hardest(hardness_N: Floats, part: float) -> NDArray[np.bool_]:
    """Which conversations of a domain are about that part of it that is hardest."""
    chosen_N = np.zeros(len(hardness_N), dtype=bool)
    chosen_N[np.argsort(-hardness_N, kind="stable")[: num_hardest(part, len(hardness_N))]] = True
    return chosen_N


def described_steps(arm: Arm, curves: Curves) -> float:
    """Steps of a policy's arm, in those of the update that its curve describes.

    Raises:
        ValueError: there is no such curve.
    """
    if arm.name not in curves.arms:
        raise ValueError(
            f"the policy's arm {arm.name!r} has no learning curve; the curves know {', '.join(curves.arms)}"
        )
    return arm.steps / curves.arms[arm.name].steps


def after_update(
    levels_XK: Floats, arm: str, fraction: float, mix_K: Floats, luck: float, curves: Curves, known: Levels
) -> Floats:
    """Acceptance lengths after training.

    Args:
        levels_XK: acceptance lengths before, [..., K].
        arm: name in ``curves.arms``.
        fraction: share of the steps that its curve describes.
        mix_K: shares of the kinds among the conversations trained on.
        luck: factor of what is gained, 1 on average.
        curves: learning curves.
        known: base, ceiling and floor of the kinds.
    """
    curve = curves.arms[arm]
    reached_K = known.base + curve.reach * (known.ceiling - known.base)
    progress_K = np.array([curves.progress(fraction * share) for share in mix_K])
    closed_K = np.minimum(1.0, luck * curve.gap_closed * progress_K)
    gained = levels_XK + closed_K * np.maximum(reached_K - levels_XK, 0.0)
    # A kind that makes up part of the training data is forgotten by that much less.
    kept_K = 1 - min(1.0, curve.forgetting * curves.progress(fraction)) * (1 - mix_K)
    forgotten: Floats = np.maximum(gained * kept_K, known.floor)
    return forgotten
