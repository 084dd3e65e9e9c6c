"""Prometheus metrics: what the gateway observes, what the engine counts, what the adaptation service reports.

Every series is published once under a ``specblock_`` name; those that vLLM also has are mirrored under vLLM's name, so
that dashboards and benchmark clients written for it work unchanged. Labels never carry text of users, and domain
labels are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from specblock.daemon.bandit_metrics import flat_numbers
from specblock.daemon.messages import EngineStatus, RequestStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OTHER_DOMAIN = "other"
_BASE = ("model_name", "engine")
_ENGINE = "0"
_FINISH_REASONS = ("stop", "length", "abort", "error")
_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ACCEPTANCE = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
# Values of one family by those of its own labels.
_Values = dict[tuple[str, ...], float]
_NAME = re.compile(r"[a-z][a-z0-9_]*")

# Our family name -> vLLM's, both without the suffix that counters get.
_VLLM_NAMES = {
    "specblock_spec_decode_steps": "vllm:spec_decode_num_drafts",
    "specblock_spec_decode_tree_nodes": "vllm:spec_decode_num_draft_tokens",
    "specblock_spec_decode_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "specblock_spec_decode_accepted_tokens_per_pos": "vllm:spec_decode_num_accepted_tokens_per_pos",
    "specblock_requests_running": "vllm:num_requests_running",
    "specblock_requests_waiting": "vllm:num_requests_waiting",
    "specblock_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "specblock_prompt_tokens": "vllm:prompt_tokens",
    "specblock_generation_tokens": "vllm:generation_tokens",
    "specblock_request_success": "vllm:request_success",
    "specblock_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "specblock_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "specblock_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "specblock_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "specblock_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "specblock_request_decode_time_seconds": "vllm:request_decode_time_seconds",
}

_COUNTERS = {
    "spec_decode_steps": ("Decode cycles, one target forward each.", "cycles"),
    "spec_decode_tree_nodes": ("Draft nodes verified, all branches counted.", "draft_tokens"),
    "spec_decode_accepted_tokens": ("Draft tokens accepted, bonus tokens not counted.", "accepted_tokens"),
    "prompt_tokens": ("Prompt tokens processed.", "prompt_tokens"),
    "generation_tokens": ("Tokens produced.", "generation_tokens"),
    "draft_seconds": ("Time spent drafting.", "draft_s"),
    "verify_seconds": ("Time spent in target forwards of decode cycles.", "verify_s"),
    "other_seconds": ("Time of decode cycles outside drafting and verifying.", "other_s"),
    "windows_dropped": ("Training windows dropped for want of room.", "windows_dropped"),
    "feedback_events": ("Acceptance events sent to the stream.", "events_sent"),
    "feedback_dropped": ("Acceptance events dropped because the stream was unreachable.", "events_dropped"),
    "drafter_swaps": ("Drafter versions taken into service between two cycles.", "swaps"),
}
_GAUGES = {
    "requests_running": ("Requests being decoded.", "running"),
    "requests_waiting": ("Requests waiting for a slot.", "waiting"),
    "slots": ("Requests that can be decoded at the same time.", "slots"),
    "kv_tokens_used": ("Tokens held in the KV cache.", "kv_tokens_used"),
    "kv_tokens_capacity": ("Tokens the KV cache can hold.", "kv_tokens_capacity"),
    "windows": ("Training windows held in memory.", "windows"),
    "window_bytes": ("Memory held by training windows.", "window_bytes"),
    "speculation_enabled": ("1 while drafting is on.", "speculation"),
    "tree_nodes_mean": ("Draft nodes chosen per drafting cycle, recent mean.", "tree_nodes_mean"),
    "tree_leaves_mean": ("Leaves extended per drafting cycle, recent mean.", "tree_leaves_mean"),
    "tree_blocks_mean": ("Drafter forwards per drafting cycle, recent mean.", "tree_blocks_mean"),
    "plain_cycles_share": ("Share of recent cycles without drafts.", "plain_cycles_share"),
    "probe_seconds_share": ("Share of device time spent probing whether drafting pays again.", "probe_seconds_share"),
    "probe_lost_seconds_share": (
        "Share of device time that these probes lost against plain decoding, below 0 if they won.",
        "probe_lost_seconds_share",
    ),
}


@dataclass(frozen=True, slots=True, eq=False)  # a registry's keys: compared by identity
class _Snapshot(Collector):
    """The engine's and the adaptation service's numbers at one moment, as metric families."""

    status: EngineStatus
    bandit: Mapping[str, Any]
    labels: tuple[str, ...]

    def collect(self) -> Iterable[Metric]:
        """All families."""
        for name, (text, attribute) in _COUNTERS.items():
            yield self._counter(name, text, {(): float(getattr(self.status, attribute))})
        for name, (text, attribute) in _GAUGES.items():
            yield self._gauge(name, text, {(): float(getattr(self.status, attribute))})
        status = self.status
        usage = status.kv_tokens_used / status.kv_tokens_capacity if status.kv_tokens_capacity else 0.0
        yield self._gauge("kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", {(): usage})
        depths = status.accepted_per_position or (0,)
        by_depth: _Values = {(str(depth),): float(count) for depth, count in enumerate(depths)}
        name = "spec_decode_accepted_tokens_per_pos"
        yield self._counter(name, "Accepted draft tokens by depth in the tree.", by_depth, ("position",))
        reasons = dict.fromkeys(_FINISH_REASONS, 0) | status.finished
        by_reason: _Values = {(reason,): float(count) for reason, count in reasons.items()}
        yield self._counter("request_success", "Finished requests.", by_reason, ("finished_reason",))
        phase: _Values = {(status.phase,): 1.0}
        yield self._gauge("engine_phase", "The engine's phase; always 1.", phase, ("phase",))
        version: _Values = {(status.drafter_version,): 1.0}
        yield self._gauge("drafter_version_info", "The serving drafter version; always 1.", version, ("version",))
        yield from self._of_bandit()

    def _of_bandit(self) -> Iterator[Metric]:
        for key, value in sorted(self.bandit.items()):
            if not _NAME.fullmatch(key):
                continue
            if _is_number(value):
                yield self._reported(key, (), {(): float(value)})
                continue
            stem, by, label = key.removesuffix("_total").rpartition("_by_")
            if by and stem and isinstance(value, Mapping):
                found: _Values = {(str(name),): float(number) for name, number in value.items() if _is_number(number)}
                yield self._reported(stem + ("_total" if key.endswith("_total") else ""), (label,), found)

    def _reported(self, key: str, names: tuple[str, ...], values: _Values) -> Metric:
        text = "Reported by the adaptation service."
        make = self._counter if key.endswith("_total") else self._gauge
        return make(f"bandit_{key.removesuffix('_total')}", text, values, names)

    def _counter(self, name: str, text: str, values: _Values, names: tuple[str, ...] = ()) -> Metric:
        family = CounterMetricFamily(f"specblock_{name}", text, labels=(*_BASE, *names))
        for key, value in values.items():
            family.add_metric((*self.labels, *key), value)
        return family

    def _gauge(self, name: str, text: str, values: _Values, names: tuple[str, ...] = ()) -> Metric:
        family = GaugeMetricFamily(f"specblock_{name}", text, labels=(*_BASE, *names))
        for key, value in values.items():
            family.add_metric((*self.labels, *key), value)
        return family


@dataclass(frozen=True, slots=True, eq=False)
class _Families(Collector):
    """Families that were collected already, with vLLM's names added."""

    families: tuple[Metric, ...]
    vllm_compat: bool

    def collect(self) -> Iterable[Metric]:
        """Every family, then its twin if vLLM has one."""
        for family in self.families:
            yield family
            if self.vllm_compat and (name := _VLLM_NAMES.get(family.name)):
                yield _renamed(family, name)


