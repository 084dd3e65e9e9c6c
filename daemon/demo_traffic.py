"""The demo's traffic: a daemon of its own as a child process, requests in phases, and what was observed of each."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from specblock.daemon.collect import Prompt
from specblock.daemon.errors import DependencyError
from specblock.daemon.openai_request import DOMAIN_HEADER

NEW_TOKENS, TEMPERATURE, TOP_P = 64, 1.0, 0.95
_START_S, _STOP_S, _REQUEST_S = 120.0, 60.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request of the demo.

    Attributes:
        number: unique in a run; the same in both runs of a comparison.
        fresh: the prompt occurs only once, at the end of its phase: no update was trained on it.
        seed: fixes the text, whatever drafter serves.
    """

    number: int
    domain: str
    prompt: str
    seed: int
    fresh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a question, and the daemon's counters right after it.

    Attributes:
        cycles: decode cycles of the request.
        tokens: generated tokens.
        serving_s: device-seconds of all decode cycles so far.
        charged_s: device-seconds charged to adaptation so far.
        at_s: seconds since the traffic began.
    """

    question: Question
    version: str
    tokens: int
    cycles: int
    serving_s: float
    charged_s: float
    at_s: float


def phase(domain: str, prompts: Sequence[Prompt], first: int, traffic: int, fresh: int) -> list[Question]:
    """Questions of one kind of text: ``traffic`` from the head of the prompts in turn, then the last ``fresh`` once."""
    repeated, last = prompts[: len(prompts) - fresh], prompts[len(prompts) - fresh :]
    chosen = [(repeated[i % len(repeated)], False) for i in range(traffic)] + [(p, True) for p in last]
    return [
        Question(number=first + i, domain=domain, prompt=p.text, seed=1000 + first + i, fresh=new)
        for i, (p, new) in enumerate(chosen)
    ]


class DemoDaemon:
    """A daemon as a child process; use as a context manager.

    Args:
        arguments: of ``python``, such as ``-m specblock.daemon serve -c FILE``.
        url: where it will answer.
        log: file for its output.

    Raises:
        DependencyError: it did not start.
    """

    def __init__(self, arguments: Sequence[str], url: str, log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT)
        # trust_env=False: a proxy configured for the internet must not be asked about localhost.
        self.http = httpx.AsyncClient(base_url=url, timeout=_REQUEST_S, trust_env=False)

    async def __aenter__(self) -> DemoDaemon:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                if (await self.http.get("/health")).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        await self.__aexit__()
        raise DependencyError(f"the demo's daemon did not start; the end of {self._log}:\n{self._tail()}")

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    async def status(self) -> dict[str, Any]:
        """``/specblock/status``."""
        answer = await self.http.get("/specblock/status")
        found: dict[str, Any] = answer.json()
        return found

    async def ask(self, question: Question, began_s: float) -> Answer:
        """Sends one question.

        Raises:
            DependencyError: the daemon refused or broke.
        """
        body = {
            "prompt": question.prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "seed": question.seed,
            "ignore_eos": True,
        }
        try:
            answer = await self.http.post("/v1/completions", json=body, headers={DOMAIN_HEADER: question.domain})
            status = await self.status()
        except httpx.HTTPError as error:
            raise DependencyError(f"the demo's daemon broke off: {error!r}\n{self._tail()}") from None
        if answer.status_code != 200:
            raise DependencyError(f"the demo's daemon answered {answer.status_code}: {answer.text[:300]}")
        found = answer.json()
        engine, balance = status["engine"], status["bandit"].get("balance", {})
        return Answer(
            question=question,
            version=found["drafter_version"],
            tokens=found["usage"]["completion_tokens"],
            cycles=found["metrics"]["speculative_decoding"]["num_spec_steps"],
            serving_s=engine["draft_s"] + engine["verify_s"] + engine["other_s"],
            charged_s=balance.get("charged_s", 0.0),
            at_s=time.monotonic() - began_s,
        )

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:]


async def send(
    daemon: DemoDaemon, questions: Sequence[Question], together: int, began_s: float, seen: Callable[[Answer], None]
) -> None:
    """Asks all questions in order, ``together`` at a time; ``seen`` hears of every answer."""
    waiting = iter(questions)

    async def one_after_another() -> None:
        for question in waiting:
            seen(await daemon.ask(question, began_s))

    await asyncio.gather(*(one_after_another() for _ in range(together)))
