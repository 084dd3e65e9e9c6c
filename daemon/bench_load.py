"""``specblockd bench load``: drafting beside plain decoding in one engine as more requests run at once.

Closed loop: so many clients each send their next prompt when the last is answered. Both ways answer the same prompts
with the same seeds in rounds that take turns, so a drift of the machine hits both, and their texts must be the same.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from specblock.cuda_ext.sampling import SamplingParams
from specblock.daemon.bench_rivals import DEMO_DRAFTER, LARGEST, tuned_settings, warm
from specblock.daemon.bench_speed import all_prompts
from specblock.daemon.collect import Prompt
from specblock.daemon.cost_profile import profiled_planner
from specblock.daemon.engine import Clock, Engine, EngineSettings
from specblock.daemon.facts import facts
from specblock.daemon.messages import GenerationRequest, RequestStats
from specblock.daemon.models import load_network, load_target, serving_dtype
from specblock.daemon.resampling import Interval, interval_95, resampled
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.config import DraftSettings
from specblock.drafter.draft import BlockDrafter
from specblock.drafter.interface import AnyDrafter
from specblock.drafter.precision import number_format
from specblock.verifier.model import TargetModel

PLAIN, CHOSEN = "plain", "cost_chosen"
SEED = 20_000
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What is asked. Each round has ``per_client`` prompts per client, and at least eight.

    ``learning_prompts`` are answered before the first counted round, in whole rounds.
    """

    target: str = "models/demo-target"
    prompts: Path = Path("models/demo-prompts")
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 6
    per_client: int = 2
    learning_prompts: int = 64
    new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.95
    dtype: str = "auto"
    threads: int = 1
    out: Path | None = None


@dataclass(slots=True)
class Round:
    """One way's answers to one round of prompts.

    ``first_s`` are seconds from sending to the first token, ``token_s`` seconds per further token of an answer,
    ``wait_s`` those between two arrivals of text.
    """

    seconds: float
    tokens: list[tuple[int, ...]]
    stats: list[RequestStats]
    first_s: list[float]
    token_s: list[float]
    wait_s: list[float]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """One way at one concurrency; the ratio's interval is 95 %, bootstrapped over rounds, seconds are milliseconds.

    Attributes:
        acceptance_length: tokens per cycle of a request, bonus included.
        drafting_share: requests' cycles that drafted.
        nodes: mean draft nodes of those.
        different_answers: answers whose tokens are not those of plain decoding.
    """

    concurrency: int
    way: str
    tokens_per_s: float
    ratio_to_plain: float
    ratio_to_plain_interval: Interval
    acceptance_length: float
    drafting_share: float
    nodes: float
    first_token_ms_p50: float
    first_token_ms_p95: float
    per_token_ms_p50: float
    per_token_ms_p95: float
    between_arrivals_ms_p99: float
    different_answers: int


def run(settings: LoadSettings, as_json: bool, say: Callable[[str], None]) -> int:
    """Measures and prints; returns the exit code."""
    torch.set_num_threads(settings.threads)
    dtype = serving_dtype(settings.dtype, "cpu")
    target = load_target(settings.target, number_format(dtype, "cpu"), "cpu")
    warm(target)
    usual = tuned_settings().get("specblock", DraftSettings())
    largest = LARGEST["specblock"]
    drafter = BlockDrafter(
        load_network(target, DEMO_DRAFTER),
        DraftSettings(
            blocks=largest.blocks,
            leaf_cap=largest.leaf_cap,
            node_budget=largest.node_budget,
            noise_scale=usual.noise_scale,
            rank_head=usual.rank_head,
        ),
    )
    prompts = all_prompts(settings.prompts, SEED)
    rows: list[LoadRow] = []
    for concurrency in settings.concurrency:
        planner = profiled_planner(target, drafter, concurrency, 0)
        rows += measure(target, drafter, planner, prompts, concurrency, settings)
        say(f"{concurrency} at once: {rows[-1].ratio_to_plain:.2f} of plain decoding")
    known = facts(
        dtype=dtype,
        rounds=settings.rounds,
        new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=SEED,
    )
    result = {"facts": known, "rows": [asdict(row) for row in rows]}
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / "load.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps(result, indent=2) if as_json else table(known, rows))
    return 0


