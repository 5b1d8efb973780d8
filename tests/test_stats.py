"""Pure figures of hand-made Results."""

import math
import statistics
from dataclasses import replace

import pytest
from results import quality, result, run, runs

from _qwquanto.fit import peak_bytes
from _qwquanto.stats import (
    coefficient_of_variation,
    deviation,
    joules_per_token,
    kl_interval,
    mean_over_prompts,
    median,
    meets,
    pace,
    percentile,
    rates_over_shared_prefix,
    ratio_interval,
    share_interval,
    speed_interval,
    student_t,
    utilization,
)
from _qwquanto.verdicts import instability


def test_percentiles_interpolate_and_survive_few_values():
    assert percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 90) == pytest.approx(4.6)
    assert percentile([7.0], 99) == 7 and percentile([], 50) is None
    assert percentile([2.0, 2.0, 2.0], 99) == 2


def test_median_and_deviation_of_what_is_known():
    assert median([None, 3.0, 1.0]) == 2 and median([None]) is None
    assert deviation([1.0, None, 3.0]) == pytest.approx(math.sqrt(2)) and deviation([1.0, None]) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # any table of Student's t, 97.5 %
    [
        (1, 12.706),
        (4, 2.7764),
        (10, 2.2281),
        (11, 2.2010),
        (15, 2.1314),
        (20, 2.0860),
        (30, 2.0423),
        (100, 1.9840),
    ],
)
def test_students_t_against_a_table(freedom, quantile):
    assert quantile * 0.9998 < student_t(freedom) < quantile * 1.001


def test_welch_against_a_published_example():
    """Wikipedia, "Welch's t-test", example 2: t = -1.57 with 9.90 degrees of freedom; here logs of rates."""
    first = [17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8]
    second = [21.5, 22.8, 21.0, 23.0, 21.6, 23.6, 22.5, 20.7, 23.4, 21.8]
    second += [20.7, 21.7, 21.5, 22.5, 23.6, 21.5, 22.5, 23.5, 21.5, 21.8]
    groups = [[run(math.exp(value)) for value in group] for group in (first, second)]
    low, high = map(math.log, ratio_interval(*groups))
    center, half = (low + high) / 2, (high - low) / 2
    assert center == pytest.approx(statistics.fmean(first) - statistics.fmean(second))
    quantile = 2.2310  # of Student's t with 9.904 degrees of freedom
    assert center / (half / quantile) == pytest.approx(-1.57, abs=0.005)


def test_deviation_only_over_the_positions_that_all_runs_reached():
    long = run(inter_token_s=[0.1] * 39 + [9.0] * 5)
    assert rates_over_shared_prefix([run(10), long], [run(20)]) == [
        pytest.approx([10, 10]),
        pytest.approx([20]),
    ]
    assert coefficient_of_variation([run(10), long]) == pytest.approx(0)


def test_a_spread_needs_two_runs_of_32_tokens():
    short = run(10, tokens=31)
    for few in ([], [run(10)], [run(10), short], [short, short]):
        assert coefficient_of_variation(few) is None and ratio_interval(few, runs(10, 11)) is None
        assert any("how steady they are is unknown" in text for text in instability("eager", few, False)) == (
            len(few) > 1
        )
    assert coefficient_of_variation([run(10, tokens=32), run(10, tokens=32), short]) == pytest.approx(0)


def test_bandwidths_that_differ_widen_the_interval():
    base, r = result("none", (10, 10)), result("int8", (10, 10))
    low, high = speed_interval(r, base)
    assert low == pytest.approx(1 / high) and 0.9 < low < 1
    r.memory_bytes_per_s = {"cpu": 2.5e10}  # the faster memory may have made a slower one as fast
    assert speed_interval(r, base) == pytest.approx((0.8 * low, high))
    assert speed_interval(base, r) == pytest.approx((low, 1.25 * high))
    r.memory_bytes_per_s = {}
    assert speed_interval(r, base) == pytest.approx((low, high))


def test_pace_and_energy():
    long = run(
        inter_token_s=[0.1] * 100 + [0.2] * 100, energy_j={"cuda:0": 30.0, "cuda:1": 10.0}, latency_s=0.6
    )
    assert pace([long, run()]) == pytest.approx((10, 5)) and pace([run()]) is None
    assert joules_per_token([long]) is None  # under a second the counter hardly moves
    assert joules_per_token([long, long]) == pytest.approx(1)
    assert joules_per_token([long, run()]) is None and joules_per_token([]) is None


def test_peak_is_of_tensors_or_of_the_process():
    peak = {"cuda:0 allocated": 5, "cuda:0 used": 50, "cuda:1 allocated": 6, "rss": 1}
    assert peak_bytes(result(memory={"peak of runs": peak})) == (11, "tensors")
    assert peak_bytes(result(memory={"peak of runs": {"rss": 1}})) == (1, "RSS")
    assert peak_bytes(result(memory={})) == (None, "RSS")


def test_utilization_of_devices_that_work_one_after_the_other():
    held, speeds = {"cuda:0": 30, "cuda:1": 10}, {"cuda:0": 1000.0, "cuda:1": 500.0}
    r = result(device_weight_bytes=held, memory_bytes_per_s=speeds, bytes_per_token=40)
    assert utilization(r, runs(10, 10)) == pytest.approx(10 * (30 / 1000 + 10 / 500))
    half = replace(r, bytes_per_token=20)  # an untied input embedding is not read
    assert utilization(half, runs(10, 10)) == pytest.approx(5 * (30 / 1000 + 10 / 500))
    assert utilization(r, [run(tokens=1)]) is None
    assert utilization(replace(r, bytes_per_token=None), runs(10, 10)) is None
    assert utilization(replace(r, memory_bytes_per_s={"cuda:0": 1000.0}), runs(10)) is None


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        *[((0.9, 0.95), "met"), ((0.9, 0.9), "met"), ((0.5, 0.899), "not met"), (None, "too close to call")],
        *[((0.5, 0.9), "too close to call"), ((0.89, 0.91), "too close to call")],
    ],
)
def test_judged_by_the_interval_not_its_middle(interval, verdict):
    assert meets(interval, 0.9) == verdict


def test_intervals_are_over_prompts():
    """Sixteen prompts of alike positions are sixteen samples, however many positions they have."""
    means = [0.01 * i for i in range(16)]
    few, many = ([[m] * n for m in means] for n in (1, 50))
    assert mean_over_prompts(few) == pytest.approx(mean_over_prompts(many))
    mean, error = mean_over_prompts(many)
    assert (mean, error) == pytest.approx((0.075, statistics.stdev(means) / 4))
    low, high = kl_interval(replace(quality(mean, error), kl_positions=many))
    assert high - mean == pytest.approx(2.1314 * error, rel=1e-3) and low == pytest.approx(2 * mean - high)
    assert mean_over_prompts([[0.1, 0.3]]) == (pytest.approx(0.2), None)
    assert mean_over_prompts([[0.0], [1.0, 1.0, 1.0]])[0] == 0.5, "a prompt counts once"


def test_a_share_whose_prompts_are_alike_has_no_interval():
    assert share_interval([[True, True]] * 16) == (None, None) == share_interval([[True, False]])
    low, high = share_interval([[True]] * 15 + [[False]])
    assert low == pytest.approx(15 / 16 - 2.1314 / 16, rel=1e-3) and high == 1
