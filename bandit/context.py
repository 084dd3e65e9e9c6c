"""From statistics to what the decision rule reads: drops, shares, busy fraction. Pure reads of the state."""

from __future__ import annotations

import math

from specblock.bandit.acceptance import STEADY, DomainStatistics, Level, Segment, VersionStatistics
from specblock.bandit.actions import DomainWindows, WindowSummary
from specblock.bandit.config import PolicyConfig
from specblock.bandit.decision import DecisionContext, DomainContext, PastLevel
from specblock.bandit.fall import measured_fall
from specblock.bandit.intervals import UNKNOWN_SE, ratio_of
from specblock.bandit.presence import Presence
from specblock.bandit.reach import meant_for
from specblock.bandit.state import BanditState, PendingUpdate
from specblock.bandit.trend import growing_s

SHARE_PRIOR_S_PER_S = 1e-6
"""Prior flow of every known domain: keeps shares defined when nothing flows."""

WATCHES_PER_HALF_LIFE = 12
"""Looks at presence within the half-life of the flow: no closer than the flow can change."""

WINDOW_SILENT_S = 3600.0
"""A window whose newest segment is older than this says nothing about the traffic of now."""


def build_context(
    state: BanditState,
    windows: WindowSummary,
    serving_version: str,
    now_s: float,
    config: PolicyConfig,
    since_s: float = 0.0,
    stored: tuple[str, ...] = (),
) -> DecisionContext:
    """What a decision at ``now_s``, ``since_s`` after the one before, reads; ``stored`` are all versions on disk."""
    flow = _flow(state, now_s, config)
    total = math.fsum(flow.values())
    earlier = tuple(
        name for name in stored if name != serving_version and state.policy.barred_until_s.get(name, 0.0) <= now_s
    )
    available = {window.domain: window for window in windows.domains}
    return DecisionContext(
        now_s=now_s,
        serving_version=serving_version,
        domains=tuple(
            domain_context(
                name, state, serving_version, earlier, flow[name] / total, available.get(name), now_s, config
            )
            for name in sorted(state.domains)
        ),
        busy_devices=min(total, config.cost.serving_devices),
        num_changes=state.changes,
        observed_s=max(now_s - state.first_event_s, 0.0) if state.first_event_s else 0.0,
        since_s=since_s,
        stored=earlier,
        base=stored[0] if stored and stored[0] in earlier else "",
    )


def watch_presence(state: BanditState, now_s: float, config: PolicyConfig) -> None:
    """Let every domain's presence take its present share; while nothing flows at all, nothing is learned of it."""
    half_life_s = config.statistics.rate_half_life_s
    passed_s = now_s - state.watched_s
    if passed_s < half_life_s / WATCHES_PER_HALF_LIFE:
        return
    newest_s = max((domain.device_s.last_s for domain in state.domains.values()), default=0.0)
    first, state.watched_s = state.watched_s == 0.0, now_s
    if first or now_s - newest_s > half_life_s:
        return
    flow = _flow(state, now_s, config)
    total = math.fsum(flow.values())
    for name in sorted(flow):
        state.presence[name] = state.presence.get(name, Presence()).watched(flow[name] / total, passed_s)


def expected_s(state: BanditState, now_s: float, config: PolicyConfig) -> dict[str, float]:
    """Seconds of traffic that every known domain is expected to have within the horizon, in seconds of all traffic."""
    flow = _flow(state, now_s, config)
    total = math.fsum(flow.values())
    return {
        name: state.presence.get(name, Presence(there=True)).lasting_s(per_s / total, config.horizon)
        for name, per_s in sorted(flow.items())
    }


def _flow(state: BanditState, now_s: float, config: PolicyConfig) -> dict[str, float]:
    """Recent device-seconds per second of every domain."""
    half_life_s = config.statistics.rate_half_life_s
    return {
        name: domain.device_s.rate(now_s, half_life_s) + SHARE_PRIOR_S_PER_S for name, domain in state.domains.items()
    }


def domain_context(
    name: str,
    state: BanditState,
    version: str,
    earlier: tuple[str, ...],
    share: float,
    windows: DomainWindows | None,
    now_s: float,
    config: PolicyConfig,
) -> DomainContext:
    """One domain under ``version``, and what is known there of ``earlier`` ones."""
    statistics = state.domains[name].versions.get(version, VersionStatistics())
    recent = statistics.recent
    cycles, tokens = sum(s.cycles for s in recent), sum(s.tokens for s in recent)
    acceptance = tokens / cycles if cycles else 0.0
    strata = sorted({segment.stratum for segment in recent})
    levels = {stratum: reference(name, stratum, state, version, config) for stratum in strata}
    fall = measured_fall(statistics, levels)
    own = statistics.level.acceptance(config.statistics.reference_cycles)
    raw = ratio_of((segment.cycles * own, segment.tokens) for segment in recent)
    return DomainContext(
        domain=name,
        share=share,
        acceptance=acceptance,
        reference=fall.reference,
        drop=fall.drop,
        drop_se=fall.se,
        part=fall.part,
        growing_s=growing_s(statistics, levels, fall),
        raw_drop=1 - raw.ratio if raw.x > 0 else 0.0,
        raw_drop_se=min(raw.se, 1.0) if raw.x > 0 else 0.0,
        cycles=cycles,
        device_s_per_token=math.fsum(s.device_s for s in recent) / tokens if tokens else 0.0,
        measurable=cycles >= config.statistics.min_window_cycles
        and not statistics.resumed
        and now_s - statistics.last_time_s <= WINDOW_SILENT_S,
        num_train=windows.num_train if windows else 0,
        num_heldout=windows.num_heldout if windows else 0,
        presence=state.presence.get(name),
        past=past_levels(name, state, version, earlier, now_s, config),
    )


