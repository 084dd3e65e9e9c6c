"""Weight bytes that a cycle's drafting reads: at small row counts that is what a forward costs on a GPU.

Source: method reference section 8 (0.445 of EAGLE-3's at the Llama-3.1-8B shape).
"""

from __future__ import annotations

from specblock.drafter.layers import Linear
from specblock.drafter.network import DraftNetwork


def weight_bytes_per_cycle(network: DraftNetwork, blocks: int) -> int:
    """Bytes of the parameters, as they are stored, read by one forward of block 1 and ``blocks - 1`` later ones.

    Later blocks do not read the projection of the target's features. The embedding is a lookup, not a product.

    Args:
        network: on any device, ``meta`` included.
        blocks: drafter forwards per cycle.
    """
    every = {name: p.numel() * p.element_size() for name, p in network.named_parameters()}
    packed = {f"{name}.weight": m.num_bytes for name, m in network.named_modules() if isinstance(m, Linear)}
    every |= {name: size for name, size in packed.items() if name in every}
    first_only = sum(size for name, size in every.items() if name.startswith(network.feature_projection))
    return blocks * sum(every.values()) - (blocks - 1) * first_only
