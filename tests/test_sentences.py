"""Sentences that readers stumbled over, and figures that are computed."""

from dataclasses import replace

import pytest
from results import compiled, on_gpu, result, run, runs

from _qwquanto.report import heading, question_s, runs_table, single_headline, speed_table
from _qwquanto.text import plus_minus
from _qwquanto.verdicts import GPU_TESTED, untested, warnings_for


def test_a_long_question_is_computed_from_both_rates():
    """Decoding at the rate of the runs, slowed down by what was measured beside it."""
    r = result("int8", (10, 10), prefill_tokens_per_s=256.0)
    assert question_s(r) == pytest.approx(2 + 12.7)
    slowed = replace(r, decode_after_prefill_tokens_per_s=3.0, decode_after_prefill_ratio=0.5)
    assert question_s(slowed) == pytest.approx(2 + 25.4)
    by_chance = replace(r, decode_after_prefill_ratio=1.2)
    assert question_s(by_chance) == question_s(r), "a longer context makes nothing faster"
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
    assert "one run, first 40 tokens" in str(speed_table([single])[0])
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
