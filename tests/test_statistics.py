"""The pure parts on hand-made Results: settings, statistics, warnings, tables, promises, verdict."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

import qwquanto as q

GIB = 2**30


def run(decode=10.0, gaps=(0.1, 0.1), tokens=3, **more):
    told = {
        "seed": 0,
        "prompt_tokens": 7,
        "generated_tokens": tokens,
        "stop_reason": "length",
        "latency_s": 1.2,
    }
    told |= {"ttft_s": 0.05, "decode_tokens_per_s": decode, "tokens_per_s": 2.5, "inter_token_s": list(gaps)}
    return q.Run(**(told | more))


def result(weights="int8", decode=10.0, kl=None, stored=GIB, **more):
    quality = None if kl is None else q.Quality(100, kl, 0.9, *q.wilson(90, 100))
    peak = {"rss": 3 * GIB}
    told = {"devices": ["cpu"], "environment": {"cpu": "Some CPU", "ram": "8 GiB", "torch": "2.13.0"}}
    told |= {
        "weight_bytes": stored,
        "unquantized_bytes": 2 * GIB,
        "quantizable_bytes": GIB,
        "quantized_layers": 4,
    }
    told |= {"linear_layers": 5, "weight_types": {"WeightQBytesTensor": 4}, "load_s": 1.5, "parameters": GIB}
    told |= {"memory": {"before load": {"rss": GIB}, "peak of runs": peak}, "prefill_tokens_per_s": 500.0}
    told |= {"memory_bytes_per_s": {"cpu": 2e10}, "bandwidth_utilization": 0.5, "prefill_tokens": 512}
    s = replace(q.Settings(), weights=None if weights == "none" else weights)
    told |= {"runs": [run(decode)] * 2 if decode else [], "quality": quality}
    return q.Result(**({"settings": s} | told | more))


def text(parts, width=80):
    """What a terminal of this width shows."""
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def test_percentiles_interpolate_and_survive_few_values():
    assert q.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3
    assert q.percentile([1.0, 2.0, 3.0, 4.0, 5.0], 90) == pytest.approx(4.6)
    assert q.percentile([7.0], 99) == 7 and q.percentile([], 50) is None
    assert q.percentile([2.0, 2.0, 2.0], 99) == 2


def test_wilson_interval_against_the_textbook():
    low, high = q.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert q.wilson(0, 20)[0] == pytest.approx(0) and q.wilson(20, 20)[1] == pytest.approx(1)


def test_deviation_only_over_the_positions_that_all_runs_reached():
    runs = [run(gaps=(0.1, 0.1)), run(gaps=(0.1, 0.1, 9.0, 9.0))]
    assert q.common_rates(runs) == pytest.approx([10, 10])
    assert q.relative_deviation(runs) == pytest.approx(0)
    assert q.relative_deviation([run()]) is None and q.relative_deviation([]) is None
    assert q.relative_deviation([run(gaps=()), run()]) is None


def test_instability_and_drift_say_so_themselves():
    def told(*gaps):
        return " ".join(q.warnings_for(result(runs=[run(gaps=(g, g)) for g in gaps])))

    assert told(0.1, 0.1, 0.1) == ""
    assert told(0.1, 0.1001, 0.1002, 0.1003, 0.1004, 0.1005) == ""  # in order, and far too little to matter
    assert "differ by" in told(0.1, 0.2, 0.1) and "slower than the first" not in told(0.1, 0.2, 0.1)
    assert "slower than the first" in told(0.1, 0.11, 0.12, 0.13, 0.14, 0.15)
    eager = result(runs=[run()] * 2, eager_runs=[run(gaps=(g, g)) for g in (0.1, 0.2)])
    assert ["the eager runs' rates differ by" in line for line in q.warnings_for(eager)] == [True]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.00213, "0.00213"),
        (0.5, "0.500"),
        (3.14159, "3.14"),
        (44.94, "44.9"),
        (151.2, "151"),
        (1234.5, "1234"),
    ],
)
def test_three_significant_digits(value, shown):
    assert q.digits(value) == shown


def test_single_report_as_text():
    warm, s = run(tokens=16, text="x"), replace(q.Settings(), model_name="a/b")
    r = result(settings=s, warmup=[warm], generation={"top_k": 50, "top_p": None})
    r = replace(
        r,
        runs=[run(text="The [bold] answer\nis 42."), run(decode=None, gaps=(), tokens=1, stop_reason="eos")],
    )
    assert text(q.single_report(r)) == EXPECTED_SINGLE.strip("\n")


def test_comparison_as_text_in_80_columns():
    results = [
        result("none", 20.0, stored=2 * GIB),
        result("float8", None, failure="its process was killed by SIGKILL"),
        result("int8", 10.0, 0.004, stored=int(1.1 * GIB)),
        result("int4", 15.0, 0.2, stored=int(0.7 * GIB)),
        result("int2", 5.0, 4.2, stored=int(0.5 * GIB)),
    ]
    results = [replace(r, settings=replace(r.settings, compare=q.PRECISIONS)) for r in results]
    shown = text(q.comparison_report(results))
    assert shown == EXPECTED_COMPARISON.strip("\n")
    assert max(map(len, shown.splitlines())) <= 80


def test_of_equally_small_precisions_the_fastest_is_recommended():
    results = [result("none", 20.0, stored=2 * GIB), result("float8", 2.0, 0.01), result("int8", 9.0, 0.02)]
    (line,) = q.verdict_lines(results)
    assert "keeps the answers: int8" in line


def test_promises_are_judged_at_their_limits():
    base, eager = result("none", 20.0, stored=2 * GIB), [run(10.0)]
    kept = result("int8", 18.0, 0.049, stored=GIB, eager_runs=eager)
    broken = result("int4", 11.9, 0.05, stored=GIB + 10**7, eager_runs=eager)
    judged = q.promises([base, kept, broken])
    assert {name: row["int8"][0] for name, row in judged.items()} == dict.fromkeys(q.PROMISED, True)
    assert {name: row["int4"][0] for name, row in judged.items()} == dict.fromkeys(q.PROMISED, False)
    unknown = q.promises([result("int8", None, stored=None)])
    assert {name: row["int8"] for name, row in unknown.items()} == dict.fromkeys(q.PROMISED)


def test_promises_against_16_bit_are_not_judged_against_32():
    r = replace(result("int8", 20.0), unquantized_bytes=4 * GIB, parameters=GIB)
    told = q.promises([result("none", 10.0), r])
    assert told["memory saved"]["int8"] is None and told["16-bit speed"]["int8"] is None
    assert any("32-bit" in line for line in q.warnings_for(r))


def test_a_model_that_quanto_hardly_reaches_says_so():
    r = replace(result("int8"), quantizable_bytes=GIB // 4)
    assert any("only 12.5 %" in line for line in q.warnings_for(r))


def test_quality_on_few_tokens_says_so():
    few = replace(result("int8", kl=0.001), quality=q.Quality(15, 0.001, 1.0, 0.8, 1.0))
    assert any("rests on 15 tokens" in line for line in q.warnings_for(few))
    assert not any("rests on" in line for line in q.warnings_for(result("int8", kl=0.001)))


def test_memory_that_is_not_equally_fast_for_all_says_so():
    def told(*speeds):
        results = [replace(result("int8"), memory_bytes_per_s={"cpu": speed}) for speed in speeds]
        return q.unlike(results)

    assert told(34e9, 61e9, 35e9) == [
        "Memory of cpu: 34.0 to 61.0 GB/s measured beside different precisions; MBU is rough."
    ]
    assert told(34e9, 36e9) == [] and q.unlike([result("int8", memory_bytes_per_s={})]) == []


def test_a_verdict_names_the_speeds_that_are_uncertain():
    shaky = result("int8", runs=[run(gaps=(g, g)) for g in (0.1, 0.2)])
    assert "speed of int8: see above" in q.verdict_lines([result("none"), shaky])[-1]
    assert len(q.verdict_lines([result("none"), result("int8")])) == 1


def test_prefill_of_different_lengths_says_so():
    told = q.unlike(
        [result("none"), result("float8", prefill_tokens=64), result("int8", prefill_tokens=None)]
    )
    assert len(told) == 1 and "none 512, float8 64 tokens" in told[0]


def test_a_note_names_its_precision_unless_it_is_everyones():
    notes = {"none": ["no NVML"], "int8": ["no NVML", "other programs use 35 % of the processor"]}
    shown = text(q.comparison_report([result(name, notes=told) for name, told in notes.items()]), 120)
    assert shown.count("no NVML") == 1 and "! no NVML" in shown and "! int8: other programs" in shown


def test_text_is_shown_as_it_is():
    shown = io.StringIO()
    q.show([q.literal("a [bold] answer :key:")], shown)
    assert shown.getvalue() == "a [bold] answer :key:\n"


def test_random_weights_have_no_quality_and_say_so():
    s = replace(q.Settings(), random_weights=True)
    results = [result("none", settings=replace(s, weights=None)), result("int8", settings=s)]
    shown = text(q.comparison_report(results), 120)
    assert "Random weights" in shown and "Quality was not measured." in shown and "reference" not in shown


def test_verdict_borders():
    assert [q.verdict(result(kl=kl)) for kl in (0.0499, 0.05, 0.5, 0.501)] == [
        "kept",
        "changed",
        "changed",
        "broken",
    ]


def test_peak_over_devices_and_a_childs_death():
    peak = {"cuda:0 allocated": 5, "cuda:0 used": 50, "cuda:1 allocated": 6, "rss": 1}
    assert q.peak_bytes(result(memory={"peak of runs": peak})) == 11
    assert q.peak_bytes(result(memory={"peak of runs": {"rss": 1}})) == 1
    assert q.death(-9) == "its process was killed by SIGKILL (out of memory?)"
    assert q.death(3) == "its process ended with exit code 3"


EXPECTED_SINGLE = """
# a/b: int8, 1.07 B parameters, on cpu
Some CPU; 8 GiB
torch 2.13.0

