"""What the figures mean: warnings, and the headline of a comparison. Pure."""

from __future__ import annotations

import itertools
import statistics

from _qwquanto.advice import advice
from _qwquanto.results import Result, Run, reference_of
from _qwquanto.stats import (
    DISTURBED,
    KL_KEPT,
    MIN_RATE_TOKENS,
    TOO_WIDE,
    UNSTABLE,
    answer_quality,
    coefficient_of_variation,
    decode_rate,
    gpu_share,
    is_about_one,
    is_disturbed,
    is_float32,
    kl_interval,
    pace,
    rates_over_shared_prefix,
    speed_interval,
    waits_for_host,
)
from _qwquanto.text import format_3g, gib, kl_text, percent, plural

MIN_POSITIONS = 100  # of a KL: llama-perplexity prints no statistics on fewer
HOST_BOUND = 0.5  # share of an eager step under which the GPU mostly waits for the host
MPS_UNTRIED = "Never run by the authors on MPS: your --results file is welcome in an issue."
# of the GPU tests' last run (tests/test_gpu.py); the versions that requirements.txt pins ran on CPUs
GPU_TESTED = {"torch": "2.11.0+cu130", "transformers": "5.17.0"}


def grave_warnings(r: Result) -> list[str]:
    """Why a precision's answers, or its figures, are not to be used; printed in red."""
    s, q = r.settings, r.quality
    found = []
    if s.weights and r.quantized_layers == 0:
        found.append("NOTHING WAS QUANTIZED: Quanto knows none of the layers; all is as stored.")
    if s.quanto_kernels and "bias" in r.defects:
        found.append(f"RUNS AS SHIPPED: {r.defects['bias'].removeprefix('as shipped, ')}.")
    if answer_quality(r) == "broken":
        found.append(f"BREAKS THIS MODEL (KL {format_3g(q.kl_divergence)} nats): do not use it.")
    own = r.compiled and r.compiled.quality
    least = kl_interval(q)[1] if q else 0
    if own and kl_interval(own)[0] > max(KL_KEPT, least):
        found.append(f"THE COMPILED STEP ANSWERS OTHERWISE (KL {kl_text(own)}): do not use its speed.")
    return found


def warnings_for(r: Result) -> list[str]:
    """What else a reader must know before trusting a precision's numbers, the worst first."""
    s, q = r.settings, r.quality
    found = []
    if s.random_weights:
        found.append("Random weights: speed and memory hold, text and quality mean nothing.")
    if s.weights and is_float32(r):
        found.append(
            "32-bit weights: claims on memory and speed concern 16 bit, so none is judged (--dtype bfloat16)."
        )
    if s.weights and r.quantized_layers and r.quantizable_bytes < r.unquantized_bytes / 2:
        share = percent(r.quantizable_bytes / r.unquantized_bytes)
        found.append(f"Quanto reaches only {share} % of the weights; the others stay as stored.")
    if q and q.positions < MIN_POSITIONS:
        found.append(f"Quality rests on {plural(q.positions, 'token')}, fewer than {MIN_POSITIONS}.")
    if r.timed_runs and all((run.stop_reason, run.generated_tokens) == ("eos", 1) for run in r.timed_runs):
        found.append("Every answer ended at its first token: a chat model wants --chat.")
    if r.is_reference and r.greedy_answer == "":
        found.append("The greedy answer is empty" + ("." if s.chat else ": a chat model wants --chat."))
    paced_by_host = (gpu_share(r) or 1) < HOST_BOUND
    found += instability("eager", r.runs, bool(s.compare), r.host_s, paced_by_host)
    if r.compiled:
        waits = r.compiled.step_s is not None and waits_for_host(r.compiled)
        found += instability("compiled", r.compiled.runs, bool(s.compare), r.compiled.host_s, waits)
        if r.compiled.recompilations:
            found.append(f"The timed runs include {plural(r.compiled.recompilations, 'recompilation')}.")
    found += throttling("eager", r.throttled) + throttling("compiled", r.compiled and r.compiled.throttled)
    return found + r.notes


def throttling(kind: str, shares: dict[str, float] | None) -> list[str]:
    """Why the GPU ran slower than it could during some runs; a moment of it is nothing to tell."""
    found = {reason: share for reason, share in (shares or {}).items() if share > UNSTABLE}
    if not found:
        return []
    reasons = " and ".join(f"{reason} ({percent(share)} % of the time)" for reason, share in found.items())
    return [f"The GPU was slowed down during the {kind} runs by {reasons}: cool it, or raise its limit."]


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


