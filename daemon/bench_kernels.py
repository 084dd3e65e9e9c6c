"""``specblockd bench kernels``: native operations against the references they replace, one thread, the demo's shapes.

Both sides take turns, so that a drift of the machine hits both. A matrix is never multiplied twice in a row: as in a
decode cycle, its weights have left the cache by the time it is used again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specblock.cuda_ext.attention import masked_attention, tree_attention
from specblock.cuda_ext.choice import choose, choose_reference
from specblock.cuda_ext.layer import AttentionWeights, RestWeights
from specblock.cuda_ext.linear import PackedWeight, pack, rounds_rows
from specblock.cuda_ext.native import native_available
from specblock.cuda_ext.noise import NoiseRows, NoiseWindow
from specblock.cuda_ext.norm import reference_norm, rms_norm
from specblock.cuda_ext.ops import commit_rows, commit_rows_vectorised, grow_tree, grow_tree_vectorised
from specblock.cuda_ext.ranking import best_tokens, ranked_reference
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.slot_layer import CacheRows, slot_layer, slot_layer_reference
from specblock.daemon.cost_profile import stand_in_tree
from specblock.daemon.facts import facts
from specblock.daemon.models import load_target
from specblock.drafter.expand import expand_chain, expand_vectorised, root_leaf
from specblock.drafter.precision import NumberFormat, number_format
from specblock.drafter.proposals import Proposals
from specblock.verifier.accept import accept, accept_reference
from specblock.verifier.history import ChoiceState
from specblock.verifier.model import TargetModel

_ROWS = (1, 2, 4, 8, 12, 16, 32, 64)
_PREFIX_TOKENS = (128, 512, 2048)
_LAYERS_PREFIX = 200
_ROUNDS = 31
_SLOTS, _FAN_OUT, _VOCABULARY = 4, 10, 4096
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_SIZE, _LAYERS = 512, 1408, 8, 4, 64, 12

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One operation at one size: medians with the middle half of the rounds, milliseconds."""

    operation: str
    size: str
    native_ms: float
    native_middle_ms: tuple[float, float]
    reference_ms: float
    reference_middle_ms: tuple[float, float]

    @property
    def speedup(self) -> float:
        """How many times quicker the native operation is."""
        return self.reference_ms / self.native_ms


def run(model: str, as_json: bool, say: Callable[[str], None]) -> int:
    """Measures and prints; 4 if there is nothing to measure."""
    if not native_available():
        say("the native operations were not built: nothing to compare")
        return 4
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [
            *_linear_rows(),
            *_attention_rows(),
            *_norm_rows(),
            *_layer_rows(),
            *_cycle_rows(),
            *_forward_rows(model, "float32"),
            *(_forward_rows(model, "bfloat16") if rounds_rows() else []),
        ]
    known = facts(dtype="float32", rounds=_ROUNDS)
    say(
        json.dumps({"facts": known, "rows": [asdict(row) for row in rows]}, indent=2) if as_json else table(known, rows)
    )
    return 0


def table(known: object, rows: list[KernelRow]) -> str:
    """The rows as text."""
    lines = [json.dumps(known), "", f"{'operation':<34}{'size':<22}{'native ms':>11}{'reference ms':>14}{'ratio':>8}"]
    lines += [
        f"{r.operation:<34}{r.size:<22}{r.native_ms:>11.3f}{r.reference_ms:>14.3f}{r.speedup:>8.2f}" for r in rows
    ]
    return "\n".join(lines)


def compare(operation: str, size: str, native: Call, reference: Call) -> KernelRow:
    """Times both, alternating, after three rounds that do not count."""
    seconds: dict[Call, list[float]] = {native: [], reference: []}
    for turn in range(_ROUNDS + 3):
        for call, found in seconds.items():
            begin = time.perf_counter()
            call()
            if turn >= 3:
                found.append(1e3 * (time.perf_counter() - begin))
    ours, theirs = (statistics.quantiles(found, n=4) for found in seconds.values())
    return KernelRow(operation, size, ours[1], (ours[0], ours[2]), theirs[1], (theirs[0], theirs[2]))


