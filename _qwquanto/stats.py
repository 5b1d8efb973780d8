"""Pure figures from Results: medians, spreads, intervals, limits. Imports results and settings."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable

from _qwquanto.results import Compiled, Quality, Result, Run

KL_KEPT, KL_BROKEN = 0.05, 0.5  # nats: up to the first answers are kept, above the second they are broken
MIN_RATE_TOKENS = 32  # of a run whose rate counts for a spread, and for a ratio
DISTURBED = 0.1  # share of a CPU that other programs use beside a run whose rate does not count
LONG_ANSWER_TOKENS = 200  # of a run that shows a pace
UNSTABLE = 0.05  # standard deviation over mean of the runs' decode rates that deserves a warning
SAME_SPEED_RATIO = 1.1  # times as fast, or as slow, that still counts as about the same speed
REPLAY_SHARE = 0.8  # of a compiled token's time that its CUDA graph takes; below, the GPU waits for the host
TOO_WIDE = 1.5  # upper over lower end of a ratio's interval that says nothing but "measure again"
# s.d. of the logarithm of a rate between processes that measure the same (tests/bench_reproducibility.py)
BETWEEN_PROCESSES = {
    ("eager", "cpu"): 0.025,  # SmolLM2-135M, int8, 2 cores of a virtual machine; of its quieter hours
    ("eager", "cuda"): 0.07,  # Qwen2.5-3B's shape, bf16, H200 of a virtual machine; of five processes
    ("compiled", "cuda"): 0.009,  # Qwen2.5-3B's shape, int8, H100
}
BETWEEN_UNMEASURED = 0.03  # assumed elsewhere


def student_t(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t: a table, then a series.

    Welch's degrees of freedom are no whole numbers: between two of them its logarithm is taken as straight in
    1 / freedom, which is up to 3 % too large below 2 and hardly anything above.
    """
    table = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom >= len(table):
        return 1.96 + 2.4 / freedom + 2.8 / freedom**2
    below = max(1, int(freedom))
    part = (1 / below - 1 / max(1, freedom)) * below * (below + 1)
    return table[below - 1] ** (1 - part) * table[below] ** part


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


def is_disturbed(run: Run) -> bool:
    """Whether other programs took too much of the CPU that decoded.

    All threads wait for the one that has lost its core: beside a program that took one of two cores, decode
    of SmolLM2 fell from 23 to 5 tokens/s, and beside a test suite to 1.3.
    """
    return (run.others_cpu or 0) > DISTURBED


def decode_rate(runs: list[Run]) -> float | None:
    """Median decode tokens/s of the runs that were let alone; of all, where none was."""
    return median(r.decode_tokens_per_s for r in [r for r in runs if not is_disturbed(r)] or runs)


def counts(run: Run) -> bool:
    """Whether a run is long enough, and was let alone, for its rate to count in a spread and in a ratio."""
    return len(run.inter_token_s) >= MIN_RATE_TOKENS - 1 and not is_disturbed(run)


def basis(*groups: list[Run]) -> int:
    """The decode intervals that all runs that count reached, for rates to rest on; 0 if none counts."""
    return min((len(run.inter_token_s) for group in groups for run in group if counts(run)), default=0)


def cut(runs: list[Run], gaps: int) -> list[Run]:
    """The runs as if they had ended after this many intervals, where any of them counts.

    Those that do not count then have no rate.
    """
    if not any(map(counts, runs)):
        return runs
    kept = [run.inter_token_s[:gaps] if counts(run) else [] for run in runs]
    return [
        dataclasses.replace(run, inter_token_s=k, decode_tokens_per_s=len(k) / sum(k) if k else None)
        for run, k in zip(runs, kept, strict=True)
    ]


def on_one_basis(results: list[Result]) -> list[Result]:
    """Copies whose decode rates are of the same tokens: those that all rows reached, eager and compiled.

    Decode slows as the context grows, so only this compares a row with another, and a median with its ±.
    """
    gaps = basis(*(group for r in results for group in (r.runs, r.compiled.runs if r.compiled else [])))
    return [
        dataclasses.replace(
            r,
            runs=cut(r.runs, gaps),
            compiled=r.compiled and dataclasses.replace(r.compiled, runs=cut(r.compiled.runs, gaps)),
        )
        for r in results
    ]


def rates_over_shared_prefix(*groups: list[Run]) -> list[list[float]]:
    """Each run's decode tokens/s over the positions that all runs of all groups reached, group by group.

    Runs of fewer than MIN_RATE_TOKENS tokens, or disturbed ones, do not count.
    """
    shared = basis(*groups)
    return [[shared / sum(r.inter_token_s[:shared]) for r in filter(counts, runs)] for runs in groups]


def coefficient_of_variation(runs: list[Run]) -> float | None:
    """Sample standard deviation of the runs' rates over their mean; None for fewer than two that count."""
    (rates,) = rates_over_shared_prefix(runs)
    return statistics.stdev(rates) / statistics.fmean(rates) if len(rates) > 1 else None


def log_mean(values: list[float]) -> tuple[float, tuple[float, float]]:
    """The mean of the logarithms; and its squared standard error with the degrees of freedom of that."""
    logs = [math.log(value) for value in values]
    return statistics.fmean(logs), (statistics.variance(logs) / len(logs), len(logs) - 1)


def welch(center: float, errors: list[tuple[float, float]]) -> tuple[float, float]:
    """The 95 % interval around a sum of means (Welch 1947), of (squared error, degrees of freedom) each."""
    error = sum(squared for squared, _ in errors)
    uncertain = sum(squared**2 / freedom for squared, freedom in errors)
    half = student_t(error**2 / uncertain if uncertain else math.inf) * math.sqrt(error)
    return center - half, center + half