class GatewayMetrics:
    """Counters and histograms of the gateway, and the text of ``/metrics``.

    Args:
        model_name: value of the ``model_name`` label.
        vllm_compat: also publish vLLM's names.
        max_domain_labels: distinct domains with a series of their own; later ones are counted as ``other``.
    """

    def __init__(self, model_name: str, *, vllm_compat: bool = True, max_domain_labels: int = 16) -> None:
        # Clients that add up every vllm: line would count the timestamps of *_created gauges.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._labels = (model_name, _ENGINE)
        self._vllm_compat = vllm_compat
        self._max_domain_labels = max_domain_labels
        self._domains: set[str] = set()
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _LATENCY_S)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Time per token after it.", _TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_S)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a slot.", _LATENCY_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "Processing the prompt.", _LATENCY_S)
        self._decode = self._histogram("request_decode_time_seconds", "Producing tokens.", _LATENCY_S)
        self._acceptance = self._histogram(
            "request_acceptance_length", "Tokens per decode cycle of one request, bonus included.", _ACCEPTANCE
        )
        self._by_domain = Counter(
            "specblock_requests", "Finished requests.", (*_BASE, "domain"), registry=self._registry
        )
        self._tokens_by_domain = Counter(
            "specblock_domain_tokens", "Tokens produced.", (*_BASE, "domain"), registry=self._registry
        )
        self._rejections = Counter(
            "specblock_requests_rejected", "Requests that got no answer.", (*_BASE, "reason"), registry=self._registry
        )
        for reason in ("invalid", "queue_full", "unavailable", "failed", "client_gone"):
            self._rejections.labels(*self._labels, reason)

    def first_token(self, seconds: float) -> None:
        """A choice's first token left ``seconds`` after the request arrived."""
        self._first_token.observe(seconds)

    def later_tokens(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` more tokens came ``seconds`` after the ones before."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def finished(self, domain: str, stats: RequestStats, e2e_s: float) -> None:
        """A choice ended on its own."""
        self._e2e.observe(e2e_s)
        self._queue.observe(stats.queue_s)
        self._prefill.observe(stats.prefill_s)
        self._decode.observe(stats.decode_s)
        if stats.cycles:
            self._acceptance.observe(1 + stats.accepted_tokens / stats.cycles)
        label = self._domain_label(domain)
        self._by_domain.labels(*self._labels, label).inc()
        self._tokens_by_domain.labels(*self._labels, label).inc(stats.completion_tokens)

    def rejected(self, reason: str) -> None:
        """A request got an error instead of an answer."""
        self._rejections.labels(*self._labels, reason).inc()

    def render(self, status: EngineStatus, bandit: Mapping[str, Any]) -> bytes:
        """The text of ``/metrics``, format 0.0.4.

        Args:
            status: the engine's snapshot.
            bandit: the adaptation service's status, as in ``flat_numbers``; empty while there is none.
        """
        snapshot = _Snapshot(status, flat_numbers(bandit, self._max_domain_labels), self._labels)
        families = (*self._registry.collect(), *snapshot.collect())
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families, self._vllm_compat))
        return generate_latest(registry)

    def _domain_label(self, domain: str) -> str:
        if domain not in self._domains:
            if len(self._domains) >= self._max_domain_labels:
                return OTHER_DOMAIN
            self._domains.add(domain)
        return domain

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"specblock_{name}", text, _BASE, buckets=buckets, registry=self._registry)
        return family.labels(*self._labels)


def _renamed(family: Metric, name: str) -> Metric:
    twin = Metric(name, family.documentation, family.type)
    twin.samples = [
        Sample(name + sample.name.removeprefix(family.name), sample.labels, sample.value) for sample in family.samples
    ]
    return twin


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)