def _linear_rows() -> list[KernelRow]:
    """All matrices of a target the size of the demo's, once each, as a decode cycle does."""
    narrow, inner = (_HIDDEN, _HIDDEN), (_INNER, _HIDDEN)
    kv = (_KV_HEADS * _HEAD_SIZE, _HIDDEN)
    shapes = [narrow, kv, kv, narrow, inner, inner, (_HIDDEN, _INNER)] * _LAYERS
    weights = [torch.randn(shape).bfloat16().float() for shape in shapes]
    kinds = [("bfloat16 weights", weights, False), ("float32 weights", [w + 1e-4 for w in weights], False)]
    if rounds_rows():
        kinds.append(("and rows", weights, True))
    found = []
    for label, kept, coarse in kinds:
        packed = [pack(weight, coarse) for weight in kept]
        others = [weight.bfloat16() for weight in kept] if coarse else kept
        for rows in _ROWS:
            inputs = [torch.randn(rows, weight.shape[1]) for weight in kept]
            theirs = [x.to(weight.dtype) for x, weight in zip(inputs, others, strict=True)]
            found.append(
                compare(
                    f"{len(shapes)} linear maps, {label}",
                    f"{rows} rows",
                    lambda p=packed, i=inputs: [one(x) for one, x in zip(p, i, strict=True)],  # type: ignore[misc]
                    lambda k=others, i=theirs: [F.linear(x, w) for w, x in zip(k, i, strict=True)],  # type: ignore[misc]
                )
            )
    return found


def _attention_rows() -> list[KernelRow]:
    found = []
    for prefix in _PREFIX_TOKENS:
        for rows in (1, 8, 32):
            query = torch.randn(1, rows, _HEADS, _HEAD_SIZE).transpose(1, 2)
            key, value = torch.randn(2, 1, _KV_HEADS, prefix + rows, _HEAD_SIZE)
            mask = torch.ones(1, rows, prefix + rows, dtype=torch.bool)
            mask[:, :, prefix:] = torch.eye(rows, dtype=torch.bool)
            found.append(
                compare(
                    "tree attention",
                    f"{rows} rows, {prefix} prefix",
                    lambda q=query, k=key, v=value, m=mask: tree_attention(q, k, v, m),  # type: ignore[misc]
                    lambda q=query, k=key, v=value, m=mask: masked_attention(q, k, v, m, 0.125),  # type: ignore[misc]
                )
            )
    return found


def _norm_rows() -> list[KernelRow]:
    x, weight = torch.randn(8, _HIDDEN), torch.randn(_HIDDEN)
    return [
        compare("norm", "8 rows", lambda: rms_norm(x, weight, 1e-6), lambda: reference_norm(x, weight, 1e-6)),
    ]


def _cycle_rows() -> list[KernelRow]:
    """What a cycle does beside its forwards, for one request: rank a block's drafts, grow the tree, choose."""
    params = SamplingParams(temperature=1.0, top_p=0.95)
    window = NoiseWindow(1, _SLOTS, _VOCABULARY)
    window.advance([0], [0], [7], [0])
    slots, one = SamplingBatch.of([params] * _SLOTS), SamplingBatch.of([params])
    noise = window.rows(torch.zeros(_SLOTS, dtype=torch.int64), torch.arange(_SLOTS))
    first = NoiseRows(noise.storage, noise.index[:1])
    logits = torch.randn(_SLOTS, _VOCABULARY) * 3
    wanted = (1.4, _FAN_OUT, 20)
    best = best_tokens(logits, noise, None, slots, *wanted)
    shape = (1, 1, _SLOTS, _FAN_OUT)
    proposals = Proposals(best.index.view(shape), best.log_prob.view(shape), torch.full(shape[:-1], _FAN_OUT))
    leaf = root_leaf(torch.zeros(1, 1, _SLOTS, 8), torch.ones(1, dtype=torch.bool), _SLOTS)
    candidates = expand_chain(proposals, leaf, 0, 0)
    root = torch.zeros(1, dtype=torch.int64)
    of_block, size = f"{_SLOTS} slots, {_VOCABULARY} tokens", f"{_SLOTS * _FAN_OUT} candidates"
    return [
        compare("best drafts", of_block, lambda: best_tokens(logits, noise, None, slots, *wanted),
                lambda: ranked_reference(logits, noise, None, slots, *wanted)),
        compare("expansion", size, lambda: expand_chain(proposals, leaf, 0, 0),
                lambda: expand_vectorised(proposals, leaf, 0, 0)),
        compare("merge, prune, lay out", size, lambda: grow_tree(root, candidates, 8, _SLOTS),
                lambda: grow_tree_vectorised(root, candidates, 8, _SLOTS)),
        compare("the target's choice", f"1 row, {_VOCABULARY} tokens", lambda: choose(logits[:1], one, first),
                lambda: choose_reference(logits[:1], one, first)),
        *_acceptance_rows(),
    ]  # fmt: skip


