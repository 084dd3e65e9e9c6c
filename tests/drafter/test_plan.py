"""Plans survive storing, and replayed limits repeat what was recorded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from specblock.drafter.config import DraftSettings
from specblock.drafter.plan import NO_SPECULATION, DraftPlan, FixedLimits, Limits, PlannedLimits

plans = st.builds(
    DraftPlan,
    leaf_caps=st.lists(st.integers(1, 64), max_size=8).map(tuple),
    node_budget=st.integers(1, 256),
)
SCORES = torch.zeros(2, 5)


def sizes_of(limits: Limits, most_blocks: int) -> DraftPlan:
    """Asks as the drafter does."""
    leaf_caps: list[int] = []
    for block in range(most_blocks - 1):
        count = limits.leaves(block, SCORES)
        if count == 0:
            break
        leaf_caps.append(count)
    return DraftPlan(tuple(leaf_caps), limits.nodes(SCORES))


@given(plans)
def test_a_stored_plan_comes_back(plan: DraftPlan) -> None:
    assert DraftPlan.from_list(plan.to_list()) == plan
    assert plan.blocks == 1 + len(plan.leaf_caps)


@given(plans)
def test_a_recorded_plan_is_repeated(plan: DraftPlan) -> None:
    assert sizes_of(PlannedLimits(plan), most_blocks=9) == plan


def test_no_speculation_is_a_plan_without_blocks() -> None:
    assert DraftPlan.from_list(NO_SPECULATION.to_list()) == NO_SPECULATION
    assert NO_SPECULATION.blocks == 0


def test_fixed_limits_are_the_settings() -> None:
    settings = DraftSettings(blocks=3, leaf_cap=7, node_budget=20)
    assert sizes_of(FixedLimits(settings), settings.blocks) == DraftPlan((7, 7), 20)
