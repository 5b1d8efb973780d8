"""Who claims what, which precision to take, and which cards hold it: each rule on a hand-made Result."""

from dataclasses import replace

import pytest
from results import GIB, compiled, gpu_comparison, gpu_memory, quality, result, run, runs

from _qwquanto.advice import advice
from _qwquanto.claims import INTROS, QUANTO, expectations, layer_factor
from _qwquanto.fit import bytes_per_prompt_token, context_that_fits, device_peak, memory_taken, tensor_peak
from _qwquanto.memory import cache_line, comparison_memory, fit_line, fit_on, memory_table, process_lines
from _qwquanto.report import heading, question_s, runs_table, single_headline, speed_table
from _qwquanto.results import Result, from_plain
from _qwquanto.text import plus_minus
from _qwquanto.verdicts import GPU_TESTED, untested, warnings_for

KV = 36 * 1024


def on_gpu(name, rates=(20, 20), kl=None, stored=2 * GIB, **changes):
    """A Result on an empty GPU of 80 GiB."""
    made = result(name, rates, kl, stored, devices=["cuda:0"], memory_bytes_per_s={"cuda:0": 3e12}, **changes)
    made.memory, made.device_memory_bytes = gpu_memory(made), {"cuda:0": 80 * GIB}
    made.kv_bytes_per_token, made.max_positions = KV, 32768
    return made


def rows(*results):
    return {(e.by, e.of): e for e in expectations(list(results))}


# ---------------------------------------------------------------------------------------------------- claims


def test_a_claim_names_who_makes_it():
    found = expectations([on_gpu("none"), on_gpu("int8", kl=0.004, stored=int(1.1 * GIB))])
    assert [(e.by, e.expected) for e in found] == [
        (INTROS, "50-60 % less memory"),
        (INTROS, "at least 90 % of the speed"),
        (QUANTO, "its layers about 16 / bits times smaller"),
        (QUANTO, "comparable speed by optimized kernels"),
        (QUANTO, "answers very close"),
    ]


def test_what_8_bits_can_never_reach_says_so():
    (memory, *_) = expectations([result("int8", stored=int(1.1 * GIB))])
    assert memory.measured == "45.0 % of the stored weights; 8 of 16 bits can never save 50"


def test_answers_are_claimed_of_8_bits_alone():
    made = [result(name, kl=4.0) for name in ("int8", "float8", "int4", "int2")]
    assert [e.of for e in expectations(made) if e.expected == "answers very close"] == ["int8", "float8"]


