"""Our Muon against torch's, and the orthogonalisation against its definition."""

from __future__ import annotations

import pytest
import torch

from specblock.drafter import muon
from specblock.drafter.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("fast", [True, False])
def test_steps_follow_torch(shape: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "fast_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    steps = (Muon([ours], lr=0.05, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1))
    for _ in range(6):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), steps, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs.detach() - start).norm()
    # torch computes in bfloat16; float32 differs by its rounding alone.
    assert (ours.detach() - theirs.detach()).norm() < (1e-6 if fast else 0.03) * moved


def test_singular_values_end_near_one() -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(30, 50)).float())
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
