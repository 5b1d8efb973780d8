"""Pure figures from Results: medians, spreads, intervals, limits. Imports results and settings."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable

from _qwquanto.results import Quality, Result, Run

KL_KEPT, KL_BROKEN = 0.05, 0.5  # nats: up to the first answers are kept, above the second they are broken
MIN_RATE_TOKENS = 32  # of a run whose rate counts for a spread
LONG_ANSWER_TOKENS = 200  # of a run that shows a pace
UNSTABLE = 0.05  # standard deviation over mean of the runs' decode rates that deserves a warning
SAME_SPEED_RATIO = 1.2  # times as fast, or as slow, that still counts as about the same speed


def student_t(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t: a table, then a series, at most 0.1 % too small."""
    table = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[max(1, int(freedom)) - 1] if freedom < 11 else 1.96 + 2.4 / freedom + 2.8 / freedom**2


def mean_over_prompts(positions: list[list[float]]) -> tuple[float, float | None]:
    """Mean of the prompts' means and its standard error: positions of one prompt are alike."""
    means = [statistics.fmean(prompt) for prompt in positions]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return statistics.fmean(means), error


def percentile(values: list[float], percent: int) -> float | None:
    """Linear interpolation between the sorted values; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def deviation(values: Iterable[float | None]) -> float | None:
    """The sample standard deviation of what is known; None for fewer than two values."""
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def decode_rate(runs: list[Run]) -> float | None:
    """Median decode tokens/s of some runs."""
    return median(r.decode_tokens_per_s for r in runs)


def rates_over_shared_prefix(*groups: list[Run]) -> list[list[float]]:
    """Each run's decode tokens/s over the positions that all runs of all groups reached, group by group.

    Sampled answers differ in length, and decode slows as the context grows, so only this compares run with
    run. Runs of fewer than MIN_RATE_TOKENS tokens do not count.
    """
    gaps = [[r.inter_token_s for r in runs if len(r.inter_token_s) >= MIN_RATE_TOKENS - 1] for runs in groups]
    shared = min((len(g) for group in gaps for g in group), default=0)
    return [[shared / sum(g[:shared]) for g in group] for group in gaps]


def coefficient_of_variation(runs: list[Run]) -> float | None:
    """Sample standard deviation of the runs' rates over their mean; None for fewer than two that count."""
    (rates,) = rates_over_shared_prefix(runs)
    return statistics.stdev(rates) / statistics.fmean(rates) if len(rates) > 1 else None


def ratio_interval(
    runs: list[Run], base: list[Run], bandwidth_ratio: float = 1.0
) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of two decode rates (Welch 1947, on logarithms); None for too few runs.

    `bandwidth_ratio` is that of the two processes' memory: it may be in the figures or not, so the
    interval is widened by it.
    """
    logs = [[math.log(rate) for rate in group] for group in rates_over_shared_prefix(runs, base)]
    if min(map(len, logs)) < 2:
        return None
    errors = [statistics.variance(group) / len(group) for group in logs]
    center = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    error = sum(errors)
    freedom = error**2 / sum(e**2 / (len(g) - 1) for e, g in zip(errors, logs, strict=True)) if error else 1
    half = student_t(freedom) * math.sqrt(error)
    return math.exp(center - half) * min(1, 1 / bandwidth_ratio), math.exp(center + half) * max(
        1, 1 / bandwidth_ratio
    )


def bandwidth_ratio(r: Result, base: Result) -> float:
    """Ratio of the memory bandwidths that two processes measured, at the device where they differ most."""
    ours, theirs = r.memory_bytes_per_s, base.memory_bytes_per_s
    ratios = [ours[device] / theirs[device] for device in ours if device in theirs]
    return max(ratios, key=lambda x: abs(math.log(x)), default=1.0)


def speed_interval(r: Result, base: Result) -> tuple[float, float] | None:
    """The 95 % interval of r's eager decode rate over base's; None where it is unknown."""
    return ratio_interval(r.runs, base.runs, bandwidth_ratio(r, base)) if r.devices == base.devices else None


def is_about_one(interval: tuple[float, float] | None) -> bool:
    """Whether a ratio's interval holds 1 and is narrow enough to say so; a wide one says nothing."""
    return (
        interval is not None and 1 / SAME_SPEED_RATIO <= interval[0] <= 1 <= interval[1] <= SAME_SPEED_RATIO
    )


def meets(interval: tuple[float, float] | None, limit: float) -> str:
    """Whether a figure of this interval is at least `limit`: met, not met or too close to call."""
    if interval is None or interval[0] < limit <= interval[1]:
        return "too close to call"
    return "met" if interval[0] >= limit else "not met"


def kl_interval(q: Quality) -> tuple[float, float]:
    """The 95 % interval of KL over prompts (Student's t)."""
    if q.kl_standard_error is None:
        return 0.0, math.inf
    half = student_t(len(q.kl_positions) - 1) * q.kl_standard_error
    return max(0.0, q.kl_divergence - half), q.kl_divergence + half


