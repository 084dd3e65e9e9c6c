"""What an update can reach: the domains of now, how far they fell, how much of its training each should get. Pure.

The numbers of the training mix are here for those who make it: the trainer, and the simulator's model of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

from specblock.bandit.actions import Focus
from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.decision import DecisionContext, DomainContext, Target
from specblock.bandit.past import PAST_Z
from specblock.bandit.presence import FIRST_SHARE, Presence

REHEARSAL = 0.25
"""Share of the training that is on kinds of text which need no update, so that they are not forgotten; where all need
it, or there is but one, on conversations as they came. So much room is kept, too, for the newest of every domain."""

MOST_REPEATS = 4
"""A new kind of text has few windows at first; more repeats than this would only learn them by heart."""

LEAST_PART = 0.3
"""The hardest conversations are at least this share of all: fewer are mostly hard by chance."""

FEWEST_WINDOWS = 8

FOUND = 0.34
"""How far training on the hardest conversations goes from training on all of them to training on the part that fell
alone. Of the demo's python with a quarter of cpp, 0.52 and 0.60 of the hardest were cpp, with two fifths 0.69 and 0.73;
three quarters of the training are such conversations, the rest is taken as it came."""

NO_DOMAINS: Mapping[str, float] = MappingProxyType({})

SETTLING_HALF_LIVES = 3.0
"""Half-lives of the flow after which shares show what came or went."""


def targets(context: DecisionContext, config: PolicyConfig) -> tuple[Target, ...]:
    """Domains that training can reach: recent traffic, and conversations to train on."""
    return tuple(_target(d, config) for d in context.domains if d.measurable and d.num_train > 0)


def _target(domain: DomainContext, config: PolicyConfig) -> Target:
    known = domain.presence
    presence = known or Presence(there=True, turned_s=math.inf)
    settling_s = SETTLING_HALF_LIVES * config.statistics.rate_half_life_s
    turned = presence.turned_s > settling_s
    # What has become a small part of traffic and stays one is a part of it.
    there = presence.there or (turned and domain.share > FIRST_SHARE)
    fleeting = known is not None and known.staying_s(1.0, config.horizon) < settling_s
    return Target(
        domain=domain.domain,
        share=domain.share,
        drop=domain.drop,
        drop_se=domain.drop_se,
        lasting_s=known.lasting_s(domain.share, config.horizon) if known else None,
        staying_s=known.staying_s(domain.share, config.horizon) if known else None,
        past=domain.past,
        part=domain.part,
        growing_s=domain.growing_s,
        there=there,
        settled=there and (fleeting or (turned and presence.there)),
    )


def mean_drop(reached: tuple[Target, ...]) -> float:
    """Share-weighted drop of acceptance."""
    return math.fsum(target.share * max(target.drop, 0.0) for target in reached)


def training_focus(
    reached: tuple[Target, ...], min_drop: float, expected_s: Mapping[str, float] = NO_DOMAINS
) -> dict[str, Focus]:
    """What an update trains on, by domain: where most of the traffic has most to win back, and there what fell.

    A domain at its reference still counts with ``min_drop``, below which a drop is not told from noise. What is
    rehearsed beside are those that need less than the neediest, by what is expected of them within the horizon
    (``expected_s``), those of which nothing is known under the present version among them.
    """
    need = {target.domain: max(target.drop, min_drop) for target in reached}
    most = max(need.values(), default=1.0)
    focus = {name: Focus(weight=0.0, rehearsed=seconds) for name, seconds in expected_s.items()}
    for target in reached:
        focus[target.domain] = Focus(
            weight=target.share * need[target.domain],
            part=target.part if target.drop > min_drop else 1.0,
            rehearsed=(1 - need[target.domain] / most) * expected_s.get(target.domain, 0.0),
        )
    return focus


def newest_of_each(domains: Sequence[Hashable], sizes: Sequence[int], most: float) -> list[int]:
    """Positions of the conversations to train on, oldest first: the newest, and the newest of every domain.

    Args:
        domains: of the conversations, oldest first.
        sizes: of the conversations.
        most: sum of the sizes that are taken; one conversation is always taken.
    """
    names = set(domains)
    room = dict.fromkeys(names, REHEARSAL * most / max(len(names), 1))
    newest_first = range(len(domains) - 1, -1, -1)
    chosen: set[int] = set()
    for index in newest_first:
        if sizes[index] <= room[domains[index]]:
            room[domains[index]] -= sizes[index]
            chosen.add(index)
        else:
            room[domains[index]] = 0.0
    left = most - sum(sizes[index] for index in chosen)
    for index in newest_first:
        if index in chosen:
            continue
        if sizes[index] > left:
            break
        left -= sizes[index]
        chosen.add(index)
    return sorted(chosen or ({len(domains) - 1} if domains else ()))


def meant_for(reached: tuple[Target, ...], min_drop: float) -> tuple[str, ...]:
    """Domains that an update that trains is made for: where acceptance fell, or all where it fell nowhere."""
    fell = tuple(target.domain for target in reached if target.drop > min_drop)
    return fell or tuple(target.domain for target in reached)


def num_hardest(part: float, conversations: int) -> int:
    """How many of a domain's conversations are taken as the part of it that fell; all of them, or more, where few."""
    return max(FEWEST_WINDOWS, round(max(LEAST_PART, part) * conversations))


def told_drop(target: Target, config: PolicyConfig) -> float:
    """The drop, if it is told from noise, else 0.

    Decisions are taken every few seconds: the largest of many noisy drops looks like one that an update would repair.
    """
    return target.drop if target.drop > max(config.min_drop, config.drop_z * target.drop_se) else 0.0


def reachable_drop(arm: Arm, target: Target, config: PolicyConfig) -> float:
    """The drop that what ``arm`` wins back is in proportion to.

    Where the drop comes from a part of the text, training takes the hardest conversations, but only some of these are
    of that part, and an update wins back so much less than if all of the text were new. An earlier version is as good
    as it ever was.
    """
    if arm.restores:
        # Nothing is trained: no drop is too small for a look at what served before, only too uncertain.
        return target.drop if target.drop > PAST_Z * target.drop_se else 0.0
    # Of a small part even the hardest conversations are mostly hard by chance; counting takes all conversations alike.
    found = 0.0 if arm.counts else FOUND * min(1.0, target.part / LEAST_PART)
    return (target.part + found * (1 - target.part)) * told_drop(target, config)
