"""Which token follows which, counted on what the target said: a table of pairs that travels with the drafter's weights.

See ``cuda_ext/pair_gains.py`` for what drafting makes of it. Counts are soft: a choice counts for every token by the
probability that the target gave it, so that a conversation says more than its tokens do. What users wrote is not
counted. Older counts make room for as many new ones, so that the table follows the traffic.

Legend: V vocabulary, N room for pairs, G choices, k probabilities stored for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from specblock.cuda_ext.pair_gains import PairGains
from specblock.cuda_ext.recording import kept_in_place
from specblock.drafter.batches import batches
from specblock.drafter.window import Window

if TYPE_CHECKING:
    from specblock.drafter.network import DraftNetwork

TOKEN_PAIRS = "token_pairs.*"
_UNIT = 1024
"""Counts are stored as whole numbers of this part of an occurrence, which no cast of the network rounds."""
_PRIOR = 5.0
"""Occurrences of a token that its followers' law is worth before anything was counted: that of tokens in general."""
_LEAST_KEPT = 0.5
"""Of older counts so much is left after a counting, however much there is to count."""
_NAMES = ("starts", "tokens", "counts", "totals", "unigram")
_ROOM_PER_TOKEN, _MOST_ROOM = 64, 1 << 20
_MOST_COUNTED = torch.iinfo(torch.int32).max


def room_for(vocab_size: int) -> int:
    """Pairs that are kept: the most frequent ones."""
    return min(_ROOM_PER_TOKEN * vocab_size, _MOST_ROOM)


class TokenPairs(nn.Module):
    """Counted pairs, and their gains.

    Attributes:
        starts: int32 [V + 1], where each token's followers begin in ``tokens``.
        tokens: int32 [N], followers, ascending for each token.
        counts: int32 [N], how often, in parts of an occurrence.
        totals: int32 [V], how often each token came before another, pairs that were not kept included.
        unigram: int32 [V], how often each came behind another.
    """

    starts: Tensor
    tokens: Tensor
    counts: Tensor
    totals: Tensor
    unigram: Tensor

    def __init__(self, vocab_size: int, room: int) -> None:
        super().__init__()
        sizes = {"starts": vocab_size + 1, "tokens": room, "counts": room, "totals": vocab_size, "unigram": vocab_size}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.int32))
        self._known: PairGains | None = None
        self._known_of: tuple[Tensor, ...] = ()
        self.used = False

    @property
    def known(self) -> PairGains:
        """Gains of the pairs, on the device of the counts."""
        if self._known is None:
            self.refresh()
        assert self._known is not None
        return self._known

    @property
    def occurrences(self) -> float:
        """Tokens that were counted before another, as far as they still count."""
        return float(self.totals.double().sum()) / _UNIT

    def refresh(self) -> None:
        """Takes in counts that were loaded. Gains stay in the same memory where they fit: graphs read from there."""
        if self.starts.is_meta:  # a shape alone knows nothing
            return
        state = tuple(getattr(self, name) for name in _NAMES)
        same = bool(self._known_of) and self._known_of[0].device == state[0].device
        if same and all(torch.equal(old, new) for old, new in zip(self._known_of, state, strict=True)):
            return
        with torch.inference_mode(False), torch.no_grad():
            new = self._gains()
            old = self._known or new
            derived = (kept_in_place(getattr(old, name), getattr(new, name)) for name in ("gains", "rest", "keys"))
            self._known = PairGains(self.starts, self.tokens, *derived)
            self._known_of = tuple(one.clone() for one in state)
            self.used = bool(self.starts[-1] > 0)

    def count(self, windows: Iterable[Window], kept: float | None = None) -> None:
        """Counts what the target chose in conversations.

        Args:
            windows: each counts as often as it comes.
            kept: share of the older counts that stays; None: as much as the new ones leave room for, half at least.
        """
        size, device = self.totals.shape[0], self.totals.device
        parts = [tuple(part.to(device) for part in _pairs(window)) for window in windows]
        if not parts:
            return
        before, after, weight = (torch.cat(own) for own in zip(*parts, strict=True))
        old_before, old_after = _filled(self.starts, self.tokens)
        counted = self.counts[: old_before.shape[0]].double()
        if kept is None:
            kept = kept_share(self.occurrences, float(weight.sum()))
        keys = torch.cat([old_before * size + old_after, before * size + after])
        found, place = torch.unique(keys, return_inverse=True)
        summed = torch.zeros(found.shape[0], dtype=torch.float64, device=device)
        summed = summed.index_add_(0, place, torch.cat([kept * counted, _UNIT * weight])).round()
        kept_pairs = (summed > 0).nonzero()[:, 0]
        if kept_pairs.shape[0] > self.tokens.shape[0]:
            kept_pairs = kept_pairs[torch.topk(summed[kept_pairs], self.tokens.shape[0]).indices].sort().values
        found, summed = found[kept_pairs], summed[kept_pairs]
        each = torch.bincount(torch.div(found, size, rounding_mode="floor"), minlength=size)
        with torch.no_grad():
            self.starts.zero_()[1:] = torch.cumsum(each, dim=0)
            self.tokens.zero_()[: len(found)] = (found % size).to(torch.int32)
            self.counts.zero_()[: len(found)] = summed.clamp(max=_MOST_COUNTED).to(torch.int32)
            for mine, where in ((self.totals, before), (self.unigram, after)):
                sums = (kept * mine.double()).index_add_(0, where, _UNIT * weight)
                mine.copy_(sums.round().clamp(max=_MOST_COUNTED))
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenPairs:
        made: TokenPairs = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return made

    def _gains(self) -> PairGains:
        size, room = self.totals.shape[0], self.tokens.shape[0]
        before, after = _filled(self.starts, self.tokens)
        law = self.unigram.double() / _UNIT + 0.5
        law = law / law.sum()
        prior, total = _PRIOR, self.totals.double() / _UNIT
        counts = self.counts[: before.shape[0]].double() / _UNIT
        gains = torch.log((counts + prior * law[after]) / ((total[before] + prior) * law[after]))
        kept = torch.zeros_like(law).index_add_(0, before, counts)
        others = 1 - torch.zeros_like(law).index_add_(0, before, law[after])
        others = others.clamp(min=1e-9)
        rest = torch.log(((total - kept).clamp(min=0) + prior * others) / ((total + prior) * others))
        padding = room - before.shape[0]
        return PairGains(
            starts=self.starts,
            tokens=self.tokens,
            gains=torch.nn.functional.pad(gains.float(), (0, padding)),
            rest=rest.float(),
            keys=torch.nn.functional.pad(before * size + after, (0, padding), value=size * size),
        )


