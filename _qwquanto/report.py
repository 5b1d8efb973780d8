"""A Benchmark becomes the report's lines and tables. Pure but for `print_report`."""

from __future__ import annotations

import errno
import sys
from typing import Any

from _qwquanto.advice import question_s
from _qwquanto.answers import answers, comparison_quality
from _qwquanto.chart import save_chart
from _qwquanto.claims import expectations
from _qwquanto.console import bars, discard, escape, render, save_report, table
from _qwquanto.memory import comparison_memory, memory_table
from _qwquanto.results import Benchmark, Result, Run, to_json
from _qwquanto.settings import SHORT_DTYPES, Settings
from _qwquanto.stats import (
    basis,
    counts,
    decode_rate,
    deviation,
    gpu_share,
    is_disturbed,
    joules_per_token,
    mean_watts,
    median,
    on_one_basis,
    pace,
    percentile,
    saving,
)
from _qwquanto.text import format_3g, percent, plural, plus_minus, rate_text, row_label, spread_text
from _qwquanto.verdicts import (
    HOST_BOUND,
    comparability_warnings,
    grave_warnings,
    recommendation,
    untested,
    warnings_for,
)

# first / repeated time of a token with cuDNN's attention above which its planning is told
CUDNN_PLANNING_RATIO = 1.2


def report(benchmark: Benchmark) -> list[Any]:
    """The whole report of what was measured, a single precision or a comparison."""
    results = on_one_basis(benchmark.results)
    first = benchmark.described
    compared = bool(first.settings.compare)
    compiled = any(r.compiled for r in results)
    headline = recommendation(results) if compared else single_headline(results[0])
    parts = [heading(first), *headline, ""]
    for block in (hardware(first) + untested(first), alerts(benchmark)):
        parts += [*block, ""] if block else []
    parts += speed_table(results) + host_bound(results)
    parts += speed_table(results, compiled=True) if compiled else []
    parts += energy_lines(results)
    if compared:
        parts += comparison_memory(results) + comparison_quality(results)
    else:
        parts += runs_table(first) + memory_table(first)
    return parts + expected_table(results) + kernel_lines(results) + answers(results)


def heading(r: Result) -> str:
    s = r.settings
    size = f", {format_3g(r.parameters, 1e9)} B parameters" if r.parameters else ""
    form = ("comparison" if s.compare else r.label) + (", eager and compiled" if s.compile else "")
    place = f", on {', '.join(r.devices)}" if r.devices else ""
    return f"[bold]# {escape(s.model_name)}: {form}[/]{size}{place}, batch 1"


def single_headline(r: Result) -> list[str]:
    """The most important figures in one plain sentence."""
    if not r.timed_runs or r.weight_bytes is None:
        return []
    rate, ttft = decode_rate(r.timed_runs), median(run.ttft_s for run in r.timed_runs)
    how = " in this script's compiled step" if r.timed_runs is not r.runs else ""
    parts = [f"{format_3g(rate)} tokens/s{how}" if rate else "no speed (answers of one token)"]
    shown = f"{format_3g(ttft, 0.001)} ms" if ttft < 1 else f"{format_3g(ttft)} s"
    read = " (the prompt is read eagerly)" * bool(how)
    parts += [f"first token after {shown}{read}", f"weights {format_3g(r.weight_bytes, 1e6)} MB"]
    if r.settings.weights:
        parts.append(f"{percent(saving(r))} % less than {SHORT_DTYPES.get(r.dtype, 'unquantized')}")
    return [f"[bold green]{r.label}:[/] {', '.join(parts)}."]


def hardware(r: Result) -> list[str]:
    """Hardware and versions."""
    machine = {key for key in r.environment if key in ("cpu", "ram") or key in r.devices}
    versions = [f"{key} {text}" for key, text in r.environment.items() if key not in machine]
    parts = "; ".join(text for key, text in r.environment.items() if key in machine)
    return [escape(line) for line in (parts, ", ".join(versions)) if line]


def alerts(benchmark: Benchmark) -> list[str]:
    """What failed, and what a reader must know; a warning names its precisions unless it is everyone's."""
    results = benchmark.results
    lines = []
    grave, said = {}, {}
    compared = bool(results[0].settings.compare)
    if benchmark.interrupted:
        lines.append("[bold yellow]! Interrupted: this is what had been measured.[/]")
    for r in results:
        if r.failure:
            what = "--compile " * bool(
                r.settings.compile and r.eager_complete
            )  # eager was measured to its end, so --compile failed
            what += ("unavailable" if r.unavailable else "FAILED") + f": {escape(r.failure)}"
            lines.append(f"[bold red]{f'{r.label} ' * compared}{what}[/]")
        for text in grave_warnings(r):
            grave.setdefault(text, []).append(r.label)
        for text in warnings_for(r):
            said.setdefault(text, []).append(r.label)
    for style, told in (("red", grave), ("yellow", said)):
        for text, labels in told.items():
            whose = f"{', '.join(labels)}: " if len(labels) < len(results) else ""
            lines.append(f"[bold {style}]! {whose}{escape(text)}[/]")
    if compared:
        lines += [f"[bold yellow]! {escape(text)}[/]" for text in comparability_warnings(results)]
    return lines


