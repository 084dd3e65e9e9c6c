"""Net value of an update in one currency, device-seconds. Pure functions; every term is in the result.

With s the device-seconds per committed token, the gain rate is

    g = sum over domains of share_d (1 - s_new,d / s_old,d) x busy devices      [device-seconds saved per second]

and lasts V(H) = (1 - exp(-(hazard + discount) H)) / (hazard + discount) seconds in expectation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from specblock.bandit.config import Arm, CostConfig, HorizonConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """A normal belief about one number."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainGain:
    """Expected relative saving of device-seconds per token in one domain.

    ``growth``: what the gain is on average within the horizon, in gains of now.
    """

    domain: str
    share: float
    mean: float
    sd: float
    growth: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSums:
    """What is known about one arm's training cost: seconds = slope x positions, variance growing with positions."""

    runs: int = 0
    steps: float = 0.0
    positions: float = 0.0
    seconds: float = 0.0
    seconds_squared_per_position: float = 0.0

    def observe(self, steps: float, positions: int, seconds: float) -> TrainingSums:
        """With one more measured run."""
        if positions <= 0:
            return self
        return TrainingSums(
            runs=self.runs + 1,
            steps=self.steps + steps,
            positions=self.positions + positions,
            seconds=self.seconds + seconds,
            seconds_squared_per_position=self.seconds_squared_per_position + seconds**2 / positions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSums:
    """Running sums of a cost that does not depend on size (scoring, swap stall)."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def observe(self, value: float) -> MeanSums:
        """With one more measurement."""
        return MeanSums(count=self.count + 1, total=self.total + value, squares=self.squares + value**2)


def training_seconds(sums: TrainingSums, arm: Arm, fraction: float, probe: float, config: CostConfig) -> Belief:
    """Device-seconds that ``fraction`` of the arm's steps will take.

    Conjugate (normal, inverse gamma) regression through the origin. The prior weighs ``prior_strength`` micro-profiles
    (``probe`` of the steps), so the first measurement already counts as much as the guess.
    """
    weight = config.prior_strength * max(1.0, arm.steps * probe)
    per_step = (weight * arm.positions_per_step + sums.positions) / (weight + sums.steps)
    x = per_step * arm.steps * fraction
    prior, prior_x = arm.prior_s_per_position, weight * arm.positions_per_step
    precision = prior_x + sums.positions
    slope = (prior_x * prior + sums.seconds) / precision
    spread = 0.5 * (sums.seconds_squared_per_position + prior_x * prior**2 - precision * slope**2)
    noise = ((config.prior_relative_sd * prior) ** 2 * prior_x + max(0.0, spread)) / (1 + sums.runs / 2)
    return Belief(mean=slope * x, sd=math.sqrt(noise * x + x**2 * noise / precision))


def mean_seconds(sums: MeanSums, prior: float, config: CostConfig) -> Belief:
    """The next value of a cost that does not depend on size."""
    strength, sd = config.prior_strength, config.prior_relative_sd * prior
    weight = strength + sums.count
    mean = (strength * prior + sums.total) / weight
    spread = strength * (sd**2 + prior**2) + sums.squares - weight * mean**2
    return Belief(mean=mean, sd=math.sqrt(max(0.0, spread) / weight))


def horizon_value_s(hazard_per_s: float, config: HorizonConfig) -> float:
    """V(H): the seconds that a gain is expected to last, discounted, at most ``cap_s``."""
    rate = hazard_per_s + config.discount_per_s
    return -math.expm1(-rate * config.cap_s) / rate if rate > 0 else config.cap_s


def break_even_s(gain_rate: float, cost: float, hazard_per_s: float, config: HorizonConfig) -> float | None:
    """How long the gain must last to pay the cost; None: it never does."""
    if cost <= 0:
        return 0.0
    if gain_rate <= 0:
        return None
    rate = hazard_per_s + config.discount_per_s
    if rate <= 0:
        return cost / gain_rate
    return -math.log1p(-rate * cost / gain_rate) / rate if rate * cost < gain_rate else None


def _paid_back_s(gain_rate: float, cost: float, lasting_s: float) -> float | None:
    """Seconds of the domains' traffic that pay the cost; None: it is not expected to last that long."""
    if cost <= 0:
        return 0.0
    return cost / gain_rate if gain_rate > 0 and cost < gain_rate * lasting_s else None


def pooled_gain(domains: Iterable[DomainGain]) -> Belief:
    """Traffic-weighted gain. One candidate moves all domains together, so the deviations add up."""
    gains = tuple(domains)
    return Belief(mean=sum(d.share * d.mean for d in gains), sd=sum(d.share * d.sd for d in gains))


def growing_gain(domains: Iterable[DomainGain]) -> Belief:
    """The same over the horizon: drops that grow make the gains grow that are in proportion to them."""
    return pooled_gain(replace(d, share=d.growth * d.share) for d in domains)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTerms:
    """Device-seconds still to be paid; interference and price are applied in ``net_value``."""

    train: Belief
    probe: Belief
    score: Belief
    stall: Belief


@dataclass(frozen=True, slots=True, kw_only=True)
class NetValue:
    """Every term of one arm's net value; device-seconds unless the name says otherwise."""

    arm: str
    gain: float
    gain_sd: float
    busy_devices: float
    horizon_value_s: float
    benefit: float
    benefit_sd: float
    train_s: float
    probe_s: float
    score_s: float
    stall_s: float
    price: float
    interference: float
    cost: float
    cost_sd: float
    net: float
    net_sd: float
    net_lower: float
    break_even_s: float | None
    domains: tuple[DomainGain, ...]


def net_value(
    arm: str,
    domains: tuple[DomainGain, ...],
    terms: CostTerms,
    *,
    busy_devices: float,
    hazard_per_s: float,
    z: float,
    cost: CostConfig,
    horizon: HorizonConfig,
    lasting_s: float | None = None,
) -> NetValue:
    """Benefit, cost and the one lower confidence bound (``z`` standard deviations) of their difference.

    ``lasting_s``, where known, is what the domains' traffic adds up to within the horizon, and their shares are shares
    of it; otherwise the whole of traffic lasts as long as ``hazard_per_s`` lets it.
    """
    gain, lasting = pooled_gain(domains), growing_gain(domains)
    worth_s = horizon_value_s(hazard_per_s, horizon) if lasting_s is None else lasting_s
    seconds = busy_devices * worth_s
    benefit, benefit_sd = lasting.mean * seconds, lasting.sd * seconds
    trained = cost.price + cost.interference
    total = trained * (terms.train.mean + terms.probe.mean) + cost.price * terms.score.mean
    total += cost.serving_devices * terms.stall.mean
    spread = trained * (terms.train.sd + terms.probe.sd)
    cost_sd = math.hypot(spread, cost.price * terms.score.sd, cost.serving_devices * terms.stall.sd)
    net, net_sd = benefit - total, math.hypot(benefit_sd, cost_sd)
    return NetValue(
        arm=arm,
        gain=gain.mean,
        gain_sd=gain.sd,
        busy_devices=busy_devices,
        horizon_value_s=worth_s,
        benefit=benefit,
        benefit_sd=benefit_sd,
        train_s=terms.train.mean,
        probe_s=terms.probe.mean,
        score_s=terms.score.mean,
        stall_s=terms.stall.mean,
        price=cost.price,
        interference=cost.interference,
        cost=total,
        cost_sd=cost_sd,
        net=net,
        net_sd=net_sd,
        net_lower=net - z * net_sd,
        break_even_s=break_even_s(lasting.mean * busy_devices, total, hazard_per_s, horizon)
        if lasting_s is None
        else _paid_back_s(lasting.mean * busy_devices, total, worth_s),
        domains=domains,
    )


def charge_s(config: CostConfig, *, device_s: float = 0.0, train_s: float = 0.0, stall_s: float = 0.0) -> float:
    """Device-seconds that a finished action is charged with.

    Args:
        config: prices.
        device_s: measured training, scoring or probing device-seconds.
        train_s: wall seconds of training, for the interference with serving.
        stall_s: serving stall.
    """
    return config.price * device_s + config.interference * train_s + config.serving_devices * stall_s


def update_belief(belief: Belief, observed: float, observed_sd: float) -> Belief:
    """Conjugate normal update of a belief about a mean by one observation of known deviation."""
    prior, data = max(belief.sd, 1e-9) ** -2, max(observed_sd, 1e-9) ** -2
    return replace(
        belief, mean=(prior * belief.mean + data * observed) / (prior + data), sd=math.sqrt(1 / (prior + data))
    )