def share_interval(positions: list[list[bool]]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a share over prompts (Student's t); None where they do not differ."""
    share, error = mean_over_prompts(positions)
    if not error:
        return None, None
    half = student_t(len(positions) - 1) * error
    return max(0.0, share - half), min(1.0, share + half)


def kl_difference(q: Quality, base: Quality) -> tuple[float, float] | None:
    """The 95 % interval of KL minus another's, in pairs of prompts; None where the text is not the same."""
    if not q.text_id or q.text_id != base.text_id or q.reference != base.reference:
        return None
    pairs = zip(q.kl_positions, base.kl_positions, strict=True)
    mean, error = mean_over_prompts([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])
    if error is None:
        return None
    half = student_t(len(q.kl_positions) - 1) * error
    return mean - half, mean + half


def answer_quality(r: Result) -> str:
    """The answers: kept, changed or broken, with "or" where KL's interval holds a limit; – if unknown."""
    if r.quality is None or r.quality.kl_standard_error is None:
        return "–"
    named = [sum(kl > limit for limit in (KL_KEPT, KL_BROKEN)) for kl in kl_interval(r.quality)]
    names = ("kept", "changed", "broken")
    return names[named[0]] if named[0] == named[1] else f"{names[named[0]]} or {names[named[1]]}"


def utilization(r: Result, runs: list[Run]) -> float | None:
    """MBU. Several devices work one after the other, so the memory's time is the sum of each one's."""
    rate = decode_rate(runs)
    held = r.device_weight_bytes
    if rate is None or r.bytes_per_token is None or not held or not set(held) <= set(r.memory_bytes_per_s):
        return None
    total = sum(held.values())
    return rate * sum(r.bytes_per_token * n / total / r.memory_bytes_per_s[d] for d, n in held.items())


def pace(runs: list[Run]) -> tuple[float, float] | None:
    """Median decode tokens/s over the first and the last tenth of long answers; None without one."""
    gaps = [r.inter_token_s for r in runs if len(r.inter_token_s) >= LONG_ANSWER_TOKENS - 1]
    tenths = [(g[: len(g) // 10], g[-(len(g) // 10) :]) for g in gaps]
    return tuple(statistics.median(len(t[i]) / sum(t[i]) for t in tenths) for i in (0, 1)) if tenths else None


def is_warming_up(rates: list[float]) -> bool:
    """Whether the first runs were slower because they were the first: never of two runs.

    Either the first run alone is a tenth slower than all others, which agree; or each run is faster than the
    one before. Three noisy runs rise by chance one time in six: of three, each step must be a large one.
    """
    if len(rates) < 3:
        return False
    first, *others = rates
    agree = statistics.stdev(others) < UNSTABLE * statistics.fmean(others)
    least = UNSTABLE if len(rates) == 3 else 0.01
    rises = all(b > (1 + least) * a for a, b in itertools.pairwise(rates))
    return (agree and first < 0.9 * min(others)) or (rises and rates[-1] > (1 + UNSTABLE) * first)


def slows_with_context(runs: list[Run]) -> bool:
    """Whether decode slows by a tenth within each of two or more long answers, and in all of them alike.

    A busy machine slows each run elsewhere.
    """
    falls = [last / first for first, last in filter(None, (pace([run]) for run in runs))]
    return len(falls) > 1 and max(falls) < 0.9 and max(falls) < 1.1 * min(falls)


def gpu_share(r: Result) -> float | None:
    """Share of an eager decode step's time in which the GPU works; None where its kernels were not timed."""
    rate = decode_rate(r.runs)
    return r.kernel_s * rate if r.kernel_s and rate else None


def joules_per_token(runs: list[Run]) -> float | None:
    """Energy of all runs on all devices by their tokens; None under a second: the counter hardly moves."""
    if not runs or any(run.energy_j is None for run in runs) or sum(run.latency_s for run in runs) < 1:
        return None
    return sum(sum(run.energy_j.values()) for run in runs) / sum(run.generated_tokens for run in runs)


def saving(r: Result) -> float | None:
    """Share of the unquantized bytes that this precision saves."""
    return 1 - r.weight_bytes / r.unquantized_bytes if r.weight_bytes and r.unquantized_bytes else None


def peak_bytes(r: Result) -> tuple[int | None, str]:
    """Peak of the runs, and of what: tensors on all devices, or RSS where torch keeps no count (CPU)."""
    peak = r.memory.get("peak of runs", {})
    allocated = [n for name, n in peak.items() if name.endswith("allocated")]
    return (sum(allocated), "tensors") if allocated else (peak.get("rss"), "RSS")


def is_float32(r: Result) -> bool:
    """Whether the unquantized model has 32 bits a parameter."""
    return bool(r.parameters and r.unquantized_bytes > 3 * r.parameters)