def speed_table(results: list[Result], compiled: bool = False) -> list[Any]:
    """Speeds, eager or in the compiled step."""
    groups = [(r.compiled.runs if r.compiled else []) if compiled else r.runs for r in results]
    if not any(groups):
        return []
    rates = [decode_rate(runs) for runs in groups]
    rows = []
    drawn = bars(rates, [rate_text(runs) for runs in groups], max(filter(None, rates), default=None))
    known = ((r, runs, rate) for r, runs, rate in zip(results, groups, rates, strict=True) if rate)
    base, base_runs, base_rate = next((x for x in known if x[0].name == "none"), (None, [], None))
    for r, runs, rate, cell in zip(results, groups, rates, drawn, strict=True):
        row = [row_label(r, compiled), cell]
        measured = r.compiled if compiled else r
        long = any(map(counts, runs))  # enough for a ratio
        if base:
            alike = long and any(map(counts, base_runs)) and r.devices == base.devices
            row.append(format_3g(rate / base_rate) if alike else "–")
        if compiled:
            row.append(format_3g(rate / decode_rate(r.runs)) if long and any(map(counts, r.runs)) else "–")
            row.append(format_3g(measured and measured.seconds))
        else:
            row.append(plus_minus(r.prefill_tokens_per_s, deviation(r.prefill_rates)))
            row.append(format_3g(question_s(r)))
        rows.append([*row, percent(measured and measured.bandwidth_utilization)])
    columns = ["weights", "decode tok/s", *["speed-up"] * bool(base)]
    columns += ["x eager", "compile s"] if compiled else ["prefill tok/s", "512+128 s"]
    parts = table(speed_title(results, groups, compiled), [*columns, "MBU %"], rows)
    if not compiled:
        note = "512+128 s: for 512 prompt tokens and 128 new ones, computed"
        note += ", with slower decoding after them" * any(r.decode_after_prefill_ratio for r in results)
        note += ". MBU: the weights' share of the memory's bandwidth."
        return [*parts, note, ""]
    single = any(len(r.runs) == 1 for r in results)
    return [*parts, "x eager rests on a single eager run.", ""] if single else parts


def speed_title(results: list[Result], groups: list[list[Run]], compiled: bool) -> str:
    """What the speeds are of; counts are of the runs that were made and count, not of those asked for."""
    timed = [sum(run.decode_tokens_per_s is not None for run in runs) or len(runs) for runs in groups if runs]
    numbers = sorted(set(timed) or {0})
    made = f"{numbers[0]} to {numbers[-1]} runs" if len(numbers) > 1 else plural(numbers[0], "run")
    shared = basis(*groups) + 1
    tokens = max((run.generated_tokens for runs in groups for run in runs), default=0)
    over = f", first {shared} tokens" if shared > 1 else f" of up to {plural(tokens, 'token')}"
    title = next((r.compiled.way for r in results if r.compiled), "") if compiled else "Speed, eager"
    made = "one run" if numbers == [1] else f"median ± s.d. of {made}"
    return f"{title[:1].upper()}{title[1:]}: {made}{over}"


def energy_lines(results: list[Result]) -> list[str]:
    """Joules a token of warm-up and timed runs, and their mean watts, eager and compiled."""
    lines = []
    for kind in ("eager", "compiled"):
        known = []
        for r in results:
            measured = r if kind == "eager" else r.compiled
            runs = [*measured.warmup, *measured.runs] if measured and measured.runs else []
            if (spent := joules_per_token(runs)) is not None:
                known.append(f"{r.label} {format_3g(spent)} J ({mean_watts(runs):.0f} W)")
        lines += [f"Energy a token, {kind}: {', '.join(known)}."] if known else []
    return [*lines, ""] if lines else []


def host_bound(results: list[Result]) -> list[str]:
    """How much of an eager decode step the GPU works: where that is little, the host's speed is measured."""
    shares = {r.label: gpu_share(r) for r in results}
    known = ", ".join(f"{label} {percent(share)} %" for label, share in shares.items() if share)
    if not known:
        return []
    line = f"GPU at work during an eager step: {known}"
    if min(filter(None, shares.values())) < HOST_BOUND:
        line += "; for the rest it waits for Python on the host, whose speed this is."
    return [line.rstrip(".") + ".", ""]


