"""Draft-tree operations; ``reference.py`` defines what each must return.

Growing a tree and keeping its rows are native on CPUs and CUDA, masks and ranks of choices on CPUs. Everything else,
and every device without a native operation, is vectorised: no Python loop runs over nodes, and nothing here reads a
value back from the device.

Legend: B requests, M raw candidates, R = budget + 1 rows, D tree depth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.tree import Candidates, DraftTree, Offers

_HASH_ROOT, _HASH_MULTIPLIER = 0x27D4EB2F165667C5, -7046029254386353131  # odd 64-bit constants (wrap-around product)
_CUDA_CANDIDATES = 2048  # as many as fit the shared memory of one block on every device from 8.0 on
NOT_OFFERED = 1 << 30  # a rank behind every real one


def _path_hash(candidates: Candidates, max_depth: int) -> Tensor:
    """int64 [B, M]: equal exactly when the token paths from the root are equal (up to 64-bit collisions)."""
    parent = candidates.parent.clamp(min=0)
    from_root = candidates.parent < 0
    hashed = torch.full_like(candidates.token, _HASH_ROOT)
    for _ in range(max_depth):  # after d rounds every node of depth <= d holds its final value
        above = torch.where(from_root, _HASH_ROOT, hashed.gather(1, parent))
        mixed = (above ^ (candidates.token + 1)) * _HASH_MULTIPLIER
        hashed = mixed ^ (mixed >> 29)
    return hashed


def build_tree(root_token: Tensor, candidates: Candidates, budget: int, max_depth: int) -> DraftTree:
    """The tree alone; see ``grow_tree``."""
    return grow_tree(root_token, candidates, budget, max_depth)[0]


def grow_tree(
    root_token: Tensor, candidates: Candidates, budget: int, max_depth: int, merge: bool = True
) -> tuple[DraftTree, Offers]:
    """Merges duplicate paths, keeps the best ``budget`` nodes, and lays them out for verification.

    Nodes with the same token path from the root are one node: the best score survives and adopts the children of the
    others. The kept set is closed under parents because scores never increase along a path and ties go to the
    shallower node, then to the lower index.

    Args:
        root_token: int64 [B], the last committed token.
        candidates: raw proposals [B, M].
        budget: largest number of draft nodes kept, root excluded.
        max_depth: largest depth among the candidates.
        merge: False keeps duplicates apart, to measure what merging is worth; siblings are then not unique, which
            wastes budget but cannot change the text.

    Returns:
        A tree with R = min(budget, M) + 1 rows, and every candidate with the row that it was proposed behind.

    Source: method reference 4.3 (merge all levels, remove losers physically), 4.4.
    """
    fits = root_token.is_cpu or candidates.token.shape[1] <= _CUDA_CANDIDATES
    if fits and has_kernel("grow_tree", root_token):
        c = candidates
        fields = (root_token, c.token, c.parent, c.score, c.depth, c.block, c.slot, c.valid)
        grown = torch.ops.specblock.grow_tree(*(field.contiguous() for field in fields), budget, merge)
        token, parent, depth, block, slot, score, size, parent_row = grown
        return DraftTree(token, parent, depth, score, block, slot, size), Offers(parent_row, c.token, c.rank)
    return grow_tree_vectorised(root_token, candidates, budget, max_depth, merge)


def grow_tree_vectorised(
    root_token: Tensor, candidates: Candidates, budget: int, max_depth: int, merge: bool = True
) -> tuple[DraftTree, Offers]:
    """``grow_tree`` on any device.

    A duplicate is found by one sort over 64-bit path hashes instead of a pass per level. A collision (about 1e-14 per
    tree) could only drop a proposal: acceptance compares tokens with the target's own choice, so text never depends on
    it.
    """
    batch, num_raw = candidates.token.shape
    keep = min(budget, num_raw)
    score = candidates.score.to(torch.float32).masked_fill(~candidates.valid, -torch.inf)

    # Best first: score, then depth, then index.
    by_depth = torch.argsort(candidates.depth, dim=1, stable=True)
    by_score = torch.argsort(score.gather(1, by_depth), dim=1, descending=True, stable=True)
    best_first = by_depth.gather(1, by_score)

    # Group equal paths; the first of a group in best-first order is its survivor. Padding is alone in its group.
    hashed = _path_hash(candidates, max_depth)
    hashed_sorted, position = torch.sort(hashed.gather(1, best_first), dim=1, stable=True)
    valid_sorted = candidates.valid.gather(1, best_first).gather(1, position)
    leads = torch.ones_like(valid_sorted)
    if merge:
        leads[:, 1:] = (hashed_sorted[:, 1:] != hashed_sorted[:, :-1]) | ~valid_sorted[:, 1:]
    place = torch.arange(num_raw, device=score.device).expand(batch, -1)
    leader_place = torch.cummax(torch.where(leads, place, 0), dim=1).values
    members = best_first.gather(1, position)
    survivor = torch.empty_like(members).scatter_(1, members, members.gather(1, leader_place))

    # The best `keep` survivors, in best-first order, then by depth.
    survives = (survivor == place) & candidates.valid
    lost = (~survives.gather(1, best_first)).to(torch.int64)
    chosen = best_first.gather(1, torch.argsort(lost, dim=1, stable=True)[:, :keep])
    real = survives.gather(1, chosen)
    depth = torch.where(real, candidates.depth.gather(1, chosen), max_depth + 1)
    order = torch.argsort(depth, dim=1, stable=True)
    chosen, real, depth = chosen.gather(1, order), real.gather(1, order), depth.gather(1, order)

    # Row numbers of survivors, to translate parents (through their survivors) into rows.
    rows = torch.arange(1, keep + 1, device=score.device).expand(batch, -1)
    row_of = torch.full_like(members, -1).scatter_(1, chosen, torch.where(real, rows, -1))
    parent_row = row_of.gather(1, survivor.gather(1, candidates.parent.clamp(min=0)))
    parent_row = torch.where(candidates.parent < 0, 0, parent_row).masked_fill(~candidates.valid, -1)

    def with_root(values: Tensor, root: Tensor | int | float, padding: Tensor | int | float) -> Tensor:
        body = torch.where(real, values, padding)
        head = root[:, None] if isinstance(root, Tensor) else body.new_full((batch, 1), root)
        return torch.cat([head.to(body.dtype), body], dim=1)

    tree = DraftTree(
        token=with_root(candidates.token.gather(1, chosen), root_token, 0),
        parent=with_root(parent_row.gather(1, chosen), 0, rows),
        depth=with_root(depth, 0, 0),
        score=with_root(score.gather(1, chosen), 0.0, -torch.inf),
        block=with_root(candidates.block.gather(1, chosen), -1, -1),
        slot=with_root(candidates.slot.gather(1, chosen), -1, -1),
        size=1 + real.sum(dim=1),
    )
    return tree, Offers(parent_row, candidates.token, candidates.rank)


def rank_of_choice(offers: Offers, row: Tensor, token: Tensor) -> Tensor:
    """Which rank the token that the target chose had among what was proposed there.

    Args:
        offers: of B requests.
        row: int64 [B], row of the tree at which acceptance stopped.
        token: int64 [B], the target's choice behind it.

    Returns:
        int64 [B], 0-based and the best one where several slots proposed the token; ``NOT_OFFERED`` where only other
        tokens were proposed; -1 where nothing was, because the drafter never went on from that row.
    """
    if row.is_cpu and has_kernel("rank_of_choice", row):
        fields = (offers.parent_row, offers.token, offers.rank, row, token)
        found: Tensor = torch.ops.specblock.rank_of_choice(*(field.contiguous() for field in fields), NOT_OFFERED)
        return found
    return rank_of_choice_vectorised(offers, row, token)


def rank_of_choice_vectorised(offers: Offers, row: Tensor, token: Tensor) -> Tensor:
    """``rank_of_choice`` on any device."""
    under = offers.parent_row == row[:, None]
    hit = under & (offers.token == token[:, None])
    rank = torch.where(hit, offers.rank, NOT_OFFERED).amin(dim=1)
    return torch.where(under.any(dim=1), rank, -1)


def ancestor_mask(tree: DraftTree, max_depth: int) -> Tensor:
    """bool [B, R, R]: row r sees itself and its ancestors (padding rows see only themselves)."""
    if tree.parent.is_cpu and has_kernel("ancestor_mask", tree.parent):
        found: Tensor = torch.ops.specblock.ancestor_mask(tree.parent.contiguous())
        return found
    return ancestor_mask_vectorised(tree, max_depth)


def ancestor_mask_vectorised(tree: DraftTree, max_depth: int) -> Tensor:
    """``ancestor_mask`` on any device."""
    rows = tree.num_rows
    own = torch.eye(rows, dtype=torch.bool, device=tree.token.device).expand(tree.token.shape[0], -1, -1)
    mask = own
    parent = tree.parent[:, :, None].expand(-1, -1, rows)
    for _ in range(max_depth):
        mask = own | mask.gather(1, parent)
    return mask


def find_child(tree: DraftTree, row: Tensor, token: Tensor) -> Tensor:
    """int64 [B]: the child of ``row`` [B] that carries ``token`` [B], or -1."""
    match = (tree.parent == row[:, None]) & (tree.token == token[:, None]) & (tree.depth > 0)
    found, index = match.max(dim=1)
    return torch.where(found, index, -1)


def follow_path(tree: DraftTree, path: Tensor) -> Tensor:
    """How many leading tokens of a known continuation a tree covers: int64 [B] from ``path`` int64 [B, D].

    Entries of ``path`` below 0 stop the walk. This is acceptance when the target's choices are already known.
    """
    row = torch.zeros_like(tree.size)
    accepted = torch.zeros_like(tree.size)
    alive = torch.ones_like(tree.size, dtype=torch.bool)
    for d in range(path.shape[1]):
        child = find_child(tree, row, path[:, d])
        alive &= (child >= 0) & (path[:, d] >= 0)
        row = torch.where(alive, child, row)
        accepted += alive
    return accepted


def commit_rows(storage: Tensor, slots: Tensor, start: Tensor, rows: Tensor) -> None:
    """Moves the key or value rows of accepted nodes behind the committed prefix, in place.

    Args:
        storage: [layers, slots, kv_heads, capacity, head_dim].
        slots: int64 [B], slot of each request.
        start: int64 [B], committed length; tree row r was written at position ``start + r``.
        rows: int64 [B, A], accepted tree rows in path order; rows[:, j] moves to position ``start + j``. Pad with j.
    """
    if has_kernel("commit_rows", storage):
        torch.ops.specblock.commit_rows(storage, slots.contiguous(), start.contiguous(), rows.contiguous())
        return
    commit_rows_vectorised(storage, slots, start, rows)


def commit_rows_vectorised(storage: Tensor, slots: Tensor, start: Tensor, rows: Tensor) -> None:
    """``commit_rows`` on any device."""
    source = start[:, None] + rows
    target = start[:, None] + torch.arange(rows.shape[1], device=rows.device)
    # Reading everything before writing makes overlapping moves safe.
    moved = storage[:, slots[:, None], :, source]
    storage[:, slots[:, None], :, target] = moved