def test_memory_of_quantos_layers_is_judged_by_its_factor():
    """1.8 of 2 GiB are in its layers: int8 stores them in 0.9 GiB, int4 in 0.5 with its scales."""
    int8, int4 = result("int8", stored=int(1.1 * GIB)), result("int4", stored=int(0.7 * GIB))
    assert layer_factor(int8) == pytest.approx(2) and layer_factor(int4) == pytest.approx(3.6)
    (row,) = [e for e in expectations([int8, int4]) if e.by == QUANTO]
    assert (row.of, row.measured, row.verdict) == ("all", "int8 2.00, int4 3.60 times", "met")
    half = result("int4", stored=int(1.1 * GIB))  # of 16 / 4 = 4, it has 2
    (row, other) = [e for e in expectations([int8, half]) if e.by == QUANTO]
    assert (row.of, row.verdict, other.of, other.verdict) == ("int8", "met", "int4", "not met")
    for unknown in (result("none"), result(quantized_layers=0), result(stored=GIB // 10)):
        assert layer_factor(unknown) is None


def test_speed_is_claimed_where_an_optimized_kernel_ran():
    base, int8 = result("none", (20, 20)), result("int8", (19, 19), kernels={"aten::mm": 5})
    (row,) = [e for e in expectations([base, int8]) if "kernels" in e.expected]
    assert (row.of, row.measured, row.verdict) == ("int8", "no such kernel ran", "no claim")
    packed = {"aten::_weight_int4pack_mm_for_cpu": 4, "aten::mm": 1}
    int4 = result("int4", (10, 10), kernels=packed)
    found = [e for e in expectations([base, int8, int4]) if "kernels" in e.expected]
    assert [(e.of, e.verdict) for e in found] == [("int4", "not met"), ("int8", "no claim")]
    fast = replace(int4, runs=runs(18.5, 18.5))
    assert rows(base, fast)[QUANTO, "int4"].measured == "92.5 % (92.5 to 92.5)"
    assert rows(base, fast)[QUANTO, "int4"].verdict == "met"
    few = replace(int4, kernels={"aten::_weight_int4pack_mm": 1, "aten::mm": 4})
    assert [e.verdict for e in expectations([base, few]) if "kernels" in e.expected] == ["no claim"]
    assert [e for e in expectations([int4]) if "kernels" in e.expected] == [], "nothing to compare with"


def test_no_claim_against_16_bit_is_judged_against_32():
    r = result("int8", kl=0.004, unquantized_bytes=4 * GIB)
    assert [e.expected for e in expectations([result("none"), r])] == ["answers very close"]


# ---------------------------------------------------------------------------------------------------- advice


def told(*results, done=None):
    return advice(list(results), [r for r in results if r.eager_complete])


def test_bf16_that_fits_and_is_faster_is_taken():
    base, int8 = on_gpu("none", (20, 20)), on_gpu("int8", (11, 11), 0.004, int(1.1 * GIB))
    int8.prefill_tokens_per_s = 3.5 * base.prefill_tokens_per_s
    assert told(base, int8) == (
        "[bold green]Take bf16[/]: it fits (2.75 of 80.0 GiB) and is 1.82 times as fast as int8."
        " Where you have less than 2.75 GiB: int8 keeps the answers and took 1.85 GiB,"
        " decode 0.550 times, prompts 3.50 times bf16's speed."
    )


def test_a_precision_that_is_faster_is_taken():
    base, int8 = on_gpu("none", (20, 20)), on_gpu("int8", (30, 30), 0.004, int(1.1 * GIB))
    assert told(base, int8) == (
        "[bold green]Take int8[/]: it keeps the answers in 1.10 GiB of weights (45.0 % saved),"
        " decode 1.50 times, prompts 1.00 times bf16's speed."
    )
    smaller = on_gpu("int4", (15, 15), 0.02, int(0.7 * GIB))
    assert " Smaller still: int4 in 0.700 GiB" in told(base, int8, smaller)
    changed = on_gpu("int4", (90, 90), 0.2, int(0.7 * GIB))
    assert told(base, int8, changed) == told(base, int8)


def test_of_those_that_may_be_the_fastest_the_smallest_is_taken():
    base = on_gpu("none", (19.9, 20.1))
    near = on_gpu("int8", (19.8, 20), 0.004, int(1.1 * GIB))
    noisy = on_gpu("int8", (8, 18), 0.004, int(1.1 * GIB))
    assert "Take int8" in told(base, near) and "; about as fast (" in told(base, near)
    assert "Take int8" in told(base, noisy) and "which decodes faster is not certain" in told(base, noisy)


def test_what_saves_no_memory_is_not_taken_for_it():
    """On a CPU int8's process often takes more than bf16's."""
    base, int8 = result("none", (19.9, 20.1), stored=2 * GIB), result("int8", (20, 20.2), 0.004)
    assert "Take bf16[/]: it fits (3.00 GiB) and int8 is not certain to be faster (" in told(base, int8)
    assert told(base, int8).endswith("but its process took no less memory (3.00 GiB).")
    smaller = replace(int8, memory={"peak of runs": {"rss": 2 * GIB}})
    assert "Take int8" in told(base, smaller)
    assert "Take int8" in told(base, replace(int8, runs=runs(30, 30))), "it is faster"


def test_where_bf16_does_not_fit_the_smallest_that_keeps_the_answers_is_taken():
    """The reference, the most precise one that ran, keeps its own."""
    failed = Result(result("none").settings, failure="the weights need 14.2 of 12.0 GiB in all")
    fits = {"device_memory_bytes": {"cuda:0": int(1.9 * GIB)}}
    int8 = result("int8", (11, 11), stored=int(1.1 * GIB), is_reference=True, **fits)
    int4 = result("int4", (15, 15), 0.2, stored=int(0.7 * GIB), **fits)
    assert told(failed, int8, int4).startswith(
        "[bold green]Take int8[/]: bf16 does not fit (2.00 GiB of weights in 1.90 GiB); it is the most"
        " precise one that ran, and nothing smaller is certain to keep its answers; in"
    )
    assert told(failed, int8, int4).endswith("in 1.10 GiB of weights (45.0 % saved), decode 11.0 tokens/s.")
    close = replace(int4, quality=quality(0.01, reference="int8"))
    assert "Take int4[/]: bf16 does not fit" in told(failed, int8, close)
    assert "it keeps int8's answers in 0.700 GiB" in told(failed, int8, close)
    int8.device_memory_bytes = int4.device_memory_bytes = {"cuda:0": 80 * GIB}
    assert "bf16 did not run here" in told(failed, int8, int4)
    assert "bf16 was not measured" in told(int8, int4)


def test_a_model_spread_over_two_devices_is_not_compared_in_speed():
    base, int8 = on_gpu("none", (20, 20)), on_gpu("int8", (11, 11), 0.004, int(1.1 * GIB))
    base.devices = ["cuda:0", "cuda:1"]
    assert told(base, int8) == (
        "[bold green]Take int8[/]: it keeps the answers on cuda:0 in 1.10 GiB of weights (45.0 % saved);"
        " bf16 ran on cuda:0, cuda:1, so speeds are not compared."
    )


def test_nothing_is_taken_without_quality_and_bf16_where_nothing_else_keeps_answers():
    assert told(on_gpu("none"), on_gpu("int8")) == ""
    assert "Take bf16[/]: nothing smaller" in told(on_gpu("none"), on_gpu("int8", kl=0.3))
    assert told(result("int4", kl=0.3)) == ""


def test_the_compiled_step_has_an_advice_of_its_own_where_it_differs():
    base, int8 = on_gpu("none", (20, 20)), on_gpu("int8", (11, 11), 0.004, int(1.1 * GIB))
    base.compiled, int8.compiled = compiled(30, 30), compiled(40, 40)
    assert told(base, int8).endswith(" In this script's compiled step take int8: 40.0 tokens/s, bf16 30.0.")
    int8.compiled = compiled(20, 20)
    assert "compiled" not in told(base, int8)
    int8.compiled = compiled(40, 40, quality=quality(0.3))
    assert "compiled" not in told(base, int8), "it answers otherwise"
    base.compiled = None
    assert "compiled" not in told(base, int8)


# ------------------------------------------------------------------------------------------------------- fit


def test_the_devices_peak_is_above_what_others_had():
    r = on_gpu("int8", stored=GIB)
    assert device_peak(r) == r.memory["peak of runs"]["cuda:0 used"] - GIB
    assert tensor_peak(r) == r.memory["peak of runs"]["cuda:0 allocated"]
    r.memory["at start"] = {}  # a file of an older version
    assert device_peak(r) is None and memory_taken(r) == tensor_peak(r)
    assert device_peak(result()) == 3 * GIB and tensor_peak(result()) is None
    mps = result(devices=["mps"], memory={"peak of runs": {"mps allocated": 5, "mps reserved": 7, "rss": 9}})
    assert (device_peak(mps), tensor_peak(mps)) == (7, 5)
    assert device_peak(replace(r, memory={})) is None and memory_taken(replace(r, memory={})) is None


def test_a_prompts_token_takes_keys_values_and_activations():
    r = on_gpu("int8", stored=GIB)
    assert bytes_per_prompt_token(r) == pytest.approx(KV + 75 * 1024)
    r.memory["peak of prefill"] = {"cuda:0 allocated": 0}
    assert bytes_per_prompt_token(r) == KV, "never less than keys and values"
    del r.memory["peak of prefill"]
    assert bytes_per_prompt_token(r) == KV


def test_the_context_that_fits_is_what_a_card_has_left():
    """7.6 of 8 GiB: 6 GiB of weights and 0.75 more leave 0.85 GiB, for tokens of 111 KiB."""
    r = on_gpu("none", stored=6 * GIB)
    assert context_that_fits(r, 8 * GIB) == pytest.approx(0.85 * GIB / (111 * 1024), rel=0.001)
    assert context_that_fits(r, 12 * GIB) == 32768 == context_that_fits(r, 24 * GIB)
    assert context_that_fits(r, 7 * GIB) == 0
    r.memory["peak of load"]["cuda:0 used"] = 9 * GIB  # above 1 GiB of others'
    assert context_that_fits(r, 8 * GIB) == 0 < context_that_fits(r, 12 * GIB)
    unknown = {"devices": ["cuda:0", "cuda:1"]}, {"kv_bytes_per_token": None}, {"runs": []}
    assert [context_that_fits(replace(r, **changes), 24 * GIB) for changes in unknown] == [None] * 3
    assert context_that_fits(result(kv_bytes_per_token=9.0), 24 * GIB) is None, "a CPU has no card"
    endless = replace(r, max_positions=None)
    assert context_that_fits(endless, 24 * GIB) > 32768


def test_cards_that_hold_the_same_share_a_place():
    bf16, int8 = on_gpu("none", stored=6 * GIB), on_gpu("int8", stored=int(3.3 * GIB))
    big = on_gpu("none", stored=16 * GIB)
    assert fit_on(8, [bf16, int8]) == "bf16 8,000; int8 all 32,768"
    assert fit_on(8, [big, int8]) == "bf16 none; int8 all 32,768"
    assert fit_line([bf16, int8]) == [
        "Tokens of context that a card has room for (computed). 8 GB: bf16 8,000; int8 all 32,768."
        " 12, 16, 24 GB: bf16, int8 all 32,768."
    ]
    assert fit_line([result("none"), result()]) == []


def test_the_cache_is_told_in_bytes_of_1000_tokens():
    assert cache_line([on_gpu("none"), on_gpu("int8")]) == ["KV cache: 35.2 MiB per 1,000 tokens of context."]
    assert cache_line([result()]) == []


def test_a_process_that_took_more_ram_than_bf16s_is_said_to():
    base = result("none", memory={"peak of runs": {"rss": GIB}})
    (_, line) = process_lines([base, result("int8"), result("int4", memory={"peak of runs": {"rss": GIB}})])
    assert line == "More RAM than bf16's process (1.00 GiB) took int8's (3.00 GiB)."
    assert len(process_lines([result("none"), result("int8")])) == 1 == len(process_lines([result()]))
    assert process_lines([on_gpu("none"), on_gpu("int8")]) == []


def test_the_tables_name_what_their_peak_is_of():
    (title, made, *lines) = comparison_memory(gpu_comparison())
    assert "what the program took of the device" in title and any("KV cache" in line for line in lines)
    assert [c.header for c in made.columns][3:6] == ["peak", "tensors", "load s"]
    (title, made, *_) = comparison_memory([result("none"), result()])
    assert "the whole process (RSS)" in title and [c.header for c in made.columns][3:] == ["peak", "load s"]
    (title, *_) = comparison_memory([result("none", memory={}), result(memory={})])
    assert title == "[bold]### Memory in GiB[/]"
    assert any("KV cache" in str(part) for part in memory_table(on_gpu("int8")))


def test_older_files_have_none_of_it():
    plain = {"settings": vars(result().settings), "weight_bytes": GIB}
    r = from_plain(Result, plain)
    assert (r.kv_bytes_per_token, r.max_positions, r.device_memory_bytes) == (None, None, {})


# ----------------------------------------------------------------------------------------- lines and figures


def test_a_long_question_is_computed_from_both_rates():
    r = result("int8", (10, 10), prefill_tokens_per_s=256.0)
    assert question_s(r) == pytest.approx(2 + 12.7)
    assert (
        question_s(replace(r, prefill_tokens_per_s=None)) is None and question_s(replace(r, runs=[])) is None
    )


def test_versions_that_no_gpu_test_has_seen_are_told():
    (line,) = untested(on_gpu("int8", environment=GPU_TESTED | {"torch": "2.13.0+cu130"}))
    assert "torch 2.11.0+cu130, transformers 5.17.0" in line
    assert untested(on_gpu("int8", environment=GPU_TESTED)) == []
    assert untested(result(environment=GPU_TESTED | {"torch": "2.13.0"})) == [], "CPUs have run them"
    (line,) = untested(result(devices=["mps"]))
    assert "Never run by the authors on MPS" in line


def test_sentences_say_what_was_done():
    assert heading(result()).endswith(", on cpu, batch 1")
    single = result(runs=[run(ttft_s=0.0658)], compiled=compiled(20, 20))
    assert "one run of up to 40 new tokens" in str(speed_table([single])[0])
    assert "x eager rests on a single eager run." in speed_table([single], compiled=True)
    assert "x eager rests on a single eager run." not in speed_table([result(compiled=compiled(9))], True)
    slow = result(runs=[run(ttft_s=0.0658), run(ttft_s=0.0658)])
    assert "first token after 65.8 ms," in single_headline(slow)[0]
    assert "first token after 2.00 s," in single_headline(result(runs=[run(ttft_s=2.0)]))[0]
    assert "first token after 50.0 ms (the prompt is read eagerly)," in single_headline(single)[0]
    ended = result(runs=[run(stop_reason="time", latency_s=60.1), run(stop_reason="time", latency_s=60.0)])
    assert "Runs all ended by max_seconds" not in runs_table(ended)[-2]
    assert "Runs all ended by MAX_SECONDS; " in runs_table(ended)[-2]
    assert "Latency 4.00 ±0.00 s" in runs_table(result())[-2]


def test_runs_ended_by_time_are_not_said_to_do_less_than_the_others():
    (line,) = warnings_for(result("int8", runs=runs(10, 10, stop_reason="time"), compare=("int8",)))
    assert line == "The eager runs were ended by MAX_SECONDS, short of COMPARE_TOKENS."


def test_a_small_spread_has_a_decimal_more():
    assert plus_minus(357.2, 0.14) == "357.2 ±0.1" and plus_minus(357.2, 0.01) == "357.2 ±0.0"
    assert plus_minus(357.2, 1.2) == "357 ±1" and plus_minus(10.0, 0.0) == "10.0 ±0.0"
    assert plus_minus(24.12, 0.03) == "24.12 ±0.03"
