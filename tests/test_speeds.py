"""What is said of speeds: one basis, intervals, words, energy; hand-made Results for every rule."""

import dataclasses
import io
import json
import math
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from bench_reproducibility import between_processes, builds_ratio, tell
from conftest import t_quantile
from results import (
    compiled,
    compiled_comparison,
    files,
    gpu_comparison,
    piped,
    result,
    run,
    runs,
    settings,
)

from _qwquanto.claims import speed_verdict
from _qwquanto.console import render
from _qwquanto.report import energy_lines, runs_table, speed_table
from _qwquanto.results import Benchmark, from_json, to_json
from _qwquanto.saved import files_report, speed_change
from _qwquanto.stats import (
    BETWEEN_PROCESSES,
    BETWEEN_UNMEASURED,
    basis,
    decode_rate,
    is_about_one,
    mean_watts,
    on_one_basis,
    ratio_interval,
    speed_interval,
    student_t,
    utilization,
    waits_for_host,
)
from _qwquanto.verdicts import comparability_warnings, fastest, recommendation, warnings_for


def shown(parts):
    """Parts of a report as a pipe gets them."""
    out = io.StringIO()
    render(parts, out)
    return out.getvalue()


# -------------------------------------------------------------------------------------------------- one basis


def falling(rate, tokens):
    """A run that makes `rate` tokens/s up to its 40th token and half of that afterwards."""
    return run(rate, tokens, inter_token_s=[1 / rate] * 39 + [2 / rate] * (tokens - 40))


def test_medians_spreads_and_ratios_rest_on_the_tokens_that_all_rows_reached():
    """bf16 was ended at 40 tokens, the others went on and slowed: over the first 40 all are as they were."""
    base = result("none", runs=[run(20, 40), run(20, 40)], compare=("none", "int8"))
    int8 = result("int8", runs=[falling(20, 200), falling(20, 200)], compare=("none", "int8"))
    int8.runs = [replace(r, decode_tokens_per_s=12.0) for r in int8.runs]  # of the whole runs
    table = shown(speed_table(on_one_basis([base, int8])))
    assert "median ± s.d. of 2 runs, first 40 tokens" in table
    assert "| int8    | ████ 20.0 ±0.0 |     1.00 |" in table
    assert int8.runs[0].decode_tokens_per_s == 12.0 and len(int8.runs[0].inter_token_s) == 199


def test_compiled_and_eager_rows_have_the_same_basis():
    eager, step = [run(10, 50)] * 2, compiled(runs=[falling(30, 100)] * 2)
    (cut,) = on_one_basis([result("int8", runs=eager, compiled=step)])
    lengths = {len(r.inter_token_s) for r in cut.runs + cut.compiled.runs}
    assert lengths == {49} and decode_rate(cut.compiled.runs) == pytest.approx(49 / (39 / 30 + 10 / 15))


def test_answers_of_fewer_than_32_tokens_neither_shorten_the_basis_nor_count_in_it():
    long, short = run(10, 40), run(99, 20)
    assert basis([long, short], [run(10, 32)]) == 31 and basis([short]) == 0
    (cut,) = on_one_basis([result("int8", runs=[long, long, short])])
    assert decode_rate(cut.runs) == pytest.approx(10) and len(cut.runs) == 3
    (alone,) = on_one_basis([result("int8", runs=[short, short])])
    assert decode_rate(alone.runs) == pytest.approx(99)


def test_there_is_no_ratio_below_32_tokens():
    def speed_up(tokens):
        made = [
            result(name, runs=[run(10, tokens)] * 2, compiled=compiled(20, 20)) for name in ("none", "int8")
        ]
        tables = shown(speed_table(on_one_basis(made))), shown(speed_table(on_one_basis(made), compiled=True))
        return [
            line.split("|")[3].strip() for table in tables for line in table.splitlines() if "| int8" in line
        ]

    assert speed_up(32) == ["1.00", "1.00"] and speed_up(31) == ["–", "1.00"]
    few = [result(name, runs=[run(10, 31)] * 2) for name in ("none", "int8")]
    assert "first" not in shown(speed_table(few)) and "median ± s.d. of 2 runs of up to 31 tokens" in shown(
        speed_table(few)
    )


def test_two_files_have_one_basis_too():
    a, b = (Benchmark([result("int8", runs=[falling(20, n)] * 2)]) for n in (40, 200))
    table = shown(files_report(["a.json", "b.json"], [a, b]))
    assert "Decode eager and compiled over the first 40 tokens," in table
    assert table.count(" 20.0 ±0.0 |") == 2 and "about the same" in table


