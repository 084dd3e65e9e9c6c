"""The loss in passes against the loss of all rows at once: values, gradients, what is handed on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specblock.drafter import head_loss as module
from specblock.drafter.head_loss import HeadLoss, head_loss, head_loss_reference
from specblock.drafter.labels import BlockLabels

ROWS, SLOTS, HIDDEN, VOCAB, KEPT = 150, 4, 16, 60, 6


def _labels(seed: int) -> BlockLabels:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:KEPT] for _ in range(ROWS * SLOTS)])
    log_p = torch.log_softmax(torch.randn(ROWS, SLOTS, KEPT, generator=generator), dim=-1)
    came = torch.randint(-1, KEPT, (ROWS, SLOTS), generator=generator)
    ids = ids.view(ROWS, SLOTS, KEPT)
    known = came >= 0
    actual = ids.gather(-1, came.clamp(min=0)[..., None])[..., 0]
    actual_log_p = log_p.gather(-1, came.clamp(min=0)[..., None])[..., 0]
    return BlockLabels(
        where=torch.arange(ROWS),
        row=torch.randint(0, 3, (ROWS,), generator=generator),
        ids=ids,
        probs=log_p.exp() * (torch.rand(ROWS, SLOTS, 1, generator=generator) > 0.1),
        usable=torch.rand(ROWS, SLOTS, generator=generator) > 0.2,
        actual=torch.where(known, actual, -1),
        actual_log_prob=torch.where(known, actual_log_p, -torch.inf),
    )


def _both(prefix: str, biased: bool, moves: tuple[bool, bool]) -> list[tuple[HeadLoss, Tensor | None, Tensor | None]]:
    torch.manual_seed(5)
    rows, head = 2 * torch.randn(ROWS, SLOTS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    bias = torch.randn(3, VOCAB) if biased else None
    found = []
    for loss in (head_loss, head_loss_reference):
        own_rows, own_head = rows.clone().requires_grad_(moves[0]), head.clone().requires_grad_(moves[1])
        done = loss(own_rows, own_head, _labels(1), bias, [1.0, 0.8, 0.64, 0.5], prefix, 5)
        if any(moves):
            (3 * done.loss).backward()
        found.append((done, own_rows.grad, own_head.grad))
    return found


@pytest.mark.parametrize("prefix", ["argmax", "acceptance"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("moves", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("rows_per_pass", [64, ROWS])
def test_passes_give_what_all_rows_at_once_give(
    prefix: str, biased: bool, moves: tuple[bool, bool], rows_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module._PASS_VALUES, "cpu", rows_per_pass * VOCAB)
    (done, of_rows, of_head), (true, true_of_rows, true_of_head) = _both(prefix, biased, moves)
    assert float(true.loss.detach()) > 1
    for name in ("loss", "top1", "rank", "top"):
        torch.testing.assert_close(getattr(done, name).detach(), getattr(true, name).detach(), atol=1e-5, rtol=1e-5)
    for own, other, moved in ((of_rows, true_of_rows, moves[0]), (of_head, true_of_head, moves[1])):
        assert (own is None) == (other is None) == (not moved)
        if own is not None and other is not None:
            torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-4)


def test_nothing_is_derived_where_no_gradient_is_wanted() -> None:
    head = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    with torch.no_grad():
        done = head_loss(torch.randn(ROWS, SLOTS, HIDDEN), head, _labels(2), None, [1.0] * SLOTS, "argmax", 0)
    assert not done.loss.requires_grad and done.top.shape == (ROWS, SLOTS, 0)


def test_a_slot_that_is_never_reached_adds_nothing() -> None:
    labels = _labels(3)
    labels.usable[:, 1] = False
    rows, head = torch.randn(ROWS, SLOTS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    head_loss(rows, head, labels, None, [1.0] * SLOTS, "acceptance", 0).loss.backward()
    assert rows.grad is not None and rows.grad[:, 0].abs().sum() > 0 and not rows.grad[:, 1:].any()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_weights() -> None:
    labels, head = _labels(4), torch.randn(VOCAB, HIDDEN, requires_grad=True)
    rows = torch.randn(ROWS, SLOTS, HIDDEN).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        done = head_loss(rows, head, labels, None, [1.0] * SLOTS, "acceptance", 3)
        true = head_loss_reference(rows, head, labels, None, [1.0] * SLOTS, "acceptance", 3)
    torch.testing.assert_close(done.loss, true.loss, atol=1e-3, rtol=1e-3)
    mine = torch.autograd.grad(done.loss, (rows, head))
    reference = torch.autograd.grad(true.loss, (rows, head))
    assert mine[0].dtype == torch.bfloat16 and mine[1].dtype == torch.float32
    for own, other in zip(mine, reference, strict=True):
        cosine = torch.nn.functional.cosine_similarity(own.float().flatten(), other.float().flatten(), dim=0)
        assert float(cosine) > 0.999
