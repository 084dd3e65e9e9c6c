"""What extending draft trees has brought, measured: drafts that only a later block can have proposed, and the time."""

from __future__ import annotations

from collections.abc import Sequence

from specblock.daemon.planner_types import Cycle, CycleResult
from specblock.drafter.survival import PathNodes, extra_tokens, first_blocks

_MOST_S = 8.0  # times a verification: one stall of the machine says nothing about extending


def brought(cycle: Cycle, result: CycleResult) -> list[float]:
    """Accepted drafts that only each later block of a cycle can have brought, summed over its requests."""
    growth, tree, offers = cycle.growth, result.tree, result.offers
    if not growth.leaf_caps:
        return []
    assert tree is not None and offers is not None and result.accepted_rows is not None
    widths = growth.widths[: 1 + len(growth.leaf_caps)]
    if len(widths) == len(growth.leaf_caps):  # nobody asked about the last block
        widths.append(offers.token.shape[1] - sum(widths))
    # Trees and paths are there for all requests of the cycle, proposals only for those that drafted.
    drafted = [b for b, yes in enumerate(cycle.speculate) if yes]
    paths = PathNodes(tree.parent[drafted], tree.token[drafted], result.accepted_rows[drafted])
    first = first_blocks(paths, offers, widths)
    return extra_tokens(first, [result.num_accepted[b] for b in drafted], len(growth.leaf_caps))


def compare(cycle: Cycle, result: CycleResult, extra: Sequence[float]) -> None:
    """Tells every question that chose to extend what that has saved over stopping.

    Args:
        cycle: whose extensions they are.
        result: what the cycle did.
        extra: ``brought`` of it. All that came after an extension counts for it, and all its time, but for thinking.
    """
    drafted_s = result.draft_s if cycle.spent_s is None else cycle.spent_s
    for made in cycle.extensions:
        took_s = drafted_s - cycle.thought_s - made.at_s + result.verify_s
        took_s = min(took_s, _MOST_S * made.stop_verify_s)
        brought_s = sum(extra[made.block :]) / cycle.tokens_per_s
        made.question.turned_out(made.expected_s, brought_s - took_s + made.stop_verify_s)