# -------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("freedom", [1, 1.2, 1.5, 1.9, 2, 2.7, 4, 7.3, 9.9, 10, 10.5, 11, 30])
def test_students_t_of_any_degrees_of_freedom(freedom):
    assert t_quantile(freedom) * 0.999 < student_t(freedom) < t_quantile(freedom) * 1.03
    assert student_t(0.5) == student_t(1) and student_t(math.inf) == 1.96


def test_what_differs_between_processes_is_in_the_interval_of_a_ratio():
    """Runs that agree to the last digit leave the s.d. of each process."""
    for kind, device in (("eager", "cpu"), ("compiled", "cuda"), ("eager", "cuda")):
        name = {"cpu": "cpu", "cuda": "cuda:0"}[device]
        made = [result(w, (10, 10), devices=[name], compiled=compiled(10, 10)) for w in ("none", "int8")]
        low, high = speed_interval(*made, compiled=kind == "compiled")
        between = BETWEEN_PROCESSES.get((kind, device), BETWEEN_UNMEASURED)
        assert math.log(high) == pytest.approx(1.96 * between * math.sqrt(2)) == -math.log(low)


def test_noise_within_and_between_processes_add_in_quadrature():
    first, second = runs(9.9, 10.0, 10.1), runs(9.9, 10.0, 10.1)
    alone = [math.log(x) for x in ratio_interval(first, second)]
    both = [math.log(x) for x in ratio_interval(first, second, (0.03, 0.04))]
    within = 2 * statistics.variance(math.log(rate) for rate in (9.9, 10.0, 10.1)) / 3
    assert alone[1] == pytest.approx(t_quantile(4) * math.sqrt(within), rel=1e-3)
    freedom = (within + 0.05**2) ** 2 / (2 * (within / 2) ** 2 / 2)
    assert freedom > 1000 and both[1] == pytest.approx(1.96 * math.sqrt(within + 0.05**2), rel=1e-2)


def test_a_host_that_was_slower_beside_one_widens_the_interval_to_its_side():
    base, r = result("none", (10, 10), host_s=[0.05] * 3), result("int8", (10, 10), host_s=[0.05] * 3)
    low, high = speed_interval(r, base)
    for unknown in ([], [0.09]):  # a file of an older version; a run that was interrupted
        assert speed_interval(replace(r, host_s=unknown), base) == (low, high)
    slow = replace(r, host_s=[0.1] * 3)  # it may have made a model that is twice as fast look the same
    assert speed_interval(slow, base) == pytest.approx((low, 2 * high))
    assert speed_interval(base, slow) == pytest.approx((low / 2, high))
    assert speed_interval(slow, base, same_machine=False) == pytest.approx((low, high))
    (line,) = comparability_warnings([base, slow])
    assert "Eager runs: the host was 2.00 times as slow beside int8 as beside bf16: intervals are" in line
    assert comparability_warnings([base, replace(r, host_s=[0.054] * 3)]) == []


def test_a_yardstick_that_scatters_says_less_and_widens_more():
    base, r = result("none", (10, 10), host_s=[0.05] * 3), result("int8", (10, 10), host_s=[0.05] * 3)
    seconds = [0.04, 0.05, 0.0625]  # the same mean of logarithms
    low, high = map(math.log, speed_interval(replace(r, host_s=seconds), base))
    scatter = math.log(0.05 / 0.04) ** 2 / 3  # squared standard error, two degrees of freedom
    error = scatter + 2 * 0.025**2
    freedom = error**2 / (scatter**2 / 2)
    assert high == pytest.approx(t_quantile(freedom) * math.sqrt(error), rel=5e-3) == -low


def test_graphs_that_fill_a_tokens_time_do_not_wait_for_the_host():
    """A large model's on CUDA. A small one's waits; on a CPU, and in a static cache, Python has its part."""

    def measured(name, host_s, step_s):
        step = compiled(20, 20, host_s=[host_s] * 2, step_s=step_s)  # a token takes 0.05 s
        return result(name, devices=["cuda:0"], compiled=step)

    for step_s, widened in ((0.045, 1), (0.041, 1), (0.039, 2), (None, 2)):
        quiet, busy = measured("none", 0.05, step_s), measured("int8", 0.1, step_s)
        alike = speed_interval(quiet, quiet, compiled=True)
        assert speed_interval(busy, quiet, compiled=True)[1] == pytest.approx(widened * alike[1])
        told = comparability_warnings([quiet, busy])
        assert [line[:14] for line in told] == (["Compiled runs:"] if widened == 2 else [])
    mixed = measured("none", 0.05, 0.045), measured("int8", 0.1, 0.02)
    assert "Compiled runs:" in comparability_warnings(mixed)[0], "one of them waited"
    assert waits_for_host(compiled(step_s=0.01)), "without a rate nothing is known"


