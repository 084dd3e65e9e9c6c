"""``specblockd bench roofline``: what the forwards of a cycle must read and compute, and how far they are from it.

Bytes and operations are counted where they happen, from the shapes of the products and attentions that really run; the
ceilings are measured on the same thread. The floor of a phase is the larger of both quotients.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import DraftTree
from specblock.daemon.bench_rivals import DEMO_DRAFTER, warm
from specblock.daemon.cost_profile import DraftCycle, stand_in_tree
from specblock.daemon.facts import facts
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
_ROUNDS = 25
_BANDWIDTH_BYTES = 1 << 28  # far beyond any cache
_SQUARE = 384  # a matrix product whose operands stay in the second-level cache

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a cycle; ``forward``: it does nothing that is not counted."""

    name: str
    call: Call
    forward: bool


class Work(TorchDispatchMode):
    """Counts what the products and attentions inside its context read and compute.

    Attributes:
        weight_bytes: of weights, as they are stored, once per product.
        cache_bytes: of keys and values.
        operations: multiplications and additions.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight_bytes = self.cache_bytes = self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in ("packed_linear", "rotary_linear"):
            self._product(args[0], args[1], args[2])
        elif name == "swiglu":
            x, gate, up, down, inner, outputs = args[:6]
            self._product(x, gate, inner)
            self._product(x, up, inner)
            self._count(down, x.numel() // x.shape[-1] * inner * outputs)
        elif name == "attention_inputs":
            x, query, key, value, query_out, key_out = args[0], *args[3:8]
            self._product(x, query, query_out)
            self._product(x, key, key_out)
            self._product(x, value, key_out)
        elif name == "layer_rest":
            mixed, output, gate, up, down, inner = args[1], args[2], *args[5:9]
            self._rest(mixed.numel() // mixed.shape[-1], output, gate, up, down, inner)
        elif name == "slot_layer":
            self._slot_layer(args[0], result.numel() // result.shape[-1], args[4:9], args[17:19])
            self._rest(result.numel() // result.shape[-1], args[21], *args[24:28])
        elif name == "slot_layers":
            x, weights, head_norms, _, *outputs = args[:6]
            rows, each = x.numel() // x.shape[-1], 11 if head_norms else 9
            for first in range(0, len(weights), each):
                layer = weights[first : first + each]
                self._slot_layer(x, rows, (*layer[1:4], *outputs), args[12:14])
                output, _, gate, up, down = layer[-5:]
                self._rest(rows, output, gate, up, down, args[16])
        elif name == "tree_attention" or "scaled_dot_product" in name:
            self._attention(*args[:3])
        elif name == "linear":
            self._count(args[1], args[0].numel() * args[1].shape[0])
        elif name in ("mm", "addmm"):
            left, right = args[-2:]
            self._count(right, left.shape[0] * right.numel())
        return result

    def _slot_layer(self, x: Tensor, asking: int, products: Sequence[Any], seen_by: Sequence[Tensor]) -> None:
        """A layer over slots up to its attention, of whose rows so many ask."""
        (query, key, value, query_out, key_out), (lengths, visible) = products, seen_by
        self._product(x, key, key_out)
        self._product(x, value, key_out)
        self._count(query, asking * x.shape[-1] * query_out)
        seen = int(lengths.sum()) + lengths.numel() * visible.shape[2]
        self.cache_bytes += 2 * seen * key_out * x.element_size()
        self.operations += 4 * query_out * (asking // lengths.numel()) * seen

    def _product(self, x: Tensor, weight: Tensor, outputs: int) -> None:
        self._count(weight, x.numel() * outputs)

    def _rest(self, rows: int, output: Tensor, gate: Tensor, up: Tensor, down: Tensor, inner: int) -> None:
        hidden, width = gate.shape[1], output.shape[1]
        self._count(output, rows * width * hidden)
        self._count(gate, rows * hidden * inner)
        self._count(up, rows * hidden * inner)
        self._count(down, rows * inner * hidden)

    def _count(self, weight: Tensor, multiply_adds: int) -> None:
        self.weight_bytes += weight.numel() * weight.element_size()
        self.operations += 2 * multiply_adds

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.cache_bytes += sum(t.numel() * t.element_size() for t in (key, value))
        self.operations += 4 * query.numel() * key.shape[2]


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
        rows = measure(phases(target, drafter), ceilings)
    known = facts(dtype=found, prefix_tokens=_PREFIX_TOKENS, rounds=_ROUNDS)
    result = {"facts": known, "ceilings": asdict(ceilings), "rows": [asdict(one) for one in rows]}
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
    return "\n".join(lines)


def _seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
