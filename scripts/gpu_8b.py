#!/usr/bin/env python3
"""What decoding costs at the shape of Llama-3.1-8B, random weights in bfloat16: forwards, drafting, cycles, a swap.

Needs torch, transformers, numpy and safetensors, no checkpoint and no disk. Prints one JSON object per row.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gpu_common import Row, device_is_missing, import_from_checkout, middle

if TYPE_CHECKING:
    from specblock.daemon.engine import Engine
    from specblock.drafter.draft import BlockDrafter
    from specblock.verifier.kv_cache import TargetCache
    from specblock.verifier.model import TargetModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A target, the drafters published for it, and what is measured of them."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256
    draft_vocab: int = 32000
    prefixes: tuple[int, ...] = (512, 4096, 16384)
    batches: tuple[int, ...] = (1, 4, 16)
    rows: tuple[int, ...] = (1, 16, 64)
    prompt: int = 512
    cycles: int = 12
    repeats: int = 6
    copied_bytes: int = 1 << 31
    dtype: str = "bfloat16"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (2 if self.dtype == "bfloat16" else 4)


LLAMA_8B = Shape()
TINY = Shape(
    hidden=64, inner=96, layers=4, heads=4, kv_heads=2, head_dim=16, vocab=512, draft_vocab=256, prefixes=(8, 40),
    batches=(1, 2), rows=(1, 8), prompt=12, cycles=2, repeats=2, copied_bytes=1 << 20, dtype="float32",
)  # fmt: skip
DRAFTERS = ("specblock", "eagle3")


class Timer:
    """Times on one device: by the clock, waiting for the device, and between events on it."""

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda, self._repeats = device == "cuda", repeats

    def wait(self) -> float:
        """Seconds by the clock once the device is idle."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def of(self, action: Callable[[], Any], warm_up: int = 3) -> dict[str, float]:
        """``ms``, ``iqr_ms`` and, on a GPU, ``device_ms``: medians over the repeats."""
        import torch

        wall, device = [], []
        for index in range(self._repeats + warm_up):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
            begin = self.wait()
            for event in events[:1]:
                event.record()
            action()
            for event in events[1:]:
                event.record()
            end = self.wait()
            if index >= warm_up:
                wall.append(1e3 * (end - begin))
                device.extend([events[0].elapsed_time(events[1])] if events else [])
        return spread(wall) | ({"device_ms": statistics.median(device)} if device else {})


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    median, quarters = middle(times_ms)
    return {"ms": median, "iqr_ms": quarters}


