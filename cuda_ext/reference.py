"""Slow, readable definitions of the tree operations: what correct means. Tests hold ``ops.py`` to them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Node:
    """One node of a plain tree; children by token."""

    token: int
    score: float
    depth: int
    index: int
    children: dict[int, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a laid-out tree."""

    token: int
    parent: int
    depth: int
    score: float


def merge(tokens: list[int], parents: list[int], scores: list[float]) -> Node:
    """Builds the tree in which nodes with the same (parent, token) are one; the best score wins, first on ties.

    Args:
        tokens: token of each candidate.
        parents: index of each candidate's parent (-1: the root); parents precede children.
        scores: cumulative log-probability of each candidate.

    Source: method reference 4.3.
    """
    root = Node(-1, 0.0, 0, -1)
    nodes: list[Node] = []
    for index, (token, parent, score) in enumerate(zip(tokens, parents, scores, strict=True)):
        above = root if parent < 0 else nodes[parent]
        node = above.children.get(token)
        if node is None:
            node = above.children[token] = Node(token, score, above.depth + 1, index)
        elif score > node.score:
            node.score, node.index = score, index
        nodes.append(node)
    return root


def prune(root: Node, budget: int) -> list[Row]:
    """Keeps the best ``budget`` nodes (score, then depth, then index) and lays them out by depth, root first."""
    every: list[Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        every.extend(node.children.values())
        stack.extend(node.children.values())
    best = sorted(every, key=lambda n: (-n.score, n.depth, n.index))[:budget]
    kept = sorted(best, key=lambda n: n.depth)
    row_of = {id(root): 0} | {id(node): row for row, node in enumerate(kept, start=1)}
    parent_of = {id(child): id(node) for node in [root, *every] for child in node.children.values()}
    return [Row(-1, 0, 0, 0.0)] + [Row(n.token, row_of[parent_of[id(n)]], n.depth, n.score) for n in kept]


def ancestors(rows: list[Row], row: int) -> set[int]:
    """The rows that ``row`` attends to: itself and everything above it."""
    seen = {row}
    while row != 0:
        row = rows[row].parent
        seen.add(row)
    return seen


def walk(rows: list[Row], continuation: list[int]) -> list[int]:
    """Rows of the accepted path (root excluded) when the target's choices are ``continuation``."""
    path: list[int] = []
    at = 0
    for token in continuation:
        child = next((r for r in range(1, len(rows)) if rows[r].parent == at and rows[r].token == token), None)
        if child is None:
            break
        path.append(child)
        at = child
    return path


def rank_of_choice(
    tokens: list[int], parents: list[int], ranks: list[int], path: list[int], choice: int
) -> tuple[bool, int | None]:
    """Whether anything was proposed behind the token path ``path`` (empty: the root), and the best rank of ``choice``.

    Args:
        tokens: token of each candidate.
        parents: index of each candidate's parent (-1: the root); parents precede children.
        ranks: place of each candidate among what its slot proposed, best first.
        path: tokens from the root down to where acceptance stopped.
        choice: the target's token behind it.
    """
    paths: list[list[int]] = []
    offered: list[tuple[int, int]] = []
    for token, parent, rank in zip(tokens, parents, ranks, strict=True):
        above = [] if parent < 0 else paths[parent]
        paths.append([*above, token])
        if above == path:
            offered.append((token, rank))
    return bool(offered), min((rank for token, rank in offered if token == choice), default=None)
