"""``specblockd demo``: the loop on a real traffic shift, watched in the terminal and drawn on a page.

Two daemons, one after the other, answer the same prompts with the same seeds: *adaptive* as configured, then *static*
with adaptation off. Both are live; nothing is modelled.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specblock.bandit.decision import FAULT
from specblock.bandit.explain import explain
from specblock.bandit.ledger import DECIDED, LedgerRecord, read_ledger
from specblock.daemon.collect import read_prompts
from specblock.daemon.config import NOTHING_TO_ADAPT, DaemonConfig
from specblock.daemon.config_loader import load_config
from specblock.daemon.demo_report import write_report
from specblock.daemon.demo_summary import DOMAINS, Run, in_words, summary
from specblock.daemon.demo_traffic import Answer, DemoDaemon, Question, phase, send
from specblock.daemon.errors import ConfigError, DependencyError
from specblock.daemon.models import serving_dtype
from specblock.daemon.runfile import read_run_file

PROMPTS = Path("models/demo-prompts")
SHIFTED = "cpp"
"""The kind of text whose traffic goes on until an update was promoted (or the most requests were sent)."""
_RECENT = 24
_PROGRAM, _FAULTY_PROGRAM = "specblock.daemon", "specblock.daemon.demo_fault_main"


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
    most: int = 480
    fresh: int = 20
    fault: bool = False


def run(settings: DemoSettings, say: Callable[[str], None]) -> int:
    """Runs the demo; returns the exit code (1: the planted fault was not found).

    Raises:
        ConfigError: there is nothing to adapt.
    """
    config = load_config(settings.config)
    if not config.drafter.has_weights:
        raise ConfigError(f"drafter.kind: {config.drafter.kind} cannot be demonstrated: {NOTHING_TO_ADAPT}")
    target = config.target
    # Settled here, so that both daemons run in one format.
    dtype = serving_dtype(target.dtype, target.device)
    if settings.fault:
        return 0 if asyncio.run(_fault(settings, dtype, say)) else 1
    adaptive, questions = asyncio.run(_adaptive(_Stage(settings, "adaptive", dtype), DOMAINS, say))
    say("\nThe same prompts and seeds again, with adaptation off.")
    stage = _Stage(settings, "static", dtype, changes=("adaptation.enabled=false",))
    static = asyncio.run(_static(stage, questions, say))
    settings.out.mkdir(parents=True, exist_ok=True)
    found = summary(static, adaptive, _threads(config), target.device, dtype)
    (settings.out / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    page = write_report(settings.out / "report.html", static, adaptive, found)
    for line in in_words(found):
        say(line)
    say(f"page: {page}")
    return 0


def _threads(config: DaemonConfig) -> int:
    """Both daemons run on as many: without a trainer beside it, one would take its core."""
    return 1 if config.engine.threads == "auto" else config.engine.threads


class _Stage:
    """One run's daemon: a fresh state directory, and how to start it."""

    def __init__(
        self, settings: DemoSettings, name: str, dtype: str, program: str = _PROGRAM, changes: tuple[str, ...] = ()
    ) -> None:
        config = load_config(settings.config)
        self.settings, self.name, self.together = settings, name, config.engine.slots
        state = config.state_dir / name
        _refuse_running(state)
        shutil.rmtree(state, ignore_errors=True)
        self.ledger = state / "bandit" / "ledger.jsonl"
        self._url = f"http://127.0.0.1:{config.http.port}"
        self._arguments = ["-m", program, "serve", "-c", str(settings.config)]
        settled = (f"state_dir={state}", f"target.dtype={dtype}", f"engine.threads={_threads(config)}")
        for change in (*settled, *changes):
            self._arguments += ["--set", change]

    def daemon(self) -> DemoDaemon:
        """Started when entered."""
        return DemoDaemon(self._arguments, self._url, self.settings.out / f"{self.name}.log")


def _refuse_running(state: Path) -> None:
    """A daemon whose state directory is deleted under it would go on without its Redis.

    Raises:
        DependencyError: one still runs.
    """
    try:
        info = read_run_file(state)
    except DependencyError:
        return
    raise DependencyError(f"the daemon of an earlier demo (process {info.pid}) still uses {state}: stop it first")


async def _fault(settings: DemoSettings, dtype: str, say: Callable[[str], None]) -> bool:
    say("A cache desynchronisation is planted: the drafter's cache has slipped by one position.")
    done, _ = await _adaptive(_Stage(settings, "fault", dtype, _FAULTY_PROGRAM), DOMAINS[:2], say)
    faults = [r for r in done.records if r.stage == DECIDED and r.verdict == FAULT]
    trained = [r for r in done.records if r.stage.startswith(("prob", "train", "promot"))]
    say(f"{len(faults)} decisions reported a fault, {len(trained)} stages trained or promoted anything")
    return bool(faults) and not trained


async def _adaptive(stage: _Stage, domains: tuple[str, ...], say: Callable[[str], None]) -> tuple[Run, list[Question]]:
    most, fresh_count = stage.settings.most, stage.settings.fresh
    step = 2 * stage.together
    watch = _Watch(stage.name, stage.ledger, say)
    asked: list[Question] = []

    async with stage.daemon() as daemon:
        began = time.monotonic()

        async def ask(questions: list[Question]) -> None:
            asked.extend(questions)
            await send(daemon, questions, stage.together, began, watch.see)

        for index, domain in enumerate(domains):
            say(f"--- {domain}")
            prompts = read_prompts(PROMPTS / f"{domain}.jsonl")
            plan = phase(domain, prompts, index * (most + fresh_count), most, fresh_count)
            before = watch.promoted
            for start in range(0, most, step):
                enough = domain != SHIFTED or watch.promoted > before or watch.faults > 0
                if start >= stage.settings.traffic and enough:
                    break
                await ask(plan[start : min(start + step, most)])
            await ask(plan[most:])
        parity = (await daemon.status())["bandit"].get("parity")
    watch.follow_ledger()
    return Run(name=stage.name, answers=tuple(watch.answers), records=tuple(watch.records), parity=parity), asked


async def _static(stage: _Stage, questions: list[Question], say: Callable[[str], None]) -> Run:
    watch = _Watch(stage.name, stage.ledger, say)
    async with stage.daemon() as daemon:
        await send(daemon, questions, stage.together, time.monotonic(), watch.see)
    return Run(name=stage.name, answers=tuple(watch.answers), records=(), parity=None)


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
