"""An upper bound: dynamic programming with the traffic, the learning curves and the true levels known.

Time is cut into epochs. A state is the serving drafter's acceptance length per kind of text, on a grid; an action is to
skip or to train one arm, focused on one domain or on none, whose mean effect is taken. The bound pays for training and
swaps, but for no trial, no comparison and no parity check, because it has nothing to find out. Only the luck of a
single update is unknown to it.

Source: the yardstick of CARA (arXiv 2310.04216), retraining decisions judged against the optimum in hindsight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from specblock.bandit.actions import Focus
from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.cost import charge_s
from specblock.bandit.reach import newest_of_each
from specblock.bandit.simulation.drafters import (
    Conversations,
    Floats,
    after_update,
    described_steps,
    training_mix,
)
from specblock.bandit.simulation.scenario import START_S
from specblock.bandit.simulation.world import BASE, World

EPOCH_S = 60.0
GRID = 21
"""Levels per kind of text."""


class Oracle:
    """A driver that follows the optimal plan, looking up the true level of what serves at every epoch."""

    def __init__(self, world: World, policy: PolicyConfig) -> None:
        self._world = world
        self._arms = [arm for arm in policy.arms if arm.steps > 0]
        self.value = _solve(world, self._arms)
        self._candidate = ""
        self._decisions = 0

    def step(self, now_s: float) -> None:
        """Put a trained candidate live, or train if that costs less in all."""
        world = self._world
        if self._candidate:
            world.promote("", self._candidate)
            self._candidate = ""
        epoch = math.ceil((now_s - START_S) / EPOCH_S)
        levels_K = world.serving.levels
        best, cheapest_s = None, float(self.value.stay_s(epoch, levels_K))
        for arm, focus in itertools.product(self._arms, self.value.focuses):
            cost_s = float(self.value.train_s(epoch, levels_K, arm, focus))
            if cost_s < cheapest_s:
                best, cheapest_s = (arm, focus), cost_s
        if best is not None:
            name = f"d{self._decisions:06d}"
            self._decisions += 1
            report = world.train(name, best[0], world.serving_version(), 1.0, False, self.value.focus(epoch, best[1]))
            self._candidate = report.candidate_version

    def close(self) -> None:
        """Nothing is held."""


class Value:
    """Least device-seconds still to be paid, per epoch and level."""

    def __init__(self, world: World, epochs: int) -> None:
        self._world, self.epochs = world, epochs
        known = world.known
        self.axes = [np.linspace(low, high, GRID) for low, high in zip(known.floor, known.ceiling, strict=True)]
        self.grid_SK = np.stack([axis.ravel() for axis in np.meshgrid(*self.axes, indexing="ij")], axis=-1)
        self.left_ES = np.zeros((epochs + 1, len(self.grid_SK)))
        # "" takes conversations as they came.
        self.focuses = ("", *world.traffic.domains)
        self.work_EK, self.mix, self.part_E = _known_traffic(world, epochs, self.focuses)

    def focus(self, epoch: int, domain: str) -> dict[str, Focus]:
        """An update for one domain, and there for the part of it that is new; the others are rehearsed."""
        part = float(self.part_E[min(epoch, self.epochs - 1)])
        return _focus(domain, part, self._world.traffic.domains) if domain else {}

    def serve_s(self, epoch: int, levels_XK: Floats, passed_s: float, until_s: float) -> Floats:
        """Device-seconds of serving a part of an epoch."""
        share = (until_s - passed_s) / EPOCH_S
        cost_X: Floats = share * (self.work_EK[epoch] / levels_XK).sum(-1)
        return cost_X

    def left_s(self, epoch: int, levels_XK: Floats) -> Floats:
        """Multilinear interpolation of what is left to pay."""
        if epoch >= self.epochs:
            return np.zeros(levels_XK.shape[:-1])
        table = self.left_ES[epoch].reshape([GRID] * len(self.axes))
        low, weight = [], []
        for index, axis in enumerate(self.axes):
            place = np.clip((levels_XK[..., index] - axis[0]) / max(axis[1] - axis[0], 1e-12), 0.0, GRID - 1.0)
            low.append(np.minimum(place.astype(np.int64), GRID - 2))
            weight.append(place - low[-1])
        total = np.zeros(levels_XK.shape[:-1])
        for corner in itertools.product((0, 1), repeat=len(self.axes)):
            share = np.ones_like(total)
            for bit, part in zip(corner, weight, strict=True):
                share = share * (part if bit else 1 - part)
            total += share * table[tuple(place + bit for place, bit in zip(low, corner, strict=True))]
        return total

    def stay_s(self, epoch: int, levels_XK: Floats) -> Floats:
        """Cost to go when nothing is trained now."""
        if epoch >= self.epochs:
            return np.zeros(levels_XK.shape[:-1])
        return self.serve_s(epoch, levels_XK, 0.0, EPOCH_S) + self.left_s(epoch + 1, levels_XK)

    def train_s(self, epoch: int, levels_XK: Floats, arm: Arm, focus: str) -> Floats:
        """Cost to go when ``arm`` is trained now, focused on a domain, and goes live when it is done."""
        paid_X, after_XK, last = self.trained(epoch, levels_XK, arm, focus)
        return paid_X + self.left_s(last, after_XK)

    def trained(self, epoch: int, levels_XK: Floats, arm: Arm, focus: str) -> tuple[Floats, Floats, int]:
        """What is paid until the first epoch that begins after the training, the levels then, and that epoch."""
        world = self._world
        described = described_steps(arm, world.curves)
        wall_s = described * world.curves.arms[arm.name].train_s
        last = epoch + max(1, math.ceil(wall_s / EPOCH_S))
        total = charge_s(world.cost, device_s=wall_s, train_s=wall_s, stall_s=world.curves.stall_s)
        paid_X = np.full(levels_XK.shape[:-1], total)
        if epoch >= self.epochs:
            return paid_X, levels_XK, last
        mix_K = self.mix[focus][epoch]
        after_XK = after_update(levels_XK, arm.name, described, mix_K, 1.0, world.curves, world.known)
        for number in range(epoch, min(last, self.epochs)):
            before_s = min(max(wall_s - (number - epoch) * EPOCH_S, 0.0), EPOCH_S)
            paid_X = paid_X + self.serve_s(number, levels_XK, 0.0, before_s)
            paid_X = paid_X + self.serve_s(number, after_XK, before_s, EPOCH_S)
        return paid_X, after_XK, last


def _focus(domain: str, part: float, domains: Sequence[str]) -> dict[str, Focus]:
    """An update for one domain that rehearses the others."""
    others = {name: Focus(weight=0.0, rehearsed=1.0) for name in domains if name != domain}
    return {domain: Focus(weight=1.0, part=part)} | others


def _solve(world: World, arms: list[Arm]) -> Value:
    """Backward induction."""
    value = Value(world, math.ceil((world.traffic.end_s - START_S) / EPOCH_S))
    for epoch in reversed(range(value.epochs)):
        options = [value.stay_s(epoch, value.grid_SK)]
        options += [value.train_s(epoch, value.grid_SK, *one) for one in itertools.product(arms, value.focuses)]
        value.left_ES[epoch] = np.minimum.reduce(options)
    return value


def _known_traffic(world: World, epochs: int, focuses: tuple[str, ...]) -> tuple[Floats, dict[str, Floats], Floats]:
    """Per epoch and kind: device-seconds at one token per cycle; per focus: the mix a training at its start sees, with
    conversations as hard as the first version found them; per epoch: the part of a lone domain that is new.
    """
    traffic, curves = world.traffic, world.curves
    kinds = len(traffic.kinds)
    epoch_N = np.minimum(((traffic.time_s - START_S) / EPOCH_S).astype(np.int64), epochs - 1)
    work_N = np.full(len(epoch_N), curves.request_tokens * curves.cycle_s)
    work_N[traffic.time_s >= traffic.fault_s] /= 1 - curves.fault_loss
    work_EK = np.zeros((epochs, kinds))
    np.add.at(work_EK, (epoch_N, traffic.kind), work_N)
    train = np.flatnonzero(~traffic.heldout)
    mixes = {focus: np.zeros((epochs, kinds)) for focus in focuses}
    first, part_E = world.drafters[BASE].cycles.astype(np.float64), np.ones(epochs)
    for epoch in range(epochs):
        kept = train[: np.searchsorted(epoch_N[train], epoch)][
            -round(curves.kept_windows * (1 - curves.heldout_fraction)) :
        ]
        newest = kept[newest_of_each(traffic.domain[kept].tolist(), [1] * len(kept), curves.train_windows)]
        if len(traffic.domains) == 1 and len(newest):
            part_E[epoch] = (traffic.kind[newest] > 0).mean() or 1.0
        for focus, mix_EK in mixes.items():
            wanted = _focus(focus, float(part_E[epoch]), traffic.domains) if focus else {}
            meant = {traffic.domains.index(name): one for name, one in wanted.items()}
            given = Conversations(domain=traffic.domain[newest], kind=traffic.kind[newest], hardness=first[newest])
            mix_EK[epoch] = training_mix(given, kinds, meant)
    return work_EK, mixes, part_E