def beside_one_host(rates: list[float], host_s: list[float]) -> list[float]:
    """The runs' rates times the yardstick's seconds around each: steady where the host alone was not.

    The rates themselves where the yardsticks are not one more than the rates: before, between and after them.
    """
    if len(host_s) != len(rates) + 1:
        return rates
    around = [statistics.fmean(pair) for pair in itertools.pairwise(host_s)]
    return [rate * seconds for rate, seconds in zip(rates, around, strict=True)]


def slows_with_context(runs: list[Run]) -> bool:
    """Whether decode slows by a tenth within each of two or more long answers, and in all of them alike.

    A busy machine slows each run elsewhere.
    """
    falls = [last / first for first, last in filter(None, (pace([run]) for run in runs))]
    return len(falls) > 1 and max(falls) < 0.9 and max(falls) < 1.1 * min(falls)


def instability(
    kind: str, runs: list[Run], same_work: bool, host_s: list[float] = (), paced_by_host: bool = False
) -> list[str]:
    """What is unsteady about some runs, and whether that could be judged at all.

    `host_s`: the yardstick before, between and after them, for what the host did meanwhile.
    """
    found, variation = [], coefficient_of_variation(runs)
    if same_work and any(run.stop_reason == "time" for run in runs):
        found.append(f"The {kind} runs were ended by MAX_SECONDS, short of COMPARE_TOKENS.")
    others = f"other programs used over {100 * DISTURBED:.0f} % of the processor"
    if runs and all(map(is_disturbed, runs)):
        found.append(f"Beside all {kind} runs {others}: the speeds are too low and not judged. Close them.")
    elif any(map(is_disturbed, runs)):
        found.append(f"Beside some {kind} runs {others}: those runs are left out.")
    if variation is None:
        few = f"Fewer than two {kind} runs of {MIN_RATE_TOKENS} tokens count"
        return found + [f"{few}: how steady they are is unknown."] * (len(runs) > 1)
    (rates,) = rates_over_shared_prefix(runs)
    even = beside_one_host(rates, host_s)
    if is_warming_up(rates) and is_warming_up(even):
        found.append(
            f"The {kind} runs rise, each faster than the one before: still warming up? Try more WARMUP_RUNS."
        )
    elif variation > UNSTABLE:
        # no figure in the text (the table has it): precisions with the same warning share a line
        explained = statistics.stdev(even) / statistics.fmean(even) < variation / 2
        of_host = paced_by_host or explained
        why = "the host, which sets the pace, is not steady." if of_host else "is the machine busy?"
        found.append(f"The {kind} runs' rates differ by over {100 * UNSTABLE:.0f} % (s.d.): {why}")
    # never of three runs, whose extremes are at most 2 s.d. apart
    if rates[0] - rates[-1] > max(2 * variation, UNSTABLE) * statistics.fmean(rates):
        found.append(f"The last {kind} run is clearly slower than the first: heat? another program?")
    if slows_with_context(runs):
        first, last = pace(runs)
        speeds = f"{format_3g(first)} tokens/s at the beginning, {format_3g(last)} at the end"
        found.append(f"The {kind} model slows with context, alike in all runs: {speeds}.")
    return found


def comparability_warnings(results: list[Result]) -> list[str]:
    """Where the precisions were not measured alike, so that their figures are hard to compare.

    A process may get faster memory than another: on a shared virtual machine 33 to 61 GB/s, steady in each.
    """
    found = []
    placed = {r.label: ", ".join(r.devices) for r in results if r.memory}
    if len(set(placed.values())) > 1:
        each = "; ".join(f"{name} on {devices}" for name, devices in placed.items())
        found.append(f"Measured on different devices ({each}): speeds are not compared.")
    for device in dict.fromkeys(device for r in results for device in r.memory_bytes_per_s):
        speeds = [r.memory_bytes_per_s[device] for r in results if device in r.memory_bytes_per_s]
        if max(speeds) > 1.1 * min(speeds):
            span = f"{format_3g(min(speeds), 1e9)} to {format_3g(max(speeds), 1e9)} GB/s"
            found.append(f"Memory of {device} delivered {span}: the intervals of speeds are widened by it.")
    for kind in ("eager", "compiled"):
        measured = {r.label: r if kind == "eager" else r.compiled for r in results}
        measured = {label: one for label, one in measured.items() if one and one.host_s}
        if not any(map(waits_for_host, measured.values())):
            continue
        seconds = {label: statistics.geometric_mean(one.host_s) for label, one in measured.items()}
        if max(seconds.values()) > 1.1 * min(seconds.values()):
            slow, fast = max(seconds, key=seconds.get), min(seconds, key=seconds.get)
            times = f"{format_3g(seconds[slow] / seconds[fast])} times as slow beside {slow} as beside {fast}"
            found.append(f"{kind.capitalize()} runs: the host was {times}: intervals are widened by it.")
    return found


