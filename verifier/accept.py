"""Lossless acceptance: the target chooses, the tree is followed while it agrees.

The token at absolute position i is arg-max(processed log-probability + Gumbel(seed, choice, i, token)), a function of
the target, the sampling parameters and the seed alone. A draft is accepted exactly when it *is* that token, so the text
never depends on the tree. Source: design section 4.1.

Legend: B requests, R tree rows, V vocabulary, N requests still walking, A accepted drafts on the longest path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.choice import choose
from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.ops import find_child
from specblock.cuda_ext.sampling import SamplingBatch
from specblock.cuda_ext.transfer import on_device
from specblock.cuda_ext.tree import DraftTree
from specblock.verifier.history import ChoiceState, PathHistory


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The target's own choices along each tree.

    Attributes:
        paths: the chosen tokens per request, accepted drafts first, the bonus token last (host).
        tokens: int64 [B, A + 1], the same, padded with -1.
        num_accepted: accepted drafts per request, bonus excluded (host).
        rows: int64 [B, A + 1], tree rows of the path, root (row 0) first; column j is padded with j.
    """

    paths: tuple[tuple[int, ...], ...]
    tokens: Tensor
    num_accepted: list[int]
    rows: Tensor

    @property
    def num_cols(self) -> int:
        """A + 1: the longest path, bonus included."""
        return self.tokens.shape[1]


class TokenChooser:
    """Chooses the next token of some of B requests, given their logits and position."""

    def __init__(
        self,
        states: Sequence[ChoiceState],
        noise: NoiseWindow,
        slots: Sequence[int],
        device: torch.device,
        sampling: SamplingBatch | None = None,
    ) -> None:
        self._slots, self._noise = slots, noise
        self._history = PathHistory(states, device)
        self._samples = [state.params.temperature > 0 for state in states]
        if sampling is None and any(self._samples):
            sampling = SamplingBatch.of([state.params for state in states], device)
        self._sampling = sampling

    def choose(self, members: Sequence[int], logits_NV: Tensor, positions: Sequence[int]) -> Tensor:
        """int64 [N]: the target's choice for requests ``members`` from raw logits [N, V] at absolute ``positions``."""
        logits_NV = self._history.adjust(members, logits_NV)
        drawn = [
            (n, member, self._slots[member], positions[n]) for n, member in enumerate(members) if self._samples[member]
        ]
        if not drawn or self._sampling is None:
            return logits_NV.argmax(dim=-1)
        row, member, slot, position = on_device(drawn, logits_NV.device).unbind(1)
        everyone = len(drawn) == len(self._samples)
        choice = choose(
            logits_NV if everyone else logits_NV[row],
            self._sampling if everyone else self._sampling.rows(member),
            self._noise.rows(slot, position),
        )
        if len(drawn) == len(members):
            return choice
        return logits_NV.argmax(dim=-1).index_copy_(0, row, choice)

    def visit(self, members: Sequence[int], tokens: Sequence[int]) -> None:
        """Tells penalties that each of ``members`` went on with one token."""
        self._history.append(members, tokens)


def accept(
    logits_BRV: Tensor,
    tree: DraftTree,
    states: Sequence[ChoiceState],
    noise: NoiseWindow,
    slots: Sequence[int],
    first_position: Sequence[int],
    sampling: SamplingBatch | None = None,
) -> Acceptance:
    """Walks all trees; only visited rows are processed.

    Args:
        logits_BRV: raw target logits of every tree row, [B, R, V], B >= 1.
        tree: the trees.
        states: parameters and history of the B requests; not changed.
        noise: window already advanced to ``first_position`` for every request with a temperature above 0, wide enough
            for the deepest path plus the bonus token.
        slots: noise slot of each request.
        first_position: absolute position of the token that follows each root.
        sampling: the same parameters as tensors on the logits' device, if the caller has them already.
    """
    # On a CPU, other types would have to be widened as a whole, to read the few rows that are visited.
    device, wide = logits_BRV.device, logits_BRV.dtype in (torch.float32, torch.float64)
    served = (wide or logits_BRV.is_cuda) and has_kernel("accept_walk", logits_BRV)
    if not served or any(state.adjusts for state in states):
        return accept_reference(logits_BRV, tree, states, noise, slots, first_position, sampling)
    sampling = SamplingBatch.of([state.params for state in states], device) if sampling is None else sampling
    rows_at = noise.rows_from(slots, first_position, min(noise.width, tree.num_rows))
    tokens, rows, counts = torch.ops.specblock.accept_walk(
        logits_BRV.contiguous(),
        tree.token.contiguous(),
        tree.parent.contiguous(),
        rows_at.storage,
        rows_at.index.view(len(slots), -1).to(device),
        *sampling.law,
    )
    said_by: list[list[int]] = torch.cat([tokens, counts[:, None]], dim=1).tolist()  # the one wait for the device
    lengths = [said.pop() for said in said_by]
    longest = max(lengths)
    paths = tuple(tuple(said[:count]) for said, count in zip(said_by, lengths, strict=True))
    return Acceptance(paths, tokens[:, :longest], [count - 1 for count in lengths], rows[:, :longest])


def accept_reference(
    logits_BRV: Tensor,
    tree: DraftTree,
    states: Sequence[ChoiceState],
    noise: NoiseWindow,
    slots: Sequence[int],
    first_position: Sequence[int],
    sampling: SamplingBatch | None = None,
) -> Acceptance:
    """The readable definition of ``accept``, level by level, for any device, penalties and biases included."""
    device = logits_BRV.device
    chooser = TokenChooser(states, noise, slots, device, sampling)
    num_requests = logits_BRV.shape[0]
    tokens: list[list[int]] = [[] for _ in range(num_requests)]
    rows: list[list[int]] = [[0] for _ in range(num_requests)]
    members = list(range(num_requests))
    row_B = torch.zeros(num_requests, dtype=torch.int64, device=device)
    every_B = torch.arange(num_requests, device=device)
    level = 0
    while members:
        everyone = len(members) == num_requests
        member_N = every_B if everyone else on_device(members, device)
        chosen_B = chooser.choose(
            members, logits_BRV[member_N, row_B[member_N]], [first_position[b] + level for b in members]
        )
        if not everyone:  # -1 matches no child: requests that have stopped stay stopped
            chosen_B = torch.full_like(row_B, -1).index_copy_(0, member_N, chosen_B)
        row_B = find_child(tree, row_B, chosen_B)
        chosen, child = torch.stack([chosen_B, row_B]).tolist()  # the one wait for the device per level
        chooser.visit(members, [chosen[b] for b in members])
        for b in members:
            tokens[b].append(chosen[b])
        members = [b for b in members if child[b] >= 0]
        for b in members:
            rows[b].append(child[b])
        level += 1
    return _pack(tokens, rows, device)


def _pack(tokens: list[list[int]], rows: list[list[int]], device: torch.device) -> Acceptance:
    width = max(len(path) for path in tokens)
    padded_tokens = [path + [-1] * (width - len(path)) for path in tokens]
    padded_rows = [path + list(range(len(path), width)) for path in rows]
    packed = on_device([padded_tokens, padded_rows], device)
    return Acceptance(tuple(map(tuple, tokens)), packed[0], [len(path) - 1 for path in tokens], packed[1])
