"""/metrics: readable by Prometheus, under the names that other tools look for, complete from the first scrape."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from specblock.daemon.messages import EngineStatus, RequestStats, TokenChunk
from specblock.daemon.metrics import GatewayMetrics, path_acceptance_rate, render

LABELS = (("engine", "0"), ("model_name", "m"))


def parse(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def stats(**changes: object) -> RequestStats:
    values: dict[str, object] = {
        "prompt_tokens": 3,
        "completion_tokens": 7,
        "cycles": 2,
        "draft_tokens": 20,
        "accepted_tokens": 5,
        "acceptance_histogram": (0, 0, 1, 1, 0),
        "queue_s": 0.1,
        "prefill_s": 0.2,
        "decode_s": 0.3,
        "drafter_version": "v1",
    }
    return RequestStats(**{**values, **changes})  # type: ignore[arg-type]


def test_everything_is_there_from_the_start_and_zero() -> None:
    found = parse(render(EngineStatus(phase="loading"), {}, GatewayMetrics("m"), "1.2"))
    for name in (
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "specblock_spec_decode_tree_nodes_total",
        "specblock_feedback_dropped_total",
        "specblock_feedback_duplicates_total",
        "specblock_request_acceptance_rate_count",
    ):
        assert found[name, LABELS] == 0, name
    assert found["vllm:request_success_total", (*LABELS[:1], ("finished_reason", "stop"), *LABELS[1:])] == 0
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total", (*LABELS, ("position", "0"))] == 0
    assert found["specblock_engine_phase", (*LABELS, ("phase", "loading"))] == 1
    assert found["specblock_engine_phase", (*LABELS, ("phase", "ready"))] == 0
    assert found["specblock_build_info", (*LABELS, ("version", "1.2"))] == 1
    assert not any(name.endswith("_created") for name, _ in found)


def test_values_of_engine_and_bandit() -> None:
    status = EngineStatus(
        phase="ready",
        cycles=10,
        draft_tokens=100,
        accepted_tokens=25,
        accepted_per_position=(9, 8, 8),
        finished={"stop": 3, "error": 1},
        kv_tokens_used=50,
        kv_tokens_capacity=200,
        drafter_version="v000001-head-00000000",
        speculation=False,
    )
    bandit = {"arm_pulls": {"skip": 4}, "cost_s": {"train": 1.5}, "lost": 2, "backlog": 7, "unknown": object()}
    found = parse(render(status, bandit, GatewayMetrics("m"), "1"))
    assert found["vllm:spec_decode_num_drafts_total", LABELS] == 10
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total", (*LABELS, ("position", "2"))] == 8
    assert found["vllm:kv_cache_usage_perc", LABELS] == 0.25
    assert found["vllm:request_success_total", (*LABELS[:1], ("finished_reason", "stop"), *LABELS[1:])] == 3
    assert found["specblock_speculation_enabled", LABELS] == 0
    assert found["specblock_drafter_version_info", (*LABELS, ("version", "v000001-head-00000000"))] == 1
    assert found["specblock_bandit_arm_pulls_total", (("arm", "skip"), *LABELS)] == 4
    assert found["specblock_bandit_cost_seconds_total", (*LABELS, ("phase", "train"))] == 1.5
    assert found["specblock_feedback_lost_total", LABELS] == 2
    assert found["specblock_feedback_backlog", LABELS] == 7


def test_request_timings() -> None:
    gateway = GatewayMetrics("m")
    gateway.first_token(0.5)
    gateway.tokens(0.3, 3)
    gateway.finished(1.0, TokenChunk(request_id="r", tokens=(), text="", finish_reason="stop", stats=stats()))
    gateway.finished(2.0, TokenChunk(request_id="r", tokens=(), text="", finish_reason="error", error="x"))
    found = parse(render(EngineStatus(phase="ready"), {}, gateway, "1"))
    assert found["vllm:inter_token_latency_seconds_count", LABELS] == 3
    assert abs(found["vllm:inter_token_latency_seconds_sum", LABELS] - 0.3) < 1e-9
    assert found["vllm:e2e_request_latency_seconds_sum", LABELS] == 3.0
    assert found["vllm:request_queue_time_seconds_sum", LABELS] == 0.1
    assert found["specblock_request_acceptance_rate_sum", LABELS] == 5 / (2 * 4)


def test_acceptance_rate_without_cycles() -> None:
    assert path_acceptance_rate(stats(cycles=0, acceptance_histogram=())) == 0


def test_domain_labels_are_bounded() -> None:
    gateway = GatewayMetrics("m", max_domain_labels=2)
    for domain in ("a", "b", "c", "d", "a"):
        gateway.admitted(domain)
    found = parse(render(EngineStatus(phase="ready"), {}, gateway, "1"))
    counts = {
        dict(labels)["domain"]: value
        for (name, labels), value in found.items()
        if name == "specblock_domain_requests_total"
    }
    assert counts == {"a": 2, "b": 1, "other": 2}


def test_without_vllm_names() -> None:
    text = render(EngineStatus(phase="ready"), {}, GatewayMetrics("m", vllm_compat=False), "1")
    assert b"vllm:" not in text
    assert parse(text)["specblock_time_to_first_token_seconds_count", LABELS] == 0
