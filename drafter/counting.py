"""An update without gradients: how often the target says each token, against how often the drafter expects it.

After a change of traffic much of what a drafter gets wrong is which tokens are common at all. One forward over
recorded conversations counts both sides, and the logarithm of their ratio, added to the head's logits, evens them out:
one step of iterative proportional fitting towards the target's unigram, for each kind of text by itself. It costs a
forward, no backward, and swaps in place.

Legend: B batch, T positions, K slots, Vd draft vocabulary.
Source: design section 6.2 (statistics); Deming and Stephan 1940 for proportional fitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specblock.drafter.batches import batches
from specblock.drafter.labels import BlockLabels, labelled_positions, slot_weights
from specblock.drafter.loss import train_blocks
from specblock.drafter.network import DraftNetwork
from specblock.drafter.window import TrainingBatch, Window, collate

TOKEN_BIAS = "token_bias.*"
_SMOOTHING = 2.0  # expected occurrences added to both sides: a token hardly seen keeps its logit


class TokenBiasRun:
    """Counts batch by batch; after every step the model carries the bias that all batches so far suggest.

    Every conversation counts once, however often it comes: repeated it would look like evidence that is not there.
    Has the face of ``TrainRun`` that an update needs.

    Args:
        model: its ``token_bias`` moves, nothing else.
        batch_windows: windows per step.
        share: how much of the counted difference is taken over, above 0 and at most 1.
        seed: order of the windows.
    """

    rehearses = False

    def __init__(self, model: DraftNetwork, batch_windows: int, share: float, seed: int = 0) -> None:
        """Raises:
        ValueError: share out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"{TOKEN_BIAS}: learning_rate is the share that is taken over, above 0 and at most 1")
        self.model = model
        self.done = 0
        self.positions = 0
        self._batch_windows, self._share, self._seed = batch_windows, share, seed
        self._counts: dict[int, _Counts] = {}
        self._seen: set[str] = set()

    def batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Endless batches from step ``done`` on."""
        return batches(windows, self._batch_windows, self._seed, self.done)

    @torch.no_grad()
    def step(self, windows: Sequence[Window]) -> None:
        """Counts one batch of windows and moves the bias of their domains."""
        self.done += 1
        fresh = list({w.conversation_id: w for w in windows if w.conversation_id not in self._seen}.values())
        if not fresh:
            return
        self._seen.update(window.conversation_id for window in fresh)
        batch = collate(fresh, self.model.norm.weight.device)
        for key in dict.fromkeys(batch.domains):
            if key not in self._counts:
                self._counts[key] = _Counts(self.model.token_bias.table[self.model.token_bias.row(key)].float())
        start_BV = torch.stack([self._counts[key].start for key in batch.domains])
        target_BV, draft_BV = expected_counts(self.model, batch, start_BV)
        for key, target, draft in zip(batch.domains, target_BV, draft_BV, strict=True):
            self._counts[key].add(target, draft)
        for key in dict.fromkeys(batch.domains):
            counts, bias = self._counts[key], self.model.token_bias
            bias.table[bias.row(key)] = counts.start + self._share * counts.log_ratio()
        self.positions += int(batch.valid.sum())


class _Counts:
    """Expected occurrences of one domain's tokens on both sides, float32 [Vd], under the bias ``start``."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.clone()
        self._target, self._draft = torch.zeros_like(start), torch.zeros_like(start)

    def add(self, target: Tensor, draft: Tensor) -> None:
        self._target += target
        self._draft += draft

    def log_ratio(self) -> Tensor:
        return torch.log((self._target + _SMOOTHING) / (self._draft + _SMOOTHING))


def expected_counts(model: DraftNetwork, batch: TrainingBatch, bias_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Expected occurrences of every draft token over the labelled slots of block 1, float32 [B, Vd] each.

    A slot counts as far as it is reached: with the probability that those before it are accepted. That is how training
    weighs slots, so text that a drafter was trained on asks for no bias.

    Args:
        model: the drafter.
        batch: windows with the target's most probable tokens.
        bias_BV: float32, what is added to the head's logits, whatever the model carries.

    Returns:
        By the target's laws (as training has them: over the draft vocabulary), by the drafter's.
    """
    wanted = labelled_positions(batch.valid)
    hidden, draft_ids = train_blocks(model, batch, [], wanted=wanted)[0], model.to_draft[batch.label_ids]
    usable = batch.valid & (draft_ids[..., 0] >= 0)
    by_target, by_draft = torch.zeros_like(bias_BV), torch.zeros_like(bias_BV)
    for row in range(bias_BV.shape[0]):
        one = slice(row, row + 1)  # one window at a time bounds the memory that its laws take
        own = TrainingBatch(*(getattr(batch, name)[one] for name in TrainingBatch.__dataclass_fields__))
        labels = BlockLabels.of(own, draft_ids[one], usable[one], wanted[one], 0, hidden.shape[2])
        logits = model.lm_head(model.norm(hidden[row][labels.where])).float() + bias_BV[row]
        log_q = torch.log_softmax(logits, dim=-1)
        hit = logits.argmax(dim=-1) == labels.ids[..., 0]
        weight = slot_weights(log_q, hit, labels, "acceptance")
        by_draft[row] = torch.einsum("rk,rkv->v", weight, log_q.exp())
        by_target[row].index_add_(0, labels.ids.flatten(), (weight[..., None] * labels.probs).flatten())
    return by_target, by_draft
