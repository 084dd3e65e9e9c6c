"""The numbers of the modelled world, each with its origin; other fitted ones can be loaded from JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from specblock.bandit.codec import loads
from specblock.bandit.config_checks import at_least, not_negative, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCurve:
    """Acceptance length on one kind of text: of the base drafter, and the most that training can reach."""

    base: float
    ceiling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCurve:
    """What one complete update does.

    Attributes:
        steps: of the update that the other numbers describe; a policy's arm may take more or fewer.
        train_s: device-seconds of all these steps.
        gap_closed: share of the gap to what the arm can reach that an update on nothing but one kind of text closes.
        reach: share of the gap between base and ceiling that the arm can ever close.
        forgetting: relative loss of acceptance on kinds of text that it did not train on.
    """

    steps: int
    train_s: float
    gap_closed: float
    reach: float = 1.0
    forgetting: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One machine, one target, one drafter.

    Attributes:
        origin: where the numbers come from, by name.
        kinds: kinds of text.
        usual: the kind that scenarios begin with.
        new: the kind that they bring.
        arms: by the names that the policy's arms have.
        request_tokens: committed tokens of a request.
        cycle_s: device-seconds of one cycle of one request, as accounted with several requests at a time.
        replay_s_per_token: device-seconds of replaying one version on one token.
        stall_s: serving stall of a swap.
        positions_per_step: training positions that one optimiser step processes.
        steps_scale: curvature of the gain over the share of steps: large is linear, small saturates early.
        cycles_sd: relative scatter of a request's cycles around its kind's mean.
        paired_sd: relative scatter of the difference in cycles between a version and its complete update.
        luck_sd: relative scatter of what an update closes of its gap.
        fault_loss: relative loss of live acceptance while something is broken.
        train_windows: newest training conversations that an update trains on.
        heldout_windows: newest held-out conversations that a comparison replays.
        parity_windows: newest conversations that a parity check replays.
        kept_windows: newest conversations that are kept at all.
        heldout_fraction: share of conversations kept out of training.
    """

    origin: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, KindCurve]
    arms: dict[str, ArmCurve]
    usual: str
    new: str
    request_tokens: int = 64
    cycle_s: float
    replay_s_per_token: float
    stall_s: float = 0.02
    positions_per_step: int = 512
    steps_scale: float = 4.0
    cycles_sd: float = 0.15
    paired_sd: float = 0.085
    luck_sd: float = 0.25
    fault_loss: float = 0.2
    train_windows: int = 160
    heldout_windows: int = 128
    parity_windows: int = 32
    kept_windows: int = 1000
    heldout_fraction: float = 0.3

    def __post_init__(self) -> None:
        for name in ("usual", "new"):
            kind = getattr(self, name)
            require(kind in self.kinds, f"curves.{name}", f"one of {', '.join(self.kinds)}", kind)
        require(self.usual != self.new, "curves.new", "another kind of text than curves.usual", self.new)
        require(bool(self.arms), "curves.arms", "at least one arm", self.arms)
        for name, kind in self.kinds.items():
            path = f"curves.kinds.{name}"
            at_least(path, 1, base=kind.base)
            at_least(path, kind.base, ceiling=kind.ceiling)
        for name, arm in self.arms.items():
            path = f"curves.arms.{name}"
            at_least(path, 1, steps=arm.steps)
            positive(path, train_s=arm.train_s)
            for field_name in ("gap_closed", "reach", "forgetting"):
                value = getattr(arm, field_name)
                require(0 <= value <= 1, f"{path}.{field_name}", "between 0 and 1", value)
        positive("curves", cycle_s=self.cycle_s, steps_scale=self.steps_scale, cycles_sd=self.cycles_sd)
        not_negative("curves", replay_s_per_token=self.replay_s_per_token, stall_s=self.stall_s)
        not_negative("curves", paired_sd=self.paired_sd, luck_sd=self.luck_sd)
        require(0 < self.fault_loss < 1, "curves.fault_loss", "strictly between 0 and 1", self.fault_loss)
        fraction = self.heldout_fraction
        require(0 < fraction < 1, "curves.heldout_fraction", "strictly between 0 and 1", fraction)
        for name in ("request_tokens", "positions_per_step", "train_windows", "heldout_windows", "parity_windows"):
            at_least("curves", 1, **{name: getattr(self, name)})
        at_least("curves", self.heldout_windows, kept_windows=self.kept_windows)

    def progress(self, fraction: float) -> float:
        """Gain of ``fraction`` of an update's steps, in gains of the whole; above 1 if it takes more steps."""
        return math.expm1(-fraction / self.steps_scale) / math.expm1(-1 / self.steps_scale)

    def floor(self, kind: str) -> float:
        """Acceptance length below which forgetting cannot push ``kind``."""
        return max(1.0, 0.85 * self.kinds[kind].base)


