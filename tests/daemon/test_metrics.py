"""/metrics: readable by Prometheus, under the names that other tools look for, complete from the first scrape."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from specblock.daemon.messages import EngineStatus, RequestStats
from specblock.daemon.metrics import GatewayMetrics

LABELS = (("engine", "0"), ("model_name", "m"))
STATS = RequestStats(
    prompt_tokens=3,
    completion_tokens=7,
    cycles=2,
    draft_tokens=20,
    accepted_tokens=5,
    acceptance_histogram=(0, 0, 1, 1, 0),
    queue_s=0.1,
    prefill_s=0.2,
    decode_s=0.3,
    drafter_version="v1",
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: bytes) -> Samples:
    found = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    ]
    assert len(found) == len(dict(found)), "a series is there twice"
    return dict(found)


def labels(**extra: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((*LABELS, *extra.items())))


def test_everything_is_there_from_the_start_and_zero() -> None:
    found = parse(GatewayMetrics("m").render(EngineStatus(phase="loading"), {}))
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
        "specblock_request_acceptance_length_count",
    ):
        assert found[name, LABELS] == 0, name
    assert found["vllm:request_success_total", labels(finished_reason="stop")] == 0
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total", labels(position="0")] == 0
    assert found["specblock_engine_phase", labels(phase="loading")] == 1
    assert found["specblock_requests_rejected_total", labels(reason="queue_full")] == 0
    assert not any(name.endswith("_created") for name, _ in found)


def test_values_of_the_engine() -> None:
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
    found = parse(GatewayMetrics("m").render(status, {}))
    assert found["vllm:spec_decode_num_drafts_total", LABELS] == 10
    assert found["specblock_spec_decode_steps_total", LABELS] == 10
    assert found["vllm:spec_decode_num_accepted_tokens_per_pos_total", labels(position="2")] == 8
    assert found["vllm:kv_cache_usage_perc", LABELS] == 0.25
    assert found["vllm:request_success_total", labels(finished_reason="stop")] == 3
    assert found["vllm:request_success_total", labels(finished_reason="error")] == 1
    assert found["specblock_speculation_enabled", LABELS] == 0
    assert found["specblock_drafter_version_info", labels(version="v000001-head-00000000")] == 1


def test_values_of_the_bandit() -> None:
    bandit = {
        "decisions_by_arm_total": {"skip": 4, "head": 1},
        "lost_total": 2,
        "backlog": 7,
        "note": "text is not published",
        "Bad Name": 1,
        "ratio": float("nan"),
    }
    found = parse(GatewayMetrics("m").render(EngineStatus(phase="ready"), bandit))
    own = {name: value for (name, _), value in found.items() if name.startswith("specblock_bandit")}
    assert found["specblock_bandit_decisions_total", labels(arm="skip")] == 4
    assert own.keys() == {"specblock_bandit_decisions_total", "specblock_bandit_lost_total", "specblock_bandit_backlog"}
    assert (own["specblock_bandit_lost_total"], own["specblock_bandit_backlog"]) == (2, 7)


def test_request_timings() -> None:
    gateway = GatewayMetrics("m")
    gateway.first_token(0.5)
    gateway.later_tokens(0.3, 3)
    gateway.finished("python", STATS, 1.5)
    found = parse(gateway.render(EngineStatus(phase="ready"), {}))
    assert found["vllm:inter_token_latency_seconds_count", LABELS] == 3
    assert abs(found["vllm:inter_token_latency_seconds_sum", LABELS] - 0.3) < 1e-9
    assert found["vllm:e2e_request_latency_seconds_sum", LABELS] == 1.5
    assert found["vllm:request_queue_time_seconds_sum", LABELS] == 0.1
    assert found["specblock_request_acceptance_length_sum", LABELS] == 3.5
    assert found["specblock_domain_tokens_total", labels(domain="python")] == 7


def test_domain_labels_are_bounded() -> None:
    gateway = GatewayMetrics("m", max_domain_labels=2)
    for domain in ("a", "b", "c", "d", "a"):
        gateway.finished(domain, STATS, 1.0)
    found = parse(gateway.render(EngineStatus(phase="ready"), {}))
    counts = {
        dict(pairs)["domain"]: value for (name, pairs), value in found.items() if name == "specblock_requests_total"
    }
    assert counts == {"a": 2, "b": 1, "other": 2}


def test_without_vllm_names() -> None:
    text = GatewayMetrics("m", vllm_compat=False).render(EngineStatus(phase="ready"), {})
    assert b"vllm:" not in text
    assert parse(text)["specblock_time_to_first_token_seconds_count", LABELS] == 0


def test_the_status_of_the_adaptation_service() -> None:
    domain = {"domain": "cpp", "version": "v1", "acceptance": 2.5, "cycles": 10, "requests": 3, "changes": 1}
    bandit = {
        "stage": "gating-1",
        "decisions": 4,
        "accrued_s": 1.5,
        "balance": {"charged_s": 3.0, "skips": 2},
        "counters": {"read": 9},
        "domains": [domain, {**domain, "domain": "rare", "cycles": 1}],
        "last_record": None,
        "open_records": [{"decision_id": "d1"}],
    }
    found = parse(GatewayMetrics("m", max_domain_labels=1).render(EngineStatus(phase="ready"), bandit))
    own = {key: value for key, value in found.items() if key[0].startswith("specblock_bandit")}
    assert own == {
        ("specblock_bandit_stage", labels(stage="gating-1")): 1,
        ("specblock_bandit_decisions_total", labels()): 4,
        ("specblock_bandit_accrued_s", labels()): 1.5,
        ("specblock_bandit_balance_charged_s", labels()): 3,
        ("specblock_bandit_balance_skips", labels()): 2,
        ("specblock_bandit_loop_read_total", labels()): 9,
        ("specblock_bandit_acceptance", labels(domain="cpp")): 2.5,
        ("specblock_bandit_cycles", labels(domain="cpp")): 10,
        ("specblock_bandit_requests", labels(domain="cpp")): 3,
        ("specblock_bandit_changes", labels(domain="cpp")): 1,
    }
