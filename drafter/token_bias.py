"""What is added to the head's logits for a kind of text: a row per domain, zero until an update counted one.

Rows belong to domains, so that what helps one kind of text costs the others nothing. Domains are known by a 63-bit hash
of their name, which fits a tensor and so travels with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor, nn

from specblock.cuda_ext.transfer import on_device

MAX_DOMAINS = 31


class TokenBias(nn.Module):
    """Rows of logits by domain.

    Attributes:
        table: [1 + MAX_DOMAINS, Vd]; row 0 belongs to domains without a row of their own and stays zero.
        domains: int64 [1 + MAX_DOMAINS], ``domain_key`` of each row's domain, 0 where there is none.
        stamps: int64 [1 + MAX_DOMAINS], larger where a row was counted later.
    """

    table: Tensor
    domains: Tensor
    stamps: Tensor

    def __init__(self, draft_vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1 + MAX_DOMAINS, draft_vocab_size))
        self.register_buffer("domains", torch.zeros(1 + MAX_DOMAINS, dtype=torch.int64))
        self.register_buffer("stamps", torch.zeros(1 + MAX_DOMAINS, dtype=torch.int64))
        self._row_of: dict[int, int] = {}

    def rows(self, keys: Sequence[int]) -> Tensor | None:
        """int64 [B]: rows of domains given by key; None where all of them are zero."""
        rows = [self._row_of.get(key, 0) for key in keys]
        return on_device(rows, self.table.device) if any(rows) else None

    def of(self, keys: Sequence[int]) -> Tensor | None:
        """Bias [B, Vd] of domains given by key; None where all of it is zero."""
        rows = self.rows(keys)
        return None if rows is None else self.table[rows]

    def row(self, key: int) -> int:
        """The row of a domain that is being counted; with all rows taken the one counted longest ago gives way."""
        if key not in self._row_of:
            free = (self.domains[1:] == 0).nonzero()
            row = 1 + int(free[0] if len(free) else self.stamps[1:].argmin())
            self.table[row] = 0
            self.domains[row] = key
            self.refresh()
        self.stamps[self._row_of[key]] = self.stamps.max() + 1
        return self._row_of[key]

    def refresh(self) -> None:
        """Reads the rows' owners anew after they were loaded."""
        owners = [] if self.domains.is_meta else self.domains.tolist()  # a shape alone has no owners
        self._row_of = {key: row for row, key in enumerate(owners) if key}


def domain_key(domain: str) -> int:
    """63-bit hash of a domain's name, never 0."""
    return (int.from_bytes(blake2b(domain.encode(), digest_size=8).digest(), "big") >> 1) or 1
