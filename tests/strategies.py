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
