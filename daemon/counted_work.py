"""What the products and attentions of some work read and compute, counted where they run; and the calls themselves.

Operations of this project's library and PyTorch's own are both known by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Work(TorchDispatchMode):
    """Counts what the products and attentions inside its context read and compute.

    Attributes:
        weight_bytes: of weights, as they are stored, once per product.
        cache_bytes: of keys and values.
        operations: multiplications and additions.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight_bytes = self.cache_bytes = self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in ("packed_linear", "rotary_linear"):
            self._product(args[0], args[1], args[2])
        elif name == "swiglu":
            x, gate, up, down, inner, outputs = args[:6]
            self._product(x, gate, inner)
            self._product(x, up, inner)
            self._count(down, x.numel() // x.shape[-1] * inner * outputs)
        elif name == "attention_inputs":
            x, query, key, value, query_out, key_out = args[0], *args[3:8]
            self._product(x, query, query_out)
            self._product(x, key, key_out)
            self._product(x, value, key_out)
        elif name == "layer_rest":
            mixed, output, gate, up, down, inner = args[1], args[2], *args[5:9]
            self._rest(mixed.numel() // mixed.shape[-1], output, gate, up, down, inner)
        elif name == "slot_layer":
            self._slot_layer(args[0], result.numel() // result.shape[-1], args[4:9], args[17:19])
            self._rest(result.numel() // result.shape[-1], args[21], *args[24:28])
        elif name == "slot_layers":
            x, weights, head_norms, _, *outputs = args[:6]
            every, each = x.numel() // x.shape[-1], 11 if head_norms else 9
            for first in range(0, len(weights), each):
                # In the last layer only some rows may ask.
                rows = result[0].numel() // x.shape[-1] if first + each == len(weights) else every
                layer = weights[first : first + each]
                self._slot_layer(x, rows, (*layer[1:4], *outputs), args[12:14])
                output, _, gate, up, down = layer[-5:]
                self._rest(rows, output, gate, up, down, args[16])
            for shift in args[19]:
                self._count(shift, every * 2 * x.shape[-1] ** 2)
        elif name == "slot_inputs":
            x, projection, token, hidden = args[0], args[1], args[4], args[9].shape[1]
            if projection is not None:
                self._product(x, projection, hidden)
            self._count(args[3], token.numel() * hidden**2)
            self._count(args[7], token.numel() * hidden**2)
        elif name == "draft_head":
            self._product(args[0], args[3], args[4])
        elif name == "tree_attention" or "scaled_dot_product" in name:
            self._attention(*args[:3])
        elif name == "linear":
            self._count(args[1], args[0].numel() * args[1].shape[0])
        elif name in ("mm", "addmm"):
            left, right = args[-2:]
            self._count(right, left.shape[0] * right.numel())
        return result

    def _slot_layer(self, x: Tensor, asking: int, products: Sequence[Any], seen_by: Sequence[Tensor]) -> None:
        """A layer over slots up to its attention, of whose rows so many ask."""
        (query, key, value, query_out, key_out), (lengths, visible) = products, seen_by
        self._product(x, key, key_out)
        self._product(x, value, key_out)
        self._count(query, asking * x.shape[-1] * query_out)
        seen = int(lengths.sum()) + lengths.numel() * visible.shape[2]
        self.cache_bytes += 2 * seen * key_out * x.element_size()
        self.operations += 4 * query_out * (asking // lengths.numel()) * seen

    def _product(self, x: Tensor, weight: Tensor, outputs: int) -> None:
        self._count(weight, x.numel() * outputs)

    def _rest(self, rows: int, output: Tensor, gate: Tensor, up: Tensor, down: Tensor, inner: int) -> None:
        hidden, width = gate.shape[1], output.shape[1]
        self._count(output, rows * width * hidden)
        self._count(gate, rows * hidden * inner)
        self._count(up, rows * hidden * inner)
        self._count(down, rows * inner * hidden)

    def _count(self, weight: Tensor, multiply_adds: int) -> None:
        self.weight_bytes += weight.numel() * weight.element_size()
        self.operations += 2 * multiply_adds

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.cache_bytes += sum(t.numel() * t.element_size() for t in (key, value))
        self.operations += 4 * query.numel() * key.shape[2]


class Recorded(Work):  # type: ignore[no-untyped-call]
    """Keeps the calls that it counts as well, to make them again by themselves.

    ``draft_head`` picks the best tokens beside its product.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.operations
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.operations > before:
            self._calls.append((func, args, dict(kwargs or {})))
        return result

    def __len__(self) -> int:
        return len(self._calls)

    def again(self) -> None:
        """The same calls with the same tensors. They write to caches where they wrote then, over what came later."""
        for func, args, kwargs in self._calls:
            func(*args, **kwargs)