def _acceptance_rows() -> list[KernelRow]:
    """What ends a cycle: walking a chain that the target agrees with half way, moving its rows behind the prefix."""
    depth = _SLOTS + 1
    tree = stand_in_tree(2 * _SLOTS, 1, torch.device("cpu"))
    logits = torch.randn(1, tree.num_rows, _VOCABULARY)
    for row in range(_SLOTS // 2):
        logits[0, row, int(tree.token[0, row + 1])] = 100.0
    window = NoiseWindow(1, 2 * _SLOTS + 1, _VOCABULARY)
    window.advance([0], [0], [7], [0])
    params = SamplingParams(temperature=1.0, top_p=0.95)
    given = (tree, [ChoiceState(params, [], _VOCABULARY)], window, [0], [0], SamplingBatch.of([params]))
    storage = torch.zeros(_LAYERS, 1, _KV_HEADS, 512, _HEAD_SIZE)
    moved = (torch.zeros(1, dtype=torch.int64), torch.tensor([200]), torch.tensor([[0, *range(2, depth)]]))
    return [
        compare("acceptance walk", f"{tree.num_rows} rows, {_VOCABULARY} tokens", lambda: accept(logits, *given),
                lambda: accept_reference(logits, *given)),
        compare("KV commit", f"{depth - 1} rows, {_LAYERS} layers", lambda: commit_rows(storage, *moved),
                lambda: commit_rows_vectorised(storage, *moved)),
    ]  # fmt: skip


def _layer_rows() -> list[KernelRow]:
    """All layers over a cache, in one call each and of their parts."""
    width, kv = _HEADS * _HEAD_SIZE, _KV_HEADS * _HEAD_SIZE

    def packed(outputs: int, inputs: int) -> PackedWeight:
        return pack(torch.randn(outputs, inputs).bfloat16().float())

    layers = [
        (
            AttentionWeights(norm=torch.ones(_HIDDEN), eps=1e-6, query=packed(width, _HIDDEN), key=packed(kv, _HIDDEN),
                             value=packed(kv, _HIDDEN)),
            RestWeights(output=packed(_HIDDEN, width), norm=torch.ones(_HIDDEN), eps=1e-6, gate=packed(_INNER, _HIDDEN),
                        up=packed(_INNER, _HIDDEN), down=packed(_HIDDEN, _INNER)),
        )
        for _ in range(_LAYERS)
    ]  # fmt: skip

    keys, values = torch.randn(2, _LAYERS, 1, _KV_HEADS, _LAYERS_PREFIX + max(_ROWS), _HEAD_SIZE)
    slots, lengths = torch.tensor([0]), torch.tensor([_LAYERS_PREFIX])

    def through(x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, layer: Any) -> None:
        for (before, after), key, value in zip(layers, keys, values, strict=True):
            x = layer(x, before, after, rotary, CacheRows(key, value, slots, lengths, visible))

    found = []
    for count in _ROWS:
        x, angle = torch.randn(1, count, _HIDDEN), torch.randn(1, count, _HEAD_SIZE)
        given = (x, (angle.cos(), angle.sin()), torch.ones(1, count, count, dtype=torch.bool).tril())
        found.append(
            compare(
                f"{_LAYERS} layers",
                f"{count} rows, {_LAYERS_PREFIX} prefix",
                partial(through, *given, slot_layer),
                partial(through, *given, slot_layer_reference),
            )
        )
    return found


def _forward_rows(model: str, name: str) -> list[KernelRow]:
    """The target's whole forward behind 200 tokens, against the same model with transformers' own layers."""
    theirs = NumberFormat(getattr(torch, name))
    pair = [load_target(model, number_format(name, "cpu"), "cpu"), load_target(model, theirs, "cpu", native=False)]
    caches = [target.new_cache(1, 512) for target in pair]
    for target, cache in zip(pair, caches, strict=True):
        target.prefill(cache, cache.allocate(), list(range(_LAYERS_PREFIX)))

    def forward(which: int, rows: int) -> Call:
        target: TargetModel = pair[which]
        return lambda: target.forward(caches[which], [0], torch.arange(rows)[None])

    return [
        compare(f"target forward, {name}", f"{rows} rows, {_LAYERS_PREFIX} prefix", forward(0, rows), forward(1, rows))
        for rows in _ROWS
    ]
