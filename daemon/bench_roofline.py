"""``specblockd bench roofline``: what the forwards of a cycle must read and compute, and how far they are from it.

Bytes and operations are counted where they happen, from the shapes of the products and attentions that really run; the
ceilings are measured on the same thread. The floor of a phase is the larger of both quotients.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import DraftTree
from specblock.daemon.bench_rivals import DEMO_DRAFTER, warm
from specblock.daemon.cost_profile import DraftCycle, stand_in_tree
from specblock.daemon.counted_work import Recorded, Work
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.facts import facts
from specblock.daemon.messages import GenerationRequest
from specblock.daemon.models import load_network, load_target, serving_dtype
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.plan import DraftPlan
from specblock.drafter.precision import number_format
from specblock.verifier.history import ChoiceState
from specblock.verifier.model import TargetModel
from specblock.verifier.verify import verify

_ROWS = (1, 4, 8, 16, 32, 64)
_PREFIX_TOKENS, _POSITIONS, _DEPTH, _LEAVES = 256, 2, 8, 4
_ROUNDS, _RECORDED = 25, 9
_BANDWIDTH_BYTES = 1 << 28  # far beyond any cache
_ALONE = ", its forwards alone"
_SQUARE = 384  # a matrix product whose operands stay in the second-level cache

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a cycle; ``forward``: it does nothing that is not counted."""

    name: str
    call: Call
    forward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What one thread of this machine can do: bytes a second from memory, operations a second."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineRow:
    """One phase; seconds are milliseconds, the median and middle half of the rounds.

    ``distance`` is measured over floor; None for phases that also do what is not counted.
    """

    phase: str
    megabytes: float
    million_operations: float
    memory_floor_ms: float
    compute_floor_ms: float
    measured_ms: float
    middle_ms: tuple[float, float]
    distance: float | None


def run(model: str, dtype: str, out: Path | None, as_json: bool, say: Callable[[str], None]) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(1)
    found = serving_dtype(dtype, "cpu")
    target = load_target(model, number_format(found, "cpu"), "cpu")
    warm(target)
    drafter = BlockDrafter(load_network(target, DEMO_DRAFTER), DraftSettings(blocks=2, leaf_cap=_LEAVES, node_budget=7))
    with torch.inference_mode():
        ceilings = measured_ceilings(torch.bfloat16 if target.coarse else target.dtype)
        rows = measure([*phases(target, drafter), *cycles(target, drafter)], ceilings)
    known = facts(dtype=found, prefix_tokens=_PREFIX_TOKENS, rounds=_ROUNDS)
    result = {"facts": known, "ceilings": asdict(ceilings), "rows": [asdict(one) for one in rows]}
    result["outside_forwards"] = outside_forwards(rows)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "roofline.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result, indent=2) if as_json else table(known, ceilings, rows))
    return 0


def measured_ceilings(multiplied: torch.dtype = torch.float32) -> Ceilings:
    """The best of several: other work on the machine only ever takes away. Operations are of numbers of one type."""
    memory = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32)
    left, right = torch.randn(2, _SQUARE, _SQUARE).to(multiplied)
    reading_s = min(_seconds(memory.sum) for _ in range(7))
    product_s = min(_seconds(lambda: left @ right) for _ in range(50))
    return Ceilings(bytes_per_s=_BANDWIDTH_BYTES / reading_s, operations_per_s=2 * _SQUARE**3 / product_s)


def phases(target: TargetModel, drafter: BlockDrafter) -> list[Phase]:
    """One run of every phase after ``_PREFIX_TOKENS`` tokens."""
    cache = target.new_cache(1, _PREFIX_TOKENS + max(_ROWS))
    slot = cache.allocate()
    cache.advance([slot], [_PREFIX_TOKENS])
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=1)
    states, sampling = [ChoiceState(params, [], target.vocab_size)], SamplingBatch.of([params])
    noise = NoiseWindow(1, _DEPTH + 1, target.vocab_size)
    cycle = DraftCycle(drafter, target.feature_size, 1, runs=8 * (_ROUNDS + 3))

    def forward(count: int) -> object:
        return target.forward(cache, [slot], torch.zeros(1, count, dtype=torch.int64))

    def verification(tree: DraftTree) -> object:
        return verify(target, cache, [slot], tree, _DEPTH, states, noise, sampling=sampling)

    chains = {count: stand_in_tree(count, 1, torch.device("cpu")) for count in (1, 8)}
    return [
        *(Phase(f"target forward, {count} rows", partial(forward, count), True) for count in _ROWS),
        *(Phase(f"verification, {count} rows", partial(verification, tree), False) for count, tree in chains.items()),
        Phase(f"drafter absorbs {_POSITIONS} positions", partial(cycle.refresh, _POSITIONS), True),
        Phase("drafting, one block", partial(cycle.run, DraftPlan((), 7), 1, _POSITIONS), False),
        Phase(
            f"drafting, two blocks, {_LEAVES} leaves",
            partial(cycle.run, DraftPlan((_LEAVES,), 7), 1, _POSITIONS),
            False,
        ),
    ]


