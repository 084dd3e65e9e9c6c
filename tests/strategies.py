"""Random draft trees shared by the tests: plain lists for the reference, tensors for the real thing.

Legend: B requests, M raw candidates, D tree depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from specblock.cuda_ext.tree import Candidates


@dataclass(frozen=True, slots=True)
class RawTree:
    """Candidates of one request as plain lists; parents precede children and scores never increase along a path."""

    tokens: list[int]
    parents: list[int]
    scores: list[float]

    @property
    def depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths


@st.composite
def raw_trees(draw: st.DrawFn, max_nodes: int = 24) -> RawTree:
    """Trees with many duplicates and ties: few token ids, score steps from a handful of exact binary fractions."""
    size = draw(st.integers(1, max_nodes))
    shape = draw(st.sampled_from(["any", "any", "any", "chain", "star"]))
    num_tokens = draw(st.integers(1, 6)) if shape != "star" else max_nodes
    tokens = draw(st.lists(st.integers(0, num_tokens - 1), min_size=size, max_size=size))
    steps = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), min_size=size, max_size=size))
    parents: list[int] = []
    scores: list[float] = []
    for index in range(size):
        choices = {"chain": st.just(index - 1), "star": st.just(-1), "any": st.integers(-1, index - 1)}
        parent = draw(choices[shape])
        parents.append(parent)
        scores.append((0.0 if parent < 0 else scores[parent]) - steps[index])
    return RawTree(tokens, parents, scores)


def to_candidates(trees: list[RawTree], padding: int = 0) -> Candidates:
    """Stacks trees of different sizes, with ``padding`` invalid entries behind the largest."""
    width = max(len(tree.tokens) for tree in trees) + padding

    def stack(rows: list[list[int]] | list[list[float]], fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)

    depth = stack([t.depths for t in trees], 1, torch.int64)
    return Candidates(
        token=stack([t.tokens for t in trees], 0, torch.int64),
        parent=stack([t.parents for t in trees], -1, torch.int64),
        score=stack([t.scores for t in trees], 0.0, torch.float32),
        depth=depth,
        block=torch.zeros_like(depth),
        slot=(depth - 1).clamp(max=3),
        rank=torch.zeros_like(depth),
        valid=torch.arange(width) < torch.tensor([[len(t.tokens)] for t in trees]),
    )


def random_candidates(
    generator: torch.Generator,
    batch: int,
    num_raw: int,
    vocab_size: int,
    max_depth: int,
    truth_BD: Tensor | None = None,
    hit_rate: float = 0.6,
) -> Candidates:
    """Random topologies with random tokens, vectorised over requests.

    Args:
        truth_BD: int64 [B, >= D], the true continuation of each request; a node gets the true token of its depth with
            probability ``hit_rate`` (so deep acceptance happens), else any token. None: any tokens.
    """

    def uniform() -> Tensor:
        return torch.rand(batch, generator=generator)

    rows = torch.arange(batch)
    token = torch.zeros(batch, num_raw, dtype=torch.int64)
    parent, depth, score = token.clone(), token.clone(), torch.zeros(batch, num_raw)
    for index in range(num_raw):
        above = torch.where(uniform() < 0.5, index - 1, (uniform() * (index + 1)).long() - 1)
        level = torch.where(above < 0, 0, depth[rows, above.clamp(min=0)])
        above = torch.where(level >= max_depth, -1, above)
        level = torch.where(above < 0, 0, level)
        parent[:, index], depth[:, index] = above, level + 1
        parent_score = torch.where(above < 0, 0.0, score[rows, above.clamp(min=0)])
        score[:, index] = parent_score - (uniform() * 4).floor() / 2
        token[:, index] = (uniform() * vocab_size).long()
        if truth_BD is not None:
            token[:, index] = torch.where(uniform() < hit_rate, truth_BD[rows, level], token[:, index])
    none = torch.zeros_like(token)
    every = torch.ones_like(token, dtype=torch.bool)
    return Candidates(token, parent, score, depth, none, (depth - 1).clamp(max=3), none, every)