def runs_table(r: Result) -> list[Any]:
    """A line a run, eager ones before compiled ones, and what describes all timed ones of the last kind."""
    runs = r.timed_runs
    if not runs:
        return []
    columns, rows = ("run", "ended by", "tokens", "TTFT ms", "decode tok/s", "latency s", "J"), []
    kinds = ("eager ", "compiled ") if runs is not r.runs else ("",)
    numbered = []
    for kind, measured in zip(kinds, (r, r.compiled), strict=False):
        warm = f"last of {len(measured.warmup)}"
        numbered += [(f"{kind}warm", warm, run) for run in measured.warmup[-1:]]
        numbered += [(f"{kind}{i + 1}", run.stop_reason, run) for i, run in enumerate(measured.runs)]
    for name, ended, run in numbered:
        joules = sum(run.energy_j.values()) if run.energy_j and run.latency_s >= 1 else None
        rest = format_3g(run.decode_tokens_per_s), format_3g(run.latency_s), format_3g(joules)
        ended += ", disturbed" * is_disturbed(run)
        rows.append([name, ended, str(run.generated_tokens), format_3g(run.ttft_s, 0.001), *rest])
    used = ", ".join(f"{key} {value}" for key, value in r.generation.items() if value is not None)
    title = f"Runs: {runs[0].prompt_tokens} prompt tokens ({used})"
    latency = f"latency {spread_text(run.latency_s for run in runs)} s"
    if all(run.stop_reason == "time" for run in runs):
        latency = "runs all ended by MAX_SECONDS"
    facts = [f"{kinds[-1]}{latency}"]
    facts[0] = facts[0][0].upper() + facts[0][1:]
    facts += [f"{spread_text(run.tokens_per_s for run in runs)} tokens/s of the whole call"]
    if gaps := [gap for run in runs for gap in run.inter_token_s]:
        shown = ", ".join(format_3g(percentile(gaps, p), 0.001) for p in (50, 90, 99))
        facts.append(f"inter-token {shown} ms (p50, p90, p99)")
    if rates := pace(runs):
        facts.append(f"pace {' → '.join(map(format_3g, rates))} tokens/s from the first to the last tenth")
    if r.memory_bytes_per_s:
        delivers = format_3g(min(r.memory_bytes_per_s.values()), 1e9)
        facts.append(f"this device's memory delivers {delivers} GB/s")
    return [*table(title, columns, rows, left=2), "; ".join(facts) + ".", ""]


def expected_table(results: list[Result]) -> list[Any]:
    """What users are told to expect of Quanto, and by whom, against what was measured here."""
    marks = {"met": "[green]✓ met[/]", "not met": "[red]✗ not met[/]", "no claim": "[dim]– no claim[/]"}
    rows, reasons = [], []
    for e in expectations(results):
        rows.append([e.by, e.expected, e.of, e.measured, marks.get(e.verdict, f"[yellow]? {e.verdict}[/]")])
        reasons += [e.reason] if e.reason and e.verdict == "not met" else []
    if not rows:
        return []
    title = "Expected of Quanto by introductions (intros) and its own README (Quanto)"
    columns = ("by", "expected", "of", "measured", "verdict")
    return table(title, columns, rows, left=5) + reasons + [""] * bool(reasons)


def kernel_lines(results: list[Result]) -> list[Any]:
    """Which matrix products one eager decode step really called, and what Quanto as shipped would do here."""
    lines = []
    for r in results:
        if r.kernels:
            calls = ", ".join(f"{count} {name}" for name, count in r.kernels.items())
            lines.append(escape(f"{r.label}: {calls}"))
        patched = "" if r.settings.quanto_kernels else " (patched here)"
        lines += [escape(f"{r.label}: {text}{patched}") for text in r.defects.values()]
    lines += cudnn_lines(results)
    return ["[bold]### Kernels of one eager decode step[/]", "", *lines, ""] if lines else []


def cudnn_lines(results: list[Result]) -> list[str]:
    """What torch's choice of cuDNN's attention costs a program that leaves it on, where that was seen."""
    seen = [(r.label, r.cudnn_attention_s) for r in results if r.cudnn_attention_s]
    costs = [
        f"{label} {format_3g(cost['first'], 0.001)}, repeated {format_3g(cost['again'], 0.001)}"
        for label, cost in seen
        if cost["first"] > CUDNN_PLANNING_RATIO * cost["again"]
    ]
    if not costs:
        return []
    line = "As shipped, torch plans cuDNN's attention anew at every context length that a process has not had"
    line += f" before; ms a token, at a new length and at the same repeated: {'; '.join(costs)}."
    line += " It is switched off here."
    return [line, "Your own program wants torch.backends.cuda.enable_cudnn_sdp(False)."]


def print_report(s: Settings, benchmark: Benchmark) -> list[str]:
    """Save the report's picture, print it and draw the chart; what could not be written."""
    out = sys.stderr if s.results == "-" else sys.stdout
    problems, parts = [], []
    if any(r.memory for r in benchmark.results):
        parts = report(benchmark)
        problems += save_report(parts, s.report, f"python qwquanto.py, {s.model_name}")
    else:
        problems += dict.fromkeys(r.failure for r in benchmark.results if r.failure)
    try:
        if parts:
            render(parts, out)
        if s.results == "-":
            print(to_json(benchmark))
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if error.errno not in (errno.EPIPE, errno.EIO):  # `| head` has seen enough; a terminal that is closed
            problems.append(f"cannot write to standard output: {error.strerror or error}")
    return problems + (save_chart([""], [benchmark], s.chart) if parts else [])
