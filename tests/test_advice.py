"""Which precision to take: a case for each rule."""

from dataclasses import replace

from results import GIB, compiled, on_gpu, quality, result, runs

from _qwquanto.advice import advice
from _qwquanto.memory import fit_line
from _qwquanto.results import Result
from _qwquanto.stats import BETWEEN_PROCESSES, speed_interval
from _qwquanto.text import format_3g


def told(*results, done=None):
    return advice(list(results), [r for r in results if r.eager_complete])


def test_bf16_that_fits_and_is_faster_is_taken():
    base, int8 = on_gpu("none", (20, 20)), on_gpu("int8", (11, 11), 0.004, int(1.1 * GIB))
    int8.prefill_tokens_per_s = 3.5 * base.prefill_tokens_per_s
    assert told(base, int8) == (
        "[bold green]Take bf16[/]: it fits (2.75 of 80.0 GiB) and is 1.82 times as fast as int8."
        " Where memory is short: int8 keeps the answers and took 1.85 GiB,"
        " decode 0.550 times, prompts 3.50 times bf16's speed."
    )


def test_what_a_smaller_card_gains_by_a_smaller_model_is_said():
    """The peak of a short context is no limit: what counts is the context that a card has room for."""
    base, int8 = on_gpu("none", (20, 20), stored=6 * GIB), on_gpu("int8", (11, 11), 0.004, 3 * GIB)
    (on_8,) = fit_line([base, int8])
    assert "8 GB: bf16 8,000; int8 all 32,768." in on_8
    text = "took 3.75 GiB (a card of 8 GB has room for all 32,768 tokens with it, 8,000 with bf16), decode"
    assert text in told(base, int8)
    base, int8 = on_gpu("none", (20, 20), stored=9 * GIB), on_gpu("int8", (11, 11), 0.004, 5 * GIB)
    assert " tokens with it, none with bf16), " in told(base, int8)


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


def test_of_those_that_may_be_the_fastest_the_smallest_is_taken(monkeypatch):
    monkeypatch.setitem(BETWEEN_PROCESSES, ("eager", "cuda"), 0.01)  # of a host that is steadier
    base = on_gpu("none", (19.9, 20.1))
    near = on_gpu("int8", (19.8, 20), 0.004, int(1.1 * GIB))
    noisy = on_gpu("int8", (8, 18), 0.004, int(1.1 * GIB))
    assert "Take int8" in told(base, near) and "; about as fast (" in told(base, near)
    assert "Take bf16" in told(base, noisy) and "int8 is not certain to be faster" in told(base, noisy)
    quick = on_gpu("int8", (16, 36), 0.004, int(1.1 * GIB))
    assert "Take int8" in told(base, quick) and "which decodes faster is not certain" in told(base, quick)


def test_what_saves_no_memory_is_not_taken_for_it():
    """On a CPU int8's process often takes more than bf16's."""
    base, int8 = result("none", (19.9, 20.1), stored=2 * GIB), result("int8", (20, 20.2), 0.004)
    low, high = map(format_3g, speed_interval(int8, base))
    unsure = f"it fits (3.00 GiB) and int8 is not certain to be faster ({low} to {high} times)."
    assert unsure in told(base, int8)
    assert told(base, int8).endswith(
        " int8 keeps the answers too (decode 1.01 times, prompts 1.00 times bf16's speed),"
        " but took no less memory: 3.00 GiB."
    )
    smaller = replace(int8, memory={"peak of runs": {"rss": 2 * GIB}})
    assert "Take int8" in told(base, smaller)
    faster = replace(int8, runs=runs(30, 30))
    assert "Take int8" in told(base, faster), "it is faster"
    assert told(base, faster).endswith(" The program took no less memory, 3.00 GiB against 3.00 GiB.")
    large = replace(faster, memory={"peak of runs": {"rss": 4 * GIB}})
    assert told(base, large).endswith(" The program took more memory, 4.00 GiB against 3.00 GiB.")
    lean = replace(faster, memory={"peak of runs": {"rss": 2 * GIB}})
    assert "no less memory" not in told(base, lean)
    # as SmolLM2's int8 on a CPU: faster decoding, slow prompts, more memory
    slow = replace(faster, prefill_tokens_per_s=50.0, decode_after_prefill_ratio=25 / 30)
    base = replace(base, prefill_tokens_per_s=500.0)
    shown = told(base, slow)
    assert "Take bf16[/]: it fits (3.00 GiB) and is faster than int8 where prompts are long" in shown
    assert "(512 + 128 tokens: 7.37 s against 15.3)" in shown and "decode 1.50 times" in shown
    assert "Take int8" in told(base, replace(slow, memory={"peak of runs": {"rss": 2 * GIB}})), "less memory"


def test_where_bf16_does_not_fit_the_smallest_that_keeps_the_answers_is_taken():
    """The reference, the most precise one that ran, keeps its own."""
    failed = Result(result("none").settings, failure="the weights need 14.2 of 12.0 GiB in all")
    fits = {"device_memory_bytes": {"cuda:0": int(1.9 * GIB)}}
    int8 = result("int8", (11, 11), stored=int(1.1 * GIB), is_reference=True, **fits)
    int4 = result("int4", (15, 15), 0.2, stored=int(0.7 * GIB), **fits)
    assert told(failed, int8, int4) == (
        "[bold green]Take int8[/]: bf16 does not fit (2.00 GiB of weights in 1.90 GiB). It is the most"
        " precise one that ran (1.10 GiB of weights, 45.0 % saved, decode 11.0 tokens/s); nothing smaller is"
        " certain to keep its answers. Smaller, but with changed answers: int4 (0.700 GiB, KL 0.200"
        " ±0.0001)."
    )
    float8 = result("float8", (9, 9), 0.01, stored=int(1.1 * GIB), **fits)
    four = told(failed, int8, float8, int4)
    assert "is certain to keep its answers. Equally small: float8, 9.00 tokens/s. Smaller, but" in four
    broken = replace(int4, quality=quality(3.0, reference="int8"))
    assert told(failed, int8, broken).endswith("certain to keep its answers.")
    close = replace(int4, quality=quality(0.01, reference="int8"))
    assert "Take int4[/]: bf16 does not fit" in told(failed, int8, close)
    assert "It keeps int8's answers (0.700 GiB of weights, 65.0 % saved" in told(failed, int8, close)
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