def test_a_small_models_unsteady_graphs_are_put_down_to_the_host():
    unsteady = {"rates": (20, 20), "devices": ["cuda:0"]}
    waiting = result(**unsteady, compiled=compiled(20, 28, 24, step_s=0.01))
    (line,) = [text for text in warnings_for(waiting) if "compiled runs" in text]
    assert line.endswith("the host, which sets the pace, is not steady.")
    filled = result(**unsteady, compiled=compiled(20, 28, 24, step_s=0.04))
    (line,) = [text for text in warnings_for(filled) if "compiled runs" in text]
    assert line.endswith("is the machine busy?")


def test_memory_widens_by_the_part_of_a_step_that_it_can_take():
    """A step that reads a tenth of what the memory delivers hardly gains by a faster one."""
    pair = [
        result(name, rates=(10, 10.01), memory_bytes_per_s={"cpu": speed}) for name, speed in
        (("none", 2e10), ("int8", 4e10))
    ]  # fmt: skip
    widths = []
    for share in (0.8, 0.5, 0.1, None):
        base, r = (dataclasses.replace(x, bandwidth_utilization=share) for x in pair)
        low, high = speed_interval(r, base)
        widths.append(math.log(high / low))
    assert widths[0] == pytest.approx(widths[1]) == pytest.approx(widths[3])
    assert widths[0] - widths[2] == pytest.approx(0.8 * math.log(2))


def test_a_run_beside_which_others_took_a_tenth_of_the_cpu_does_not_count():
    """As a rate of SmolLM2 on two cores, one of which another program took for some seconds."""
    quiet, busy = runs(22.7, 23.8, 23.9), run(5.4, others_cpu=0.3)
    disturbed = result("int8", runs=[quiet[0], busy, *quiet[1:]])
    base = result("none", (19.1, 20.1, 19.0))
    assert speed_interval(disturbed, base) == speed_interval(replace(disturbed, runs=quiet), base)
    (shown_one,) = on_one_basis([disturbed])
    assert decode_rate(shown_one.runs) == pytest.approx(23.8)
    assert "median ± s.d. of 3 runs" in shown(speed_table([shown_one]))
    assert utilization(disturbed, disturbed.runs) == utilization(disturbed, quiet)
    (line,) = warnings_for(disturbed)
    assert line.startswith(
        "Beside some eager runs other programs used over 10 % of the processor: those runs"
    )
    assert "length, disturbed" in shown(runs_table(disturbed))
    little = replace(disturbed, runs=[*quiet, run(5.4, others_cpu=0.09)])
    assert "other programs" not in " ".join(warnings_for(little))
    # a test suite beside all of them: a rate to see, and no verdict
    lost = result("int8", runs=[run(rate, others_cpu=0.5) for rate in (1.3, 2.1, 2.7)])
    assert speed_interval(lost, base) is None and decode_rate(on_one_basis([lost, base])[0].runs) == 2.1
    assert named(base, lost).endswith("; two undisturbed runs of 32 tokens each would tell the fastest.")
    told = warnings_for(lost)
    assert told[0].startswith(
        "Beside all eager runs other programs used over 10 % of the processor: the speeds"
    )
    assert "Fewer than two eager runs" in told[1]
    assert "Unsteady speeds: eager int8; see below." in " ".join(recommendation([base, lost]))


def test_memory_and_host_are_no_two_excuses_but_the_larger_one():
    base = result("none", (10, 10), host_s=[0.05] * 2)
    r = result("int8", (10, 10), host_s=[0.1] * 2, memory_bytes_per_s={"cpu": 1e10})  # half of base's
    _, high = speed_interval(result("int8", (10, 10)), base)
    assert speed_interval(r, base)[1] == pytest.approx(2 * high)


# ------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.9, 1.5), "met"),  # wide, and yet on one side of the limit
        ((0.3, 0.89), "not met"),
        ((0.89, 0.91), "borderline"),
        ((0.899, 1.34), "borderline"),
        ((0.5, 4.0), "too noisy (0.500 to 4.00 times): measure again"),
        (None, "unknown: needs two undisturbed runs of 32 tokens"),
    ],
)
def test_the_limit_comes_first_and_an_open_verdict_says_what_to_do(interval, verdict):
    assert speed_verdict(interval, 0.9) == verdict


