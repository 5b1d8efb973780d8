"""What the figures mean: warnings, what is expected of Quanto, the recommendation. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from _qwquanto.results import Result, Run
from _qwquanto.stats import (
    KL_KEPT,
    MIN_RATE_TOKENS,
    SAME_SPEED_RATIO,
    UNSTABLE,
    answer_quality,
    coefficient_of_variation,
    decode_rate,
    gpu_share,
    is_about_one,
    is_float32,
    is_warming_up,
    kl_interval,
    meets,
    pace,
    peak_bytes,
    rates_over_shared_prefix,
    saving,
    slows_with_context,
    speed_interval,
)
from _qwquanto.text import format_3g, gib, interval_text, kl_text, percent, plural

MIN_POSITIONS = 100  # of a KL: llama-perplexity prints no statistics on fewer
PLANNING = 1.2  # times the time of a token that a new context length must cost to be told
HOST_BOUND = 0.5  # share of an eager step under which the GPU mostly waits for the host


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
    found += instability("eager", r.runs, bool(s.compare), (gpu_share(r) or 1) < HOST_BOUND)
    if r.compiled:
        found += instability("compiled", r.compiled.runs, bool(s.compare))
        if r.compiled.recompilations:
            found.append(f"The timed runs include {plural(r.compiled.recompilations, 'recompilation')}.")
    return found + r.notes


def instability(kind: str, runs: list[Run], same_work: bool, host_bound: bool = False) -> list[str]:
    """What is unsteady about some runs, and whether that could be judged at all."""
    found, variation = [], coefficient_of_variation(runs)
    if same_work and any(run.stop_reason == "time" for run in runs):
        found.append(f"The {kind} runs were ended by MAX_SECONDS: less work than the others did.")
    if variation is None:
        unknown = (
            f"Fewer than two {kind} runs reached {MIN_RATE_TOKENS} tokens: how steady they are is unknown."
        )
        return found + [unknown] * (len(runs) > 1)
    (rates,) = rates_over_shared_prefix(runs)
    if is_warming_up(rates):
        found.append(f"The {kind} runs are still warming up, each faster than before: more WARMUP_RUNS.")
    elif variation > UNSTABLE:
        # without the figure, which stands in the table: precisions of the same words share a line
        why = "the host, which sets the pace, is not steady." if host_bound else "is the machine busy?"
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
    return found


@dataclass
class Expectation:
    """What introductions to Quanto tell users, what was measured here, and why it differs, if known."""

    expected: str
    of: str  # precision
    measured: str
    verdict: str  # met, not met, too close to call, unknown
    reason: str = ""


def expectations(results: list[Result]) -> list[Expectation]:
    """One per claim whose precisions were measured."""
    by_name = {r.name: r for r in results}
    base, int8, float8, int4 = map(by_name.get, ("none", "int8", "float8", "int4"))
    found = []
    if int8 and int8.weight_bytes and not is_float32(int8):
        found.append(expected_memory(int8, base))
        if base and base.devices == int8.devices and decode_rate(base.runs) and decode_rate(int8.runs):
            interval = speed_interval(int8, base)
            ratio = percent(decode_rate(int8.runs) / decode_rate(base.runs))
            measured = f"{ratio} %{interval_text(interval, percent)}, both eager"
            why = "Speed: eager Quanto calls Python for every layer"
            on_cuda = int8.devices[0].startswith("cuda")
            why += (
                ", and widens 8-bit weights on every call." if on_cuda else ", which small models feel most."
            )
            found.append(
                Expectation("at least 90 % of the 16-bit speed", "int8", measured, meets(interval, 0.9), why)
            )
    for r in results:
        if r.quality and r.settings.weights:
            low, high = kl_interval(r.quality)
            said = meets((-high, -low), -KL_KEPT)
            found.append(Expectation("answers very close", r.label, f"KL {kl_text(r.quality)}", said))
    if int8 and int8.torch_compile_graphs is not None:
        found.append(expected_torch_compile(int8))
    both = [r.quality for r in (float8, int8) if r and r.quality]
    if len(both) == 2 and both[0].reference == both[1].reference:
        (low, high), (least, most) = map(kl_interval, both)
        said = meets((least - high, most - low), 0)
        measured = f"KL {kl_text(both[0])} against {kl_text(both[1])}"
        found.append(Expectation("more exact than int8", "float8", measured, said))
    if int8 and int4 and int8.weight_bytes and int4.weight_bytes:
        measured = f"{gib(int4.weight_bytes)} GiB stored against {gib(int8.weight_bytes)}"
        said = "met" if int4.weight_bytes < int8.weight_bytes else "not met"
        found.append(Expectation("less memory still than int8", "int4", measured, said))
    return found


def expected_memory(int8: Result, base: Result | None) -> Expectation:
    """Judged by the stored weights, which are exact; memory in use stands beside them."""
    used, kind = peak_bytes(int8)
    before, base_kind = peak_bytes(base) if base else (None, "")
    measured = f"{percent(saving(int8))} % of the stored weights"
    if used:
        measured += f"; peak of {kind} {gib(used)} GiB"
        measured += f" against {gib(before)}" if before and kind == base_kind else ""
    bits = 8 * int8.unquantized_bytes / int8.parameters
    most = percent(int8.quantizable_bytes / int8.unquantized_bytes * (1 - 8 / bits))
    why = f"Memory: embeddings and output layer stay as stored, so 8 bits save at most {most} % here."
    said = "met" if saving(int8) >= 0.5 else "not met"
    return Expectation("50-60 % less memory than 16 bit", "int8", measured, said, why)


def expected_torch_compile(r: Result) -> Expectation:
    """Not timed: where torch captured no graph, what ran was the model as it is."""
    claim = "model = torch.compile(model): 20-30 % faster"
    graphs = r.torch_compile_graphs
    if graphs:
        return Expectation(claim, r.label, f"{plural(graphs, 'graph')} compiled, not timed", "unknown")
    why = "torch.compile: generate() runs the module inside the wrapper, so nothing is compiled"
    return Expectation(claim, r.label, "no effect: 0 graphs compiled", "not met", f"{why} (pytorch #161743).")


def reference_of(results: list[Result]) -> str:
    """The name of the precision that the others' answers are held against."""
    return next((r.label for r in results if r.is_reference), "the reference")


