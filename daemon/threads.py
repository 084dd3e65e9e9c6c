"""How many CPU threads a decode loop gets where ``engine.threads`` is "auto": as many as make verifications faster.

A cycle over a few rows waits for memory, so threads help until they have all of its bandwidth, and then only wake
late. With native layers nothing that a row computes depends on their number; without them its last bits may, so one
thread serves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from specblock.verifier.model import TargetModel

if TYPE_CHECKING:
    from specblock.daemon.config import DaemonConfig

_WORTH = 0.95  # more threads must bring the time below this share of what fewer take
_ROWS, _PREFIX_TOKENS, _TIMES, _ROUNDS = 8, 64, 5, 3


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """A number of threads, and what was measured: (threads, seconds of a verification forward), fewest first."""

    threads: int
    measured: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        seen = ", ".join(f"{threads}: {seconds * 1e3:.2f}" for threads, seconds in self.measured)
        why = f"; ms per forward by threads: {seen}" if seen else ""
        return f"CPU threads: {self.threads} (engine.threads: auto{why})"


def candidates(most: int) -> tuple[int, ...]:
    """Numbers of threads to try: powers of two up to ``most``, and ``most``."""
    return tuple(sorted({1 << i for i in range(most.bit_length())} | {most}))


def choose_threads(counts: Sequence[int], seconds: Callable[[int], float]) -> ThreadChoice:
    """The fewest threads that no other number beats by more than 5 %.

    Args:
        counts: numbers to try, at least one.
        seconds: of some work with that many threads. Every number is tried several times, in turns, and its shortest
            time counts: something else that starts up beside it only ever makes it longer.
    """
    if len(counts) == 1:
        return ThreadChoice(counts[0], ())
    shortest = dict.fromkeys(sorted(counts), math.inf)
    for _ in range(_ROUNDS):
        for count in shortest:
            shortest[count] = min(shortest[count], seconds(count))
    best_s = min(shortest.values())
    chosen = next(count for count, took_s in shortest.items() if took_s * _WORTH <= best_s)
    return ThreadChoice(chosen, tuple(shortest.items()))


def free_cores(config: DaemonConfig, quota: float | None) -> int:
    """Cores this process may use, less those of a trainer beside it; at least one.

    Args:
        config: says whether there is a trainer.
        quota: CPU seconds that it may use per second; None for no limit.
    """
    trains = config.adaptation.enabled and config.drafter.has_weights and config.trainer.device == "cpu"
    # Not every system tells which of its cores are ours.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = cores if quota is None else min(cores, int(quota))
    return max(1, cores - (config.trainer.threads if trains else 0))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """What a container's limit leaves, in cores; None without one. Threads beyond it seem fast until stopped."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            limit, period = (int(word) for name in names for word in (root / name).read_text().split())
        except (OSError, ValueError):  # not there, or "max"
            continue
        return limit / period if limit > 0 else None
    return None


def use_threads(config: DaemonConfig, target: TargetModel, clock: Callable[[], float]) -> str:
    """Sets PyTorch's threads for an engine over ``target``; measures, if the configuration leaves it to us.

    Returns:
        What was chosen and why, for people.
    """
    asked = config.engine.threads
    if asked != "auto":
        torch.set_num_threads(asked)
        return f"CPU threads: {asked}"
    most = free_cores(config, cpu_quota()) if target.native else 1
    choice = choose_threads(candidates(most), lambda threads: forward_seconds(target, threads, clock))
    torch.set_num_threads(choice.threads)
    return str(choice)


@torch.inference_mode()
def forward_seconds(target: TargetModel, threads: int, clock: Callable[[], float]) -> float:
    """Shortest seconds of a forward of a small tree's rows with so many threads, which stay set."""
    torch.set_num_threads(threads)
    cache = target.new_cache(1, _PREFIX_TOKENS + _ROWS)
    cache.advance([0], [_PREFIX_TOKENS])  # what is in a prefix does not change the time
    tokens, times = torch.zeros(1, _ROWS, dtype=torch.int64, device=target.device), []
    for _ in range(_TIMES + 2):
        begin = clock()
        target.forward(cache, [0], tokens)
        times.append(clock() - begin)
    return min(times[2:])