def cycles(target: TargetModel, drafter: BlockDrafter) -> list[Phase]:
    """Whole cycles of an engine with one request, plain and drafting one block, each beside its forwards alone."""
    one_block = BlockDrafter(drafter.model, replace(drafter.settings, blocks=1))
    found = []
    for name, own in (("plain cycle", None), ("drafting cycle", one_block)):
        recorded = _usual_cycle(_engine_at_work(target, own))
        step = _engine_at_work(target, own).step  # another engine: calls made again write over a cache
        found += [Phase(name, step, False), Phase(f"{name}{_ALONE}", recorded.again, True)]
    return found


def _usual_cycle(engine: Engine) -> Recorded:
    """The forwards of the median one of some cycles, by what they compute: cycles differ in what they absorb."""
    every = [Recorded() for _ in range(_RECORDED)]
    for recorded in every:
        with recorded:
            engine.step()
    return sorted(every, key=lambda recorded: recorded.operations)[_RECORDED // 2]


def _engine_at_work(target: TargetModel, drafter: BlockDrafter | None) -> Engine:
    """An engine whose only request has its prompt behind it and more tokens to go than are measured."""
    most_tokens = (_ROUNDS + 8) * (1 + (drafter.max_depth if drafter else 0))
    capacity = _PREFIX_TOKENS + most_tokens
    engine = Engine(target, drafter, EngineSettings(slots=1, capacity_tokens=capacity), time.perf_counter)
    prompt = tuple(token % target.vocab_size for token in range(1, _PREFIX_TOKENS + 1))
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=1)
    request = GenerationRequest(
        request_id="roofline", prompt_tokens=prompt, sampling=sampling, max_tokens=most_tokens, ignore_eos=True
    )
    engine.submit(request)
    for _ in range(3):
        engine.step()
    assert not engine.idle, "the request is over before it was measured"
    return engine


def outside_forwards(rows: list[RooflineRow]) -> dict[str, float]:
    """By kind of cycle, the share of it that is not its forwards."""
    ms = {row.phase: row.measured_ms for row in rows}
    return {
        name.removesuffix(_ALONE): 1.0 - alone / ms[name.removesuffix(_ALONE)]
        for name, alone in ms.items()
        if name.endswith(_ALONE)
    }


def measure(every: list[Phase], ceilings: Ceilings) -> list[RooflineRow]:
    """Counts one run of every phase, then times them in turns, so that a drift of the machine hits all."""
    counted: list[Work] = []
    for phase in every:
        phase.call()
        with Work() as work:
            phase.call()
        counted.append(work)
    seconds: list[list[float]] = [[] for _ in every]
    for _ in range(_ROUNDS):
        for own, phase in zip(seconds, every, strict=True):
            own.append(_seconds(phase.call))
    return [row(*of, ceilings) for of in zip(every, counted, seconds, strict=True)]


def row(phase: Phase, work: Work, seconds: list[float], ceilings: Ceilings) -> RooflineRow:
    """What was counted beside what was timed."""
    moved, ordered = work.weight_bytes + work.cache_bytes, sorted(seconds)
    memory_s, compute_s = moved / ceilings.bytes_per_s, work.operations / ceilings.operations_per_s
    median_s, quarter = statistics.median(ordered), len(ordered) // 4
    return RooflineRow(
        phase=phase.name,
        megabytes=moved / 1e6,
        million_operations=work.operations / 1e6,
        memory_floor_ms=1e3 * memory_s,
        compute_floor_ms=1e3 * compute_s,
        measured_ms=1e3 * median_s,
        middle_ms=(1e3 * ordered[quarter], 1e3 * ordered[-1 - quarter]),
        distance=median_s / max(memory_s, compute_s) if phase.forward else None,
    )


def table(known: object, ceilings: Ceilings, rows: list[RooflineRow]) -> str:
    """The rows as text."""
    lines = [
        json.dumps(known),
        f"one thread reads {ceilings.bytes_per_s / 1e9:.1f} GB/s and computes {ceilings.operations_per_s / 1e9:.0f} "
        "billion operations a second",
        "",
        f"{'phase':<36}{'MB':>8}{'M ops':>8}{'memory ms':>11}{'compute ms':>12}{'measured ms':>13}"
        f"{'middle half':>18}{'x floor':>9}",
    ]
    for r in rows:
        middle = f"{r.middle_ms[0]:.2f} to {r.middle_ms[1]:.2f}"
        distance = "-" if r.distance is None else f"{r.distance:.2f}"
        lines.append(
            f"{r.phase:<36}{r.megabytes:>8.1f}{r.million_operations:>8.0f}{r.memory_floor_ms:>11.2f}"
            f"{r.compute_floor_ms:>12.2f}{r.measured_ms:>13.2f}{middle:>18}{distance:>9}"
        )
    lines += [f"outside of forwards: {share:.1%} of a {name}" for name, share in outside_forwards(rows).items()]
    return "\n".join(lines)


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
