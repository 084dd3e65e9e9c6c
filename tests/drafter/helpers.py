"""Tiny models and recorded conversations for the drafter's tests."""

from __future__ import annotations

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.drafter.config import DrafterConfig
from specblock.drafter.kinds import new_network
from specblock.drafter.network import DraftNetwork
from specblock.drafter.window import Window

VOCAB, HIDDEN = 64, 32
KINDS: dict[str, dict[str, object]] = {
    "specblock": {},
    "eagle3": {"kind": "eagle3", "num_slots": 1, "num_hidden_layers": 1},
    "parallel": {"kind": "parallel", "num_hidden_layers": 0},
}
"""What makes a tiny network one of each kind."""


def tiny_config(**changes: object) -> DrafterConfig:
    fields: dict[str, object] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "feature_layers": (0, 1, 2),
    }
    return DrafterConfig(**(fields | changes))  # type: ignore[arg-type]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> DraftNetwork:
    torch.manual_seed(seed)
    model = new_network(tiny_config(**changes), torch.randn(VOCAB, HIDDEN))
    return model.to(dtype).eval()


def random_window(
    seed: int, prompt_tokens: int = 5, generated: int = 20, temperature: float = 1.0, top_k: int = 8
) -> Window:
    generator = torch.Generator().manual_seed(seed)
    total = prompt_tokens + generated
    tokens = torch.randint(0, VOCAB, (total,), generator=generator, dtype=torch.int32)
    logits = torch.randn(generated, VOCAB, generator=generator)
    top = torch.log_softmax(logits, dim=-1).topk(top_k, dim=-1)
    return Window(
        conversation_id=f"c{seed}",
        domain="python" if seed % 2 else "cpp",
        time_s=float(seed),
        drafter_version="v0",
        heldout=False,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        features=torch.randn(total - 1, 3 * HIDDEN, generator=generator),
        top_ids=top.indices.to(torch.int32),
        top_log_probs=top.values.to(torch.float16),
        sampling=SamplingParams(temperature=temperature, seed=seed),
    )


def sampling_of(windows: list[Window]) -> SamplingBatch:
    return SamplingBatch.of([w.sampling for w in windows])


def noise_for(windows: list[Window], first: list[int], depth: int) -> NoiseWindow:
    noise = NoiseWindow(len(windows), depth + 1, VOCAB)
    noise.advance(
        list(range(len(windows))), first, [w.sampling.seed for w in windows], [w.sampling.choice for w in windows]
    )
    return noise