def recommendation(results: list[Result]) -> list[str]:
    """The answer to "which one?", by plain rules on the figures: a comparison's first lines.

    Only what was measured to its end is recommended.
    """
    done = [r for r in results if r.eager_complete and r.weight_bytes and decode_rate(r.runs)]
    kept = [r for r in done if answer_quality(r) == "kept"]
    if not done:
        return []
    lines = []
    if kept:
        lines.append(recommended(kept, next((r for r in done if r.name == "none"), None)))
    elif any(r.quality for r in done):
        lines.append(f"[bold]No precision is certain to keep {reference_of(results)}'s answers.[/]")
    elif len(done) == 1 and done[0].is_reference:
        only = f"[bold]Only {reference_of(results)} was measured to its end[/]"
        lines.append(f"{only}: there is nothing to compare its answers with.")
    else:
        lines.append("[bold]Quality was not measured[/], so none is recommended.")
    if len(done) > 1 and len({tuple(r.devices) for r in done}) == 1:
        fastest = max(done, key=lambda r: decode_rate(r.runs))
        line = f"Fastest: {fastest.label} ({format_3g(decode_rate(fastest.runs))} tokens/s)"
        intervals = {r.label: speed_interval(r, fastest) for r in done if r is not fastest}
        near = [name for name, interval in intervals.items() if is_about_one(interval)]
        unsure = [
            n for n, interval in intervals.items() if n not in near and (not interval or interval[1] >= 1)
        ]
        line += f", about as fast: {', '.join(near)}" if near else ""
        line += f", possibly as fast: {', '.join(unsure)}" if unsure else ""
        smallest = min(done, key=lambda r: r.weight_bytes)
        lines.append(f"{line}. Smallest: {smallest.label} ({gib(smallest.weight_bytes)} GiB).")
    for said in dict.fromkeys(answer_quality(r) for r in done):
        if said not in ("kept", "–"):
            lines[-1] += f" Answers {said}: {', '.join(r.label for r in done if answer_quality(r) == said)}."
    unsteady = [r.label for r in done if (coefficient_of_variation(r.runs) or 0) > UNSTABLE]
    if unsteady:
        lines.append(f"[bold yellow]Unsteady: the speed of {', '.join(unsteady)}, see below.[/]")
    if left_out := [r.label for r in results if not r.eager_complete]:
        lines.append(f"[bold yellow]Not measured to the end, so left out here: {', '.join(left_out)}.[/]")
    return lines


def recommended(kept: list[Result], base: Result | None) -> str:
    """The smallest, or of those of its size the fastest; a percent of memory is no difference."""
    least = min(r.weight_bytes for r in kept)
    best = max((r for r in kept if r.weight_bytes <= 1.01 * least), key=lambda r: decode_rate(r.runs))
    rate = decode_rate(best.runs)
    line = f"[bold green]Smallest that keeps the answers: {best.label}[/], {gib(best.weight_bytes)} GiB"
    line += f" of weights ({percent(saving(best))} % saved), decode {format_3g(rate)} tokens/s"
    if base and base is not best and base.devices == best.devices:
        line += f", {format_3g(rate / decode_rate(base.runs))} times {base.label}'s speed"
        if best.prefill_tokens_per_s and base.prefill_tokens_per_s:
            slower = base.prefill_tokens_per_s / best.prefill_tokens_per_s
            link = "but" if rate > decode_rate(base.runs) else "and"
            line += (
                f" ({link} prompts are read {format_3g(slower)} times slower)"
                if slower > SAME_SPEED_RATIO
                else ""
            )
    if best.compiled and decode_rate(best.compiled.runs):
        line += f"; in this script's compiled step: {format_3g(decode_rate(best.compiled.runs))} tokens/s"
    return line + "."
