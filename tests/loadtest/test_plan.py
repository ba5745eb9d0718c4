"""Workloads as numbers: seeds, shards, arrivals, popularity, lengths, traces, and what is refused."""

import itertools
import random

import numpy as np
import pytest

from lvnas.errors import InputError
from lvnas_loadtest import arrivals, specs
from lvnas_loadtest.distributions import distribution
from lvnas_loadtest.plan import Plan
from lvnas_loadtest.popularity import popularity
from lvnas_loadtest.workload import Workload

NAMES = ["a", "b", "c", "d"]


def workload(**changes):
    return Workload(**({"url": "localhost:1", "adapters": NAMES} | changes))


def test_same_seed_same_requests_in_any_number_of_processes():
    load = workload(arrivals="poisson:50", duration=4, prompt_tokens="lognormal:64:0.5", popularity="zipf:1")
    whole = list(Plan(load))
    assert whole == list(Plan(load))
    shards = [list(Plan(load, shard, 3)) for shard in range(3)]
    assert sorted(itertools.chain(*shards), key=lambda planned: planned.index) == whole
    other = list(Plan(workload(arrivals="poisson:50", duration=4, prompt_tokens="lognormal:64:0.5", seed=1)))
    assert [planned.prompt_tokens for planned in other] != [planned.prompt_tokens for planned in whole]


def test_closed_loop_with_a_number_of_requests_is_shared_out():
    shards = [list(Plan(workload(requests=7), shard, 2)) for shard in range(2)]
    assert [planned.index for planned in shards[0]] == [0, 2, 4, 6]
    assert [planned.index for planned in shards[1]] == [1, 3, 5]


@pytest.mark.parametrize(("text", "cv"), [("poisson:40", 1.0), ("gamma:40:0.5", 0.5), ("gamma:40:2", 2.0)])
def test_gaps_have_their_rate_and_variation(text, cv):
    times = list(itertools.islice(arrivals.times(text, 1.0, seed=3), 40_000))
    gaps = np.diff([0.0, *times])
    assert gaps.mean() == pytest.approx(1 / 40, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_constant_arrivals():
    assert list(itertools.islice(arrivals.times("constant:4", 1.0, 0), 3)) == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(("first", "last"), [(10, 110), (110, 10), (60, 60)])
def test_ramp_goes_from_one_rate_to_the_other(first, last):
    duration = 100.0
    times = np.array(list(itertools.islice(arrivals.times(f"ramp:{first}:{last}", duration, 5), 8000)))
    assert (np.diff(times) >= 0).all()
    for begin in (0, 40, 90):
        middle = first + (last - first) * (begin + 5) / duration
        count = ((times >= begin) & (times < begin + 10)).sum()
        assert count == pytest.approx(10 * middle, abs=5 * np.sqrt(10 * middle))
    after = ((times >= duration) & (times < duration + 10)).sum()
    assert after == pytest.approx(10 * last, abs=5 * np.sqrt(10 * last))


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("uniform", [0.25] * 4),
        ("zipf:1", np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)),
        ("distinct", [0.25] * 4),
        ("identical", [1, 0, 0, 0]),
        ("weights:a=3,d=1", [0.75, 0, 0, 0.25]),
    ],
)
def test_popularity(text, shares):
    choose, rng = popularity(text, NAMES), random.Random(0)
    chosen = [choose(index, rng) for index in range(20_000)]
    for name, share in zip(NAMES, shares, strict=True):
        assert chosen.count(name) / len(chosen) == pytest.approx(share, abs=0.015)
    if text == "distinct":
        assert all(one != two for one, two in itertools.pairwise(chosen))


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("7", 7, 7, 7),
        ("uniform:4:8", 4, 8, 6),
        ("normal:50:5", 20, 80, 50),
        ("lognormal:50:0.2", 10, 200, 51),
    ],
)
def test_lengths(text, low, high, mean):
    sample, rng = distribution("length", text), random.Random(1)
    values = [sample(rng) for _ in range(5000)]
    assert low <= min(values) and max(values) <= high
    assert np.mean(values) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_recorded_trace(tmp_path, suffix):
    path = tmp_path / f"trace.{suffix}"
    if suffix == "csv":
        path.write_text("timestamp,model,output_tokens\n101.5,b,9\n100,a,\n")
    else:
        path.write_text(
            '{"timestamp": 101.5, "model": "b", "output_tokens": 9}\n{"timestamp": 100, "model": "a"}\n'
        )
    load = workload(arrivals=f"trace:{path}", popularity="trace", output_tokens="5")
    first, second = Plan(load)
    assert (first.at, first.adapter, first.output_tokens) == (0.0, "a", 5)
    assert (second.at, second.adapter, second.output_tokens) == (1.5, "b", 9)