def build_model(shape: Shape, device: str) -> Any:
    """transformers' model of the target, its weights drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=131072, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return on(shape, device, lambda: LlamaForCausalLM(config))


def build_drafter(shape: Shape, kind: str, target: TargetModel, device: str) -> BlockDrafter:
    """A drafter of the published shape, tree and draft vocabulary, with random weights.

    Both refresh as the method intends: what the published code does instead costs time that says nothing of the method.
    """
    import torch

    from specblock.drafter.config import DrafterConfig, published_settings
    from specblock.drafter.draft import BlockDrafter
    from specblock.drafter.kinds import new_network

    eagle = kind == "eagle3"
    config = DrafterConfig(
        kind=kind, num_slots=1 if eagle else 4, num_hidden_layers=1 if eagle else 2, hidden_size=shape.hidden,
        intermediate_size=shape.inner, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, vocab_size=shape.vocab, draft_vocab_size=shape.draft_vocab,
        feature_layers=target.feature_layers,
    )  # fmt: skip
    network = on(shape, device, lambda: new_network(config, target.embedding)).eval().requires_grad_(False)
    step = shape.vocab // shape.draft_vocab
    network.set_vocabulary(torch.arange(shape.draft_vocab, device=device) * step)
    return BlockDrafter(network, replace(published_settings(kind), published_refresh=False))


def on(shape: Shape, device: str, build: Callable[[], Any]) -> Any:
    """What ``build`` makes, made on the device in the shape's number format."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            return build()
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second: read and written by a copy, read by a sum."""

    copied: float
    read: float

    @property
    def floor(self) -> float:
        """What the floors are computed with: the better one, though a forward only reads."""
        return max(self.copied, self.read)


def bandwidth(shape: Shape, device: str, timer: Timer) -> Bandwidth:
    """What the memory gives."""
    import torch

    source = torch.zeros(shape.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    found = [timer.of(action) for action in (lambda: target.copy_(source), lambda: words.sum())]
    copied, read = (shape.copied_bytes / (1e-3 * times.get("device_ms", times["ms"])) for times in found)
    return Bandwidth(2 * copied, read)


def set_graphs(on: bool, *models: TargetModel | BlockDrafter | None) -> None:
    """Lets the forwards of decode cycles run as graphs or not, where there are any."""
    for model in models:
        if model is not None and model.by_slot is not None:
            model.by_slot.graphs = on


def forward_rows(shape: Shape, target: TargetModel, timer: Timer, bytes_per_s: float, what: str) -> Iterator[Row]:
    """Verification forwards by rows, batch and prefix, against the time that reading weights and keys takes.

    Without graphs only where there is least to do: that is what the host takes.
    """
    weights = sum(p.numel() * p.element_size() for p in target.transformers_model.parameters())
    weights -= target.embedding.numel() * target.embedding.element_size()  # a lookup, not a product
    capacity = max(shape.prefixes) + max(shape.rows)
    slots = max(shape.batches)
    while slots > 1 and not fits(target.device.type, slots * (capacity + 96) * shape.kv_bytes_per_token):
        slots //= 2
    cache = target.new_cache(slots, capacity)
    target.use_graphs(cache)
    cache.keys.normal_(), cache.values.normal_()  # zeros would draw less power than real keys do
    for prefix in shape.prefixes:
        for batch in (b for b in shape.batches if b <= slots):
            floor_ms = 1e3 * (weights + batch * prefix * shape.kv_bytes_per_token) / bytes_per_s
            for count in shape.rows:
                least = (prefix, batch) == (shape.prefixes[0], shape.batches[0])
                for graphs in ((False, True) if least else (True,)) if timer.cuda else (False,):
                    set_graphs(graphs, target)
                    call = verify_call(target, cache, batch, count, prefix)
                    found = timer.of(call)
                    how = "graph" if graphs else "eager"
                    yield {
                        "what": f"8B {what}, {count} rows, batch {batch}, prefix {prefix}, {how}", **found,
                        "rows": count, "batch": batch, "prefix": prefix, "graphs": graphs, "fused": target.fused,
                        "floor_ms": floor_ms, "over_floor": found["ms"] / floor_ms,
                    }  # fmt: skip
    yield {
        "what": f"8B graphs: {what}", "recorded": target.num_graphs, "failed": target.num_graph_failures,
        "by_slot": target.by_slot is not None, "fused": target.fused,
    }  # fmt: skip


def transformers_rows(shape: Shape, model: Any, timer: Timer, bytes_per_s: float) -> Iterator[Row]:
    """Forwards through transformers' own layers, for comparison: fewest and most rows, one request."""
    from specblock.verifier.model import TargetModel

    target = TargetModel.from_model(model, native=False)
    few = replace(shape, prefixes=shape.prefixes[:1], batches=(1,), rows=(shape.rows[0], shape.rows[-1]))
    yield from forward_rows(few, target, timer, bytes_per_s, "forward of transformers' layers")


def verify_call(target: TargetModel, cache: TargetCache, batch: int, count: int, prefix: int) -> Callable[[], Any]:
    """A forward over trees of so many rows, chains of depth 8, behind a prefix that is only claimed to be there."""
    from specblock.cuda_ext.ops import ancestor_mask
    from specblock.daemon.cost_profile import stand_in_tree

    slots = list(range(batch))
    tree = stand_in_tree(count, batch, target.device)
    mask = ancestor_mask(tree, 8)
    for slot in slots:
        cache.truncate(slot, 0)
    cache.advance(slots, [prefix] * batch)
    return lambda: target.forward(cache, slots, tree.token, tree_mask=mask, depth=tree.depth)


