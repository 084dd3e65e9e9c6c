"""Which token follows which, counted on what the target said: a table of pairs that travels with the drafter's weights.

See ``cuda_ext/pair_gains.py`` for what drafting makes of it. Counts are soft: a choice counts for every token by the
probability that the target gave it, so that a conversation says more than its tokens do. Older counts weigh less from
one counting to the next, so that the table follows the traffic.

Legend: V vocabulary, N room for pairs, G choices, k probabilities stored for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from specblock.cuda_ext.pair_gains import PairGains
from specblock.drafter.batches import batches
from specblock.drafter.window import Window

if TYPE_CHECKING:
    from specblock.drafter.network import DraftNetwork

TOKEN_PAIRS = "token_pairs.*"
_UNIT = 1024
"""Counts are stored as whole numbers of this part of an occurrence, which no cast of the network rounds."""
_PRIOR = 5.0
"""Occurrences of a token that its followers' law is worth before anything was counted: that of tokens in general."""
_KEPT = 0.5
"""What is left of older counts after a counting."""
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
        self.used = False

    @property
    def known(self) -> PairGains:
        """Gains of the pairs, on the device of the counts."""
        if self._known is None:
            self.refresh()
            assert self._known is not None
        return self._known

    def refresh(self) -> None:
        """Computes the gains anew after counts were loaded, in the same memory where it fits: graphs read from there.

        Raises:
            ValueError: the table is damaged.
        """
        if self.starts.is_meta:  # a shape alone knows nothing
            return
        with torch.inference_mode(False), torch.no_grad():
            new = self._gains()
            old = self._known
            if old is not None and old.gains.device == new.gains.device and not old.gains.is_inference():
                for name in ("gains", "rest", "keys"):
                    getattr(old, name).copy_(getattr(new, name))
                new = PairGains(self.starts, self.tokens, old.gains, old.rest, old.keys)
            self._known = new
            self.used = bool(self.starts[-1] > 0)

    def count(self, windows: Iterable[Window]) -> None:
        """Counts conversations; what was counted before weighs half as much from now on.

        Every pair of a prompt counts once, every choice of the target by its probabilities.
        """
        size = self.totals.shape[0]
        known, counted = self._keys()
        keys, weights = [known], [_KEPT * counted]
        totals, unigram = _KEPT * self.totals.double(), _KEPT * self.unigram.double()
        for window in windows:
            before, after, weight = (part.to(self.totals.device) for part in _pairs(window))
            keys.append(before * size + after)
            weights.append(_UNIT * weight)
            totals.index_add_(0, before, _UNIT * weight)
            unigram.index_add_(0, after, _UNIT * weight)
        found, place = torch.unique(torch.cat(keys), return_inverse=True)
        summed = torch.zeros(found.shape[0], dtype=torch.float64, device=found.device)
        summed = summed.index_add_(0, place, torch.cat(weights)).round()
        kept = (summed > 0).nonzero()[:, 0]
        if kept.shape[0] > self.tokens.shape[0]:
            kept = kept[torch.topk(summed[kept], self.tokens.shape[0]).indices].sort().values
        found, summed = found[kept], summed[kept]
        number = torch.bincount(torch.div(found, size, rounding_mode="floor"), minlength=size)
        with torch.no_grad():
            self.starts.zero_()[1:] = torch.cumsum(number, dim=0)
            self.tokens.zero_()[: len(found)] = (found % size).to(torch.int32)
            self.counts.zero_()[: len(found)] = summed.clamp(max=_MOST_COUNTED).to(torch.int32)
            self.totals.copy_(totals.round().clamp(max=_MOST_COUNTED))
            self.unigram.copy_(unigram.round().clamp(max=_MOST_COUNTED))
        self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenPairs:
        made: TokenPairs = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._known = None
        self.refresh()
        return made

    def _keys(self) -> tuple[Tensor, Tensor]:
        """int64 keys and float64 counts of the pairs there are."""
        each = self.starts.long().diff()
        before = torch.repeat_interleave(torch.arange(each.shape[0], device=each.device), each)
        filled = before.shape[0]
        return before * each.shape[0] + self.tokens[:filled].long(), self.counts[:filled].double()

    def _gains(self) -> PairGains:
        size, room = self.totals.shape[0], self.tokens.shape[0]
        each = self.starts.long().diff()
        if int(self.starts[0]) != 0 or int(each.min()) < 0 or int(self.starts[-1]) > room:
            raise ValueError("token_pairs: the table is damaged (its rows do not fit)")
        keys, counts = self._keys()
        if bool((keys.diff() <= 0).any()) or bool((keys % size != self.tokens[: len(keys)].long()).any()):
            raise ValueError("token_pairs: the table is damaged (followers are not in order)")
        before, after = torch.div(keys, size, rounding_mode="floor"), keys % size
        law = self.unigram.double() / _UNIT + 0.5
        law = law / law.sum()
        prior, total = _PRIOR, self.totals.double() / _UNIT
        counts = counts / _UNIT
        gains = torch.log((counts + prior * law[after]) / ((total[before] + prior) * law[after]))
        kept = torch.zeros_like(law).index_add_(0, before, counts)
        others = 1 - torch.zeros_like(law).index_add_(0, before, law[after])
        others = others.clamp(min=1e-9)
        rest = torch.log(((total - kept).clamp(min=0) + prior * others) / ((total + prior) * others))
        padding = room - keys.shape[0]
        return PairGains(
            starts=self.starts,
            tokens=self.tokens,
            gains=torch.nn.functional.pad(gains.float(), (0, padding)),
            rest=rest.float(),
            keys=torch.nn.functional.pad(keys, (0, padding), value=size * size),
        )


class TokenPairsRun:
    """An update that counts pairs and moves nothing else. Has the face of ``TrainRun`` that an update needs.

    All that was seen so far is counted as one, on what the table held at first: after every step the model carries it.

    Args:
        model: its ``token_pairs`` moves.
        batch_windows: windows per step.
        seed: order of the windows.
    """

    rehearses = True

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
        self._start = {name: value.clone() for name, value in model.token_pairs.state_dict().items()}
        self._seen: dict[str, Window] = {}

    def batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Endless batches from step ``done`` on."""
        return batches(windows, self._batch_windows, self._seed, self.done)

    def step(self, windows: Sequence[Window]) -> None:
        """Counts one batch of windows; every conversation counts once, however often it comes."""
        self.done += 1
        fresh = {w.conversation_id: w for w in windows if w.conversation_id not in self._seen}
        self._seen |= fresh
        self.positions += sum(window.num_generated for window in fresh.values())
        if fresh:
            self.model.token_pairs.load_state_dict(self._start)
            self.model.token_pairs.count(self._seen.values())


def _pairs(window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """int64 before and after, float64 weight of every pair of a conversation."""
    tokens, prompt = window.tokens.long(), window.prompt_tokens
    chosen, probs = window.top_ids.long(), window.top_log_probs.double().exp()  # [G, k]
    before = tokens[prompt - 1 : prompt - 1 + chosen.shape[0], None].expand_as(chosen)
    said = tokens[: prompt - 1], tokens[1:prompt]
    return (
        torch.cat([said[0], before.flatten()]),
        torch.cat([said[1], chosen.flatten()]),
        torch.cat([torch.ones(prompt - 1, dtype=torch.float64, device=tokens.device), probs.flatten()]),
    )
