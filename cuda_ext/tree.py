"""The draft tree: flat padded arrays for a batch of requests.

Legend: B requests, N draft nodes, R = N + 1 rows (row 0 is the root, the last committed token), M raw candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Candidates:
    """Raw proposals of a drafter before merge and prune; a parent always precedes its children.

    Attributes:
        token: int64 [B, M], target token id.
        parent: int64 [B, M], index of the parent candidate, -1 for children of the root.
        score: float32 [B, M], cumulative log-probability from the root; never larger than the parent's.
        depth: int64 [B, M], 1 for children of the root.
        block: int64 [B, M], drafter block that proposed the node (0-based).
        slot: int64 [B, M], slot inside that block (0-based).
        rank: int64 [B, M], place among what that slot proposed, best first (0-based).
        valid: bool [B, M], False for padding.
    """

    token: Tensor
    parent: Tensor
    score: Tensor
    depth: Tensor
    block: Tensor
    slot: Tensor
    rank: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Offers:
    """Everything that was proposed behind the rows of a tree, also what merging and pruning took out of it.

    Attributes:
        parent_row: int64 [B, M], row of the tree below which the token was proposed (0: the root); -1 where the parent
            is not in the tree, and in padding.
        token: int64 [B, M], target token id.
        rank: int64 [B, M], see ``Candidates``.
    """

    parent_row: Tensor
    token: Tensor
    rank: Tensor


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Trees ready for verification; rows are ordered by depth, so parents precede children.

    Attributes:
        token: int64 [B, R], target token id; column 0 is the root's token; 0 in padding.
        parent: int64 [B, R], row of the parent; the root and padding rows point to themselves.
        depth: int64 [B, R], root 0; padding 0.
        score: float32 [B, R], cumulative log-probability, root 0; -inf in padding.
        block: int64 [B, R], drafter block (0-based) that proposed the node, -1 for root and padding.
        slot: int64 [B, R], slot inside the block, -1 for root and padding.
        size: int64 [B], number of real rows, root included.
    """

    token: Tensor
    parent: Tensor
    depth: Tensor
    score: Tensor
    block: Tensor
    slot: Tensor
    size: Tensor

    @property
    def num_rows(self) -> int:
        """R: the padded number of rows, root included."""
        return self.token.shape[1]

    @property
    def valid(self) -> Tensor:
        """bool [B, R], True for real rows."""
        return torch.arange(self.num_rows, device=self.token.device) < self.size[:, None]

    def check(self) -> None:
        """Asserts every invariant of the structure. Slow; for tests and debugging.

        Raises:
            AssertionError: naming the broken invariant.
        """
        for b in range(self.token.shape[0]):
            size = int(self.size[b])
            assert 1 <= size <= self.num_rows, "size out of range"
            assert int(self.parent[b, 0]) == 0 and int(self.depth[b, 0]) == 0, "row 0 must be the root"
            seen: set[tuple[int, int]] = set()
            for r in range(1, size):
                parent, token = int(self.parent[b, r]), int(self.token[b, r])
                assert parent < r, "parents must precede children"
                assert int(self.depth[b, r]) == int(self.depth[b, parent]) + 1, "depth must be the parent's plus one"
                assert (parent, token) not in seen, "siblings must be unique"
                seen.add((parent, token))
                assert float(self.score[b, r]) <= float(self.score[b, parent]) + 1e-6, "scores must not increase"
            for r in range(size, self.num_rows):
                assert int(self.parent[b, r]) == r, "padding rows point to themselves"


def root_only(root_token: Tensor) -> DraftTree:
    """The tree without drafts (plain decoding): root tokens int64 [B] -> one row per request."""
    column = root_token[:, None]
    zero, none = torch.zeros_like(column), torch.full_like(column, -1)
    return DraftTree(column, zero, zero, zero.to(torch.float32), none, none, torch.ones_like(root_token))


def place_rows(tree: DraftTree, rows: Tensor, root_token: Tensor) -> DraftTree:
    """Trees of a whole batch when only some requests drafted; the others get their root alone.

    Args:
        tree: trees of the D requests that drafted.
        rows: int64 [D], their places in the batch.
        root_token: int64 [B], root tokens of the whole batch.
    """
    batch, width = root_token.shape[0], tree.num_rows
    order = torch.arange(width, device=root_token.device).expand(batch, -1)

    def placed(values: Tensor, padding: Tensor | float) -> Tensor:
        whole = torch.zeros(batch, width, dtype=values.dtype, device=values.device)
        whole = whole + padding if isinstance(padding, Tensor) else whole.fill_(padding)
        return whole.index_copy_(0, rows, values)

    token = placed(tree.token, 0)
    token[:, 0] = root_token
    score = placed(tree.score, -torch.inf)
    score[:, 0] = 0.0
    return DraftTree(
        token=token,
        parent=placed(tree.parent, order),
        depth=placed(tree.depth, 0),
        score=score,
        block=placed(tree.block, -1),
        slot=placed(tree.slot, -1),
        size=torch.ones(batch, dtype=torch.int64, device=root_token.device).index_copy_(0, rows, tree.size),
    )
