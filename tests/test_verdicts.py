"""Warnings, judgements and recommendation on hand-made Results."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from conftest import t_quantile
from results import (
    GIB,
    comparison,
    compiled,
    compiled_comparison,
    quality,
    quality_of,
    result,
    run,
    runs,
    settings,
)

from _qwquanto import stats
from _qwquanto.claims import expectations
from _qwquanto.report import alerts, expected_table, row_label
from _qwquanto.results import Benchmark, to_json
from _qwquanto.stats import kl_interval, speed_interval
from _qwquanto.verdicts import (
    comparability_warnings,
    grave_warnings,
    instability,
    is_warming_up,
    recommendation,
    slows_with_context,
    warnings_for,
)


@pytest.mark.parametrize(
    ("kl", "error", "kept", "very_close"),
    [
        *[(0.05, 0, "kept", "met"), (0.04, 0.001, "kept", "met"), (0.01, None, "–", "too close to call")],
        *[(0.051, 0, "changed", "not met"), (0.5, 0, "changed", "not met"), (0.501, 0, "broken", "not met")],
        (0.04, 0.01, "kept or changed", "too close to call"),
        (0.49, 0.1, "changed or broken", "not met"),
        (0.3, 0.2, "kept or broken", "too close to call"),
    ],
)
def test_answers_are_judged_by_the_interval_of_kl(kl, error, kept, very_close):
    r = result("int8", quality=quality(kl, error))
    assert stats.answer_quality(r) == kept
    assert [e.verdict for e in expectations([r]) if e.expected == "answers very close"] == [very_close]


# ----------------------------------------------------------------------------------------------- expectations


def verdicts(*results, by="intros"):
    return {(e.expected, e.of): e.verdict for e in expectations(list(results)) if e.by == by}


MEMORY, SPEED = ("50-60 % less memory", "int8"), ("at least 90 % of the speed", "int8")
COMPILE = ("20-30 % faster by torch.compile(model)", "int8")
LAYERS = "its layers about 16 / bits times smaller"
KERNELS = "comparable speed by optimized kernels"


def test_expectations_are_judged_at_their_limits():
    base = result("none", (20, 20), stored=2 * GIB)
    assert verdicts(base, result("int8", (19.5, 19.5), stored=GIB)).items() >= {
        (MEMORY, "met"),
        (SPEED, "met"),
    }
    assert verdicts(base, result("int8", (18, 18.2)))[SPEED] == "borderline"
    slow = verdicts(base, result("int8", (10, 10), stored=GIB + 1))
    assert slow == {MEMORY: "not met", SPEED: "not met"}
    for graphs, said in ((0, "not met"), (3, "unknown")):  # compiled some day: then it wants to be timed
        assert verdicts(result("int8", torch_compile_graphs=graphs))[COMPILE] == said


def test_a_row_stands_where_its_precisions_were_measured():
    assert verdicts(result("none")) == {} == verdicts(result("int4"))
    assert set(verdicts(result("int8"))) == {MEMORY}
    assert set(verdicts(result("none"), result("int8", ()))) == {MEMORY}
    one_token = result("int8", runs=[run(tokens=1, stop_reason="eos")] * 2)
    assert (
        set(verdicts(result("none"), one_token)) == {MEMORY} == set(verdicts(one_token, result("none", ())))
    )
    assert set(verdicts(result("none"), result("int8", devices=["cuda:0"]))) == {MEMORY}
    assert verdicts(result("none"), result("int8", (10.0,)))[SPEED].startswith(
        "unknown: needs two undisturbed runs of 32"
    )


def test_float8_and_int4_are_judged_against_int8():
    exact, less = ("more exact than int8", "float8"), ("smaller still than int8", "int4")
    int8, float8 = result("int8", kl=0.004), result("float8", kl=0.003)
    assert (
        verdicts(int8, float8)[exact] == "met"
        and verdicts(result("int8", kl=0.002), float8)[exact] == "not met"
    )
    assert verdicts(int8, result("float8", quality=quality(0.003, 0.001)))[exact] == "too close to call"
    assert exact not in verdicts(int8, result("float8", quality=quality(0.003, reference="int8")))
    assert verdicts(int8, result("int4", stored=GIB // 2))[less] == "met"
    assert verdicts(int8, result("int4", stored=GIB))[less] == "not met"


def test_expectations_against_16_bit_are_not_judged_against_32():
    r = result("int8", unquantized_bytes=4 * GIB)
    assert verdicts(result("none"), r) == {}
    assert any("32-bit" in line for line in warnings_for(r))


def test_reasons_for_what_was_not_met():
    memory, speed, compiling = (e.reason for e in expectations(comparison()) if e.reason)
    assert "8 bits save at most 45.0 % here" in memory  # a tenth of the bytes is in other layers
    assert "Python" in speed and "#161743" in compiling
    shown = " ".join(map(str, expected_table(comparison())))
    assert all(reason in shown for reason in (memory, speed, compiling))
    assert memory not in " ".join(map(str, expected_table([result()])))  # met: nothing to explain


def test_every_judgement_can_be_recomputed_from_the_file():
    """By a reader with the JSON alone, in formulas of his own."""
    made = compiled_comparison()
    file = json.loads(to_json(Benchmark(made)))
    by_name = {r["settings"]["weights"] or "none": r for r in file["results"]}
    int8, base, int4 = by_name["int8"], by_name["none"], by_name["int4"]
    said = verdicts(*made)

    assert (said[MEMORY] == "met") == (1 - int8["weight_bytes"] / int8["unquantized_bytes"] >= 0.5)
    assert (said["smaller still than int8", "int4"] == "met") == (int4["weight_bytes"] < int8["weight_bytes"])
    logs = [[math.log(39 / sum(run["inter_token_s"])) for run in r["runs"]] for r in (int8, base)]
    center = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    within = [statistics.variance(log) / 2 for log in logs]
    error = sum(within) + 2 * 0.025**2  # between two processes on a CPU
    freedom = error**2 / sum(v**2 for v in within)  # of two runs a side
    half = t_quantile(freedom) * math.sqrt(error)
    assert speed_interval(made[1], made[0]) == pytest.approx(
        (math.exp(center - half), math.exp(center + half)), rel=1e-3
    )
    assert (said[SPEED] == "not met") == (math.exp(center + half) < 0.9)
    close = {}
    for name in ("int8", "int4", "int2"):
        kl = by_name[name]["quality"]
        close[name] = kl["kl_divergence"] + 2.1314 * kl["kl_standard_error"] < 0.05
    assert (said[COMPILE] == "not met") == (int8["torch_compile_graphs"] == 0) and len(said) == 4
    theirs = verdicts(*made, by="Quanto")
    assert theirs.pop(("answers very close", "int8")) == "met" and close["int8"]
    others = {n: r["unquantized_bytes"] - r["quantizable_bytes"] for n, r in by_name.items()}
    bits = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}
    times = {n: by_name[n]["quantizable_bytes"] / (by_name[n]["weight_bytes"] - others[n]) for n in bits}
    assert all(times[n] > 0.85 * 16 / bits[n] for n in bits)
    assert theirs == {(LAYERS, "all"): "met", (KERNELS, "all"): "no claim"}

    kept = [n for n, r in by_name.items() if r["quality"] and r["complete"] and close[n]]
    smallest = min(kept, key=lambda n: by_name[n]["weight_bytes"])
    rates = {
        n: statistics.median([run["decode_tokens_per_s"] for run in r["runs"]] or [0])
        for n, r in by_name.items()
    }
    text = " ".join(recommendation(made))
    assert (
        smallest == "int8"
        and "Take bf16" in text
        and f"is {rates['none'] / rates['int8']:.2f} times as fast as int8" in text
    )
    assert max(rates, key=rates.get) == "none" and "; bf16 is the fastest." in text


# --------------------------------------------------------------------------------------------- recommendation


def advice(*results):
    return " ".join(recommendation(list(results)))


def test_of_equally_small_precisions_the_fastest_is_recommended():
    told = advice(
        result("none", (20, 20), stored=2 * GIB), result("float8", (2, 2), 0.01), result("int8", (9, 9), 0.02)
    )
    assert "is 2.22 times as fast as int8" in told and "float8 keeps" not in told


def test_only_what_was_measured_to_its_end_is_recommended():
    """The eager model; what becomes of the compiled step, which comes last, does not matter to it."""
    unfinished = result("int2", (99, 99), stored=GIB // 8, complete=False, compare=("none", "int8", "int2"))
    told = advice(result("none", (20, 20), stored=2 * GIB), result("int8", (10, 10), 0.01), unfinished)
    assert "bf16 is the fastest" in told and "Smallest: int8" in told and "Take bf16" in told
    assert told.endswith("Not measured to the end, so left out here: int2.[/]") and advice(unfinished) == ""
    judged = replace(unfinished, quality=quality(0.001), failure="needs a C++ compiler")
    assert "Take int8[/]: bf16 was not measured" in advice(result("int8", (10, 10), 0.01), judged)
    uncompiled = replace(judged, eager_complete=True)
    assert "Take int2[/]: bf16 was not measured" in advice(uncompiled)
    assert row_label(uncompiled) == "int2" and "✗" in row_label(uncompiled, compiled=True)


def test_speeds_that_cannot_be_told_apart_are_said_to_be():
    base = result("none", (19.9, 20.1), stored=2 * GIB)
    equal = advice(base, result("int8", (19.7, 20)))
    assert "Eager decode: bf16 20.0, int8 19.9 tokens/s; bf16 and int8 are about equal." in equal
    assert "too noisy to name the fastest of bf16, int8: measure" in advice(base, result("int8", (8, 18)))
    close = advice(base, result("int8", (18, 18.5, 19)))
    assert "; bf16 or int8 is the fastest (borderline)." in close
    assert "; bf16 is the fastest." in advice(result("none", (19.9, 20)), result("int8", (10, 10.1)))
    assert "two undisturbed runs of 32 tokens each would tell" in advice(base, result("int8", (10,)))


def test_precisions_on_different_devices_are_not_compared():
    base, r = (
        result("none", stored=2 * GIB, devices=["cuda:0", "cuda:1"]),
        result("int8", (9, 9), 0.01, devices=["cuda:0"]),
    )
    told = advice(base, r)
    assert "fastest" not in told and "times bf16's" not in told and speed_interval(r, base) is None
    assert comparability_warnings([base, r]) == [
        "Measured on different devices (bf16 on cuda:0, cuda:1; int8 on cuda:0): speeds are not compared."
    ]


def test_no_check_is_not_a_passed_check():
    assert "Quality was not measured" in advice(result("none"), result("int8"))
    unsure = result("int8", quality=quality(0.04, 0.01))
    assert "Take bf16[/]: nothing smaller is certain to keep its answers." in advice(result("none"), unsure)
    assert "Answers against bf16's: int8 kept or changed." in advice(result("none"), unsure)
    reference = result("int8", is_reference=True)
    assert "Only int8 was measured to its end" in advice(reference)
    assert "nothing smaller is certain to keep its answers" in advice(reference, result("int4", kl=0.2))
    assert "No precision is certain to keep the reference's answers." in advice(result("int4", kl=0.2))


def test_the_compiled_step_stands_beside_eager():
    told = advice(
        result("none", (20, 20), compiled=compiled(30, 30)),
        result("int8", (9, 9), 0.01, compiled=compiled(40, 40)),
    )
    assert "In this script's compiled step take int8: 40.0 tokens/s, bf16 30.0. " in told
    assert "Eager decode: bf16 20.0, int8 9.00 tokens/s; bf16 is the fastest." in told
    assert "Compiled decode: int8 40.0, bf16 30.0 tokens/s; int8 is the fastest." in told


def test_a_recommendation_names_the_speeds_that_are_uncertain():
    assert "Unsteady speeds: eager int8; see below" in advice(result("none"), result("int8", (5, 10)))
    assert "see below" not in advice(result("none"), result("int8"))


# --------------------------------------------------------------------------------------------------- warnings


def test_instability_and_drift_say_so_themselves():
    def told(*rates):
        return " ".join(warnings_for(result(rates=rates)))

    assert told(10, 10, 10) == ""
    assert told(10, 9.999, 9.998, 9.997, 9.996, 9.995) == ""  # in order, and far too little to matter
    assert "differ by" in told(10, 5, 10) and "slower than the first" not in told(10, 5, 10)
    assert "slower than the first" in told(10, 9.5, 9, 8.5, 8, 7.5)
    assert [
        "The compiled runs' rates differ" in line for line in warnings_for(result(compiled=compiled(10, 5)))
    ] == [True]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"quantizable_bytes": GIB // 4}, "only 12.5 % of the weights"),
        ({"quality": quality(0.001, positions=15)}, "Quality rests on 15 tokens, fewer than 100"),
        ({"runs": [run(tokens=1, stop_reason="eos")] * 2}, "Every answer ended at its first token"),
        ({"runs": runs(10, 10, stop_reason="time"), "compare": ("int8",)}, "runs were ended by MAX_SECONDS"),
        ({"compiled": compiled(10, 10, recompilations=2)}, "2 recompilations"),
    ],
)
def test_what_a_reader_must_know_is_said(changes, warning):
    assert any(warning in line for line in warnings_for(result("int8", **changes)))
    assert warnings_for(result("int8", kl=0.001)) == []


LOST = {"bias": "as shipped, it leaves out the bias of 3 layers"}


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"quantized_layers": 0}, "NOTHING WAS QUANTIZED"),
        ({"quality": quality(4.2)}, "BREAKS THIS MODEL (KL 4.20 nats)"),
        (
            {"settings": settings(quanto_kernels=True), "defects": LOST},
            "RUNS AS SHIPPED: it leaves out the bias of 3 layers.",
        ),
    ],
)
def test_what_forbids_a_precision_is_said_first_and_in_red(changes, warning):
    made = result("int8", notes=["a note"], **changes)
    assert any(warning in line for line in grave_warnings(made))
    red, yellow = alerts(Benchmark([made]))
    assert red.startswith("[bold red]! ") and warning in red and yellow == "[bold yellow]! a note[/]"
    assert grave_warnings(result("int8", kl=0.001, defects=LOST)) == []


def test_a_compiled_step_that_answers_otherwise_is_said():
    def told(eager, kl, error=0.001):
        made = result("int8", quality=eager, compiled=compiled(20, 20, quality=quality(kl, error)))
        return any("COMPILED STEP ANSWERS OTHERWISE" in line for line in grave_warnings(made))

    assert told(quality(0.004), 0.3) and told(None, 0.06)  # None: the reference itself
    assert not told(quality(0.004), 0.03) and not told(None, 0.04)
    assert not told(quality(4.2, 0.2), 4.4, 0.2), "as broken as the eager one"
    assert not told(quality(0.04, 0.01), 0.07, 0.02), "unsure"


def test_what_was_not_measured_alike_is_said():
    def told(*speeds):
        return comparability_warnings([result("int8", memory_bytes_per_s={"cpu": speed}) for speed in speeds])

    assert told(34e9, 36e9) == [] == comparability_warnings([result("int8", memory_bytes_per_s={})])
    (line,) = told(34e9, 61e9, 35e9)
    assert "Memory of cpu delivered 34.0 to 61.0 GB/s" in line and "intervals of speeds are widened" in line


@pytest.mark.parametrize(
    ("rates", "warms"),
    [
        ((10, 12, 14), True),  # each run faster than the one before
        ((20, 21, 22, 23), True),
        ((10, 20, 20.1), True),  # the first run alone was slow
        ((10, 10.1, 10.2), False),  # three noisy runs rise by chance one time in six
        ((20, 20.1, 20.05, 20.15), False),
        ((20, 19, 20, 21, 20), False),
        ((20, 21.5, 20.5), False),
        ((14, 12, 10), False),
        ((10, 20), False),  # of two, nothing can be said
    ],
)
def test_runs_that_are_still_warming_up(rates, warms):
    assert is_warming_up(list(rates)) == warms
    told = " ".join(instability("eager", runs(*rates), False))
    assert ("still warming up" in told) == warms
    assert not (warms and "busy" in told)


def test_runs_that_rise_with_their_host_are_not_warming_up():
    """Measured on a shared virtual machine with an H200: the yardstick fell as the rates rose."""
    rising, host_s = runs(33.0, 38.5, 46.7), [0.0631, 0.0629, 0.0453, 0.0455]
    (told,) = instability("eager", rising, False, host_s)
    assert "the host, which sets the pace" in told
    for steady in ([0.05] * 4, [0.05] * 3, []):  # of a host that was steady, or is not known
        (told,) = instability("eager", rising, False, steady)
        assert "still warming up" in told
    (told,) = instability("eager", runs(10, 12, 10), False, [0.05] * 4)
    assert "is the machine busy?" in told


def slowing(rate, by, tokens=300):
    """A run whose last tokens come `by` times as fast as its first ones."""
    gaps = [1 / rate / (1 + (by - 1) * i / (tokens - 2)) for i in range(tokens - 1)]
    return run(rate, tokens, inter_token_s=gaps)


@pytest.mark.parametrize(
    ("made", "slows"),
    [
        ([slowing(20, 0.6), slowing(20.5, 0.6)], True),
        ([slowing(20, 0.6), slowing(18, 0.61), run(20, 40)], True),  # a short answer says nothing
        ([slowing(20, 1), slowing(20, 1)], False),
        ([slowing(20, 0.95), slowing(20, 0.95)], False),
        ([slowing(20, 0.6), slowing(20, 1)], False),  # another program
        ([slowing(20, 0.4), slowing(20, 0.8)], False),
        ([slowing(20, 0.6)], False),  # one run may be the machine's
    ],
)
def test_decode_that_slows_with_context(made, slows):
    assert slows_with_context(made) == slows
    told = [text for text in instability("eager", made, False) if "slows with context" in text]
    assert len(told) == slows and all("at the beginning" in text for text in told)


def test_float8_is_held_against_int8_in_pairs_of_prompts():
    """Prompts differ by ten times, but float8 is a tenth below int8 on each of them."""
    base = [[0.01 * 1.2**i] for i in range(16)]
    less = [[0.9 * prompt[0]] for prompt in base]
    verdict = lambda a, b: {
        e.expected: e.verdict for e in expectations([result("int8", quality=a), result("float8", quality=b)])
    }.get("more exact than int8")
    assert (
        verdict(quality_of(base), quality_of(less)) == "met"
        and verdict(quality_of(less), quality_of(base)) == "not met"
    )
    low, high = kl_interval(quality_of(base))
    assert low < quality_of(less).kl_divergence < high, "unpaired they could not be told apart"
    noisy = [[x[0] * (1.5 if i % 2 else 0.5)] for i, x in enumerate(base)]
    assert verdict(quality_of(base), quality_of(noisy)) == "too close to call"
    assert verdict(quality_of(base), quality_of(less, text_id="other")) is None


def test_an_empty_greedy_answer_is_warned_of():
    empty = result("none", greedy_answer="")
    assert warnings_for(empty) == ["The greedy answer is empty: a chat model wants --chat."]
    chat = replace(empty, settings=settings(weights=None, chat=True))
    assert warnings_for(chat) == ["The greedy answer is empty."]
    assert warnings_for(result("none", greedy_answer="42")) == []
