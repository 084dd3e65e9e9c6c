"""``specblockd demo``: the loop on a real traffic shift, watched in the terminal and drawn on a page.

Two daemons, one after the other, answer the same prompts with the same seeds: *adaptive* as configured, then *static*
with adaptation off. Both are live; nothing is modelled.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specblock.bandit.decision import FAULT
from specblock.bandit.explain import explain
from specblock.bandit.ledger import DECIDED, LedgerRecord, read_ledger
from specblock.daemon.collect import read_prompts
from specblock.daemon.config_loader import load_config
from specblock.daemon.demo_traffic import Answer, DemoDaemon, Question, phase, send

PROMPTS = Path("models/demo-prompts")
DOMAINS = ("python", "cpp", "javascript")
SHIFTED = "cpp"
"""The kind of text whose traffic goes on until an update was promoted (or the most requests were sent)."""
_RECENT = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo.

    Attributes:
        config: policy of the daemon.
        out: directory of the results.
        traffic: requests per kind of text, at least.
        most: requests of the shifted kind of text while no update has been promoted in it.
        fresh: requests with prompts seen only once, at the end of each kind.
        fault: plant a cache desynchronisation instead of comparing.
    """

    config: Path
    out: Path
    traffic: int = 40
    most: int = 240
    fresh: int = 20
    fault: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One daemon's answers in the order they came, and its ledger."""

    name: str
    answers: tuple[Answer, ...]
    records: tuple[LedgerRecord, ...]
    parity: dict[str, float] | None


def run(settings: DemoSettings, say: Callable[[str], None]) -> int:
    """Runs the demo; returns the exit code (1: the planted fault was not found)."""
    if settings.fault:
        found = asyncio.run(_fault(settings, say))
        return 0 if found else 1
    adaptive, questions = asyncio.run(_adaptive(settings, say, "adaptive", ("-m", "specblock.daemon"), DOMAINS))
    say("\nThe same prompts and seeds again, with adaptation off.")
    static = asyncio.run(_static(settings, questions, say))
    from specblock.daemon.demo_report import write_report

    settings.out.mkdir(parents=True, exist_ok=True)
    facts = summary(static, adaptive)
    (settings.out / "result.json").write_text(json.dumps(facts, indent=2) + "\n")
    page = write_report(settings.out / "report.html", static, adaptive, facts)
    for line in _lines(facts):
        say(line)
    say(f"page: {page}")
    return 0


async def _fault(settings: DemoSettings, say: Callable[[str], None]) -> bool:
    say("A cache desynchronisation is planted: the drafter's cache has slipped by one position.")
    done, _ = await _adaptive(settings, say, "fault", ("-m", "specblock.daemon.demo_fault_main"), DOMAINS[:2])
    faults = [r for r in done.records if r.stage == DECIDED and r.verdict == FAULT]
    trained = [r for r in done.records if r.stage.startswith(("prob", "train", "promot"))]
    say(f"{len(faults)} decisions reported a fault, {len(trained)} stages trained or promoted anything")
    return bool(faults) and not trained


async def _adaptive(
    settings: DemoSettings,
    say: Callable[[str], None],
    name: str,
    program: tuple[str, ...],
    domains: tuple[str, ...],
) -> tuple[Run, list[Question]]:
    arguments, state, together, url = _daemon_arguments(settings, name)
    watch = _Watch(name, state / "bandit" / "ledger.jsonl", say)
    asked: list[Question] = []
    async with DemoDaemon((*program, *arguments), url, settings.out / f"{name}.log") as daemon:
        began = time.monotonic()
        for domain in domains:
            prompts = read_prompts(PROMPTS / f"{domain}.jsonl")
            say(f"--- {domain}")
            plan = phase(domain, prompts, len(asked), settings.most, settings.fresh)
            repeated, fresh = plan[: settings.most], plan[settings.most :]
            before = watch.promoted
            for start in range(0, settings.most, 2 * together):
                enough = domain != SHIFTED or watch.promoted > before or watch.faults > 0
                if start >= settings.traffic and enough:
                    break
                part = repeated[start : start + 2 * together]
                asked.extend(part)
                await send(daemon, part, together, began, watch.see)
            renumbered = [
                Question(number=len(asked) + i, domain=q.domain, prompt=q.prompt, seed=q.seed, fresh=True)
                for i, q in enumerate(fresh)
            ]
            asked.extend(renumbered)
            await send(daemon, renumbered, together, began, watch.see)
        parity = (await daemon.status())["bandit"].get("parity")
    watch.follow_ledger()
    return Run(name=name, answers=tuple(watch.answers), records=tuple(watch.records), parity=parity), asked


async def _static(settings: DemoSettings, questions: list[Question], say: Callable[[str], None]) -> Run:
    arguments, state, together, url = _daemon_arguments(settings, "static", "adaptation.enabled=false")
    watch = _Watch("static", state / "bandit" / "ledger.jsonl", say)
    async with DemoDaemon(("-m", "specblock.daemon", *arguments), url, settings.out / "static.log") as daemon:
        await send(daemon, questions, together, time.monotonic(), watch.see)
    return Run(name="static", answers=tuple(watch.answers), records=(), parity=None)


def _daemon_arguments(settings: DemoSettings, name: str, *changes: str) -> tuple[list[str], Path, int, str]:
    """Arguments of ``serve`` for a fresh state directory; the directory; slots; URL."""
    config = load_config(settings.config)
    state = config.state_dir / name
    shutil.rmtree(state, ignore_errors=True)
    arguments = ["serve", "-c", str(settings.config)]
    for change in (f"state_dir={state}", *changes):
        arguments += ["--set", change]
    return arguments, state, config.engine.slots, f"http://127.0.0.1:{config.http.port}"