### Speed: 2 timed runs, 7 prompt tokens

|                                      | median |  min |  max |
|--------------------------------------|--------|------|------|
| decode tokens/s                      |   10.0 | 10.0 | 10.0 |
| TTFT ms                              |   50.0 | 50.0 | 50.0 |
| latency s                            |   1.20 | 1.20 | 1.20 |
| tokens/s of the whole call           |   2.50 | 2.50 | 2.50 |
| inter-token ms p50                   |    100 |      |      |
| inter-token ms p90                   |    100 |      |      |
| inter-token ms p99                   |    100 |      |      |
| s.d. of the decode rate %            |      – |      |      |
| prefill tokens/s (512 tokens)        |    500 |      |      |
| memory bandwidth measured GB/s       |   20.0 |      |      |
| share of it that decode uses % (MBU) |   50.0 |      |      |

### Runs (top_k 50)

| run  | ended by | tokens | TTFT ms | decode tok/s | latency s | J |
|------|----------|--------|---------|--------------|-----------|---|
| warm | –        |     16 |    50.0 |         10.0 |      1.20 | – |
| 1    | length   |      3 |    50.0 |         10.0 |      1.20 | – |
| 2    | eos      |      1 |    50.0 |            – |      1.20 | – |

### Memory

| GiB         | before load | after load | peak of load | peak of runs |
|-------------|-------------|------------|--------------|--------------|
| process RSS |        1.00 |          – |            – |         3.00 |

