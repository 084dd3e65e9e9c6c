"""Offline training: batches of windows, warm-up and decay, exact resume, held-out acceptance by exact replay.

Source: method reference section 6; the loop trains on whatever windows it is given, so the online update uses it too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specblock.drafter.batches import batches
from specblock.drafter.checkpoint import load_weights
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.kinds import new_network
from specblock.drafter.loss import LossReport, LossSettings, training_loss
from specblock.drafter.muon import Muon
from specblock.drafter.network import DraftNetwork
from specblock.drafter.precision import NumberFormat, fast_bfloat16
from specblock.drafter.replay import acceptance_length, replay
from specblock.drafter.window import Window, collate

_NOT_HIDDEN = ("lm_head.", "input_layer.position_queries.", "rank_head.")
"""Matrices that Muon is not meant for: outputs and tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """One training run.

    Attributes:
        steps: optimiser steps; the learning rate decays linearly to ``final_rate`` of its peak over them.
        batch_windows: conversations per step.
        learning_rate: peak rate of AdamW, which moves the head, norms, tables and everything not a hidden matrix.
        matrix_rate: peak rate of Muon (orthogonalised momentum), which moves the hidden matrices; 0 leaves them to
            AdamW as the published recipe does. Not yet compared under equal conditions.
        patterns: parameters that move, as shell patterns over their names.
        blocks: drafter blocks per step (test-time training).
        autocast: bfloat16 matrix products with float32 master weights; None: where they are the faster ones.
    """

    steps: int
    batch_windows: int = 8
    learning_rate: float = 5e-4
    matrix_rate: float = 0.0
    warmup_steps: int = 50
    final_rate: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5
    blocks: int = 3
    patterns: tuple[str, ...] = ("*",)
    loss: LossSettings = field(default_factory=LossSettings)
    autocast: bool | None = None
    seed: int = 0


