"""The trainer's work as a plain class: online updates, exact replay, versions on disk. The Ray actor is a shell."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specblock.bandit.actions import CompareReport, Focus, PairedReplay, ParityReport, ParityRow, TrainReport
from specblock.bandit.config import Arm
from specblock.daemon.config import TrainerConfig
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.training_mix import meant, mixed
from specblock.drafter.checkpoint import load_drafter, load_weights, save_drafter, stored
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.kinds import loss_settings, new_network, training_blocks
from specblock.drafter.network import DraftNetwork
from specblock.drafter.plan import DraftPlan, Limits, PlannedLimits
from specblock.drafter.precision import NumberFormat
from specblock.drafter.replay import Replay, replay
from specblock.drafter.train import TrainSettings
from specblock.drafter.update import UpdateRun, counts_beside, update_run
from specblock.drafter.window import Window

log = logging.getLogger(__name__)
Weights = dict[str, Tensor]
_SPOT_CHECKED = 4


@dataclass(slots=True)
class _Candidate:
    """An update in progress: its run over float32 master weights, and what it came from."""

    run: UpdateRun
    arm: Arm
    base_version: str
    cutoff_time_s: float
    start: Weights

    def taken(self) -> Weights:
        """What would serve: between the weights it started from and the trained ones, as far as the arm says."""
        trained = self.run.model.state_dict()
        return trained | {name: old.lerp(trained[name], self.arm.blend) for name, old in self.start.items()}


class Trainer:
    """Trains candidates from recorded windows and scores versions by exact replay.

    Args:
        embedding: the target's input embedding [V, H]; drafters train and are replayed where it is.
        registry: versions on disk; this process is its only writer.
        settings: tree settings of the serving engines, so that replay proposes the same trees.
        numbers: format the engines run drafters in.
        config: conversations per optimiser step, versions kept.
    """

    def __init__(
        self,
        embedding: Tensor,
        registry: DrafterRegistry,
        settings: DraftSettings,
        numbers: NumberFormat,
        config: TrainerConfig,
    ) -> None:
        self._embedding, self.registry, self._settings = embedding, registry, settings
        self._numbers, self._config = numbers, config
        # Weights that are bfloat16 numbers are what native products read at half the bytes, in float32 too: a version
        # stored in float32 would draft more slowly than the one it replaces.
        self._stored = torch.bfloat16 if numbers.dtype == torch.float32 else numbers.dtype
        self._candidates: dict[str, _Candidate] = {}

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        windows: Sequence[Window],
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        """Runs steps of ``arm`` until ``fraction`` of them are done; ``resume`` continues the micro-profile.

        ``focus`` says what the update is meant for, by domain; see ``training_mix``.

        Raises:
            ValueError: no training windows, or nothing to resume.
        """
        if not windows:
            raise ValueError("no training windows")
        begin = time.perf_counter()
        name = f"candidate-{decision_id}"
        if not resume:
            self._candidates.clear()  # one update at a time: what is left belongs to one that was forgotten in a crash
            self._candidates[name] = self._start(arm, base_version, windows, focus)
        elif name not in self._candidates:
            raise ValueError(f"{name} is not in memory (the trainer was restarted): the update is abandoned")
        candidate = self._candidates[name]
        until = max(1, round(arm.steps * fraction))
        before = candidate.run.positions
        chosen = mixed(windows, focus) if candidate.run.rehearses else meant(windows, focus)
        if not chosen:
            raise ValueError("no training windows of the kinds of text that this update is meant for")
        for batch in candidate.run.batches(chosen):
            if candidate.run.done >= until:
                break
            candidate.run.step(batch)
        candidate.cutoff_time_s = max(candidate.cutoff_time_s, *(w.time_s for w in windows))
        seconds = time.perf_counter() - begin
        return TrainReport(
            candidate_version=name,
            positions=candidate.run.positions - before,
            train_s=seconds,
            device_s=seconds,
            cutoff_time_s=candidate.cutoff_time_s,
        )

    def parity(self, version: str, windows: Sequence[Window]) -> ParityReport:
        """Replays ``version`` on windows it served live; live and replayed cycles must be the same."""
        begin = time.perf_counter()
        served = [w for w in windows if w.drafter_version == version and w.accepted]
        rows = tuple(
            ParityRow(
                conversation_id=w.conversation_id,
                tokens=sum(w.accepted) + len(w.accepted),
                live_cycles=len(w.accepted),
                replay_cycles=r.cycles,
            )
            for w, r in zip(served, self._replay(version, served, recorded=True), strict=True)
        )
        return ParityReport(rows=rows, device_s=time.perf_counter() - begin)

    def compare(self, old: str, new: str, windows: Sequence[Window], cycle_s: float) -> CompareReport:
        """Replays both versions on the same windows, with the tree sizes that live cycles used most.

        Windows that ``new`` served repeat their own sizes, since its cycles are then compared with the live ones. What
        ``old`` served with those sizes all along needs no replay: its live cycles are what a replay would give. Every
        parity check makes sure of that, and here a few do, lest a fault of now speaks for the new version. Cycle time
        is the same: neither the architecture nor the sizes change.
        """
        begin = time.perf_counter()
        sizes = usual_sizes(windows)
        limits = limits_of(sizes)
        sized = [w if w.drafter_version == new else replace(w, plans=()) for w in windows]
        known = {
            i: len(w.accepted) for i, w in enumerate(windows) if w.drafter_version == old and _served_with(w, sizes)
        }
        some = list(known)[-_SPOT_CHECKED:]
        checked = self._cycles(old, sized, some, limits)
        cycles_old = dict(known) if checked == {i: known[i] for i in some} else checked
        cycles_old |= self._cycles(old, sized, [i for i in range(len(windows)) if i not in cycles_old], limits)
        rows = tuple(
            PairedReplay(
                conversation_id=w.conversation_id,
                domain=w.domain,
                time_s=w.time_s,
                tokens=w.num_generated,
                cycles_old=cycles_old[i],
                cycles_new=one.cycles,
                live_version=w.drafter_version,
                live_cycles=len(w.accepted),
            )
            for i, (w, one) in enumerate(zip(windows, self._replay(new, sized, limits, recorded=True), strict=True))
        )
        return CompareReport(rows=rows, cycle_s_old=cycle_s, cycle_s_new=cycle_s, device_s=time.perf_counter() - begin)

    def store(self, name: str, decision_id: str) -> str:
        """Writes a candidate to the registry, where the oldest versions make room; returns its version name."""
        candidate = self._candidates[name]

        def write(directory: Path) -> None:
            taken = self._copy(candidate, torch.float32) if candidate.start else candidate.run.model
            save_drafter(taken, directory, self._stored)

        metadata = {
            "decision_id": decision_id,
            "arm": candidate.arm.name,
            "steps": candidate.run.done,
            "positions": candidate.run.positions,
        }
        fingerprint = candidate.run.model.config.target_fingerprint
        version = self.registry.save(
            candidate.arm.name, candidate.base_version, write, metadata, target_fingerprint=fingerprint
        )
        try:
            deleted = self.registry.prune(self._config.keep_versions)
        except OSError as error:  # what is stored is stored
            log.warning("the oldest drafter versions could not be deleted: %s", error)
        else:
            if deleted:
                log.info("the oldest drafter versions were deleted: %s", ", ".join(deleted))
        return version

    def weights(self, version: str) -> Weights:
        """State of a version in the serving type, ready to travel."""
        return {name: value.cpu().contiguous() for name, value in self._serving(version).state_dict().items()}

    def versions(self) -> tuple[str, ...]:
        """Stored versions that may serve again: the base, then the newest first; not what was rolled back by hand."""
        base, *others = self.registry.names()
        withdrawn = self.registry.withdrawn()
        return tuple(name for name in (base, *reversed(others)) if name not in withdrawn)

    def discard(self, name: str) -> None:
        """Forgets a candidate; unknown names are fine."""
        self._candidates.pop(name, None)

    def _start(self, arm: Arm, base_version: str, windows: Sequence[Window], focus: Mapping[str, Focus]) -> _Candidate:
        model = load_drafter(
            self.registry.path(base_version),
            self._embedding.float(),
            dtype=torch.float32,
            device=self._embedding.device,
        )
        settings = TrainSettings(
            steps=arm.steps,
            batch_windows=self._config.batch_windows,
            learning_rate=arm.learning_rate,
            matrix_rate=arm.matrix_rate,
            warmup_steps=max(1, arm.steps // 20),
            patterns=arm.patterns,
            blocks=training_blocks(model.config.kind, self._settings.blocks),
            loss=loss_settings(model.config.kind, "acceptance", 1.0),
        )
        if counts_beside(arm.patterns) and model.has_chains:
            model.token_pairs.count({w.conversation_id: w for w in mixed(windows, focus)}.values())
        run = update_run(model.train(), settings)
        moving = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        start = moving if arm.blend < 1 else {}
        return _Candidate(run, arm, base_version, max(w.time_s for w in windows), start)

    def _cycles(
        self, version: str, windows: Sequence[Window], chosen: Sequence[int], limits: Limits | None
    ) -> dict[int, int]:
        """Cycles that some of the windows take, by their numbers."""
        replayed = self._replay(version, [windows[i] for i in chosen], limits, recorded=True)
        return {i: one.cycles for i, one in zip(chosen, replayed, strict=True)}

    def _replay(
        self, version: str, windows: Sequence[Window], limits: Limits | None = None, recorded: bool = False
    ) -> list[Replay]:
        if not windows:
            return []
        drafter = BlockDrafter(self._serving(version).eval(), self._settings)
        return replay(drafter, windows, limits=limits, recorded=recorded)

    def _serving(self, version: str) -> DraftNetwork:
        candidate = self._candidates.get(version)
        if candidate is None:
            path = self.registry.path(version)
            model = load_drafter(path, self._embedding, dtype=self._numbers.dtype, device=self._embedding.device)
            return model.serve_in(self._numbers)
        model = self._copy(candidate, self._stored)  # what is judged is what will serve
        return model.to(self._embedding.device).serve_in(self._numbers)

    def _copy(self, candidate: _Candidate, dtype: torch.dtype) -> DraftNetwork:
        """A network of its own with what would serve of a candidate, whose weights are numbers of ``dtype``."""
        copy = new_network(candidate.run.model.config, self._embedding)
        load_weights(copy, stored(candidate.taken(), dtype), candidate.base_version)
        return copy


def _served_with(window: Window, sizes: tuple[int, ...]) -> bool:
    """Whether every cycle was live, with these tree sizes (empty: the configured ones, which are not recorded)."""
    return bool(window.accepted) and set(window.plans) == ({sizes} if sizes else set())


def usual_sizes(windows: Sequence[Window]) -> tuple[int, ...]:
    """The tree sizes that most live cycles with drafts used; empty if none is recorded or nothing was drafted."""
    counts: Counter[tuple[int, ...]] = Counter(plan for w in windows for plan in w.plans if plan[0])
    return max(counts.items(), key=lambda item: (item[1], item[0]))[0] if counts else ()


def limits_of(sizes: tuple[int, ...]) -> Limits | None:
    """Trees of these sizes; None: of the configured ones."""
    return PlannedLimits(DraftPlan.from_list(sizes)) if sizes else None