Weights: 1,073.74 MB stored (1.00 GiB); unquantized 2,147.48 MB: 50.0 % saved.
Loaded in 1.50 s.
Quantized: 4 of 5 linear layers (4 WeightQBytesTensor).

### The first answer begins

> The [bold] answer is 42.
"""

EXPECTED_COMPARISON = """
# Qwen/Qwen2.5-3B: comparison, 1.07 B parameters, on cpu
Some CPU; 8 GiB
torch 2.13.0

float8 FAILED: its process was killed by SIGKILL
! int2 BREAKS THIS MODEL (KL 4.20 nats): do not use it.

### Speed: medians of 5 runs of 128 new tokens

| weights  | decode tok/s | x none | prefill tok/s | TTFT ms | MBU % | J/tok |
|----------|--------------|--------|---------------|---------|-------|-------|
| none     | ██████  20.0 |   1.00 |           500 |    50.0 |  50.0 |     – |
| float8 ✗ |            – |      – |           500 |       – |  50.0 |     – |
| int8     | ███     10.0 |  0.500 |           500 |    50.0 |  50.0 |     – |
| int4     | ████    15.0 |  0.750 |           500 |    50.0 |  50.0 |     – |
| int2     | ██      5.00 |  0.250 |           500 |    50.0 |  50.0 |     – |

### Memory in GiB (peak: RSS) and quality (same top token: 95 % interval)

| weights  |    stored | saved % | peak | KL nats | same top % |   answers |
|----------|-----------|---------|------|---------|------------|-----------|
| none     | ███  2.00 |       0 | 3.00 |       – |          – | reference |
| float8 ✗ | ██   1.00 |    50.0 | 3.00 |       – |          – |         – |
| int8     | ██   1.10 |    45.0 | 3.00 | 0.00400 | 90 (83–94) |      kept |
| int4     | █   0.700 |    65.0 | 3.00 |   0.200 | 90 (83–94) |   changed |
| int2     | █   0.500 |    75.0 | 3.00 |    4.20 | 90 (83–94) |    broken |

### Quanto's promises: ✓ kept, ✗ not kept, – not measured

| promise       | documented |   float8 |      int8 |     int4 |     int2 |
|---------------|------------|----------|-----------|----------|----------|
| memory saved  | 50-60 %    | ✓ 50.0 % |  ✗ 45.0 % | ✓ 65.0 % | ✓ 75.0 % |
| 16-bit speed  | 90-95 %    |        – |  ✗ 50.0 % | ✗ 75.0 % | ✗ 25.0 % |
| quality (KL)  | very close |        – | ✓ 0.00400 |  ✗ 0.200 |   ✗ 4.20 |
| torch.compile | +20-30 %   |        – |         – |        – |        – |

Memory: embeddings and output stay as stored: 8 bit saves at most 25.0 %.
Speed: eager Quanto calls Python for every layer and widens weights on every
call: see --compile.
Fastest: none (20.0 tokens/s). Smallest: int2 (0.500 GiB). Smallest that keeps
the answers: int8 (1.10 GiB, 10.0 tokens/s). Answers changed: int4. Answers
broken: int2.
"""
