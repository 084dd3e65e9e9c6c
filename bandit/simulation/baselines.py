"""Policies to compare with: no decision, fixed schedules, a drop of moving averages, a bandit without a model."""

from __future__ import annotations

import math

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.gate import gate_rows, pooled_saving
from specblock.bandit.simulation.served import ServedWorld

FAST_REQUESTS, SLOW_REQUESTS = 64, 1024
"""Time constants of the two moving averages."""

PERIOD_S = 600.0
"""How long the bandit without a model watches what an arm brought."""

EXPLORATION = 0.02
"""Width of its confidence bound, in shares of serving time."""

DISCOUNT = 1 - 1 / 50


class Baseline:
    """What all baselines share: train an arm, put it live, keep to the arm's cool-down."""

    def __init__(self, world: ServedWorld, policy: PolicyConfig) -> None:
        self.world, self.policy = world, policy
        self._decisions = 0
        self._training: tuple[str, Arm] | None = None
        self._next_s = float("-inf")

    def step(self, now_s: float) -> None:
        """Finish the update under way (its training time has passed), or let the policy choose one."""
        if self._training is not None:
            (candidate, arm), self._training = self._training, None
            self._next_s = now_s + arm.cooldown_s
            if self.accept(candidate):
                self.world.promote("", candidate)
            else:
                self.world.discard(candidate)
            return
        if now_s < self._next_s or not self._enough():
            return
        if name := self.choose(now_s):
            arm = self.policy.arm(name)
            report = self.world.train(f"d{self._decisions:06d}", arm, self.world.serving_version(), 1.0, False, {})
            self._decisions += 1
            self._training = report.candidate_version, arm

    def close(self) -> None:
        """Nothing is held."""

    def choose(self, now_s: float) -> str:
        """Arm to train now; empty: none."""
        raise NotImplementedError

    def accept(self, candidate: str) -> bool:
        """Whether a trained candidate may serve."""
        return True

    def _enough(self) -> bool:
        return sum(d.num_train for d in self.world.windows().domains) >= self.policy.min_train_windows


class Never(Baseline):
    """The drafter stays as it is."""

    def choose(self, now_s: float) -> str:
        """Nothing."""
        return ""


class Always(Baseline):
    """Trains one arm whenever its cool-down allows it, without a gate."""

    def __init__(self, world: ServedWorld, policy: PolicyConfig, arm: str) -> None:
        super().__init__(world, policy)
        self._arm = arm

    def choose(self, now_s: float) -> str:
        """The arm."""
        return self._arm


class EveryN(Baseline):
    """Trains one arm every ``requests`` requests, without a gate."""

    def __init__(self, world: ServedWorld, policy: PolicyConfig, arm: str, requests: int) -> None:
        super().__init__(world, policy)
        self._arm, self._requests, self._due = arm, requests, requests

    def choose(self, now_s: float) -> str:
        """The arm, once enough requests were served since the last time."""
        if self.world.served < self._due:
            return ""
        self._due = self.world.served + self._requests
        return self._arm


class DualAverage(Baseline):
    """Trains when a fast moving average of acceptance falls below a slow one; serves what is better on held-out text.

    Source: TIDE (arXiv 2602.05145), which collects and trains after such a drop and, after an evaluation that fails,
    waits for the next one. The drop is the policy's ``min_drop``.
    """

    def __init__(self, world: ServedWorld, policy: PolicyConfig, arm: str) -> None:
        super().__init__(world, policy)
        self._arm = arm
        self._seen = 0
        self._fast = self._slow = 0.0
        self._dropped_at: int | None = None

    def choose(self, now_s: float) -> str:
        """The arm, once enough conversations followed a drop."""
        self._average()
        if self._dropped_at is None and self._fast < (1 - self.policy.min_drop) * self._slow:
            self._dropped_at = self._seen
        if self._dropped_at is None or self._seen - self._dropped_at < self.policy.min_train_windows:
            return ""
        return self._arm

    def accept(self, candidate: str) -> bool:
        """Whether it needs fewer cycles on held-out conversations; the comparison is charged."""
        report = self.world.compare(self.world.serving_version(), candidate, None)
        self._dropped_at, self._slow = None, self._fast
        return pooled_saving(gate_rows(report)).relative > 0

    def _average(self) -> None:
        world = self.world
        for number in range(self._seen, world.served):
            acceptance = world.acceptance(number)
            self._slow = self._slow or acceptance
            self._fast = self._fast or acceptance
            self._fast += (acceptance - self._fast) / FAST_REQUESTS
            self._slow += (acceptance - self._slow) / SLOW_REQUESTS
        self._seen = world.served


class ModelFree(Baseline):
    """Discounted UCB over skip and the training arms, rewarded with device-seconds per token after each period.

    It predicts neither gain nor cost: every arm is tried to learn what it is worth.

    Source: Garivier and Moulines, On upper-confidence bound policies for non-stationary bandits (arXiv 0805.3415).
    """

    def __init__(self, world: ServedWorld, policy: PolicyConfig) -> None:
        super().__init__(world, policy)
        self._arms = ["", *(arm.name for arm in policy.arms if arm.steps > 0)]
        self._plays, self._rewards = [0.0] * len(self._arms), [0.0] * len(self._arms)
        self._playing = 0
        self._begun_s: float | None = None
        self._mark = (0, 0.0)
        self._before = 0.0

    def choose(self, now_s: float) -> str:
        """The arm with the highest index, at the end of each period."""
        if self._begun_s is not None and now_s - self._begun_s < PERIOD_S:
            return ""
        self._learn()
        self._begun_s = now_s
        self._playing = max(range(len(self._arms)), key=lambda arm: (self._index(arm), -arm))
        return self._arms[self._playing]

    def _index(self, arm: int) -> float:
        if self._plays[arm] == 0:
            return math.inf
        total = max(sum(self._plays), math.e)
        bound = EXPLORATION * math.sqrt(math.log(total) / self._plays[arm])
        return self._rewards[arm] / self._plays[arm] + bound

    def _learn(self) -> None:
        """Reward of the arm just watched: relative saving per token against the period before."""
        tokens, spent_s = self._mark
        now = self.world.tokens, self.world.serving_s + self.world.charged_s
        if now[0] <= tokens:
            return
        per_token = (now[1] - spent_s) / (now[0] - tokens)
        if self._begun_s is not None and self._before > 0:
            self._plays = [DISCOUNT * plays for plays in self._plays]
            self._rewards = [DISCOUNT * reward for reward in self._rewards]
            self._plays[self._playing] += 1
            self._rewards[self._playing] += 1 - per_token / self._before
        self._before, self._mark = per_token, now
