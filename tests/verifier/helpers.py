"""Tiny targets and a decode loop without an engine.

Legend: B requests under way, D tree depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import build_tree
from specblock.cuda_ext.sampling import SamplingParams
from specblock.cuda_ext.tree import DraftTree, root_only
from specblock.verifier.finish import truncate_at_end
from specblock.verifier.history import ChoiceState
from specblock.verifier.kv_cache import TargetCache
from specblock.verifier.model import TargetModel
from specblock.verifier.verify import verify
from tests.random_trees import random_candidates

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def tiny_hf_model(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model with grouped heads and distributions that are neither flat nor peaked."""
    config_class, model_class = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return model_class(config_class(**(settings | changes))).to(dtype)


def tiny_target(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> TargetModel:
    return TargetModel.from_model(tiny_hf_model(family, dtype, **changes))


@dataclass(frozen=True, slots=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams


TreeMaker = Callable[[list[int], Tensor, list[int]], tuple[DraftTree, int]]
"""(request numbers [B], root tokens [B], tokens produced so far [B]) -> trees and their largest depth."""


def plain(_members: list[int], roots: Tensor, _done: list[int]) -> tuple[DraftTree, int]:
    return root_only(roots), 0


def random_trees(
    seed: int,
    vocab_size: int,
    *,
    num_raw: int = 10,
    depth: int = 5,
    budget: int = 8,
    truth: Sequence[Sequence[int]] | None = None,
    hit_rate: float = 0.7,
) -> TreeMaker:
    """Trees of arbitrary tokens; with ``truth`` (the plain continuation) they are partly right, so paths get deep."""
    generator = torch.Generator().manual_seed(seed)

    def make(members: list[int], roots: Tensor, done: list[int]) -> tuple[DraftTree, int]:
        known: Tensor | None = None
        if truth is not None:
            ahead = [list(truth[m][d : d + depth]) for m, d in zip(members, done, strict=True)]
            known = torch.tensor([row + [0] * (depth - len(row)) for row in ahead])
        candidates = random_candidates(generator, len(members), num_raw, vocab_size, depth, known, hit_rate)
        return build_tree(roots, candidates, budget, depth), depth

    return make


@dataclass(frozen=True, slots=True)
class Decoded:
    tokens: list[list[int]]
    accepted_drafts: int
    cycles: int


def prefill_all(model: TargetModel, cache: TargetCache, requests: Sequence[Request]) -> list[int]:
    """All prompts but their last token, in one padded forward; returns the slots."""
    slots = [cache.allocate() for _ in requests]
    lengths = [len(request.prompt) - 1 for request in requests]
    if max(lengths) > 0:
        padded = [[*r.prompt[:-1], *[0] * (max(lengths) - n)] for r, n in zip(requests, lengths, strict=True)]
        none = torch.zeros(len(slots), 0, dtype=torch.int64)
        model.forward(cache, slots, torch.tensor(padded), logits_rows=none)
        cache.advance(slots, lengths)
    return slots


def decode(
    model: TargetModel,
    requests: Sequence[Request],
    num_tokens: int,
    trees: TreeMaker = plain,
    *,
    max_rows: int = 12,
) -> Decoded:
    """Decodes ``num_tokens`` tokens of every request, all in one batch that thins out as requests finish."""
    cache = model.new_cache(len(requests), max(len(r.prompt) for r in requests) + num_tokens + max_rows)
    noise = NoiseWindow(len(requests), 8, model.vocab_size)
    slots = prefill_all(model, cache, requests)
    states = [ChoiceState(r.params, r.prompt, model.vocab_size) for r in requests]
    out: list[list[int]] = [[] for _ in requests]
    roots = [request.prompt[-1] for request in requests]
    accepted = cycles = 0
    active = list(range(len(requests)))
    while active:
        tree, depth = trees(active, torch.tensor([roots[b] for b in active]), [len(out[b]) for b in active])
        result = verify(
            model,
            cache,
            [slots[b] for b in active],
            tree,
            depth,
            states=[states[b] for b in active],
            noise=noise,
            top_k=0,
        )
        counts = []
        for b, path in zip(active, result.paths, strict=True):
            kept = path[: truncate_at_end(path, tokens_left=num_tokens - len(out[b])).num_kept]
            counts.append(len(kept))
            out[b].extend(kept)
            states[b].append(kept)
            roots[b] = kept[-1]
        cache.commit([slots[b] for b in active], result.rows, counts)
        accepted += sum(result.num_accepted)
        cycles += len(active)
        active = [b for b in active if len(out[b]) < num_tokens]
    return Decoded(out, accepted, cycles)


def random_params(generator: torch.Generator, vocab_size: int) -> SamplingParams:
    """Any mixture of greedy, filters, penalties and biases."""
    u = torch.rand(12, generator=generator).tolist()
    biased = torch.randperm(vocab_size, generator=generator)[:3].tolist()
    return SamplingParams(
        temperature=0.0 if u[0] < 0.25 else 0.3 + 1.2 * u[1],
        top_p=1.0 if u[2] < 0.4 else 0.4 + 0.6 * u[3],
        top_k=0 if u[4] < 0.5 else 2 + int(u[5] * 40),
        min_p=0.0 if u[6] < 0.7 else 0.2 * u[7],
        repetition_penalty=1.0 if u[8] < 0.6 else 0.8 + u[9],
        presence_penalty=0.0 if u[10] < 0.6 else 2 * u[11] - 0.5,
        frequency_penalty=0.0 if u[9] < 0.6 else 1.5 * u[8] - 0.3,
        logit_bias=tuple((token, 4 * u[1] - 1) for token in biased) if u[7] < 0.3 else (),
        seed=int(u[5] * 2**53) - 2**52,
        choice=int(u[3] * 4),
    )


def random_requests(seed: int, count: int, vocab_size: int, longest_prompt: int = 12) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for _ in range(count):
        length = int(torch.randint(1, longest_prompt + 1, (1,), generator=generator))
        prompt = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        requests.append(Request(tuple(prompt), random_params(generator, vocab_size)))
    return requests
