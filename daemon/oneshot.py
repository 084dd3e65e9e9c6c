"""One prompt in this process, without Ray or Redis: ``specblockd generate`` and the measurements."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.messages import GenerationRequest, RequestStats
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.interface import AnyDrafter
from specblock.verifier.model import TargetModel


@dataclass(frozen=True, slots=True)
class Answer:
    """Text and tokens of one completion, and what it took; ``kept`` are the tokens of each cycle."""

    text: str
    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    finish_reason: str
    stats: RequestStats
    seconds: float

    @property
    def acceptance_length(self) -> float:
        """Committed tokens per cycle, bonus included."""
        return self.stats.completion_tokens / max(1, self.stats.cycles)


def complete(
    target: TargetModel,
    drafter: AnyDrafter | None,
    prompt: str,
    sampling: SamplingParams,
    max_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
    ignore_eos: bool = False,
    collect: bool = False,
    planner: TreePlanner | None = None,
    domain: str = "default",
) -> Answer:
    """Completes one prompt; ``on_text`` receives text as it becomes certain.

    Measurements ask for ``collect``, so that the work which the daemon does for its training windows is counted, and
    may hand in a ``planner``, which chooses tree sizes and keeps what it learns from prompt to prompt.

    Raises:
        ValueError: the prompt is empty or too long for the target's context.
    """
    tokens = tuple(target.tokenizer.encode(prompt))
    limit = target.max_context_tokens
    if len(tokens) + max_tokens > limit:
        raise ValueError(f"prompt ({len(tokens)} tokens) plus --max-tokens {max_tokens} is over the context of {limit}")
    settings = EngineSettings(slots=1, capacity_tokens=len(tokens) + max_tokens)
    engine = Engine(target, drafter, settings, time.perf_counter, planner=planner)
    begin = time.perf_counter()
    engine.submit(
        GenerationRequest(
            request_id="oneshot",
            prompt_tokens=tokens,
            sampling=sampling,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            collect=collect,
            domain=domain,
        )
    )
    produced: list[int] = []
    kept: list[int] = []
    text: list[str] = []
    while True:
        for chunk in engine.step():
            produced.extend(chunk.tokens)
            kept.append(len(chunk.tokens))
            text.append(chunk.text)
            on_text(chunk.text)
            if chunk.finish_reason is not None and chunk.stats is not None:
                seconds = time.perf_counter() - begin
                return Answer("".join(text), tuple(produced), tuple(kept), chunk.finish_reason, chunk.stats, seconds)
