"""``specblockd generate``: one prompt, in this process, without Ray or Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.errors import IncompatibleError
from specblock.daemon.messages import GenerationRequest, RequestStats
from specblock.daemon.models import DTYPES
from specblock.drafter.checkpoint import load_drafter
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import SpecBlockDrafter
from specblock.verifier.model import TargetModel


@dataclass(frozen=True, slots=True)
class Answer:
    """Text and tokens of one completion, and what it took."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stats: RequestStats
    seconds: float

    @property
    def acceptance_length(self) -> float:
        """Committed tokens per cycle, bonus included."""
        return self.stats.completion_tokens / max(1, self.stats.cycles)


def load_pair(
    model: str, drafter: Path | None, dtype: str, device: str, settings: DraftSettings
) -> tuple[TargetModel, SpecBlockDrafter | None]:
    """Loads a target and the drafter that belongs to it.

    Raises:
        IncompatibleError: one of them is missing or they do not fit.
    """
    try:
        target = TargetModel.load(model, dtype=DTYPES[dtype], device=device)
        if drafter is None:
            return target, None
        network = load_drafter(
            drafter,
            target.embedding,
            dtype=DTYPES[dtype],
            device=device,
            target_fingerprint=target.fingerprint,
            feature_layers=target.feature_layers,
        )
    except ValueError as error:
        raise IncompatibleError(str(error)) from None
    return target, SpecBlockDrafter(network.eval(), settings)


def complete(
    target: TargetModel,
    drafter: SpecBlockDrafter | None,
    prompt: str,
    sampling: SamplingParams,
    max_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Completes one prompt; ``on_text`` receives text as it becomes certain.

    Raises:
        ValueError: the prompt is empty or too long for the target's context.
    """
    tokens = tuple(target.tokenizer.encode(prompt, add_special_tokens=False))
    limit = target.max_context_tokens
    if len(tokens) + max_tokens > limit:
        raise ValueError(f"prompt ({len(tokens)} tokens) plus --max-tokens {max_tokens} is over the context of {limit}")
    settings = EngineSettings(slots=1, capacity_tokens=len(tokens) + max_tokens)
    engine = Engine(target, drafter, settings, time.perf_counter)
    engine.submit(
        GenerationRequest(
            request_id="oneshot", prompt_tokens=tokens, sampling=sampling, max_tokens=max_tokens, collect=False
        )
    )
    begin = time.perf_counter()
    produced: list[int] = []
    text: list[str] = []
    while True:
        for chunk in engine.step():
            produced.extend(chunk.tokens)
            text.append(chunk.text)
            on_text(chunk.text)
            if chunk.finish_reason is not None and chunk.stats is not None:
                seconds = time.perf_counter() - begin
                return Answer("".join(text), tuple(produced), chunk.finish_reason, chunk.stats, seconds)