@pytest.mark.parametrize(
    ("interval", "cell"),
    [
        ((0.95, 1.04), "about the same"),
        ((0.91, 1.099), "about the same"),
        ((0.85, 1.02), "borderline (0.850 to 1.02 x)"),
        ((0.93, 0.97), "0.930 to 0.970 x"),  # small, and there
        ((1.2, 3.0), "1.20 to 3.00 x"),
        ((0.5, 4.0), "too noisy (0.500 to 4.00 x): measure again"),
        (None, "–"),
    ],
)
def test_how_a_file_stands_to_another(interval, cell):
    assert speed_change(interval) == cell
    assert is_about_one(interval) == (cell == "about the same")


# --------------------------------------------------------------------------------------------------- headline


def named(*made, compiled=False):
    return fastest(list(made), compiled)


def test_a_winner_is_named_only_if_its_interval_excludes_all_others():
    first, second = result("none", (20, 20)), result("int8", (10, 10))
    assert named(first, second) == "Eager decode: bf16 20.0, int8 10.0 tokens/s; bf16 is the fastest."
    near = result("int4", (19.8, 20))
    assert named(first, second, near).endswith("; bf16 and int4 are about equal.")
    close = result("int4", (18, 18.5, 19))
    assert named(first, second, close).endswith("; bf16 or int4 is the fastest (borderline).")
    noisy = result("int4", (8, 18))
    told = "too noisy to name the fastest of bf16, int4: measure again."
    assert named(first, second, noisy).endswith(told)
    assert (
        named(first, second, near, noisy).endswith("fastest of bf16, int4, float8: measure again.") is False
    )
    disturbed = result("int8", (10, 10), host_s=[0.2] * 2)
    assert "measure again" in named(result("none", (20, 20), host_s=[0.05] * 2), disturbed)
    assert named(first) == ""


def test_eager_and_compiled_have_a_line_each():
    made = [
        result("none", (34.3, 34.3), compiled=compiled(357, 357.1)),
        result("int8", (18.8, 18.8), compiled=compiled(496, 496.1)),
        result("int4", (26.5, 26.5), compiled=compiled(523, 523.1)),
    ]
    eager, step, smallest = recommendation(made)[1:4]
    assert eager == "Eager decode: bf16 34.3, int4 26.5, int8 18.8 tokens/s; bf16 is the fastest."
    assert step.startswith("Compiled decode: int4 523, int8 496, bf16 357 tokens/s; ")
    assert smallest.startswith("Smallest: ")
    without = recommendation([replace(r, compiled=None) for r in made])
    assert not any("Compiled" in line for line in without)


def test_random_weights_ask_for_real_ones():
    s = settings(random_weights=True, compare=("none", "int8"))
    made = [result("none", settings=replace(s, weights=None), is_reference=False), result("int8", settings=s)]
    assert "a recommendation needs real ones" in recommendation(made)[0]
    assert (
        "Quality was not measured" in recommendation([result("none", is_reference=False), result("int8")])[0]
    )


# ----------------------------------------------------------------------------------------- energy, throttling


def test_joules_are_of_warm_up_and_timed_runs_of_one_kind():
    """0.4 s of timed runs alone would be too short for NVML's counter."""
    spent = {"energy_j": {"cuda:0": 30.0, "cuda:1": 10.0}, "latency_s": 0.2}
    warm = run(tokens=20, energy_j={"cuda:0": 90.0}, latency_s=0.8)
    r = result(warmup=[warm], runs=[run(tokens=40, **spent)] * 2)
    step = compiled(warmup=[warm], runs=r.runs)
    assert energy_lines([r, result(), replace(r, runs=[], compiled=step)]) == [
        "Energy a token, eager: int8 1.70 J (142 W).",  # 170 J, 100 tokens, 1.2 s
        "Energy a token, compiled: int8 1.70 J (142 W).",
        "",
    ]
    assert energy_lines([replace(r, warmup=[]), result()]) == [] and mean_watts([run()]) is None


def test_every_row_of_a_gpu_comparison_has_its_energy():
    lines = [line for line in piped(Benchmark(gpu_comparison())).splitlines() if "Energy a token" in line]
    each = ", ".join(f"{name} 3.48 J (35 W)" for name in ("bf16", "int8", "int4", "int2"))
    assert lines == [f"Energy a token, {kind}: {each}." for kind in ("eager", "compiled")]