def measure(
    target: TargetModel,
    drafter: AnyDrafter,
    planner: TreePlanner,
    prompts: Sequence[Prompt],
    concurrency: int,
    settings: LoadSettings,
    clock: Clock = time.perf_counter,
) -> list[LoadRow]:
    """Rounds of both ways in turns, plain first in the table.

    Not counted are one round of plain decoding and those in which the planner learns: a daemon runs for months, and
    what it tries in its first minute is not how fast it is.
    """
    ways: dict[str, tuple[AnyDrafter | None, TreePlanner | None]] = {PLAIN: (None, None), CHOSEN: (drafter, planner)}
    count = max(8, settings.per_client * concurrency)
    supply = cycle(prompts)
    found: dict[str, list[Round]] = {name: [] for name in ways}
    learning = -(-settings.learning_prompts // count)
    for number in range(learning + settings.rounds):
        asked, counts = list(islice(supply, count)), number >= learning
        # Plain decoding has nothing to learn; its first round warms it up.
        turns = list(ways)[:: 1 if number % 2 else -1] if counts or number == 0 else [CHOSEN]
        for name in turns:
            answered = serve(target, *ways[name], asked, concurrency, SEED + number * count, settings, clock)
            if counts:
                found[name].append(answered)
    return [_row(name, concurrency, found[name], found[PLAIN]) for name in ways]


def serve(
    target: TargetModel,
    drafter: AnyDrafter | None,
    planner: TreePlanner | None,
    prompts: Sequence[Prompt],
    concurrency: int,
    seed: int,
    settings: LoadSettings,
    clock: Clock,
) -> Round:
    """Answers all prompts, ``concurrency`` at once."""
    encoded = [tuple(target.tokenizer.encode(prompt.text)) for prompt in prompts]
    engine_settings = EngineSettings(
        slots=concurrency, capacity_tokens=max(map(len, encoded)) + settings.new_tokens, prefill_chunk_tokens=128
    )
    engine = Engine(target, drafter, engine_settings, clock, planner=planner)
    answers = Round(0.0, [()] * len(prompts), [], [], [], [])
    waiting = deque(range(len(prompts)))
    sent_s: dict[int, float] = {}
    first_s: dict[int, float] = {}
    first_tokens: dict[int, int] = {}
    newest_s: dict[int, float] = {}

    def send() -> None:
        number = waiting.popleft()
        sampling = SamplingParams(temperature=settings.temperature, top_p=settings.top_p, seed=seed + number)
        sent_s[number] = clock()
        engine.submit(
            GenerationRequest(
                request_id=str(seed + number),
                prompt_tokens=encoded[number],
                sampling=sampling,
                max_tokens=settings.new_tokens,
                ignore_eos=True,
                collect=True,
                domain=prompts[number].domain,
            )
        )

    begin_s = clock()
    for _ in range(min(concurrency, len(prompts))):
        send()
    while not engine.idle:
        chunks = engine.step()
        now_s = clock()
        for chunk in chunks:
            number = int(chunk.request_id) - seed
            answers.tokens[number] += tuple(chunk.tokens)
            if number in newest_s:
                answers.wait_s.append(now_s - newest_s[number])
            else:
                first_s[number], first_tokens[number] = now_s, len(chunk.tokens)
                answers.first_s.append(now_s - sent_s[number])
            newest_s[number] = now_s
            if chunk.finish_reason is not None:
                assert chunk.stats is not None and chunk.finish_reason == "length", chunk.finish_reason
                answers.stats.append(chunk.stats)
                further = max(1, len(answers.tokens[number]) - first_tokens[number])
                answers.token_s.append((now_s - first_s[number]) / further)
                if waiting:
                    send()
    answers.seconds = clock() - begin_s
    return answers


def _row(way: str, concurrency: int, rounds: Sequence[Round], plain: Sequence[Round]) -> LoadRow:
    stats = [one for answered in rounds for one in answered.stats]
    cycles, drafting = sum(s.cycles for s in stats), sum(s.drafting_cycles for s in stats)
    cost = [[r.seconds / r.num_tokens for r in side] for side in (plain, rounds)]
    index = resampled(len(rounds), _RESAMPLES)
    sides = [np.asarray(side) for side in cost]

    def quantile_ms(name: str, share: float) -> float:
        return 1e3 * float(np.quantile(np.concatenate([getattr(r, name) for r in rounds]), share))

    return LoadRow(
        concurrency=concurrency,
        way=way,
        tokens_per_s=sum(r.num_tokens for r in rounds) / sum(r.seconds for r in rounds),
        ratio_to_plain=float(sides[0].sum() / sides[1].sum()),
        ratio_to_plain_interval=interval_95(sides[0][index].sum(axis=1) / sides[1][index].sum(axis=1)),
        acceptance_length=sum(s.completion_tokens for s in stats) / cycles,
        drafting_share=drafting / cycles,
        nodes=sum(s.draft_tokens for s in stats) / max(1, drafting),
        first_token_ms_p50=quantile_ms("first_s", 0.5),
        first_token_ms_p95=quantile_ms("first_s", 0.95),
        per_token_ms_p50=quantile_ms("token_s", 0.5),
        per_token_ms_p95=quantile_ms("token_s", 0.95),
        between_arrivals_ms_p99=quantile_ms("wait_s", 0.99),
        different_answers=sum(
            own != other
            for a, b in zip(rounds, plain, strict=True)
            for own, other in zip(a.tokens, b.tokens, strict=True)
        ),
    )


def table(known: object, rows: Sequence[LoadRow]) -> str:
    """The rows as text."""
    lines = [
        json.dumps(known),
        "",
        f"{'at once':>7} {'way':<12}{'tok/s':>8}  {'x plain':<19}{'accept':>7}{'drafts':>8}{'nodes':>7}"
        f"{'first ms':>14}{'per token ms':>16}{'wait p99':>10}{'differ':>8}",
    ]
    for r in rows:
        low, high = r.ratio_to_plain_interval
        ratio = f"{r.ratio_to_plain:.2f} [{low:.2f}, {high:.2f}]"
        first = f"{r.first_token_ms_p50:.0f} / {r.first_token_ms_p95:.0f}"
        further = f"{r.per_token_ms_p50:.1f} / {r.per_token_ms_p95:.1f}"
        lines.append(
            f"{r.concurrency:>7} {r.way:<12}{r.tokens_per_s:>8.1f}  {ratio:<19}{r.acceptance_length:>7.2f}"
            f"{r.drafting_share:>8.0%}{r.nodes:>7.1f}{first:>14}{further:>16}{r.between_arrivals_ms_p99:>10.0f}"
            f"{r.different_answers:>8}"
        )
    return "\n".join(lines)
