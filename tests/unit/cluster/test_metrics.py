"""Metrics: vLLM's names with ours in front, phases from `Timings`, promises kept jointly, workers read when scraped."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from tandem.cluster.metrics import MAX_REASONS, RouterMetrics, attains
from tandem.cluster.proto.tandem_internal_v1_pb2 import WorkerStatus
from tandem.cluster.types import SLO, Timings

TIMINGS = Timings(
    queue_s=0.1,
    prefill_s=0.2,
    ttft_s=0.5,
    transfer_s=0.05,
    exposed_transfer_s=0.01,
    decode_s=0.9,
    e2e_s=1.4,
    path="split",
    transferred_bytes=1000,
    decode_queue_s=0.03,
    cached_tokens=16,
    output_tokens=10,
)


def samples(metrics: RouterMetrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(value for name, value in sorted(sample.labels.items()) if name != "model_name")
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_a_choice_is_counted_in_every_phase() -> None:
    metrics = RouterMetrics("m")
    metrics.observe_choice(TIMINGS, prompt_tokens=40, finish_reason="stop", slo=SLO(ttft_s=1.0, tpot_s=0.2))
    found = samples(metrics)
    for name, total in {
        "time_to_first_token_seconds": 0.5,
        "request_time_per_output_token_seconds": 0.1,
        "e2e_request_latency_seconds": 1.4,
        "request_queue_time_seconds": 0.1,
        "request_prefill_time_seconds": 0.2,
        "request_decode_time_seconds": 0.9,
        "request_prompt_tokens": 40,
        "request_generation_tokens": 10,
        "request_decode_queue_time_seconds": 0.03,
        "kv_transfer_time_seconds": 0.05,
        "kv_transfer_exposed_seconds": 0.01,
        "kv_transfer_size_bytes": 1000,
    }.items():
        assert found[f"tandem:{name}_count"] == 1, name
        assert abs(found[f"tandem:{name}_sum"] - total) < 1e-9, name
    assert found["tandem:prompt_tokens_total"] == 40
    assert found["tandem:generation_tokens_total"] == 10
    assert (found["tandem:prefix_cache_queries_total"], found["tandem:prefix_cache_hits_total"]) == (40, 16)
    assert found["tandem:request_success_total{stop}"] == 1
    assert found["tandem:choices_by_path_total{split}"] == 1
    assert (found["tandem:handoffs_total"], found["tandem:kv_transferred_bytes_total"]) == (1, 1000)
    assert found["tandem:slo_attained_total{default}"] == 1


def test_a_prompt_is_counted_once_whatever_n_is() -> None:
    metrics = RouterMetrics()
    for choice in range(3):
        metrics.observe_choice(TIMINGS, prompt_tokens=40, finish_reason="stop", slo=SLO(), choice=choice)
    found = samples(metrics)
    assert (found["tandem:prompt_tokens_total"], found["tandem:generation_tokens_total"]) == (40, 30)


def test_what_is_called_requests_does_not_count_choices() -> None:
    metrics = RouterMetrics()
    for choice in range(3):
        metrics.observe_choice(TIMINGS, prompt_tokens=40, finish_reason="stop", slo=SLO(), choice=choice)
    found = samples(metrics)
    assert [
        name for name, value in found.items() if "requests" in name and value and not name.endswith("_created")
    ] == []
    choices = ("request_success_total{stop}", "choices_by_path_total{split}", "slo_choices_total{default}")
    assert [found[f"tandem:{name}"] for name in choices] == [3, 3, 3]


def test_only_a_split_is_a_handoff() -> None:
    metrics = RouterMetrics()
    for path in ("local", "mixed", "prefill_only"):
        metrics.observe_choice(Timings(path=path), prompt_tokens=1, finish_reason="length", slo=SLO())
    found = samples(metrics)
    assert found["tandem:handoffs_total"] == 0
    assert found["tandem:kv_transfer_time_seconds_count"] == 0
    assert found["tandem:choices_by_path_total{mixed}"] == 1


def test_promises_are_kept_jointly_and_one_token_has_no_tpot() -> None:
    slo = SLO(ttft_s=0.5, tpot_s=0.1)
    ok, slow_first, slow_rest = (
        Timings(ttft_s=0.5, e2e_s=0.6, output_tokens=2),
        Timings(ttft_s=0.51, e2e_s=0.6, output_tokens=2),
        Timings(ttft_s=0.5, e2e_s=0.8, output_tokens=2),
    )
    one = Timings(ttft_s=0.4, e2e_s=9.0, output_tokens=1)
    assert [attains(t, slo) for t in (ok, slow_first, slow_rest, one)] == [
        (True, True),
        (False, True),
        (True, False),
        (True, True),
    ]
    metrics = RouterMetrics()
    for timings in (ok, slow_first, slow_rest, one):
        metrics.observe_choice(timings, prompt_tokens=1, finish_reason="stop", slo=slo, slo_class="chat")
    found = samples(metrics)
    assert found["tandem:slo_choices_total{chat}"] == 4
    assert found["tandem:slo_ttft_attained_total{chat}"] == 3
    assert found["tandem:slo_tpot_attained_total{chat}"] == 3
    assert found["tandem:slo_attained_total{chat}"] == 2
    assert found["tandem:request_time_per_output_token_seconds_count"] == 3


def test_tokens_of_one_delta_share_its_gap() -> None:
    metrics = RouterMetrics()
    metrics.observe_inter_token(0.3, tokens=3)
    metrics.observe_inter_token(0.1)
    found = samples(metrics)
    assert found["tandem:inter_token_latency_seconds_count"] == 4
    assert abs(found["tandem:inter_token_latency_seconds_sum"] - 0.4) < 1e-9


def test_reasons_are_counted_and_bounded() -> None:
    metrics = RouterMetrics()
    metrics.count_refusal("overloaded")
    metrics.count_retry("peer_lost")
    metrics.count_handoff_failure("peer_lost")
    metrics.count_canceled()
    metrics.set_in_flight(3)
    for index in range(MAX_REASONS + 10):
        metrics.count_failure(f"reason {index}")
    found = samples(metrics)
    assert found["tandem:request_refusals_total{overloaded}"] == 1
    assert found["tandem:request_retries_total{peer_lost}"] == 1
    assert found["tandem:handoff_failures_total{peer_lost}"] == 1
    assert found["tandem:requests_canceled_total"] == 1
    assert found["tandem:requests_in_flight"] == 3
    assert found["tandem:request_failures_total{other}"] == 10


def test_workers_come_from_their_last_heartbeats() -> None:
    metrics = RouterMetrics()
    status = WorkerStatus(
        worker_id="d0",
        role="decode",
        epoch=7,
        device="cpu",
        model="tiny",
        num_blocks=100,
        free_blocks=20,
        cached_blocks=30,
        credited_blocks=5,
        running=4,
        waiting=3,
        leases=2,
        integrity_ok=True,
        preemptions_total=6,
        prefix_queries_tokens_total=48,
        prefix_hits_tokens_total=16,
        steps_total=9,
        computed_tokens_total=70,
    )
    statuses = [status, WorkerStatus(worker_id="p0", role="prefill")]
    metrics.watch_workers(lambda: statuses)
    found = samples(metrics)
    assert found["tandem:kv_cache_usage_perc{decode,d0}"] == 0.5
    assert found["tandem:kv_cache_usage_perc{prefill,p0}"] == 0
    assert found["tandem:num_requests_running{decode,d0}"] == 4
    assert found["tandem:num_requests_waiting{decode,d0}"] == 3
    ledger = [found[f"tandem:kv_blocks_{name}{{decode,d0}}"] for name in ("free", "cached", "held", "credited")]
    assert ledger == [20, 30, 50, 5]
    assert found["tandem:ledger_integrity{decode,d0}"] == 1
    assert found["tandem:leases{decode,d0}"] == 2
    assert found["tandem:num_preemptions_total{decode,d0}"] == 6
    assert found["tandem:worker_prefix_cache_queries_total{decode,d0}"] == 48
    assert found["tandem:worker_prefix_cache_hits_total{decode,d0}"] == 16
    assert found["tandem:engine_steps_total{decode,d0}"] == 9
    assert found["tandem:engine_computed_tokens_total{decode,d0}"] == 70
    assert any(name.startswith("tandem:worker_info{") and "d0" in name for name in found)
    statuses.clear()
    assert not any("d0" in name for name in samples(metrics)), "a worker that is gone leaves no series"


def test_two_routers_of_one_process_count_apart() -> None:
    first, second = RouterMetrics(), RouterMetrics()
    first.count_canceled()
    assert samples(first)["tandem:requests_canceled_total"] == 1
    assert samples(second)["tandem:requests_canceled_total"] == 0


def test_what_is_inside_now() -> None:
    metrics = RouterMetrics()
    metrics.set_in_flight(3)
    metrics.watch_queue(lambda: {"interactive": 1, "batch": 2})
    assert metrics.load() == {"requests_inside": 3, "choices_waiting": {"batch": 2, "interactive": 1}}
