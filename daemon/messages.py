"""Messages between gateway, engine, trainer and bandit: frozen, slotted, picklable, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from specblock.cuda_ext.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One completion to produce. The gateway has validated it and drawn a seed if the user gave none."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    domain: str = "default"
    tenant: str = "default"
    collect: bool = True
    """False: the tenant opted out; no training window is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """What one finished request did; rides on its last chunk.

    ``acceptance_histogram[a]`` counts cycles that accepted ``a`` draft tokens (bonus not included).
    """

    prompt_tokens: int
    completion_tokens: int
    cycles: int
    draft_tokens: int
    accepted_tokens: int
    acceptance_histogram: tuple[int, ...]
    queue_s: float
    prefill_s: float
    decode_s: float
    drafter_version: str
    drafter_forwards: int = 0
    drafting_cycles: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0

    @property
    def device_s(self) -> float:
        """Device-seconds of its cycles."""
        return self.draft_s + self.verify_s + self.other_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Tokens of one request leaving the engine; ``finish_reason`` is set exactly on the last chunk.

    finish_reason: "stop" (end of text, stop token or stop string), "length", "abort" (cancelled), "error".
    """

    request_id: str
    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    stats: RequestStats | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot of the engine for /health, /metrics and ``specblockd status``. Counters count since start.

    phase: "loading", "warming_up", "ready", "draining", "failed".
    """

    phase: str
    detail: str = ""
    running: int = 0
    waiting: int = 0
    slots: int = 0
    drafter_version: str = ""
    cycles: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    kv_tokens_used: int = 0
    kv_tokens_capacity: int = 0
    windows: int = 0
    window_bytes: int = 0
    windows_dropped: int = 0
    events_sent: int = 0
    events_dropped: int = 0
    swaps: int = 0
    speculation: bool = True
    tree_nodes_mean: float = 0.0
    tree_leaves_mean: float = 0.0
    tree_blocks_mean: float = 0.0
    plain_cycles_share: float = 0.0
    probe_seconds_share: float = 0.0
    probe_lost_seconds_share: float = 0.0

    @property
    def cycle_s(self) -> float:
        """Device-seconds of one request's cycle since start."""
        return (self.draft_s + self.verify_s + self.other_s) / max(1, self.cycles)
