"""``specblockd bench swap``: other drafter weights, again and again, while an engine serves.

The daemon's own path: an engine with its decode thread, weights as they come from a trainer, requests that go on. What
is measured is how long decoding stands still, and whether memory stays what it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.bench_rivals import DEMO_DRAFTER, tuned_settings, warm
from specblock.daemon.bench_speed import all_prompts
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.engine_host import EngineHost
from specblock.daemon.facts import facts
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.models import load_network, load_target, serving_dtype
from specblock.daemon.windows import WindowLimits, WindowStore
from specblock.drafter.checkpoint import load_weights
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.precision import number_format

SEED = 30_000
_MIB = 2**20
_WINDOW_BYTES = 16 * _MIB  # soon full: what is kept of conversations must not look like a leak
_SPREAD = 1e-3  # by which the two versions differ, relative to a matrix' scatter: every layer moves
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """What is done. The first fifth of the swaps warms up and is only drawn."""

    target: str = "models/demo-target"
    prompts: Path = Path("models/demo-prompts")
    swaps: int = 500
    clients: int = 4
    new_tokens: int = 64
    dtype: str = "auto"
    threads: int = 1
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapRow:
    """What came out.

    Attributes:
        stall_ms_p50, stall_ms_p95, stall_ms_max: decoding stands still.
        cycle_ms: a cycle of the whole batch, between swaps.
        resident_mib_first, resident_mib_last: resident memory, medians over a tenth of the swaps after warming up.
        growth_mib_per_100_swaps, growth_se: straight line through what follows the warming up.
        compared: requests that were answered meanwhile, and once more by the same engine without any swap.
        different_answers: of these, whose text is not the same.
    """

    swaps: int
    stall_ms_p50: float
    stall_ms_p95: float
    stall_ms_max: float
    cycle_ms: float
    resident_mib_first: float
    resident_mib_last: float
    growth_mib_per_100_swaps: float
    growth_se: float
    compared: int
    different_answers: int


def run(settings: SwapSettings, as_json: bool, say: Say) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(settings.threads)
    dtype = serving_dtype(settings.dtype, "cpu")
    target = load_target(settings.target, number_format(dtype, "cpu"), "cpu")
    warm(target)
    drafter = BlockDrafter(load_network(target, DEMO_DRAFTER), tuned_settings().get("specblock", DraftSettings()))
    prompts = all_prompts(settings.prompts, SEED)
    encoded = [tuple(target.tokenizer.encode(p.text)) for p in prompts]
    longest = max(map(len, encoded)) + settings.new_tokens

    weights = {name: tensor.clone() for name, tensor in drafter.model.state_dict().items()}

    def host() -> EngineHost:
        load_weights(drafter.model, weights, "v0")
        sizes = EngineSettings(slots=settings.clients, capacity_tokens=longest)
        engine = Engine(target, drafter, sizes, time.perf_counter, drafter_version="v0")
        return EngineHost(engine, WindowStore(WindowLimits(budget_bytes=_WINDOW_BYTES), time.time), 0.0, 64)

    swapped = Clients(host(), encoded, settings)
    stalls, resident = [], []
    try:
        swapped.answer(settings.clients)
        for number in range(settings.swaps):
            # A copy of its own, as weights that come from another process are.
            stalls.append(swapped.host.swap(f"v{number + 1}", _version(weights, number)).stall_s)
            swapped.answer(1)
            resident.append(resident_bytes())
            if (number + 1) % 100 == 0:
                say(f"{number + 1} swaps, {resident[-1] / _MIB:.0f} MiB resident")
        cycle_s = swapped.cycle_s()
    finally:
        swapped.host.close()
    quiet = Clients(host(), encoded, settings)
    try:
        quiet.answer(len(swapped.texts))
    finally:
        quiet.host.close()
    both = swapped.texts.keys() & quiet.texts.keys()
    differ = sum(swapped.texts[number] != quiet.texts[number] for number in both)
    row = summary(stalls, resident, cycle_s, len(both), differ)
    known = facts(
        dtype=dtype, swaps=settings.swaps, clients=settings.clients, new_tokens=settings.new_tokens, seed=SEED
    )
    result = {
        "facts": known,
        "rows": [asdict(row)],
        "stall_ms": [round(1e3 * s, 3) for s in stalls],
        "resident_mib": [round(r / _MIB, 2) for r in resident],
    }
    if settings.out is not None:
        from specblock.daemon.bench_swap_report import write_swap_report

        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "swap.json").write_text(json.dumps(result, indent=2) + "\n")
        say(f"page: {write_swap_report(settings.out / 'swap.html', result)}")
    say(json.dumps(result, indent=2) if as_json else "\n".join([json.dumps(known), "", *lines(row)]))
    return 0


class Clients:
    """So many clients in a closed loop: who is answered asks the next prompt at once; ``texts`` by request."""

    def __init__(self, host: EngineHost, prompts: Sequence[tuple[int, ...]], settings: SwapSettings) -> None:
        self.host, self.texts = host, dict[int, tuple[int, ...]]()
        self._prompts, self._settings, self._numbers = cycle(prompts), settings, count()
        self._open: dict[int, tuple[int, ...]] = {}

    def answer(self, more: int) -> None:
        """Returns when so many further requests are answered; others are under way then.

        Raises:
            RuntimeError: a request failed.
        """
        wanted = len(self.texts) + more
        while len(self.texts) < wanted:
            while len(self._open) < self._settings.clients:
                self._ask()
            for chunk in self.host.next_chunks(1.0):
                number = int(chunk.request_id)
                self._open[number] += tuple(chunk.tokens)
                if chunk.finish_reason is not None:
                    if chunk.finish_reason != "length":
                        raise RuntimeError(f"request {number} ended with {chunk.finish_reason}: {chunk.error}")
                    self.texts[number] = self._open.pop(number)

    def cycle_s(self) -> float:
        """Seconds of a cycle of the whole batch, by the engine's accounts."""
        return self.host.status().cycle_s * self._settings.clients

    def _ask(self) -> None:
        number = next(self._numbers)
        self._open[number] = ()
        self.host.submit(
            GenerationRequest(
                request_id=str(number),
                prompt_tokens=next(self._prompts),
                sampling=SamplingParams(temperature=1.0, top_p=0.95, seed=SEED + number),
                max_tokens=self._settings.new_tokens,
                ignore_eos=True,
                collect=True,
                domain="default",
            )
        )


