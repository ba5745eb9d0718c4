"""Our numbers against `vllm bench serve`'s own function on the same requests."""

import random

import pytest

from lvnas_loadtest import saturation, stats
from lvnas_loadtest.records import Record


def records(count: int = 40) -> list[Record]:
    rng, made = random.Random(7), []
    for index in range(count):
        tokens = rng.randint(1, 20)
        ttft, itl = rng.uniform(0.05, 0.5), [rng.uniform(0.005, 0.05) for _ in range(tokens - 1)]
        record = Record(
            adapter="ab"[index % 2], start=1000 + index * 0.1, ttft=ttft, itl=itl, output_tokens=tokens
        )
        record.prompt_tokens, record.latency = rng.randint(5, 50), ttft + sum(itl)
        if index % 10 == 9:
            record.error = "broke"
        made.append(record)
    return made


def test_numbers_equal_vllm_bench_serve():
    serve = pytest.importorskip("vllm.benchmarks.serve")
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    made = records()
    slo = {"ttft": 300.0, "tpot": 30.0, "e2el": 700.0}
    outputs = [
        RequestFuncOutput(success=r.error is None, latency=r.latency, output_tokens=r.output_tokens,
        ttft=r.ttft or 0,
                          itl=r.itl, prompt_len=r.prompt_tokens, start_time=r.start)
        for r in made
    ]  # fmt: skip
    theirs, _ = serve.calculate_metrics([None] * len(made), outputs, 12.5, None, list(stats.PERCENTILES), slo)
    ours = stats.summary(made, 12.5, slo) | stats.peaks([r for r in made if r.error is None])
    same = {"total_input_tokens": "total_input", "total_output_tokens": "total_output"}
    for name in ("completed", "failed", "request_throughput", "request_goodput", "output_throughput",
                 "total_token_throughput", "total_input_tokens", "total_output_tokens", "max_output_tokens_per_s",
                 "max_concurrent_requests"):  # fmt: skip
        assert ours[name] == pytest.approx(getattr(theirs, same.get(name, name))), name
    for metric in stats.METRICS:
        for stat in ("mean", "median", "std"):
            assert ours[f"{stat}_{metric}_ms"] == pytest.approx(getattr(theirs, f"{stat}_{metric}_ms"))
        for percentile, value in getattr(theirs, f"percentiles_{metric}_ms"):
            assert ours[f"p{percentile}_{metric}_ms"] == pytest.approx(value)


def test_groups_add_up():
    made = records()
    groups = stats.grouped(made, lambda record: record.adapter)
    parts = [stats.summary(group, 10.0, {}) for group in groups.values()]
    whole = stats.summary(made, 10.0, {})
    for name in ("completed", "failed", "output_throughput", "total_input_tokens"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name])
    assert whole["request_goodput"] is None


def test_no_requests_give_no_percentiles():
    empty = stats.summary([], 0.0, {"ttft": 1.0})
    assert empty["completed"] == 0 and empty["p99_ttft_ms"] is None and stats.span([]) == 0
    assert stats.peaks([])["max_concurrent_requests"] == 0


@pytest.mark.parametrize(
    ("process", "send_lags", "words"),
    [
        ({"cpu": 0.99, "lag_p99_ms": 1.0}, [], "used 99% of its core"),
        ({"cpu": 0.2, "lag_p99_ms": 80.0}, [], "woke up 80 ms late"),
        ({"cpu": 0.2, "lag_p99_ms": 1.0}, [0.5] * 10, "sent 500 ms after their schedule"),
    ],
)
def test_saturation_is_told(process, send_lags, words):
    assert words in "; ".join(saturation.reasons([process], send_lags))


def test_a_quiet_generator_is_trusted():
    assert saturation.reasons([{"cpu": 0.3, "lag_p99_ms": 2.0}], [0.001] * 50) == []