@pytest.mark.parametrize(
    "content",
    ["", "{}\n", "[1]\n", "nonsense\n", '{"timestamp": "x"}\n', '{"timestamp": 1, "output_tokens": "x"}\n'],
)
def test_bad_trace(tmp_path, content):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(InputError, match="trace"):
        Plan(workload(arrivals=f"trace:{tmp_path / 't.jsonl'}"))


def test_trace_names_an_unknown_adapter(tmp_path):
    """Said before anything is sent; without `--popularity trace` the names are not used."""
    (tmp_path / "t.jsonl").write_text('{"timestamp": 0, "model": "a"}\n{"timestamp": 1, "model": "z"}\n')
    with pytest.raises(InputError, match="unknown adapter in the trace 'z'; allowed: a, b, c, d"):
        Plan(workload(arrivals=f"trace:{tmp_path / 't.jsonl'}", popularity="trace"))
    assert len(list(Plan(workload(arrivals=f"trace:{tmp_path / 't.jsonl'}")))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": "poison:3"}, "unknown arrivals 'poison:3'; allowed: closed, poisson:RATE"),
        ({"arrivals": "poisson:0"}, "does not fit poisson:RATE"),
        ({"arrivals": "gamma:3"}, "give 2 numbers above 0"),
        ({"arrivals": "ramp:1:nan"}, "does not fit ramp:FROM:TO"),
        ({"popularity": "zip:1"}, "unknown popularity 'zip:1'"),
        ({"popularity": "weights:z=1"}, "unknown adapter in the weights 'z'; allowed: a, b, c, d"),
        ({"popularity": "weights:a=-1"}, "weight 'a=-1' is not a number >= 0"),
        ({"popularity": "weights:a=0"}, "are all 0"),
        ({"prompt_tokens": "-3"}, "unknown prompt length"),
        ({"output_tokens": "uniform:9:3"}, "the low end is above the high end"),
        ({"image_share": 1.5}, "image share 1.5 must be from 0 to 1"),
        ({"users": 0, "duration": 0}, "users 0 must be at least 1; duration 0 s must be above 0"),
        ({"requests": 5, "warmup": 1}, "exclude each other"),
        (
            {"prompt_tokens": "0"},
            "prompt length '0' must be at least 1; allowed: N, uniform:LOW:HIGH, normal",
        ),
        ({"slo": {"ttfx": 3}}, "SLO ttfx:3 must be one of ttft, tpot, e2el"),
        ({"slo": {"ttft": -5}}, "SLO ttft:-5 must be above 0 ms"),
        ({"timeout": 0}, "timeout 0 s must be above 0"),
        ({"url": "ftp://x"}, "is not like http://127.0.0.1:8000"),
        ({"url": "http://x:99999"}, "is not like http://127.0.0.1:8000"),
    ],
)
def test_bad_workload(changes, words):
    with pytest.raises(InputError) as error:
        workload(**changes)
    assert words in str(error.value)


def test_workload_file(tmp_path):
    load = workload(slo={"ttft": 100.0}, routes={"b": ["http://x:2", "base"]})
    load.write(tmp_path / "w.json")
    read = Workload.read(tmp_path / "w.json")
    assert (
        read == load
        and read.route("b") == ("http://x:2", "base")
        and read.route("a") == ("http://localhost:1", "a")
    )
    (tmp_path / "w.json").write_text('{"url": "x", "adapters": ["a"], "user": 3}')
    with pytest.raises(InputError, match="unknown fields: \\['user'\\]"):
        Workload.read(tmp_path / "w.json")


def test_durations_and_limits():
    assert [specs.seconds(text) for text in ("90", "90s", "1.5m", "1h", "0s")] == [90, 90, 90, 3600, 0]
    for text in ("", "s", "-1s", "1 day", "inf", "nan"):
        with pytest.raises(InputError, match="is not like 90"):
            specs.seconds(text)
    assert specs.limits(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}
    with pytest.raises(InputError, match="not like ttft:200"):
        specs.limits(["ttft=3"])