def fits(device: str, num_bytes: int) -> bool:
    """Whether a GPU has so much memory left, and some for everything else."""
    import torch

    return device != "cuda" or torch.cuda.mem_get_info()[0] > num_bytes + (4 << 30)


def drafting_rows(shape: Shape, drafters: dict[str, BlockDrafter], timer: Timer, bytes_per_s: float) -> Iterator[Row]:
    """Drafting of one cycle: two new positions in, the published tree out."""
    import torch

    from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
    from specblock.drafter.interface import NewPositions
    from specblock.drafter.weight_bytes import weight_bytes_per_cycle

    most = max(shape.batches[:2])
    for name, drafter in drafters.items():
        cache = drafter.new_cache(most, max(shape.prefixes[:2]) + 4)
        drafter.use_graphs(cache)
        cache.keys.normal_(), cache.values.normal_()
        features = torch.randn(most, 2, 3 * shape.hidden, dtype=drafter.dtype, device=drafter.device)
        tokens = torch.zeros(most, 2, dtype=torch.int64, device=drafter.device)
        floor_ms = 1e3 * weight_bytes_per_cycle(drafter.model, drafter.num_blocks) / bytes_per_s
        for batch in shape.batches[:2]:
            new = NewPositions(features[:batch], tokens[:batch], [2] * batch)
            sampling = SamplingBatch.of([SamplingParams(temperature=0.0)] * batch, drafter.device)
            for prefix in shape.prefixes[:2]:

                def draft(
                    drafter: BlockDrafter = drafter, cache: Any = cache, new: NewPositions = new,
                    sampling: SamplingBatch = sampling, prefix: int = prefix,
                ) -> None:  # fmt: skip
                    slots = list(range(new.tokens.shape[0]))
                    for slot in slots:
                        cache.reset(slot)
                        cache.advance(slot, prefix)
                    drafter.draft(cache, slots, new, new.tokens[:, 1], sampling, None)

                for graphs in (False, True) if timer.cuda else (False,):
                    set_graphs(graphs, drafter)
                    found = timer.of(draft)
                    how = "graphs" if graphs else "eager"
                    yield {
                        "what": f"8B drafting, {name}, batch {batch}, prefix {prefix}, {how}", **found,
                        "drafter": name, "forwards": drafter.num_blocks, "nodes": drafter.settings.node_budget,
                        "batch": batch, "prefix": prefix, "graphs": graphs, "floor_ms": floor_ms,
                        "over_floor": found["ms"] / floor_ms,
                    }  # fmt: skip
        if drafter.by_slot is not None:
            counts = {"recorded": drafter.by_slot.num_graphs, "failed": drafter.by_slot.num_failures}
            yield {"what": f"8B graphs of {name}", **counts}


class Clock:
    """Seconds; while ``waits``, only once the device is idle."""

    def __init__(self, timer: Timer) -> None:
        self.waits, self._timer = False, timer

    def __call__(self) -> float:
        """Seconds."""
        return self._timer.wait() if self.waits else time.perf_counter()


