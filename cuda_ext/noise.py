"""Counter-based Gumbel noise: the same bits on every device, in any batch, in any order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit counter and a
64-bit key to 128 random bits without state. The counter here is (token // 4, position, choice, stream), the key is
the request's seed, so the noise of one (seed, choice, position, token) never depends on what else is being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specblock.cuda_ext.native import has_kernel
from specblock.cuda_ext.transfer import on_device

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_PASS_VALUES = 1 << 22
"""Noise values computed at a time: a pass works on about ten 64-bit integers per value, 300 MiB at most."""


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 on broadcastable int64 tensors that hold unsigned 32-bit values.

    Args:
        counter: four int64 tensors, each value in [0, 2**32).
        key: two int64 tensors, each value in [0, 2**32).

    Returns:
        Four int64 tensors of random 32-bit words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so the two 32-bit halves are exact.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK32) ^ c1 ^ k0,
            product_1 & _MASK32,
            ((product_0 >> 32) & _MASK32) ^ c3 ^ k1,
            product_0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return [c0, c1, c2, c3]  # four rounds mix every input into every word, so all have the full shape


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token at one position per row.

    Args:
        seed: int64 [N], the request's seed (all 64 bits are used).
        choice: int64 [N], index of the parallel completion of the request.
        position: int64 [N], absolute position of the token that is being chosen.
        vocab_size: number of tokens V.

    Returns:
        float64 [N, V] on the device of ``seed``.

    Source: design section 4.1; Gumbel-max trick (Maddison, Tarlow, Minka, NeurIPS 2014).
    """
    if has_kernel("philox_uniform", seed):
        vectors = (v.contiguous() for v in (seed, choice, position))
        uniform: Tensor = torch.ops.specblock.philox_uniform(*vectors, vocab_size)
    else:
        uniform = philox_uniform(seed, choice, position, vocab_size)
    return uniform.log_().neg_().log_().neg_()  # in place: rows of a large vocabulary are megabytes


def philox_uniform(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """The reference: float64 [N, V] in (0, 1), a pure function of its arguments. See ``gumbel``."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device, dtype=torch.int64)
    seed, choice, position = seed[:, None], choice[:, None], position[:, None]
    words = philox4x32(
        (blocks[None, :], position & _MASK32, choice & _MASK32, torch.zeros_like(position)),
        (seed & _MASK32, (seed >> 32) & _MASK32),
    )
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    # The centre of each of the 2**32 cells: never 0 or 1, so both logarithms are finite.
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


@dataclass(frozen=True, slots=True)
class NoiseRows:
    """Some rows of a store of noise, not copied: ``storage`` float64 [X, V], ``index`` int64 [N]."""

    storage: Tensor
    index: Tensor

    def rows(self) -> Tensor:
        """float64 [N, V]: a copy."""
        return self.storage[self.index]


class NoiseWindow:
    """Gumbel rows of the next few positions of every slot, each computed once and used by drafter and verifier alike.

    A cycle looks at positions ``first .. first + width - 1`` and moves on by the tokens it committed, so most rows
    are already there. Rows of slots with temperature 0 are never read and never computed.
    """

    def __init__(self, num_slots: int, width: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._rows = torch.zeros(num_slots, width, vocab_size, dtype=torch.float64, device=device)
        self._next = [0] * num_slots  # first position not yet computed
        self._width = width

    @property
    def width(self) -> int:
        """Positions available per slot after ``advance``."""
        return self._width

    def reset(self, slot: int) -> None:
        """Forgets everything about a slot (a new request moved in)."""
        self._next[slot] = 0

    def advance(
        self, slots: list[int], first: list[int], seeds: list[int], choices: list[int], count: int | None = None
    ) -> None:
        """Makes positions ``first[b] .. first[b] + count - 1`` of every given slot available.

        Args:
            slots: slots that sample at temperature > 0.
            first: first position needed per slot; must not decrease between resets.
            seeds: 64-bit seed per slot.
            choices: choice index per slot.
            count: positions, at most ``width``; None is all of them.
        """
        count = self._width if count is None else count
        assert count <= self._width, "a window holds no more positions than its width"
        wanted: list[tuple[int, int, int, int]] = []
        for slot, start, seed, choice in zip(slots, first, seeds, choices, strict=True):
            for position in range(max(start, self._next[slot]), start + count):
                wanted.append((slot, position, seed, choice))
            self._next[slot] = max(self._next[slot], start + count)
        if not wanted:
            return
        vocab_size = self._rows.shape[2]
        # Requests that start together want whole windows at once; their scratch memory must not grow with the batch.
        for part in torch.split(on_device(wanted, self._rows.device), max(1, _PASS_VALUES // vocab_size)):
            slot_N, position_N, seed_N, choice_N = part.unbind(1)
            self._rows[slot_N, position_N % self._width] = gumbel(seed_N, choice_N, position_N, vocab_size)

    def rows(self, slots: Tensor, positions: Tensor) -> NoiseRows:
        """Noise rows for ``slots`` and ``positions`` (int64, broadcastable), flattened."""
        index = slots * self._width + positions % self._width
        return NoiseRows(self._rows.flatten(0, 1), index.flatten())

    def rows_from(self, slots: Sequence[int], first: Sequence[int], count: int) -> NoiseRows:
        """``rows`` of ``count`` positions from ``first[b]`` on for each of ``slots``, B * count in all."""
        index = [
            slot * self._width + (start + step) % self._width
            for slot, start in zip(slots, first, strict=True)
            for step in range(count)
        ]
        return NoiseRows(self._rows.flatten(0, 1), on_device(index, self._rows.device))