def _version(weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Other weights for every ``number``: each matrix moved by a thousandth of its scatter."""
    random = torch.Generator().manual_seed(SEED + number)
    moved = {}
    for name, own in weights.items():
        moved[name] = own.clone()
        if own.is_floating_point() and own.dim() > 1:
            noise = torch.randn(own.shape, generator=random)
            moved[name] += (_SPREAD * float(own.float().std()) * noise).to(own)
    return moved


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def summary(stalls_s: Sequence[float], resident: Sequence[int], cycle_s: float, compared: int, differ: int) -> SwapRow:
    """The row of so many swaps; ``resident`` bytes after each.

    Raises:
        ValueError: fewer than ten swaps.
    """
    if len(stalls_s) < 10:
        raise ValueError(f"at least 10 swaps are needed to tell growth from noise, not {len(stalls_s)}")
    stalls_ms, mib = 1e3 * np.array(stalls_s), np.array(resident[len(resident) // 5 :]) / _MIB
    (slope, _), covariance = np.polyfit(np.arange(len(mib)), mib, 1, cov=True)
    tenth = max(1, len(stalls_s) // 10)
    return SwapRow(
        swaps=len(stalls_s),
        stall_ms_p50=float(np.quantile(stalls_ms, 0.5)),
        stall_ms_p95=float(np.quantile(stalls_ms, 0.95)),
        stall_ms_max=float(stalls_ms.max()),
        cycle_ms=1e3 * cycle_s,
        resident_mib_first=float(np.median(mib[:tenth])),
        resident_mib_last=float(np.median(mib[-tenth:])),
        growth_mib_per_100_swaps=100 * float(slope),
        growth_se=100 * float(covariance[0, 0]) ** 0.5,
        compared=compared,
        different_answers=differ,
    )


def lines(row: SwapRow) -> list[str]:
    """For people."""
    return [
        f"{row.swaps} swaps: decoding stood still for {row.stall_ms_p50:.1f} ms (95 %: {row.stall_ms_p95:.1f}, longest "
        f"{row.stall_ms_max:.1f}); a cycle takes {row.cycle_ms:.1f} ms",
        f"resident memory {row.resident_mib_first:.1f} MiB at first and {row.resident_mib_last:.1f} MiB at the end: "
        f"{row.growth_mib_per_100_swaps:+.2f} MiB per 100 swaps (standard error {row.growth_se:.2f})",
        f"{row.different_answers} of {row.compared} answers differ from those without any swap",
    ]