def engine_of(
    shape: Shape, target: TargetModel, drafter: BlockDrafter | None, batch: int, clock: Clock, temperature: float
) -> Engine:
    """An engine past the prompts of ``batch`` requests, some cycles warm."""
    import torch

    from specblock.cuda_ext.sampling import SamplingParams
    from specblock.daemon.engine import Engine, EngineSettings
    from specblock.daemon.messages import GenerationRequest

    most = 9 * (4 * shape.cycles + 8)  # tokens that so many cycles can commit
    settings = EngineSettings(slots=batch, capacity_tokens=shape.prompt + most)
    engine = Engine(target, drafter, settings, clock, drafter_version="a")
    engine.use_graphs(ahead=False)
    for index in range(batch):
        prompt = torch.randint(0, shape.vocab, (shape.prompt,), generator=torch.Generator().manual_seed(index)).tolist()
        engine.submit(
            GenerationRequest(
                request_id=str(index),
                prompt_tokens=tuple(prompt),
                sampling=SamplingParams(temperature=temperature, top_p=0.95 if temperature else 1.0, seed=index),
                max_tokens=most,
                ignore_eos=True,
                collect=False,
            )
        )
    while not engine.running or not all(state.prefill_done for state in engine.running):
        engine.step()
    for _ in range(3):
        engine.step()
    return engine


def cycle_rows(shape: Shape, target: TargetModel, drafters: dict[str, BlockDrafter], timer: Timer) -> Iterator[Row]:
    """Whole cycles of the engine: by the clock, and (in others, which wait between) what each part takes."""
    for temperature in (0.0, 1.0):
        for batch in shape.batches[:2]:
            for name, drafter in {"plain": None, **drafters}.items():
                for graphs in (False, True) if timer.cuda and temperature == 0.0 else (timer.cuda,):
                    set_graphs(graphs, target, drafter)
                    how = "graphs" if graphs else "eager"
                    yield {
                        "what": f"8B cycle, {name}, batch {batch}, T {temperature}, {how}", "batch": batch,
                        "temperature": temperature, "graphs": graphs, "drafter": name,
                        **cycle_times(shape, target, drafter, batch, timer, temperature),
                    }  # fmt: skip
                    gc.collect()  # engines hold their caches in circles


def cycle_times(
    shape: Shape, target: TargetModel, drafter: BlockDrafter | None, batch: int, timer: Timer, temperature: float
) -> dict[str, float]:
    """Milliseconds of a cycle and of its parts, and the tokens that one request gets from a cycle."""
    clock = Clock(timer)
    engine = engine_of(shape, target, drafter, batch, clock, temperature)
    times = [step_ms(engine, timer) for _ in range(shape.cycles)]
    clock.waits = True
    before = spent(engine)
    for _ in range(shape.cycles):
        engine.step()
    parts = [1e3 * (b - a) / shape.cycles for a, b in zip(before, spent(engine), strict=True)]
    clock.waits = False
    waits = waits_of(engine.step, timer)
    done = [state.total for state in engine.running]
    tokens = sum(t.committed for t in done) / sum(t.cycles for t in done)
    found = dict(zip(("draft_ms", "verify_ms", "commit_ms"), parts, strict=True))
    graphs = all_graphs(target, drafter)
    return spread(times) | found | {"tokens": tokens, "waits": waits, "recorded": graphs[0], "failed": graphs[1]}


def waits_of(action: Callable[[], Any], timer: Timer) -> int:
    """How many operations of ``action`` make the host wait for the device."""
    import torch

    if not timer.cuda:
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def step_ms(engine: Engine, timer: Timer) -> float:
    """One cycle, until the device is idle."""
    begin = timer.wait()
    engine.step()
    return 1e3 * (timer.wait() - begin)


def spent(engine: Engine) -> list[float]:
    """Seconds of drafting, verification and the rest so far."""
    totals = [(s.total.draft_s, s.total.verify_s, s.total.other_s) for s in engine.running]
    return [sum(column) for column in zip(*totals, strict=True)]