class TrainRun:
    """A resumable training run over a float32 master model. ``step`` is one optimiser step."""

    rehearses = True

    def __init__(self, model: DraftNetwork, settings: TrainSettings) -> None:
        """Raises:
        ValueError: no parameter matches ``settings.patterns``.
        """
        self.model, self.settings = model, settings
        self.done = 0
        self.positions = 0
        self._generator = torch.Generator().manual_seed(settings.seed)
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            moves = any(fnmatch(name, pattern) for pattern in settings.patterns)
            parameter.requires_grad_(moves)
            if moves:
                hidden = parameter.ndim == 2 and not name.startswith(_NOT_HIDDEN) and settings.matrix_rate > 0
                (matrices if hidden else others).append(parameter)
        if not matrices and not others:
            raise ValueError(f"no drafter parameter matches {settings.patterns}")
        self._parameters = matrices + others
        device = model.norm.weight.device
        self._autocast = fast_bfloat16(device) if settings.autocast is None else settings.autocast
        # (optimiser, its peak rate)
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        if others:
            adam = torch.optim.AdamW(
                others, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
            )
            self._optimizers.append((adam, settings.learning_rate))
        if matrices:
            muon = Muon(matrices, lr=settings.matrix_rate, weight_decay=settings.weight_decay)
            self._optimizers.append((muon, settings.matrix_rate))

    def rate(self) -> float:
        """Learning-rate factor of the next step: linear warm-up, linear decay."""
        warm = min(1.0, (self.done + 1) / max(1, self.settings.warmup_steps))
        left = max(0.0, 1 - self.done / max(1, self.settings.steps))
        return warm * (self.settings.final_rate + (1 - self.settings.final_rate) * left)

    def step(self, windows: Sequence[Window]) -> LossReport:
        """Trains on one batch of windows."""
        device = self.model.norm.weight.device
        batch = collate(windows, device)
        width = self.model.config.num_slots
        consumed = torch.randint(1, width + 1, (self.settings.blocks - 1,), generator=self._generator).tolist()
        for optimizer, peak in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = peak * self.rate()
        with torch.autocast(device.type, torch.bfloat16, enabled=self._autocast):
            report = training_loss(self.model, batch, consumed, self.settings.loss, self._generator)
        torch.autograd.backward(report.total)
        torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip)
        for optimizer, _ in self._optimizers:
            optimizer.step()
        self.done += 1
        self.positions += int(batch.valid.sum())
        return report

    def batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Endless batches from step ``done`` on; the order is a function of the seed and the step alone."""
        return batches(windows, self.settings.batch_windows, self.settings.seed, self.done)

    def save(self, directory: Path) -> None:
        """Writes everything an exact resume needs (no pickles)."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        for which, (optimizer, _) in enumerate(self._optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{which}.{index}.{key}": value for key, value in state.items()}
        tensors["generator"] = self._generator.get_state()
        save_file(tensors, directory / "run.partial")
        facts = {
            "done": self.done,
            "positions": self.positions,
            "autocast": self._autocast,
            "settings": asdict(self.settings),
        }
        (directory / "run.json.partial").write_text(json.dumps(facts))
        (directory / "run.partial").replace(directory / "run.safetensors")
        (directory / "run.json.partial").replace(directory / "run.json")

    def resume(self, directory: Path) -> bool:
        """Continues a saved run bit for bit; False if there is none.

        Raises:
            ValueError: the saved run had other settings.
        """
        if not (directory / "run.json").exists():
            return False
        facts = json.loads((directory / "run.json").read_text())
        if facts["settings"] != json.loads(json.dumps(asdict(self.settings))):
            raise ValueError(f"{directory}: saved run has other settings; use another directory or the same options")
        tensors = load_file(directory / "run.safetensors")
        load_weights(self.model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, str(directory))
        for which, (optimizer, _) in enumerate(self._optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{which}."):
                    _, _, index, key = name.split(".")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self._generator.set_state(tensors["generator"])
        self.done, self.positions, self._autocast = facts["done"], facts["positions"], facts["autocast"]
        return True


def heldout_acceptance(
    model: DraftNetwork, windows: Sequence[Window], settings: DraftSettings, numbers: NumberFormat
) -> dict[str, float]:
    """Acceptance length per domain by exact replay of ``model``, as engines would run it in ``numbers``."""
    serving = new_network(model.config, model.embedding)
    serving.load_state_dict(model.state_dict())
    serving.refresh_vocabulary()
    drafter = BlockDrafter(serving.serve_in(numbers).eval(), settings)
    domains = sorted({w.domain for w in windows})
    return {d: acceptance_length(replay(drafter, [w for w in windows if w.domain == d])) for d in domains}


def train_to_deadline(
    run: TrainRun,
    windows: Sequence[Window],
    directory: Path,
    deadline_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    save_every_s: float = 120.0,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every_s: float = 600.0,
) -> None:
    """Trains until the steps or the time are used up; saves regularly, logs a line per save.

    ``evaluate`` replays held-out conversations, which takes longer than a save and so happens less often.
    Without a reachable step count, set ``steps`` from the measured speed, so that the rate has decayed at the end.
    """
    saved = begun = evaluated = clock()
    first = run.positions
    losses: list[float] = []
    for batch in run.batches(windows):
        report = run.step(batch)
        losses.append(float(report.draft))
        now = clock()
        over = run.done >= run.settings.steps or now >= deadline_s
        if over or now - saved >= save_every_s:
            run.save(directory)
            saved = clock()
            speed = (run.positions - first) / max(1e-9, now - begun)
            mean = math.fsum(losses) / len(losses)
            line = f"step {run.done}/{run.settings.steps} loss {mean:.3f} {speed:.0f} positions/s"
            top1 = " ".join(f"{x:.2f}" for x in report.slot_top1[0].tolist())
            line = f"{line} | top-1 by slot {top1}"
            if evaluate is not None and clock() - evaluated >= evaluate_every_s:
                held = " ".join(f"{d} {a:.3f}" for d, a in evaluate().items())
                line, evaluated = f"{line} | held-out acceptance {held}", clock()
            say(line)
            losses.clear()
        if over:
            return
