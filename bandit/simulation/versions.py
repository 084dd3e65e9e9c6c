"""Drafter versions of a modelled world and the cycles that each needs for every conversation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.simulation.curves import Curves
from specblock.bandit.simulation.drafters import Floats
from specblock.bandit.simulation.scenario import Traffic

LONGEST_ACCEPTED = 8
"""Most tokens that one cycle commits."""


@dataclass(frozen=True, slots=True)
class Version:
    """One drafter: acceptance length per kind, and how hard it finds each conversation (standard normal)."""

    name: str
    levels: Floats
    scatter: Floats
    cycles: NDArray[np.int64]


def base_version(name: str, levels_K: Floats, traffic: Traffic, curves: Curves) -> Version:
    """The drafter that serves first."""
    return _version(name, levels_K, traffic.scatter, traffic, curves)


def child_version(
    name: str,
    parent: Version,
    levels_K: Floats,
    progress: float,
    seed: list[int],
    traffic: Traffic,
    curves: Curves,
    first: int = 0,
) -> Version:
    """A version trained from ``parent``.

    Two versions find mostly the same conversations hard: their scatter is correlated so that the difference of their
    cycles scatters by ``paired_sd`` after a complete update, and by less after a part of one (``progress``). Nobody
    asks about conversations before ``first``, which are no longer kept.
    """
    # The cube root fits what both micro-profiles and both complete updates showed.
    pair_sd = min(curves.paired_sd * progress ** (1 / 3), curves.cycles_sd)
    kept = 1 - pair_sd**2 / (2 * curves.cycles_sd**2)
    fresh_N = np.random.default_rng(seed).standard_normal(len(traffic.time_s) - first)
    scatter_N = np.zeros(len(traffic.time_s))
    scatter_N[first:] = kept * parent.scatter[first:] + math.sqrt(1 - kept**2) * fresh_N
    return _version(name, levels_K, scatter_N, traffic, curves, first)


def _version(
    name: str, levels_K: Floats, scatter_N: Floats, traffic: Traffic, curves: Curves, first: int = 0
) -> Version:
    # Minus half the variance: the mean of a log-normal factor is then 1.
    factor_N = np.exp(curves.cycles_sd * scatter_N[first:] - curves.cycles_sd**2 / 2)
    cycles_N = np.zeros(len(scatter_N), dtype=np.int64)
    cycles_N[first:] = whole_cycles(levels_K[traffic.kind[first:]] / factor_N, traffic, curves, first)
    return Version(name, levels_K, scatter_N, cycles_N)


def whole_cycles(acceptance_N: Floats, traffic: Traffic, curves: Curves, first: int = 0) -> NDArray[np.int64]:
    """Cycles of every conversation from ``first`` on at an acceptance length of its own, rounded without bias."""
    tokens = curves.request_tokens
    cycles_N = np.floor(tokens / acceptance_N + traffic.dither[first:]).astype(np.int64)
    return np.clip(cycles_N, math.ceil(tokens / LONGEST_ACCEPTED), tokens)


def histogram(cycles: int, tokens: int) -> tuple[int, ...]:
    """Accepted draft tokens of ``cycles`` that commit ``tokens`` as evenly as whole numbers can."""
    each, more = divmod(tokens, cycles)
    return (*(0,) * (each - 1), cycles - more, more)
