"""Proposals into tree nodes, and nodes into the leaves that the next block extends.

Legend: B requests, n leaves, K slots, W fan-out width, H hidden.
Source: method reference 4.1 (nodes and scores), 4.2 (leaves).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.tree import Candidates
from specblock.drafter.proposals import Proposals


@dataclass(frozen=True, slots=True)
class Leaves:
    """Open ends of the tree.

    node, depth, token int64 [B, n]; score, valid [B, n]; hidden [B, n, H]; seen bool [B, n, scratch rows]: which rows
    of the current cycle a leaf's block attends to.
    """

    node: Tensor
    depth: Tensor
    token: Tensor
    score: Tensor
    valid: Tensor
    hidden: Tensor
    seen: Tensor


def root_leaf(hidden_BnKH: Tensor, started: Tensor, scratch_rows: int) -> Leaves:
    """The root as the single leaf that block 1 extends; requests without any position (``started`` False) have none."""
    node, zero, score, seen = _at_root(started.shape[0], scratch_rows, started.device)
    hidden = hidden_BnKH[:, :, 0]
    return Leaves(node=node, depth=zero, token=zero, score=score, valid=started[:, None], hidden=hidden, seen=seen)


@functools.lru_cache(maxsize=64)
def _at_root(batch: int, scratch_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is the same in every cycle: node, depth and token, score, and what is seen. Read only."""
    with torch.inference_mode(False):
        zero = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        seen = torch.zeros(batch, 1, scratch_rows, dtype=torch.bool, device=device)
        return zero - 1, zero, zero.to(torch.float32), seen


def expand_chain(proposals: Proposals, leaves: Leaves, offset: int, block: int) -> Candidates:
    """Nodes of one block: per leaf a greedy chain of K and alternatives at every slot.

    Args:
        proposals: of the leaves' slots, [B, n, K, W].
        leaves: what the block extends.
        offset: number of candidates before this block.
        block: 0-based.

    Returns:
        [B, n * K * W] candidates, leaf-major, then slot, then rank.
    """
    if has_kernel("expand_chain", proposals.token):
        of_slots = (proposals.token, proposals.log_prob, proposals.fan_out)
        of_leaves = (leaves.node, leaves.depth, leaves.score, leaves.valid)
        parent, depth, blocks, slot, rank, score, valid = torch.ops.specblock.expand_chain(
            *(tensor.contiguous() for tensor in (*of_slots, *of_leaves)), offset, block
        )
        return Candidates(proposals.token.flatten(1), parent, score, depth, blocks, slot, rank, valid)
    return expand_vectorised(proposals, leaves, offset, block)


def expand_vectorised(proposals: Proposals, leaves: Leaves, offset: int, block: int) -> Candidates:
    """``expand_chain`` on any device."""
    batch, num_leaves, width_k, width_w = proposals.token.shape
    device = proposals.token.device
    slot_K = torch.arange(width_k, device=device)
    chain = torch.cumsum(proposals.log_prob[..., 0], dim=-1) - proposals.log_prob[..., 0]
    score = leaves.score[:, :, None, None] + chain[..., None] + proposals.log_prob
    # Never above its parent, however the sum is rounded, or a tree could keep it alone.
    above = [leaves.score]
    for greedy in score[..., 0].unbind(-1)[:-1]:
        above.append(torch.where(greedy > above[-1], above[-1], greedy))
    parent_score = torch.stack(above, dim=-1)[..., None]
    score = torch.where(score > parent_score, parent_score, score)
    own = offset + (torch.arange(num_leaves, device=device)[:, None] * width_k + slot_K - 1) * width_w
    parent = torch.where(slot_K == 0, leaves.node[:, :, None], own)[..., None]
    depth = (leaves.depth[:, :, None] + slot_K + 1)[..., None]
    kept = torch.arange(width_w, device=device) < proposals.fan_out.clamp(min=1)[..., None]
    valid = kept & leaves.valid[:, :, None, None] & torch.isfinite(score)

    def flat(values: Tensor) -> Tensor:
        return values.expand(batch, num_leaves, width_k, width_w).reshape(batch, -1)

    return Candidates(
        token=flat(proposals.token),
        parent=flat(parent),
        score=flat(score),
        depth=flat(depth),
        block=flat(torch.full((1, 1, 1, 1), block, device=device)),
        slot=flat(slot_K[:, None]),
        rank=flat(torch.arange(width_w, device=device)),
        valid=flat(valid & ~_below_dead_chain(valid)),
    )