def test_throttling_is_told_with_its_reason_and_kind():
    def told(**changes):
        return [line for line in warnings_for(result("int8", **changes)) if "slowed down" in line]

    assert told(throttled={"heat": 0.02}) == told() == [], "a moment of it is nothing"
    (line,) = told(throttled={"heat": 0.35})
    assert "slowed down during the eager runs by heat (35.0 % of the time): cool it, or raise its" in line
    (line,) = told(compiled=compiled(20, 20, throttled={"its power limit": 1.0, "heat": 0.5}))
    assert "the compiled runs by its power limit (100 % of the time) and heat (50.0 % of the time)" in line


# -------------------------------------------------------------------------------------------------- yardstick


def test_between_processes_is_what_their_runs_do_not_explain():
    alike = [[10.0, 10.2, 9.8]] * 3
    between, within = between_processes(alike)
    assert between == 0 and within == pytest.approx(0.02, rel=1e-3)
    apart = [[9.0, 9.0], [10.0, 10.0], [11.0, 11.0]]
    assert between_processes(apart) == (pytest.approx(statistics.stdev(map(math.log, (9, 10, 11)))), 0)


POWER = 200  # simulated comparisons


def simulated(slower, processes, within=0.03, between=0.03):
    """Two builds in so many processes of five runs, the second slower by a factor: (first, second) each."""
    noise = random.Random(0)

    def process(rate):
        rate *= math.exp(noise.gauss(0, between))
        return result("int8", runs=[run(rate * math.exp(noise.gauss(0, within))) for _ in range(5)])

    for _ in range(POWER):
        yield [process(30) for _ in range(processes)], [process(30 / slower) for _ in range(processes)]


def test_of_one_build_hardly_anything_is_said_to_be_faster_or_slower():
    """With the noise of a shared machine: 3 % between runs, 3 % between processes."""
    same, little, large = (
        Counter(tell(speed_interval(b, a)) for (a,), (b,) in simulated(slower, 1))
        for slower in (1.0, 1.05, 1.15)
    )
    assert same["faster"] + same["slower"] < 0.08 * POWER, same
    assert little["faster"] < 0.02 * POWER and large["faster"] == 0, (little, large)
    assert large["slower"] > 0.7 * POWER, large


def test_a_quiet_machine_tells_by_a_single_pair_what_is_the_same():
    told = {
        slower: Counter(tell(speed_interval(b, a)) for (a,), (b,) in simulated(slower, 1, 0.01, 0.01))
        for slower in (1.0, 1.15)
    }
    assert told[1.0]["about the same"] > 0.8 * POWER and told[1.15]["slower"] > 0.99 * POWER, told


def test_five_processes_of_each_build_tell_what_a_single_pair_cannot():
    told = {}
    for slower in (1.0, 1.05, 1.15):
        groups = ([[decode_rates(r) for r in build] for build in pair] for pair in simulated(slower, 5))
        told[slower] = Counter(tell(builds_ratio(pair)[1]) for pair in groups)
    assert told[1.0]["about the same"] > 0.85 * POWER and told[1.0]["open"] < 0.1 * POWER, told
    assert told[1.15]["slower"] > 0.99 * POWER, told
    assert told[1.05]["faster"] == 0 and told[1.05]["slower"] > 0.4 * POWER, told
    ratio, _ = builds_ratio([[[10.0, 40.0], [20.0]], [[10.0], [10.0]]])
    assert ratio == pytest.approx(0.5)


def decode_rates(r):
    return [one.decode_tokens_per_s for one in r.runs]


def test_yardsticks_and_throttling_outlive_the_file_and_older_files_lack_them():
    r = result(host_s=[0.05, math.nan], throttled={"heat": 0.5}, compiled=compiled(10, host_s=[0.04]))
    plain = json.loads(json.dumps(dataclasses.asdict(Benchmark([r]))).replace("NaN", "null"))
    (found,) = from_json(json.dumps(plain)).results
    assert (found.host_s, found.throttled, found.compiled.host_s) == ([0.05], {"heat": 0.5}, [0.04])
    for measured in (plain["results"][0], plain["results"][0]["compiled"]):
        del measured["host_s"], measured["throttled"]
    (older,) = from_json(json.dumps(plain)).results
    assert older.host_s == [] and older.compiled.throttled == {}


# ------------------------------------------------------------------------------- recomputed from a saved file


