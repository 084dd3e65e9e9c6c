"""How many CPU threads a decode loop gets where ``engine.threads`` is "auto": as many as make verifications faster.

A cycle over a few rows waits for memory, so threads help until they have all of its bandwidth, and then only wake
late. What a row computes does not depend on their number.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specblock.verifier.model import TargetModel

if TYPE_CHECKING:
    from specblock.daemon.config import DaemonConfig

log = logging.getLogger(__name__)

_WORTH = 0.95  # more threads must bring the time below this share of what fewer take
_ROWS, _PREFIX_TOKENS, _TIMES = 8, 64, 7


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
    """The fewest threads that no larger number beats by more than 5 %; stops where more no longer help.

    Args:
        counts: numbers to try, ascending; at least one.
        seconds: of some work with that many threads.
    """
    if len(counts) == 1:
        return ThreadChoice(counts[0], ())
    best, measured = counts[0], [(counts[0], seconds(counts[0]))]
    for count in counts[1:]:
        measured.append((count, seconds(count)))
        if measured[-1][1] >= _WORTH * dict(measured)[best]:
            break
        best = count
    return ThreadChoice(best, tuple(measured))


def free_cores(config: DaemonConfig) -> int:
    """Cores this process may use, less those of a trainer beside it; at least one."""
    trains = config.adaptation.enabled and config.drafter.has_weights and config.trainer.device == "cpu"
    # Not every system tells which of its cores are ours.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - (config.trainer.threads if trains else 0))


def use_threads(config: DaemonConfig, target: TargetModel, clock: Callable[[], float]) -> None:
    """Sets PyTorch's threads for an engine over ``target``; measures, if the configuration leaves it to us."""
    asked = config.engine.threads
    if asked != "auto":
        torch.set_num_threads(asked)
        return
    most = free_cores(config) if target.device.type == "cpu" else 1
    choice = choose_threads(candidates(most), lambda threads: forward_seconds(target, threads, clock))
    torch.set_num_threads(choice.threads)
    log.info("engine runs on %s", choice)


@torch.inference_mode()
def forward_seconds(target: TargetModel, threads: int, clock: Callable[[], float]) -> float:
    """Median seconds of a forward of a small tree's rows with so many threads, which stay set."""
    torch.set_num_threads(threads)
    cache = target.new_cache(1, _PREFIX_TOKENS + _ROWS)
    cache.advance([0], [_PREFIX_TOKENS])  # what is in a prefix does not change the time
    tokens, times = torch.zeros(1, _ROWS, dtype=torch.int64, device=target.device), []
    for _ in range(_TIMES + 2):
        begin = clock()
        target.forward(cache, [0], tokens)
        times.append(clock() - begin)
    return statistics.median(times[2:])