def untested(r: Result) -> list[str]:
    """What of this machine the authors' tests have not run on."""
    if "mps" in r.devices:
        return [MPS_UNTRIED]
    seen = {name: r.environment.get(name) for name in GPU_TESTED}
    if not any(d.startswith("cuda") for d in r.devices) or None in seen.values() or seen == GPU_TESTED:
        return []
    last = ", ".join(f"{name} {version}" for name, version in GPU_TESTED.items())
    return [f"This script's GPU tests last ran with {last}; other versions have run on CPUs only."]


def recommendation(results: list[Result]) -> list[str]:
    """The answer to "which one?", by plain rules on the figures: a comparison's first lines.

    Only what was measured to its end is recommended.
    """
    done = [r for r in results if r.eager_complete and r.weight_bytes and decode_rate(r.runs)]
    if not done:
        return []
    lines = []
    if advised := advice(results, done):
        lines.append(advised)
    elif any(r.quality for r in done):
        lines.append(f"[bold]No precision is certain to keep {reference_of(results)}'s answers.[/]")
    elif len(done) == 1 and done[0].is_reference:
        only = f"[bold]Only {reference_of(results)} was measured to its end[/]"
        lines.append(f"{only}: there is nothing to compare its answers with.")
    elif done[0].settings.random_weights:
        lines.append("[bold]Random weights[/] have speed and memory; a recommendation needs real ones.")
    else:
        lines.append("[bold]Quality was not measured[/], so none is recommended.")
    if len(done) > 1 and len({tuple(r.devices) for r in done}) == 1:
        lines += [fastest(done, compiled) for compiled in (False, True)]
        smallest = min(done, key=lambda r: r.weight_bytes)
        lines.append(f"Smallest: {smallest.label} ({gib(smallest.weight_bytes)} GiB).")
    lines = [line for line in lines if line]
    worse: dict[str, list[str]] = {}
    for r in done:
        if (said := answer_quality(r)) not in ("kept", "–"):
            worse.setdefault(said, []).append(r.label)
    if worse:
        each = "; ".join(f"{', '.join(labels)} {said}" for said, labels in worse.items())
        lines[-1] += f" Answers against {reference_of(results)}'s: {each}."
    shaky = lambda runs: (coefficient_of_variation(runs) or 0) > UNSTABLE or all(map(is_disturbed, runs))
    unsteady = {
        "eager": [r.label for r in done if shaky(r.runs)],
        "compiled": [r.label for r in done if r.compiled and r.compiled.runs and shaky(r.compiled.runs)],
    }
    if any(unsteady.values()):
        each = "; ".join(f"{kind} {', '.join(labels)}" for kind, labels in unsteady.items() if labels)
        lines.append(f"[bold yellow]Unsteady speeds: {each}; see below.[/]")
    if left_out := [r.label for r in results if not r.eager_complete]:
        lines.append(f"[bold yellow]Not measured to the end, so left out here: {', '.join(left_out)}.[/]")
    return lines


def fastest(done: list[Result], compiled: bool) -> str:
    """All speeds, the best first, and the winner where its interval excludes the others."""
    measured = {r.label: r.compiled if compiled else r for r in done}
    rates = {label: decode_rate(one.runs) if one else None for label, one in measured.items()}
    ranked = sorted((r for r in done if rates[r.label]), key=lambda r: -rates[r.label])
    if len(ranked) < 2:
        return ""
    first, *others = ranked
    speeds = ", ".join(f"{r.label} {format_3g(rates[r.label])}" for r in ranked)
    line = f"{'Compiled' if compiled else 'Eager'} decode: {speeds} tokens/s"
    intervals = {r.label: speed_interval(r, first, compiled) for r in others}
    rivals = {name: interval for name, interval in intervals.items() if not interval or interval[1] >= 1}
    names = [first.label, *rivals]
    if not rivals:
        return f"{line}; {first.label} is the fastest."
    if None in rivals.values():
        return f"{line}; two undisturbed runs of {MIN_RATE_TOKENS} tokens each would tell the fastest."
    if all(map(is_about_one, rivals.values())):
        return f"{line}; {', '.join(names[:-1])} and {names[-1]} are about equal."
    low, high = max(rivals.values(), key=lambda interval: interval[1] / interval[0])
    if high > TOO_WIDE * low:
        return f"{line}; too noisy to name the fastest of {', '.join(names)}: measure again."
    return f"{line}; {', '.join(names[:-1])} or {names[-1]} is the fastest (borderline)."
