#!/usr/bin/env python3
"""Times what a decode cycle does beside its forwards, at the sizes of an 8-billion-parameter Llama.

``rows`` is for gpu_check.py; alone, the script prints them. Times are by events around one call that finds the device
idle, so they contain launches. "In a graph" is a replay of the recorded call, without them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_common import Row, device_is_missing, import_from_checkout, middle

if TYPE_CHECKING:
    from torch import Tensor

    from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
    from specblock.cuda_ext.tree import Candidates, DraftTree

Call = Callable[[], Any]
WIDTH_K, WIDTH_W, LEAVES, ROWS, ACCEPTED, WINDOW = 8, 10, 16, 64, 4, 12
REPEATS = 25


@dataclass(frozen=True, slots=True)
class Size:
    """What the operations work on."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    capacity: int


LLAMA_8B, SMALL = Size(128256, 32, 8, 128, 512), Size(4096, 2, 2, 32, 128)


def timed(action: Call, device: str) -> tuple[float, float]:
    """Median and interquartile range in ms; three calls before do not count."""
    import torch

    times = []
    for index in range(REPEATS + 3):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            action()
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            action()
            elapsed = 1e3 * (time.perf_counter() - start)
        if index >= 3:
            times.append(elapsed)
    return middle(times)


def recorded(action: Call) -> Call:
    """A replay of ``action``, which must not wait for the device."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def compared(what: str, native: Call, reference: Call | None, device: str, graph: bool) -> Iterator[Row]:
    """The call, its replay, and the reference."""
    ms, spread = timed(native, device)
    reference_ms = timed(reference, device)[0] if reference else None
    yield {"what": what, "ms": ms, "iqr_ms": spread, "reference_ms": reference_ms}
    if graph and device == "cuda":
        ms, spread = timed(recorded(native), device)
        yield {"what": f"{what}, in a graph", "ms": ms, "iqr_ms": spread, "reference_ms": None}


def proposed(batch: int, size: Size, device: str) -> Callable[[], Candidates]:
    """Two blocks of a drafter's proposals, to be expanded into candidates."""
    import torch

    from specblock.drafter.expand import Leaves, concatenate, expand_chain
    from specblock.drafter.proposals import Proposals

    def proposals(leaves: int) -> Proposals:
        shape = (batch, leaves, WIDTH_K, WIDTH_W)
        log_prob = torch.randn(shape, device=device).mul(2).log_softmax(-1).sort(-1, descending=True).values
        token = torch.randint(0, size.vocab_size, shape, device=device)
        return Proposals(token, log_prob, torch.full(shape[:3], WIDTH_W, device=device))

    def leaves_at(node: Tensor, depth: Tensor, score: Tensor) -> Leaves:
        every, none = torch.ones_like(node, dtype=torch.bool), torch.zeros(*node.shape, 0, device=device)
        return Leaves(node, depth, node, score, every, none, none)

    zero = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    root, blocks = leaves_at(zero - 1, zero, zero.float()), (proposals(1), proposals(LEAVES))
    first = expand_chain(blocks[0], root, 0, 0)
    best = torch.topk(first.score, LEAVES, dim=1)
    leaves = leaves_at(best.indices, first.depth.gather(1, best.indices), best.values)
    second_offset = first.token.shape[1]

    def expand() -> Candidates:
        parts = [expand_chain(blocks[0], root, 0, 0), expand_chain(blocks[1], leaves, second_offset, 1)]
        return concatenate(parts)

    return expand