def expand_product(proposals: Proposals, started: Tensor, beam: int) -> Candidates:
    """Nodes of slots that are independent of each other: any token may follow any, the best ``beam`` are followed.

    Args:
        proposals: of the root's slots, [B, 1, K, W].
        started: bool [B], requests that have a position to draft from.
        beam: nodes per depth that get children.

    Returns:
        Candidates, by depth.
    """
    token, log_prob = proposals.token[:, 0], proposals.log_prob[:, 0]
    batch, width_k, width_w = token.shape
    device = token.device
    parent_node = torch.full((batch, 1), -1, device=device)
    parent_score = torch.zeros(batch, 1, device=device)
    parts: list[Candidates] = []
    offset = 0
    for slot in range(width_k):
        score = (parent_score[..., None] + log_prob[:, None, slot]).flatten(1)
        size = score.shape[1]
        constant = torch.full_like(score, 0, dtype=torch.int64)
        parts.append(
            Candidates(
                token=token[:, None, slot].expand(-1, size // width_w, -1).flatten(1),
                parent=parent_node.repeat_interleave(width_w, dim=1),
                score=score,
                depth=constant + slot + 1,
                block=constant,
                slot=constant + slot,
                rank=torch.arange(width_w, device=device).repeat(size // width_w).expand(batch, -1),
                valid=torch.isfinite(score) & started[:, None],
            )
        )
        parent_score, best = torch.topk(score, min(beam, size), dim=1)
        parent_node = offset + best
        offset += size
    return concatenate(parts)


def choose_leaves(
    nodes: Candidates, hidden_BnKH: Tensor, parents: Leaves, score: Tensor, offset: int, first_row: int, count: int
) -> Leaves:
    """The ``count`` best-scoring nodes of the last block that may be extended.

    Args:
        nodes: candidates of the last block, as ``expand_chain`` lays them out.
        hidden_BnKH: u of the last block.
        parents: leaves that block extended.
        score: ``extendable`` of ``nodes``, [B, n * K * W].
        offset: number of candidates before the last block.
        first_row: scratch row at which the last block's rows begin.
        count: leaves wanted.
    """
    batch, num_parents, width_k, _ = hidden_BnKH.shape
    width_w = score.shape[1] // (num_parents * width_k)
    best = torch.topk(score, min(count, score.shape[1]), dim=1)
    index = best.indices
    source, slot = index // (width_k * width_w), (index // width_w) % width_k
    rows = torch.arange(batch, device=index.device)[:, None]
    scratch = torch.arange(parents.seen.shape[-1], device=index.device)
    start = (first_row + source * width_k)[..., None]
    return Leaves(
        node=offset + index,
        depth=nodes.depth.gather(1, index),
        token=nodes.token.gather(1, index),
        score=torch.where(torch.isfinite(best.values), best.values, 0.0),
        valid=torch.isfinite(best.values),
        hidden=hidden_BnKH[rows, source, slot],
        seen=parents.seen[rows, source] | ((scratch >= start) & (scratch <= start + slot[..., None])),
    )


def extendable(nodes: Candidates, num_parents: int, width_k: int) -> Tensor:
    """Scores [B, M] of the nodes that the next block may extend, -inf elsewhere: all of a slot that branches, and the
    end of every chain."""
    grid = nodes.valid.view(nodes.valid.shape[0], num_parents, width_k, -1)
    may = grid & (grid.sum(dim=-1, keepdim=True) > 1)
    may[:, :, -1, 0] = grid[:, :, -1, 0]
    return nodes.score.masked_fill(~may.flatten(1), -torch.inf)


def concatenate(parts: list[Candidates]) -> Candidates:
    """One set of candidates from those of several blocks, in order."""
    if len(parts) == 1:
        return parts[0]
    names = Candidates.__dataclass_fields__
    return Candidates(**{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names})


def _below_dead_chain(valid: Tensor) -> Tensor:
    """bool [B, n, K, W]: nodes whose greedy ancestor in the block is missing (a filtered token cannot be a parent)."""
    alive = torch.cumprod(valid[..., 0].to(torch.int8), dim=-1).to(torch.bool)
    above = torch.cat([torch.ones_like(alive[..., :1]), alive[..., :-1]], dim=-1)
    return ~above[..., None]
