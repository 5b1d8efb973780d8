"""Who claims what of Quanto, and whether it is met: each rule on hand-made Results."""

from dataclasses import replace

import pytest
from results import GIB, on_gpu, result, runs

from _qwquanto.claims import INTROS, QUANTO, expectations, layer_factor


def rows(*results):
    return {(e.by, e.of): e for e in expectations(list(results))}


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
    assert (row.of, row.measured, row.verdict) == ("int8", "few or no layers ran one", "no claim")
    packed = {"aten::_weight_int4pack_mm_for_cpu": 4, "aten::mm": 1}
    int4 = result("int4", (10, 10), kernels=packed)
    found = [e for e in expectations([base, int8, int4]) if "kernels" in e.expected]
    assert [(e.of, e.verdict) for e in found] == [("int4", "not met"), ("int8", "no claim")]
    fast = replace(int4, runs=runs(18.5, 18.5))
    assert rows(base, fast)[QUANTO, "int4"].measured == "92.5 % (86.3 to 99.1)"
    assert rows(base, fast)[QUANTO, "int4"].verdict == "borderline"
    fast = replace(int4, runs=runs(19.5, 19.5))
    assert rows(base, fast)[QUANTO, "int4"].verdict == "met"
    few = replace(int4, kernels={"aten::_weight_int4pack_mm": 1, "aten::mm": 4})
    assert [e.verdict for e in expectations([base, few]) if "kernels" in e.expected] == ["no claim"]
    assert [e for e in expectations([int4]) if "kernels" in e.expected] == [], "nothing to compare with"


def test_no_claim_against_16_bit_is_judged_against_32():
    r = result("int8", kl=0.004, unquantized_bytes=4 * GIB)
    assert [e.expected for e in expectations([result("none"), r])] == ["answers very close"]