def agreeing_logits(tree: DraftTree, size: Size, device: str) -> Tensor:
    """bfloat16 [B, R, V] whose choices follow each tree for ``ACCEPTED`` drafts."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    logits = torch.randn(*tree.token.shape, size.vocab_size, dtype=dtype, device=device) * 3
    request = torch.arange(tree.token.shape[0], device=device)
    node = tree.depth.clamp(max=ACCEPTED).argmax(dim=1)
    for _ in range(ACCEPTED):
        above = tree.parent[request, node]
        logits[request, above, tree.token[request, node]] += 40.0 * (node > 0)
        node = above
    return logits


def of_batch(batch: int, size: Size, device: str) -> Iterator[Row]:
    """The operations for ``batch`` requests, and their sum."""
    import torch

    from specblock.cuda_ext.noise import NoiseWindow
    from specblock.cuda_ext.ops import commit_rows, commit_rows_vectorised, grow_tree, grow_tree_vectorised
    from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
    from specblock.verifier.accept import accept, accept_reference
    from specblock.verifier.history import ChoiceState

    name = f"B={batch}"
    expand, roots = proposed(batch, size, device), torch.zeros(batch, dtype=torch.int64, device=device)
    candidates, depth = expand(), 2 * WIDTH_K
    given = (roots, candidates, ROWS - 1, depth)
    yield from compared(f"expand two blocks, {name}", expand, None, device, True)
    yield from compared(
        f"grow tree, {name}, M={candidates.token.shape[1]}, R={ROWS}",
        lambda: grow_tree(*given),
        lambda: grow_tree_vectorised(*given),
        device,
        True,
    )
    tree = grow_tree(*given)[0]
    logits, slots = agreeing_logits(tree, size, device), list(range(batch))
    noise = NoiseWindow(batch, WINDOW, size.vocab_size, device)
    noise.advance(slots, [5] * batch, slots, [0] * batch)
    index = (torch.arange(batch)[:, None] * WINDOW + (5 + torch.arange(WINDOW)) % WINDOW).to(device)
    storage = noise.rows(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)).storage

    def walk(law: SamplingBatch) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.ops.specblock.accept_walk(logits, tree.token, tree.parent, storage, index, *law.law)
        return found[0], found[1], found[2]

    laws: dict[str, SamplingParams] = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature 1": SamplingParams(),
        "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
        "temperature 0.8, top-k 40, top-p 0.95": SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
    }
    for label, params in laws.items():
        states = [ChoiceState(params, [0], size.vocab_size) for _ in slots]
        law = SamplingBatch.of([params] * batch, device)
        to_accept = (logits, tree, states, noise, slots, [5] * batch, law)
        length = statistics.mean(len(path) for path in accept(*to_accept).paths)
        what = f"accept, {name}, {label}, {length:.1f} choices"
        yield from compared(
            what, lambda a=to_accept: accept(*a), lambda a=to_accept: accept_reference(*a), device, False
        )
        yield from compared(f"{what}, kernel alone", lambda law=law: walk(law), None, device, True)

    shape = (size.layers, batch, size.kv_heads, size.capacity, size.head_dim)
    caches = [torch.randn(shape, dtype=logits.dtype, device=device) for _ in range(2)]
    at, start = torch.arange(batch, device=device), torch.full((batch,), size.capacity // 2, device=device)
    path = walk(law)[1][:, : ACCEPTED + 1]

    def commit(one: Callable[[Tensor, Tensor, Tensor, Tensor], None], rows: Tensor) -> None:
        for cache in caches:
            one(cache, at, start, rows)

    yield from compared(
        f"commit keys and values, {name}, {size.layers} layers",
        lambda: commit(commit_rows, path),
        lambda: commit(commit_rows_vectorised, path),
        device,
        True,
    )

    for label, params in laws.items():
        law = SamplingBatch.of([params] * batch, device)

        def cycle(law: SamplingBatch = law) -> None:
            grown = grow_tree(roots, expand(), ROWS - 1, depth)[0]
            found = torch.ops.specblock.accept_walk(logits, grown.token, grown.parent, storage, index, *law.law)
            commit(commit_rows, found[1])

        yield from compared(f"tree build + accept + commit, {name}, {label}", cycle, None, device, True)


def rows(device: str) -> Iterator[Row]:
    """One row per operation and number of requests; nothing without the native library's kernels for ``device``."""
    import torch

    from specblock.cuda_ext.native import has_kernel

    if not has_kernel("accept_walk", torch.zeros(0, device=device)):
        return
    size, batches = (LLAMA_8B, (1, 4, 16)) if device == "cuda" else (SMALL, (1,))
    torch.manual_seed(0)
    with torch.inference_mode():
        yield from row_operations(size, device)
        for batch in batches:
            yield from of_batch(batch, size, device)


def row_operations(size: Size, device: str) -> Iterator[Row]:
    """Noise of five positions, and the best tokens of the slots of one block: of the root's and of sixteen leaves'."""
    import torch

    from specblock.cuda_ext.noise import NoiseRows, gumbel, philox_uniform
    from specblock.cuda_ext.ranking import best_tokens, ranked_reference
    from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams

    vocab_size = size.vocab_size
    vectors = torch.arange(15, device=device).view(3, 5).contiguous().unbind(0)
    yield from compared(
        f"uniform numbers, 5 positions, V={vocab_size}",
        lambda: torch.ops.specblock.philox_uniform(*vectors, vocab_size),
        lambda: philox_uniform(*vectors, vocab_size),
        device,
        True,
    )
    storage = gumbel(*vectors, vocab_size)
    for count in (WIDTH_K, LEAVES * WIDTH_K):
        logits = torch.randn(count, vocab_size, device=device) * 3
        noise = NoiseRows(storage, torch.arange(count, device=device) % len(storage))
        law = SamplingBatch.of([SamplingParams(temperature=0.8, top_p=0.95)] * count, device)
        given = (logits, noise, None, law, 1.4, WIDTH_W, 20)
        yield from compared(
            f"best tokens, {count} rows, V={vocab_size}",
            lambda given=given: best_tokens(*given),
            lambda given=given: ranked_reference(*given),
            device,
            True,
        )


def show(row: Row) -> str:
    """One line of the table."""
    reference = "" if row["reference_ms"] is None else f"   reference {row['reference_ms']:9.3f}"
    return f"{row['what']:<86}{row['ms']:9.4f} ms (interquartile range {row['iqr_ms']:.4f}){reference}"


def main() -> int:
    """Prints every row; 4 without a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if device_is_missing(options.device, "gpu-cycle"):
        return 4
    import_from_checkout()
    begin = time.perf_counter()
    for row in rows(options.device):
        print(show(row), flush=True)
    print(f"{time.perf_counter() - begin:.1f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