def ratio_interval(
    runs: list[Run],
    base: list[Run],
    between: tuple[float, ...] = (),
    bandwidth_ratio: float = 1.0,
    host_s: tuple[list[float], list[float]] = ([], []),
) -> tuple[float, float] | None:
    """The 95 % interval of the ratio of two decode rates, on logarithms; None for too few runs.

    `between` is the s.d. of each one's logarithm between processes, which runs of one process cannot show:
    what is known of it, or that of the process's own runs if they differ more, since what disturbs a shared
    machine outlasts a run (SmolLM2 on two cores, five processes: 3.0 % within and 3.1 % between in one hour,
    5.4 % and 5.4 % in another).

    What the two processes' memory bandwidths and yardsticks differ by may be in the figures or not, so the
    interval holds both: the ratio as it is, and as it would be beside the same memory or the same host.
    """
    rates = rates_over_shared_prefix(runs, base)
    if min(map(len, rates)) < 2:
        return None
    (ours, our_error), (theirs, their_error) = map(log_mean, rates)
    errors = [our_error, their_error]
    for sd, (squared, freedom) in zip(between, tuple(errors), strict=False):
        of_a_run = squared * (freedom + 1)
        errors.append((sd**2, math.inf) if sd**2 > of_a_run else (of_a_run, freedom))
    low, high = welch(ours - theirs, errors)
    memory = math.log(bandwidth_ratio)
    ends = [low, high, low - memory, high - memory]
    if min(map(len, host_s)) > 1:
        (our_host, our_scatter), (their_host, their_scatter) = map(log_mean, host_s)
        # more seconds of the yardstick: a slower host, beside which the rate was lower than it could be
        ends += welch(ours + our_host - theirs - their_host, [*errors, our_scatter, their_scatter])
    return math.exp(min(ends)), math.exp(max(ends))


def bandwidth_ratio(r: Result, base: Result) -> float:
    """Ratio of the memory bandwidths that two processes measured, at the device where they differ most."""
    ours, theirs = r.memory_bytes_per_s, base.memory_bytes_per_s
    ratios = [ours[device] / theirs[device] for device in ours if device in theirs]
    return max(ratios, key=lambda x: abs(math.log(x)), default=1.0)


def waits_for_host(measured: Result | Compiled) -> bool:
    """Whether the host may have set the pace of runs: always, but for graphs that fill a token's time.

    A token also has sampling, 0.13 ms on an H200: graphs of a 3B model took 93 % of its time, those of a 135M
    model 82 %, and 45 % beside a host half as fast, whose yardstick the rate then followed.
    """
    step_s, rate = getattr(measured, "step_s", None), decode_rate(measured.runs)
    return step_s is None or rate is None or step_s * rate < REPLAY_SHARE


def memory_share(*utilizations: float | None) -> float:
    """The part of a step's time that its memory can take, for what a faster memory can change of it.

    MBU is a lower bound of it (no cache, and memory at its best): twice the larger one, at most all of it.
    """
    return 1.0 if None in utilizations else min(1.0, 2 * max(utilizations))


def speed_interval(
    r: Result, base: Result, compiled: bool = False, same_machine: bool = True
) -> tuple[float, float] | None:
    """The 95 % interval of r's decode rate over base's, both eager or both compiled; None where unknown.

    On one machine other devices are not compared, and what its memory and its host did meanwhile widens the
    interval; between two machines that is their difference. The host counts where it sets the pace.
    """
    measured = [r.compiled, base.compiled] if compiled else [r, base]
    if not all(measured) or (same_machine and r.devices != base.devices):
        return None
    kind = "compiled" if compiled else "eager"
    devices = [(one.devices or ["cpu"])[0].split(":")[0] for one in (r, base)]
    between = tuple(BETWEEN_PROCESSES.get((kind, device), BETWEEN_UNMEASURED) for device in devices)
    if not same_machine:
        return ratio_interval(*(one.runs for one in measured), between)
    waits = any(map(waits_for_host, measured))
    host_s = tuple(one.host_s for one in measured) if waits else ([], [])
    memory = bandwidth_ratio(r, base) ** memory_share(*(one.bandwidth_utilization for one in measured))
    return ratio_interval(*(one.runs for one in measured), between, memory, host_s)


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


def gpu_share(r: Result) -> float | None:
    """Share of an eager decode step's time in which the GPU works; None where its kernels were not timed."""
    rate = decode_rate(r.runs)
    return r.kernel_s * rate if r.kernel_s and rate else None


def joules(runs: list[Run]) -> float | None:
    """Energy of all runs on all devices; None under a second: the counter moves ten times a second."""
    if not runs or any(run.energy_j is None for run in runs) or sum(run.latency_s for run in runs) < 1:
        return None
    return sum(sum(run.energy_j.values()) for run in runs)


def joules_per_token(runs: list[Run]) -> float | None:
    """Energy of all runs by their tokens."""
    spent = joules(runs)
    return None if spent is None else spent / sum(run.generated_tokens for run in runs)


def mean_watts(runs: list[Run]) -> float | None:
    """Energy of all runs by the time they took."""
    spent = joules(runs)
    return None if spent is None else spent / sum(run.latency_s for run in runs)


def saving(r: Result) -> float | None:
    """Share of the unquantized bytes that this precision saves."""
    return 1 - r.weight_bytes / r.unquantized_bytes if r.weight_bytes and r.unquantized_bytes else None


def is_float32(r: Result) -> bool:
    """Whether the unquantized model has 32 bits a parameter."""
    return bool(r.parameters and r.unquantized_bytes > 3 * r.parameters)
