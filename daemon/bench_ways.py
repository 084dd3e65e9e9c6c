"""The ways that ``bench speed`` answers a prompt: transformers' own modes, and every drafter in this runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.collect import Prompt
from specblock.daemon.oneshot import complete
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.interface import AnyDrafter
from specblock.verifier.model import TargetModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How prompts are answered."""

    temperature: float
    top_p: float
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One prompt answered one way. ``tokens`` are the generated ones, ``kept`` how many each cycle gave.

    Runs of this runtime include the work of keeping training windows; transformers' do nothing of the kind.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    seconds: float
    forwards: int = 0
    drafting_cycles: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0


Way = Callable[[Prompt, Question, int], Run]
"""(prompt, how, seed) -> run."""


def engine_way(target: TargetModel, drafter: AnyDrafter | None, planner: TreePlanner | None = None) -> Way:
    """This runtime, one request at a time; a planner keeps what it learned from prompt to prompt."""

    def answer(prompt: Prompt, how: Question, seed: int) -> Run:
        sampling = SamplingParams(temperature=how.temperature, top_p=how.top_p, seed=seed)
        done = complete(
            target,
            drafter,
            prompt.text,
            sampling,
            how.new_tokens,
            ignore_eos=True,
            collect=True,
            planner=planner,
            domain=prompt.domain,
        )
        stats = done.stats
        return Run(
            tokens=done.tokens,
            kept=done.kept,
            seconds=done.seconds,
            forwards=stats.drafter_forwards,
            drafting_cycles=stats.drafting_cycles,
            draft_s=stats.draft_s,
            verify_s=stats.verify_s,
        )

    return answer


def transformers_way(target: TargetModel, **generate: object) -> Way:
    """transformers' ``generate`` on the same weights; ``generate`` are further arguments, such as prompt lookup."""

    def answer(prompt: Prompt, how: Question, seed: int) -> Run:
        tokens = torch.tensor([target.tokenizer.encode(prompt.text)], device=target.device)
        sampled = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        torch.manual_seed(seed)
        begin = time.perf_counter()
        with torch.inference_mode():
            output = target.transformers_model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=how.new_tokens,
                min_new_tokens=how.new_tokens,
                pad_token_id=1,
                **(sampled if how.temperature > 0 else {"do_sample": False}),
                **generate,
            )
        seconds = time.perf_counter() - begin
        made = tuple(output[0, tokens.shape[1] :].tolist())
        return Run(tokens=made, kept=(1,) * len(made), seconds=seconds)

    return answer