def past_levels(
    name: str, state: BanditState, serving: str, earlier: tuple[str, ...], now_s: float, config: PolicyConfig
) -> tuple[PastLevel, ...]:
    """What every one of ``earlier`` is known to save in a domain; versions of which nothing is known are left out.

    Replayed side by side with the serving version not long ago, if it has not served since; or else what it last
    accepted there in as many cycles as a window needs.
    """
    oldest_s, served = now_s - config.evidence_half_life_s, state.domains[name].versions
    compared = {
        one.version: (one.saving, one.se)
        for one in state.policy.comparisons
        if one.domain == name
        and one.against == serving
        and one.time_s >= max(oldest_s, served[one.version].last_time_s if one.version in served else 0.0)
    }
    recent = served.get(serving, VersionStatistics()).recent
    found = {v: compared.get(v) or (_below(recent, served[v].recent, config) if v in served else None) for v in earlier}
    return tuple(PastLevel(version=v, drop=one[0], drop_se=one[1]) for v, one in found.items() if one is not None)


def _below(recent: list[Segment], then: list[Segment], config: PolicyConfig) -> tuple[float, float] | None:
    """Drop of ``recent`` below ``then``, and its standard error, over the strata of both; None: too few cycles."""
    shared = {segment.stratum for segment in recent} & {segment.stratum for segment in then}
    both = [[s for s in segments if s.stratum in shared and s.cycles > 0] for segments in (recent, then)]
    if min(sum(s.cycles for s in segments) for segments in both) < config.statistics.min_window_cycles:
        return None
    levels = {
        stratum: sum(s.tokens for s in both[1] if s.stratum == stratum)
        / sum(s.cycles for s in both[1] if s.stratum == stratum)
        for stratum in shared
    }
    # Tokens over what the earlier version promises for the same strata: 1 on its own segments, on average.
    now, before = (ratio_of((s.cycles * levels[s.stratum], s.tokens) for s in segments) for segments in both)
    return 1 - now.ratio, min(math.hypot(now.se, now.ratio * before.se), UNKNOWN_SE)


def reference(name: str, stratum: str, state: BanditState, version: str, config: PolicyConfig) -> Level:
    """Acceptance that ``stratum`` of a domain should have, and the cycles it was measured on; none when unknown.

    The best sustained level of the domain itself under any remembered version, or what the serving version (in a domain
    silent since: the newest version it has seen) reaches in the same stratum of the other domains: a domain that is new
    and poor from its first request has dropped too. Where no other domain says anything, the level of the drafter's own
    training (if configured) stands in.
    """
    enough = config.statistics.reference_cycles
    known = [v.strata[stratum] for v in state.domains[name].versions.values() if stratum in v.strata]
    own = max(known, key=lambda level: level.acceptance(enough), default=Level())
    others = [_level(domain, version, stratum, enough) for key, domain in sorted(state.domains.items()) if key != name]
    settled = [level for level in others if level.acceptance(enough) > 0]
    # Without what its requests scatter: text that was never better is all of one kind, as far as is known, so that no
    # part of it has fallen.
    other = Level(sum(level.cycles for level in settled), sum(level.tokens for level in settled))
    if not settled and config.reference_acceptance:
        # The drafter's training saw far more than any window here.
        exact = STEADY * enough
        other = Level(exact, round(exact * config.reference_acceptance))
    best = max((own, other), key=lambda level: level.acceptance(enough))
    return best if best.acceptance(enough) > 0 else Level()


def _level(domain: DomainStatistics, version: str, stratum: str, enough: int) -> Level:
    """A domain's level under ``version``, or under the newest other version with a settled one."""
    own = domain.versions.get(version)
    newest_first = sorted(domain.versions.values(), key=lambda v: -v.last_time_s)
    known = (v.strata.get(stratum, Level()) for v in ([own] if own else []) + newest_first)
    return next((level for level in known if level.acceptance(enough) > 0), Level())


def trial_since_s(
    state: BanditState, windows: WindowSummary, pending: PendingUpdate, now_s: float, config: PolicyConfig
) -> float | None:
    """From when on held-out conversations judge a trial; None: all that are kept.

    Every conversation replayed costs, and only those of the domains it is made for tell anything: so far back that
    these are expected to be ``probe_conversations``.
    """
    heldout_per_s, wanted = 0.0, meant_for(pending.targets, config.min_drop)
    for window in windows.domains:
        kept = window.num_train + window.num_heldout
        domain = state.domains.get(window.domain)
        if window.domain not in wanted or domain is None or not kept:
            continue
        totals = [version for version in domain.versions.values() if version.requests]
        requests, tokens = sum(v.requests for v in totals), sum(v.total_tokens for v in totals)
        per_s = domain.tokens.rate(now_s, config.statistics.rate_half_life_s) * requests / tokens if tokens else 0.0
        heldout_per_s += per_s * window.num_heldout / kept
    return now_s - config.probe_conversations / heldout_per_s if heldout_per_s > 0 else None


def base_s_per_token(context: DecisionContext) -> float:
    """Device-seconds per committed token of the serving version over the domains with recent traffic; 0 if none."""
    seen = [domain for domain in context.domains if domain.device_s_per_token > 0]
    weight = math.fsum(domain.share / domain.device_s_per_token for domain in seen)
    return math.fsum(domain.share for domain in seen) / weight if weight > 0 else 0.0
