"""From statistics to what the decision rule reads: drops, shares, busy fraction. Pure reads of the state."""

from __future__ import annotations

import math

from specblock.bandit.acceptance import DomainStatistics, Level, Segment, VersionStatistics
from specblock.bandit.actions import DomainWindows, WindowSummary
from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import DecisionContext, DomainContext
from specblock.bandit.intervals import ratio_of
from specblock.bandit.state import BanditState

SHARE_PRIOR_S_PER_S = 1e-6
"""Prior flow of every known domain: keeps shares defined when nothing flows."""

WINDOW_SILENT_S = 3600.0
"""A window whose newest segment is older than this says nothing about the traffic of now."""


def build_context(
    state: BanditState, windows: WindowSummary, serving_version: str, now_s: float, config: PolicyConfig
) -> DecisionContext:
    """What a decision at ``now_s`` reads."""
    half_life_s = config.statistics.rate_half_life_s
    flow = {
        name: domain.device_s.rate(now_s, half_life_s) + SHARE_PRIOR_S_PER_S for name, domain in state.domains.items()
    }
    total = math.fsum(flow.values())
    available = {window.domain: window for window in windows.domains}
    return DecisionContext(
        now_s=now_s,
        serving_version=serving_version,
        domains=tuple(
            domain_context(name, state, serving_version, flow[name] / total, available.get(name), now_s, config)
            for name in sorted(state.domains)
        ),
        busy_devices=min(total, config.cost.serving_devices),
        num_changes=state.changes,
        observed_s=max(now_s - state.first_event_s, 0.0) if state.first_event_s else 0.0,
    )


def domain_context(
    name: str,
    state: BanditState,
    version: str,
    share: float,
    windows: DomainWindows | None,
    now_s: float,
    config: PolicyConfig,
) -> DomainContext:
    """One domain under ``version``."""
    statistics = state.domains[name].versions.get(version, VersionStatistics())
    recent = statistics.recent
    cycles, tokens = sum(s.cycles for s in recent), sum(s.tokens for s in recent)
    acceptance = tokens / cycles if cycles else 0.0
    drop, drop_se, reference = _drop(name, state, version, recent, config)
    own = statistics.level.acceptance(config.statistics.reference_cycles)
    return DomainContext(
        domain=name,
        share=share,
        acceptance=acceptance,
        reference=reference,
        drop=drop,
        drop_se=drop_se,
        raw_drop=1 - acceptance / own if own and cycles else 0.0,
        cycles=cycles,
        device_s_per_token=math.fsum(s.device_s for s in recent) / tokens if tokens else 0.0,
        measurable=cycles >= config.statistics.min_window_cycles and now_s - statistics.last_time_s <= WINDOW_SILENT_S,
        num_train=windows.num_train if windows else 0,
        num_heldout=windows.num_heldout if windows else 0,
    )


def _drop(
    name: str, state: BanditState, version: str, recent: list[Segment], config: PolicyConfig
) -> tuple[float, float, float]:
    """Drop of the recent window below what its strata should give, its standard error, and that reference.

    Segments in strata without any reference are left out: nothing is known of them.
    """
    levels = {
        stratum: reference_level(name, stratum, state, version, config) for stratum in {s.stratum for s in recent}
    }
    known = [segment for segment in recent if levels[segment.stratum] > 0 and segment.cycles > 0]
    if not known:
        return 0.0, 0.0, 0.0
    cycles = sum(segment.cycles for segment in known)
    kept = ratio_of((segment.cycles * levels[segment.stratum], segment.tokens) for segment in known)
    # The reference was measured on a finite number of cycles with the same scatter per cycle.
    se = kept.se * math.sqrt(1 + cycles / config.statistics.reference_cycles)
    return 1 - kept.ratio, min(se, 1.0), kept.x / cycles


def reference_level(name: str, stratum: str, state: BanditState, version: str, config: PolicyConfig) -> float:
    """Acceptance that ``stratum`` of a domain should have; 0 when unknown.

    The best sustained level of the domain itself under any remembered version, or what the serving version (in a domain
    silent since: the newest version it has seen) reaches in the same stratum of the other domains: a domain that is new
    and poor from its first request has dropped too. Where no other domain says anything, the level of the drafter's own
    training (if configured) stands in.
    """
    enough = config.statistics.reference_cycles
    own = max(
        (v.strata[stratum].acceptance(enough) for v in state.domains[name].versions.values() if stratum in v.strata),
        default=0.0,
    )
    others = [_level(domain, version, stratum, enough) for key, domain in sorted(state.domains.items()) if key != name]
    settled = [level for level in others if level.acceptance(enough) > 0]
    pooled = sum(level.tokens for level in settled) / sum(level.cycles for level in settled) if settled else 0.0
    return max(own, pooled or config.reference_acceptance)


def _level(domain: DomainStatistics, version: str, stratum: str, enough: int) -> Level:
    """A domain's level under ``version``, or under the newest other version with a settled one."""
    own = domain.versions.get(version)
    newest_first = sorted(domain.versions.values(), key=lambda v: -v.last_time_s)
    known = (v.strata.get(stratum, Level()) for v in ([own] if own else []) + newest_first)
    return next((level for level in known if level.acceptance(enough) > 0), Level())


def base_s_per_token(context: DecisionContext) -> float:
    """Device-seconds per committed token of the serving version over the domains with recent traffic; 0 if none."""
    seen = [domain for domain in context.domains if domain.device_s_per_token > 0]
    weight = math.fsum(domain.share / domain.device_s_per_token for domain in seen)
    return math.fsum(domain.share for domain in seen) / weight if weight > 0 else 0.0