class _Watch:
    """Collects answers and ledger lines of one run and tells about them."""

    def __init__(self, name: str, ledger: Path, say: Callable[[str], None]) -> None:
        self._name, self._ledger, self._say = name, ledger, say
        self.answers: list[Answer] = []
        self.records: list[LedgerRecord] = []
        self.promoted = 0
        self.faults = 0
        self._told_reason = ""

    def see(self, answer: Answer) -> None:
        """One more answer."""
        self.answers.append(answer)
        self.follow_ledger()
        if len(self.answers) % 8 == 0:
            recent = self.answers[-_RECENT:]
            length = sum(a.tokens for a in recent) / sum(a.cycles for a in recent)
            speed = sum(a.tokens for a in self.answers) / (answer.serving_s + answer.charged_s)
            self._say(
                f"{self._name:<9}{answer.at_s:6.0f} s  {len(self.answers):4d} requests  {answer.question.domain:<11}"
                f"{answer.version:<18} acceptance {length:.2f}  net {speed:5.1f} tokens/s "
                f"(serving {answer.serving_s:.0f} s, adaptation {answer.charged_s:.0f} s)"
            )

    def follow_ledger(self) -> None:
        """Tells what was decided since the last look; equal skips in a row once."""
        if not self._ledger.exists():
            return
        for record in list(read_ledger(self._ledger))[len(self.records) :]:
            self.records.append(record)
            self.promoted += record.stage == "promoted"
            self.faults += record.stage == DECIDED and record.verdict == FAULT
            kind = f"{record.action}{record.verdict}" if record.stage == DECIDED else ""
            if kind == "" or kind != self._told_reason:
                self._say(f"          > {explain(record)}")
            self._told_reason = kind


def paired_gain(static: Run, adaptive: Run, domain: str, fresh: bool = True) -> dict[str, float]:
    """Relative gain of live acceptance length, adaptive over static, on the same questions; 95 % bootstrap interval.

    Counts the questions that an updated drafter answered.
    """
    base = {a.question.number: a for a in static.answers}
    pairs = [
        (base[a.question.number], a)
        for a in adaptive.answers
        if a.question.domain == domain and a.question.fresh == fresh and not a.version.endswith("-base")
    ]
    if len(pairs) < 2:
        return {"requests": len(pairs)}
    cycles = np.array([(s.cycles, a.cycles) for s, a in pairs], dtype=float)
    tokens = np.array([(s.tokens, a.tokens) for s, a in pairs], dtype=float)

    def gain(index: Any) -> Any:
        lengths = tokens[index].sum(axis=-2) / cycles[index].sum(axis=-2)
        return lengths[..., 1] / lengths[..., 0] - 1

    draws = gain(np.random.default_rng(0).integers(0, len(pairs), size=(4000, len(pairs))))
    low, high = np.quantile(draws, [0.025, 0.975])
    every = np.arange(len(pairs))
    return {
        "requests": len(pairs),
        "static_acceptance": float(tokens[:, 0].sum() / cycles[:, 0].sum()),
        "adaptive_acceptance": float(tokens[:, 1].sum() / cycles[:, 1].sum()),
        "gain": float(gain(every)),
        "lower": float(low),
        "upper": float(high),
    }


def summary(static: Run, adaptive: Run) -> dict[str, Any]:
    """The demo's figures."""
    from specblock.daemon.bench_speed import facts

    def net(one: Run) -> dict[str, float]:
        tokens, last = sum(a.tokens for a in one.answers), one.answers[-1]
        serving, charged = max(a.serving_s for a in one.answers), max(a.charged_s for a in one.answers)
        return {
            "tokens": tokens,
            "serving_s": serving,
            "charged_s": charged,
            "net_tokens_per_s": tokens / (serving + charged),
            "wall_s": last.at_s,
        }

    return {
        "facts": facts(),
        "requests": len(static.answers),
        "promoted": [r.candidate_version for r in adaptive.records if r.stage == "promoted"],
        "fresh_prompts": {d: paired_gain(static, adaptive, d) for d in DOMAINS},
        "parity": adaptive.parity,
        "static": net(static),
        "adaptive": net(adaptive),
    }


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    yield f"\n{len(facts['promoted'])} updates promoted: {', '.join(facts['promoted']) or 'none'}"
    for domain, row in facts["fresh_prompts"].items():
        if "gain" in row:
            yield (
                f"{domain}: acceptance {row['static_acceptance']:.2f} static, {row['adaptive_acceptance']:.2f} "
                f"adaptive on {row['requests']} fresh prompts: {row['gain']:+.1%} "
                f"[{row['lower']:+.1%}, {row['upper']:+.1%}]"
            )
    if facts["parity"]:
        found = facts["parity"]
        yield (
            f"replay equals live: {found['replay_acceptance']:.3f} against {found['live_acceptance']:.3f} "
            f"({found['difference']:+.2%}, {found['conversations']} conversations)"
        )
    for name in ("static", "adaptive"):
        row = facts[name]
        yield (
            f"{name:<9}{row['net_tokens_per_s']:6.1f} net tokens/s: {row['tokens']} tokens, {row['serving_s']:.0f} "
            f"device-seconds serving, {row['charged_s']:.0f} charged to adaptation"
        )
