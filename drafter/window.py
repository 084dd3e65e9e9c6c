"""Training windows: what one finished conversation leaves for learning and for exact replay. Never leaves memory.

Legend: P prompt tokens, G generated tokens, F fused feature size, k stored target log-probabilities per choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specblock.cuda_ext.sampling import SamplingParams
from specblock.drafter.token_bias import domain_key

TENSORS = ("tokens", "features", "top_ids", "top_log_probs")
"""The fields of a window that are tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Everything a drafter saw and should have predicted in one conversation.

    Attributes:
        conversation_id: unit of the train / held-out split.
        domain: traffic tag.
        time_s: when it finished.
        drafter_version: version that served it; empty if none did.
        heldout: decided at birth; held-out windows are only replayed, never trained on.
        tokens: int32 [P + G], x_0 .. x_{P+G-1}.
        prompt_tokens: P.
        features: [P + G - 1, F], h_0 .. h_{P+G-2} (the last token was never consumed).
        top_ids: int32 [G, k], most probable target tokens at each choice, descending.
        top_log_probs: float16 [G, k], their log-probabilities at temperature 1, before any processor.
        sampling: how the tokens were chosen.
        accepted: draft tokens accepted by each live cycle; a cycle cut by the end of the conversation is left out.
        plans: sizes of each live cycle's tree, ``DraftPlan.to_list``, the cut cycle included; empty: unknown.
        truncated: the conversation was longer; only its first tokens are kept.
    """

    conversation_id: str
    domain: str
    time_s: float
    drafter_version: str
    heldout: bool
    tokens: Tensor
    prompt_tokens: int
    features: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    sampling: SamplingParams
    accepted: tuple[int, ...] = ()
    plans: tuple[tuple[int, ...], ...] = ()
    truncated: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors: list[Tensor] = [getattr(self, name) for name in TENSORS]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def num_generated(self) -> int:
        """G."""
        return self.tokens.shape[0] - self.prompt_tokens

    def to(self, device: torch.device | str) -> Window:
        """The same window with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Padded windows. Position i pairs (h_i, x_{i+1}); label j is the target's law of x_{j+2}.

    features [B, T, F]; tokens int64 [B, T + 1]; label_ids int64 [B, T, k]; label_log_probs float32 [B, T, k];
    valid bool [B, T]: label j is a generated token's law; domains: ``domain_key`` of the B windows.
    """

    features: Tensor
    tokens: Tensor
    label_ids: Tensor
    label_log_probs: Tensor
    valid: Tensor
    domains: tuple[int, ...]


def collate(windows: Sequence[Window], device: torch.device | str = "cpu") -> TrainingBatch:
    """Right-pads windows into one batch, where the windows are; then it goes to ``device``."""
    longest = max(w.features.shape[0] for w in windows)
    batch, size, top_k = len(windows), windows[0].features.shape[1], windows[0].top_ids.shape[1]
    here = windows[0].features.device
    features = torch.zeros(batch, longest, size, dtype=windows[0].features.dtype, device=here)
    tokens = torch.zeros(batch, longest + 1, dtype=torch.int64, device=here)
    ids = torch.zeros(batch, longest, top_k, dtype=torch.int64, device=here)
    log_probs = torch.full((batch, longest, top_k), -torch.inf, device=here)
    valid = torch.zeros(batch, longest, dtype=torch.bool, device=here)
    for b, w in enumerate(windows):
        count = w.features.shape[0]
        features[b, :count] = w.features
        tokens[b, : count + 1] = w.tokens
        # Row g of the stored laws is the law of x_{P+g}, hence label j = P + g - 2.
        skip = max(0, 2 - w.prompt_tokens)
        first = w.prompt_tokens + skip - 2
        rows = w.top_ids.shape[0] - skip
        ids[b, first : first + rows] = w.top_ids[skip:]
        log_probs[b, first : first + rows] = w.top_log_probs[skip:].to(torch.float32)
        valid[b, first : first + rows] = True
    domains = tuple(domain_key(w.domain) for w in windows)
    features, tokens, ids, log_probs, valid = (t.to(device) for t in (features, tokens, ids, log_probs, valid))
    return TrainingBatch(features, tokens, ids, log_probs, valid, domains)