def swap_rows(shape: Shape, target: TargetModel, drafter: BlockDrafter, timer: Timer) -> Iterator[Row]:
    """Swaps of all drafter weights, given on the host, while four requests decode."""
    from specblock.daemon.engine_host import EngineHost
    from specblock.daemon.windows import WindowLimits, WindowStore

    set_graphs(timer.cuda, target, drafter)
    engine = engine_of(shape, target, drafter, shape.batches[1], Clock(timer), 0.0)
    begin = timer.wait()
    engine.use_graphs()
    yield {"what": "8B graphs of an engine recorded", "seconds": timer.wait() - begin, "graphs": target.num_graphs}
    cycle_ms = statistics.median(step_ms(engine, timer) for _ in range(shape.cycles))
    graphs = all_graphs(target, drafter)
    weights = {name: value.cpu().clone() for name, value in drafter.model.state_dict().items()}
    places = {name: value.data_ptr() for name, value in drafter.model.state_dict().items()}
    host = EngineHost(engine, WindowStore(WindowLimits(budget_bytes=10**6), time.time), 0.0, 4)
    try:
        stalls = []
        for index in range(3):
            stalls.append(1e3 * host.swap(f"v{index}", weights, timeout_s=30.0).stall_s)
        still_decoding = len(engine.running)
    finally:
        host.close()
    moved = sum(value.data_ptr() != places[name] for name, value in drafter.model.state_dict().items())
    yield {
        "what": "8B swap of the drafter under load, stall", **spread(stalls), "cycle_ms": cycle_ms,
        "running": still_decoding, "graphs_before": graphs, "graphs_after": all_graphs(target, drafter),
        "tensors_moved": moved,
    }  # fmt: skip


def all_graphs(target: TargetModel, drafter: BlockDrafter | None) -> tuple[int, int]:
    """Graphs of both models, and how many could not be recorded."""
    if drafter is None or drafter.by_slot is None:
        return target.num_graphs, target.num_graph_failures
    blocks = drafter.by_slot
    return target.num_graphs + blocks.num_graphs, target.num_graph_failures + blocks.num_failures


def part_rows(part: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of one part, and how long it took."""
    begin = time.perf_counter()
    try:
        yield from part()
    except Exception as error:  # the other figures are worth having
        yield {"what": "8B part failed", "error": f"{type(error).__name__}: {error}"[:500]}
    gc.collect()
    yield {"what": "8B part took", "seconds": time.perf_counter() - begin}


def rows(device: str, shape: Shape = LLAMA_8B) -> Iterator[Row]:
    """All measurements; a part that breaks becomes a row that says why, and the others go on."""
    import torch

    from specblock.verifier.model import TargetModel

    timer = Timer(device, shape.repeats)
    found = bandwidth(shape, device, timer)
    yield {
        "what": "8B bandwidth of the memory: read and written by a copy, read by a sum, and what the floors use",
        "copy_gb_per_s": found.copied / 1e9, "read_gb_per_s": found.read / 1e9, "floor_gb_per_s": found.floor / 1e9,
    }  # fmt: skip
    begin = timer.wait()
    model = build_model(shape, device)
    yield {"what": "8B model built", "seconds": timer.wait() - begin}
    bytes_per_s = found.floor
    yield from part_rows(lambda: transformers_rows(shape, model, timer, bytes_per_s))
    begin = timer.wait()
    target = TargetModel.from_model(model, native=True)
    drafters = {kind: build_drafter(shape, kind, target, device) for kind in DRAFTERS}
    yield {"what": "8B target and drafters built", "seconds": timer.wait() - begin, "fused": target.fused}
    gc.collect()
    gc.freeze()  # recording collects garbage each time: what was imported is none
    yield from part_rows(lambda: forward_rows(shape, target, timer, bytes_per_s, "forward"))
    yield from part_rows(lambda: drafting_rows(shape, drafters, timer, bytes_per_s))
    yield from part_rows(lambda: cycle_rows(shape, target, drafters, timer))
    yield from part_rows(lambda: swap_rows(shape, target, drafters["specblock"], timer))
    if timer.cuda:
        yield {"what": "8B peak memory", "gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> int:
    """Prints every row as it is measured; 4 without a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    options = parser.parse_args()
    if device_is_missing(options.device, "gpu-8b"):
        return 4
    import_from_checkout()
    failed = False
    for row in rows(options.device, TINY if options.tiny else LLAMA_8B):
        print(json.dumps(row), flush=True)
        failed |= "error" in row
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
