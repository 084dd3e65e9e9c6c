"""The daemon's own parts for ``bench breakeven``: target, trainer over a registry, an engine to swap into."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from specblock.bandit.config import Arm, PolicyConfig
from specblock.bandit.decision import Target
from specblock.bandit.reach import training_focus
from specblock.daemon.breakeven import Update
from specblock.daemon.collect import CollectSettings, collect, read_prompts
from specblock.daemon.config import NOTHING_TO_ADAPT, DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.cost_profile import measure as measure_cost
from specblock.daemon.cycle_cost import CycleCost
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.engine_host import EngineHost
from specblock.daemon.errors import ConfigError, DependencyError
from specblock.daemon.messages import RequestStats
from specblock.daemon.models import draft_settings, format_of, load_target, serving_drafter, settle_dtype
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.trainer import Trainer, limits_of, usual_sizes
from specblock.daemon.windows import WindowLimits, WindowStore
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.plan import DraftPlan
from specblock.drafter.replay import acceptance_length, replay
from specblock.drafter.window import Window

_TRAIN_SLOTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        prompts: directory with DOMAIN.train.jsonl and DOMAIN.heldout.jsonl.
        conversations, heldout: per kind of text; held-out prompts are the last of their file.
        tokens: generated per conversation, at most.
    """

    prompts: Path
    domains: tuple[str, ...] = ("python", "manual", "cpp", "javascript")
    conversations: int = 128
    heldout: int = 56
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 1

    def asked(self, **sizes: int | None) -> Sizes:
        """With the fields that are not None."""
        changes: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        return replace(self, **changes)

    def facts(self) -> dict[str, str | float]:
        """What a figure measured with them depends on."""
        return {
            "conversations": self.conversations,
            "heldout": self.heldout,
            "new_tokens": self.tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def adaptable(path: Path, sizes: Sizes) -> DaemonConfig:
    """The settled configuration in ``path``, if there is something to adapt and every file of prompts is there.

    Raises:
        ConfigError: there is nothing to adapt.
        DependencyError: a file of prompts is missing.
    """
    config = settle_dtype(load_config(path))
    if not config.drafter.has_weights:
        raise ConfigError(f"drafter.kind: {config.drafter.kind} cannot be updated: {NOTHING_TO_ADAPT}")
    for name in (f"{domain}.{side}.jsonl" for domain in sizes.domains for side in ("train", "heldout")):
        if not (sizes.prompts / name).is_file():
            raise DependencyError(f"{sizes.prompts / name}: no such file of prompts")
    return config


class Stage:
    """Target, trainer and an idle serving engine over a registry of their own."""

    def __init__(self, config: DaemonConfig, policy: PolicyConfig, sizes: Sizes, state: Path) -> None:
        """Loads everything; ``state`` is an empty directory for the registry."""
        assert config.drafter.path is not None
        self.config, self.policy, self.sizes = config, policy, sizes
        self.target = load_target(config.target.source, format_of(config), config.target.device, config.target.revision)
        registry = DrafterRegistry(state)
        self.base = registry.import_base(Path(config.drafter.path))
        drafter = serving_drafter(config, self.target, registry.path(self.base))
        assert isinstance(drafter, BlockDrafter)
        self.drafter = drafter
        self.settings = draft_settings(config)
        embedding = self.target.embedding.to(config.trainer.device, copy=True)
        self.trainer = Trainer(embedding, registry, self.settings, format_of(config), config.trainer)
        slots = EngineSettings(slots=config.engine.slots, capacity_tokens=config.target.max_context_tokens)
        engine = Engine(self.target, drafter, slots, time.perf_counter, drafter_version=self.base)
        store = WindowStore(WindowLimits(budget_bytes=config.windows.budget_bytes), time.time)
        self.host = EngineHost(engine, store, config.engine.stream_interval_s, config.engine.max_waiting)

    def cycle_s(self) -> float:
        """Device-seconds of one request's cycle with every slot busy, from the curve measured now."""
        slots, settings = self.config.engine.slots, self.settings
        cost = CycleCost(measure_cost(self.target, self.drafter, slots, time.perf_counter))
        plan = DraftPlan((settings.leaf_cap,) * (settings.blocks - 1), settings.node_budget)
        return cost.cycle_s(plan, slots, slots) / slots

    def training(self, domain: str) -> list[Window]:
        """Conversations to train on, as fast as the target makes them: the text does not depend on drafts."""
        prompts = read_prompts(self.sizes.prompts / f"{domain}.train.jsonl")
        chosen = Random(self.sizes.seed).sample(prompts, min(self.sizes.conversations, len(prompts)))
        settings = self._collecting(_TRAIN_SLOTS, self.sizes.seed, heldout=False)
        return [window for window, _ in collect(self.target, chosen, settings, time.time)]

    def heldout(self, domain: str) -> list[tuple[Window, RequestStats]]:
        """Conversations to judge on, served by the base version in the daemon's slots.

        From the end of the file: its first prompts are those of the demo, on which the arms' rates were chosen.
        """
        prompts = read_prompts(self.sizes.prompts / f"{domain}.heldout.jsonl")[-self.sizes.heldout :]
        settings = self._collecting(self.config.engine.slots, self.sizes.seed + 1, heldout=True)
        return list(collect(self.target, prompts, settings, time.perf_counter, self.drafter, self.base))

    def update(
        self, domain: str, arm: Arm, windows: Sequence[Window], judged: Sequence[Window], cycle_s: float
    ) -> Update:
        """One update from its trial to the swap, then back to the base."""
        trainer, base = self.trainer, self.base
        key = f"{domain}-{arm.name}"
        focus = training_focus((Target(domain=domain, share=1.0, drop=0.0, drop_se=0.0),), self.policy.min_drop)
        probe = trainer.train(key, arm, base, self.policy.probe_fraction, False, windows, focus)
        trial = trainer.compare(base, probe.candidate_version, judged, cycle_s)
        rest = trainer.train(key, arm, base, 1.0, True, windows, focus)
        final = trainer.compare(base, rest.candidate_version, judged, cycle_s)
        begin = time.perf_counter()
        version = trainer.store(rest.candidate_version, key)
        weights = trainer.weights(version)
        publish_s = time.perf_counter() - begin
        stall_s = self.host.swap(version, weights).stall_s
        own = [w for w in judged if w.domain == domain]
        # What serves now, through the engine's own drafter: the same conversations must take the same cycles.
        again = replay(self.drafter, [replace(w, plans=()) for w in own], limits=limits_of(usual_sizes(judged)))
        cycles = {row.conversation_id: row.cycles_new for row in final.rows}
        same = sum(r.cycles == cycles[r.conversation_id] for r in again)
        self.host.swap(base, trainer.weights(base))
        trainer.discard(rest.candidate_version)
        return Update(
            domain=domain,
            arm=arm.name,
            probe=probe,
            rest=rest,
            trial=trial,
            final=final,
            stall_s=stall_s,
            publish_s=publish_s,
            accepted=(acceptance_length(own), acceptance_length(again)),
            served_as_judged=same / len(own),
        )

    def _collecting(self, slots: int, seed: int, heldout: bool) -> CollectSettings:
        return CollectSettings(
            max_tokens=self.sizes.tokens,
            temperatures=(self.sizes.temperature,),
            top_p=self.sizes.top_p,
            slots=slots,
            seed=seed,
            top_k=self.config.windows.top_k,
            heldout=heldout,
        )