def _filled(starts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """int64 before and after of the pairs there are."""
    each = starts.long().diff()
    before = torch.repeat_interleave(torch.arange(each.shape[0], device=each.device), each)
    return before, tokens[: before.shape[0]].long()


def kept_share(older: float, newer: float) -> float:
    """Share of so many older occurrences that stays where so many newer ones are counted."""
    return max(_LEAST_KEPT, 1 - newer / older) if older > 0 else 1.0


def check_pairs(tensors: Mapping[str, Tensor]) -> None:
    """Makes sure that a table can be read.

    Args:
        tensors: a state dict with the buffers of ``TokenPairs``, of the right shapes.

    Raises:
        ValueError: it is damaged.
    """
    starts, tokens, *others = (tensors[name] for name in _NAMES)
    each = starts.long().diff()
    if int(starts[0]) != 0 or int(each.min()) < 0 or int(starts[-1]) > tokens.shape[0]:
        raise ValueError("token_pairs: the table is damaged (its rows do not fit)")
    before, after = _filled(starts, tokens)
    keys = before * each.shape[0] + after
    if bool(((after < 0) | (after >= each.shape[0])).any()) or bool((keys.diff() <= 0).any()):
        raise ValueError("token_pairs: the table is damaged (followers are not in order)")
    if any(bool((one < 0).any()) for one in others):
        raise ValueError("token_pairs: the table is damaged (negative counts)")


class TokenPairsRun:
    """An update that counts pairs and moves nothing else. Has the face of ``TrainRun`` that an update needs.

    Every conversation counts once, however often it comes; after every step the model carries what was counted so far.

    Args:
        model: its ``token_pairs`` moves.
        batch_windows: windows per step.
        seed: order of the windows.
    """

    rehearses = False

    def __init__(self, model: DraftNetwork, batch_windows: int, seed: int = 0) -> None:
        """Raises:
        ValueError: a network whose slots have no token before them that they were not told.
        """
        if not model.has_chains:
            raise ValueError(f"{TOKEN_PAIRS}: this kind of drafter predicts no slot behind another")
        self.model = model
        self.done = 0
        self.positions = 0
        self._batch_windows, self._seed = batch_windows, seed
        self._older, self._newer = model.token_pairs.occurrences, 0.0
        self._seen: set[str] = set()

    def batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Endless batches from step ``done`` on."""
        return batches(windows, self._batch_windows, self._seed, self.done)

    def step(self, windows: Sequence[Window]) -> None:
        """Counts one batch of windows."""
        self.done += 1
        fresh = {w.conversation_id: w for w in windows if w.conversation_id not in self._seen}
        self._seen |= fresh.keys()
        tokens = sum(window.num_generated for window in fresh.values())
        self.positions += tokens
        kept = kept_share(self._older, self._newer)
        self._newer += tokens
        self.model.token_pairs.count(fresh.values(), kept_share(self._older, self._newer) / kept)


def _pairs(window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """int64 before and after, float64 weight: every token that the target may have chosen behind another."""
    chosen, probs = window.top_ids.long(), window.top_log_probs.double().exp()  # [G, k]
    first = window.prompt_tokens - 1
    before = window.tokens[first : first + chosen.shape[0], None].long().expand_as(chosen)
    return before.flatten(), chosen.flatten(), probs.flatten()
