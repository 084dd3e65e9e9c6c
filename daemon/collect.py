"""Conversations for offline training and measuring: the target answers prompts, windows are kept.

It is the serving engine itself, with or without a drafter, so recorded windows are what live traffic would leave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.engine import Clock, Engine, EngineSettings, Listener
from specblock.daemon.messages import GenerationRequest, RequestStats
from specblock.daemon.request import RequestState
from specblock.drafter.interface import AnyDrafter
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt and the kind of text it belongs to."""

    domain: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Reads JSON lines with ``domain`` and ``prompt``.

    Raises:
        ValueError: naming the file and line.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            prompts.append(Prompt(str(row["domain"]), str(row["prompt"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: want an object with domain and prompt ({error!r})") from None
    return prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """How conversations are made. ``temperatures`` are drawn with equal weight (repeat one to weigh it)."""

    max_tokens: int
    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 0.95
    slots: int = 32
    seed: int = 0
    top_k: int = 32
    heldout: bool = False


class _Keeper(Listener):
    """Keeps the windows and statistics of finished requests."""

    def __init__(self, clock: Clock, settings: CollectSettings) -> None:
        self._clock, self._settings = clock, settings
        self.done: list[tuple[Window, RequestStats]] = []

    def finished(self, state: RequestState, reason: str) -> None:
        now = self._clock()
        window = state.window(now, heldout=self._settings.heldout, max_tokens=1 << 30)
        if window is not None:
            self.done.append((window, state.stats(now)))


def collect(
    target: TargetModel,
    prompts: Sequence[Prompt],
    settings: CollectSettings,
    clock: Clock,
    drafter: AnyDrafter | None = None,
    drafter_version: str = "",
    on_engine: Callable[[Engine], None] | None = None,
) -> Iterator[tuple[Window, RequestStats]]:
    """Answers every prompt once and yields its window and statistics as it finishes.

    Args:
        target: the target model.
        prompts: what to answer; seeds and temperatures depend on ``settings.seed`` and the prompt's place alone.
        settings: how.
        clock: seconds.
        drafter: drafts if given; the text is the same either way.
        drafter_version: recorded in the windows.
        on_engine: called once with the engine, for measurements.
    """
    rng = Random(settings.seed)
    encoded = [tuple(target.tokenizer.encode(p.text)) for p in prompts]
    longest = max((len(tokens) for tokens in encoded), default=1)
    keeper = _Keeper(clock, settings)
    sizes = EngineSettings(slots=settings.slots, capacity_tokens=longest + settings.max_tokens, top_k=settings.top_k)
    engine = Engine(target, drafter, sizes, clock, keeper, drafter_version)
    if on_engine is not None:
        on_engine(engine)
    for index, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
        sampling = SamplingParams(
            temperature=rng.choice(settings.temperatures), top_p=settings.top_p, seed=rng.getrandbits(62)
        )
        if tokens:
            engine.submit(
                GenerationRequest(
                    request_id=f"{prompt.domain}-{settings.seed}-{index}",
                    prompt_tokens=tokens,
                    sampling=sampling,
                    max_tokens=settings.max_tokens,
                    domain=prompt.domain,
                )
            )
    yield from _served(engine, keeper)


def served_again(
    target: TargetModel,
    windows: Sequence[Window],
    slots: int,
    clock: Clock,
    drafter: AnyDrafter | None,
    drafter_version: str,
) -> Iterator[tuple[Window, RequestStats]]:
    """Answers the prompts of recorded conversations as then, with their seeds, and yields them as they finish.

    Args:
        target: the target model that answered.
        windows: whole conversations.
        slots: requests decoded together.
        clock: seconds.
        drafter: drafts if given; the text is the same either way.
        drafter_version: recorded in the new windows.
    """
    settings = CollectSettings(max_tokens=max(w.num_generated for w in windows), slots=slots, heldout=True)
    keeper = _Keeper(clock, settings)
    sizes = EngineSettings(slots=slots, capacity_tokens=max(w.tokens.shape[0] for w in windows))
    engine = Engine(target, drafter, sizes, clock, keeper, drafter_version)
    for window in windows:
        engine.submit(
            GenerationRequest(
                request_id=window.conversation_id,
                prompt_tokens=tuple(window.tokens[: window.prompt_tokens].tolist()),
                sampling=window.sampling,
                max_tokens=window.num_generated,
                domain=window.domain,
            )
        )
    yield from _served(engine, keeper)


def _served(engine: Engine, keeper: _Keeper) -> Iterator[tuple[Window, RequestStats]]:
    while not engine.idle:
        engine.step()
        yield from keeper.done
        keeper.done.clear()
