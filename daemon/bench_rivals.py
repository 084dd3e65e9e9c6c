"""The drafters that ``bench`` compares: trained alike, each with its published tree and its best fixed one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from specblock.daemon.bench_rows import COST_CHOSEN, PLAIN, TRANSFORMERS, WayName
from specblock.daemon.bench_ways import Question, Way, engine_way, transformers_way
from specblock.daemon.collect import Prompt
from specblock.daemon.cost_profile import profiled_planner
from specblock.daemon.models import in_format_of, load_network, load_target
from specblock.drafter.config import DraftSettings, published_settings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.kinds import new_network
from specblock.drafter.lookup import LookupDrafter
from specblock.drafter.network import DraftNetwork
from specblock.drafter.precision import NumberFormat
from specblock.drafter.weight_bytes import weight_bytes_per_cycle
from specblock.verifier.model import TargetModel

RIVALS, DEMO_DRAFTER = Path("models/rivals"), Path("models/demo-drafter")
TUNED, RANDOM = "tuned.json", "random_weights"
KINDS = ("specblock", "eagle3", "parallel")
LARGEST = {
    "specblock": DraftSettings(blocks=2, leaf_cap=16, node_budget=63),
    "eagle3": DraftSettings(blocks=8, leaf_cap=10, node_budget=63),
    "parallel": DraftSettings(blocks=1, node_budget=63),
}
"""Ceilings between which sizes are chosen per cycle."""
_LOOKUP = DraftSettings(blocks=1, node_budget=10)
_TRIES, _TRIAL_TOKENS, _TRIAL_TEXT = 5, 24, "def mean(values):\n    total = 0.0\n    for value in values:\n"
_LOOKUP_TOKENS = 10  # transformers' own usual setting


def networks(target: TargetModel, directory: Path = RIVALS) -> dict[str, DraftNetwork]:
    """Every rival that is there, by kind; SpecBlock is the demo drafter unless another one lies beside the rivals."""
    places = {kind: directory / kind for kind in KINDS}
    if not places["specblock"].is_dir():
        places["specblock"] = DEMO_DRAFTER
    return {kind: load_network(target, place) for kind, place in places.items() if place.is_dir()}


def tuned_settings(directory: Path = RIVALS) -> dict[str, DraftSettings]:
    """The best fixed trees that ``bench tune`` found on this kind of machine, by kind."""
    path = directory / TUNED
    found: dict[str, Any] = json.loads(path.read_text())["settings"] if path.is_file() else {}
    return {kind: DraftSettings(**{k: _tuples(v) for k, v in fields.items()}) for kind, fields in found.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def settings_json(settings: DraftSettings) -> dict[str, Any]:
    """What ``tuned_settings`` reads."""
    return asdict(settings)


def ways(target: TargetModel, untouched: TargetModel, found: dict[str, DraftNetwork]) -> Iterator[tuple[WayName, Way]]:
    """Every way of answering, named; the order is that of the table. ``untouched`` is transformers' own."""
    yield PLAIN, engine_way(target, None)
    yield TRANSFORMERS, transformers_way(untouched)
    lookup = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
    yield WayName("transformers_prompt_lookup"), transformers_way(untouched, **lookup)
    drafter = LookupDrafter(_LOOKUP, target.device, target.dtype)
    yield WayName("prompt_lookup", None, "fixed"), engine_way(target, drafter)
    yield (
        WayName("prompt_lookup", None, COST_CHOSEN),
        engine_way(target, drafter, profiled_planner(target, drafter, 1, 0)),
    )
    tuned = tuned_settings()
    for kind, network in found.items():
        best = tuned.get(kind, published_settings(kind))
        name = {"eagle3": "eagle3_tuned"}.get(kind, kind)
        for shared in (True, False):
            chosen = replace(best, shared_noise=shared)
            yield WayName(name, shared, "fixed"), engine_way(target, BlockDrafter(network, chosen))
        if kind != "parallel":
            published = {"eagle3": "eagle3"}.get(kind, f"{kind}_published")
            for shared in (True, False):
                chosen = replace(published_settings(kind), shared_noise=shared, noise_scale=best.noise_scale)
                yield WayName(published, shared, "fixed"), engine_way(target, BlockDrafter(network, chosen))
        ceiling = replace(LARGEST[kind], noise_scale=best.noise_scale, rank_head=best.rank_head)
        largest = BlockDrafter(network, ceiling)
        planner = profiled_planner(target, largest, slots=1, seed=0)
        yield WayName(name, True, COST_CHOSEN), engine_way(target, largest, planner)
    if "specblock" in found:
        untrained = BlockDrafter(random_network(target, found["specblock"]), LARGEST["specblock"])
        planner = profiled_planner(target, untrained, slots=1, seed=0)
        yield WayName(RANDOM, True, COST_CHOSEN), engine_way(target, untrained, planner)


def random_network(target: TargetModel, like: DraftNetwork) -> DraftNetwork:
    """A drafter that knows nothing, of another one's shape: what it costs to notice that and stop."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return in_format_of(target, new_network(like.config, target.embedding))


def untouched_target(target: TargetModel) -> TargetModel:
    """transformers' own layers, in the format in which they decode fastest here: its users would run it so."""
    formats = (NumberFormat(torch.float32), NumberFormat(torch.bfloat16))
    loaded = [load_target(target.model_name, one, str(target.device), native=False) for one in formats]
    ways = [transformers_way(one) for one in loaded]
    prompt, how = Prompt("", _TRIAL_TEXT), Question(temperature=0.0, top_p=1.0, new_tokens=_TRIAL_TOKENS)
    # In turns, so that a drift of the machine hits both.
    tried = [[way(prompt, how, 0).seconds for way in ways] for _ in range(_TRIES)]
    shortest = [min(seconds) for seconds in zip(*tried, strict=True)]
    return loaded[shortest.index(min(shortest))]


def weight_bytes(name: WayName, found: dict[str, DraftNetwork]) -> tuple[int, int]:
    """Bytes that one block and every further one of a way's drafter read; zero without weights."""
    kind = name.drafter.removesuffix("_tuned").removesuffix("_published").replace(RANDOM, "specblock")
    if kind not in found:
        return 0, 0
    first, both = (weight_bytes_per_cycle(found[kind], blocks) for blocks in (1, 2))
    return first, both - first


def describe(found: dict[str, DraftNetwork]) -> dict[str, Any]:
    """Facts about the drafters, for the report."""
    tuned = tuned_settings()
    return {
        kind: {
            "parameters": sum(p.numel() for p in network.parameters()),
            "tuned": settings_json(tuned[kind]) if kind in tuned else None,
            "training": _training(RIVALS / kind),
        }
        for kind, network in found.items()
    }


def _training(directory: Path) -> Any:
    path = directory / "training.json"
    return json.loads(path.read_text()) if path.is_file() else None


def warm(target: TargetModel) -> None:
    """Nothing is timed before the target has run once."""
    with torch.inference_mode():
        target.transformers_model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=target.device))