def demo_curves() -> Curves:
    """The demo models on one core, as far as they were measured; ``origin`` says what was and what is assumed."""
    return Curves(
        origin={
            "seconds": (
                "docs/results/breakeven.json (commit b7ae7b9, one thread, bfloat16), times 2.49: a cycle then takes "
                "13.2 ms, and 1.6 requests a second keep a device busy for two thirds"
            ),
            "kinds": (
                "the same: acceptance length of the drafter that knows python only. Ceilings are assumed: python's "
                "level for the others, and nothing to learn of python"
            ),
            "arms.full": (
                "the same, 40 steps and half of the way, three quarters of them on cpp: 1.68 to 2.05 there, so 0.56 of "
                "the assumed gap is closed "
                "(0.31 on manual, 0.17 on javascript); 51.0 s of training on average. Python lost 1.1 % to an update "
                "meant for manual and gained 0.4 and 1.8 % of those for javascript and cpp; a loss of 0.5 % is taken"
            ),
            "arms.statistics": (
                "an experiment on the demo drafter of then, no command repeats it: +3.5 % on cpp from 48 conversations "
                "(0.062 of 0.071 within reach); its second use adds next to nothing. A position costs a fifth of what "
                "training costs it"
            ),
            "arms.head": (
                "docs/results/breakeven.json: 1.68 to 1.84 on cpp, so 0.24 of the gap, in 8.8 s. That it reaches 0.3 "
                "of the gap is assumed; python lost 1.8 to 4.7 % there, 3 % are taken"
            ),
            "cycle_s": "docs/results/breakeven.json: 5.30 ms, times 2.49",
            "replay_s_per_token": (
                "the same: 1.0 s for 16 conversations of 64 tokens with a version that did not serve and a few with "
                "the other; 0.76 ms per token and version, times 2.49"
            ),
            "steps_scale": (
                "docs/results/breakeven.json: a fifth of the steps of `full` showed 0.54 to 0.58 of what all saved on "
                "the three new kinds of text, three quarters of which were of that kind (`head`: 0.35 to 0.58). "
                "That it holds for `statistics` is assumed"
            ),
            "paired_sd": (
                "docs/results/breakeven.json: intervals of 40 pairs are as wide as scatters of 0.05 to 0.19 (full; "
                "widest where most is saved) and 0.04 to 0.1 (head)"
            ),
            "cycles_sd": "ledger of an earlier demo: standard errors of the drop in cpp (0.024) and python (0.05)",
            "train_windows": "configs/demo.yaml: 40000 positions, of prompts of about 60 and answers of 64 tokens",
            "kept_windows": "configs/demo.yaml: 512 MiB, 0.77 MB a conversation",
            "luck_sd": "assumed",
            "stall_s": "ledger of an earlier demo",
            "fault_loss": "assumed",
        },
        kinds={
            "python": KindCurve(base=2.34, ceiling=2.34),
            "cpp": KindCurve(base=1.68, ceiling=2.34),
            "javascript": KindCurve(base=1.75, ceiling=2.34),
        },
        arms={
            "head": ArmCurve(steps=20, train_s=22.0, gap_closed=0.89, reach=0.3, forgetting=0.03),
            "full": ArmCurve(steps=40, train_s=127.0, gap_closed=0.575, reach=1.0, forgetting=0.005),
            "statistics": ArmCurve(steps=10, train_s=6.5, gap_closed=0.85, reach=0.17, forgetting=0.0),
        },
        usual="python",
        new="cpp",
        cycle_s=0.0132,
        replay_s_per_token=0.0019,
        steps_scale=0.22,
        paired_sd=0.12,
        train_windows=320,
        kept_windows=700,
    )


def read_curves(text: str) -> Curves:
    """Curves from JSON with the fields of :class:`Curves`.

    Raises:
        ValueError: not JSON, or a field is missing, unknown or bad; it is named.
    """
    return loads(Curves, text)