def interval_of(file, name, other, kind="runs"):
    """A reader's interval of two precisions' ratio, from the JSON alone, with a Student's t of his own."""
    rows = {r["settings"]["weights"] or "none": r for r in file["results"]}
    every = [one for r in rows.values() for one in (r, r["compiled"]) if one]
    tokens = min(len(x["inter_token_s"]) for r in every for x in r["runs"])
    pair = [rows[n] if kind == "runs" else rows[n]["compiled"] for n in (name, other)]
    logs = [[math.log(tokens / sum(x["inter_token_s"][:tokens])) for x in r["runs"]] for r in pair]
    within = [statistics.variance(log) / len(log) for log in logs]
    device = rows[name]["devices"][0].split(":")[0]
    known = {("runs", "cpu"): 0.025, ("runs", "cuda"): 0.07, ("compiled", "cuda"): 0.009}
    least = known.get((kind, device), 0.03)
    between = [max(least, statistics.stdev(log)) for log in logs]
    of_runs = [(sd**2, log) for sd, log in zip(between, logs, strict=True) if sd > least]
    error = sum(within) + sum(sd**2 for sd in between)
    terms = [*zip(within, logs, strict=True), *of_runs]
    freedom = error**2 / sum(v**2 / (len(log) - 1) for v, log in terms)
    half = (t_quantile(freedom) if freedom < 200 else 1.96) * math.sqrt(error)
    center = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    ends = [center - half, center + half]
    waits = [not r.get("step_s") or math.exp(statistics.median(log)) * r["step_s"] < 0.8 for r, log in
             zip(pair, logs, strict=True)]  # fmt: skip
    if all(r["host_s"] for r in pair) and any(waits):
        hosts = [[math.log(seconds) for seconds in r["host_s"]] for r in pair]
        more = [statistics.variance(log) / len(log) for log in hosts]
        terms += zip(more, hosts, strict=True)
        error += sum(more)
        freedom = error**2 / sum(v**2 / (len(log) - 1) for v, log in terms)
        half = (t_quantile(freedom) if freedom < 200 else 1.96) * math.sqrt(error)
        center += statistics.fmean(hosts[0]) - statistics.fmean(hosts[1])
        ends += [center - half, center + half]
    return math.exp(min(ends)), math.exp(max(ends))


@pytest.mark.parametrize("made", [compiled_comparison, gpu_comparison])
def test_a_reader_with_the_file_alone_comes_to_the_same_headline_and_verdict(made):
    made = [r for r in made() if r.runs]
    for i, r in enumerate(made):  # the host was a little slower beside each one than beside the one before
        r.host_s = [0.05 + 0.002 * i, 0.051 + 0.002 * i, 0.052 + 0.002 * i]
        r.compiled.host_s = r.host_s[::2]
    file, text = json.loads(to_json(Benchmark(made))), piped(Benchmark(made))
    low, high = interval_of(file, "int8", "none")
    assert speed_interval(made[1], made[0]) == pytest.approx((low, high), rel=2e-3)
    assert 0.5 < high < 0.9
    (row,) = [line for line in text.splitlines() if "at least 90 % of the speed" in line]
    assert f"({100 * low:.1f} to {100 * high:.1f})" in row and "not met" in row
    for kind, first, title in (
        ("runs", "none", "Eager decode: bf16 20.0"),
        ("compiled", "int8", "Compiled decode: int8 41.0"),
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(title)]
        others = [r.name for r in made if r.name != first]
        clear = all(interval_of(file, name, first, kind)[1] < 1 for name in others)
        assert line.endswith("is the fastest.") == clear, line
    assert ("int8 is the fastest" in text) == (made[0].devices == ["cuda:0"]), "noise is smaller there"


def test_a_reader_with_two_files_comes_to_the_same_cells():
    names, benchmarks = files()
    text = shown(files_report(names, benchmarks))
    before, after = (json.loads(to_json(b)) for b in benchmarks)
    old = [r for r in before["results"] if r["settings"]["weights"] == "int4"]
    for r in old:
        r["settings"]["weights"] = "old int4"
    low, high = interval_of({"results": [*after["results"], *old]}, "int4", "old int4")
    cell = f"{low:#.3g} to {high:#.3g} x"
    assert f"| after int4   | {cell} " in text and low > 1
    same = {"results": [*after["results"], before["results"][1] | {"settings": {"weights": "old int8"}}]}
    low, high = interval_of(same, "int8", "old int8")
    assert 1 / 1.1 < low < 1 < high < 1.1 and "| after int8   | about the same " in text
