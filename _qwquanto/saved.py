"""`--show`: saved results printed again, and several files beside each other."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from _qwquanto.channel import Failure
from _qwquanto.chart import save_chart
from _qwquanto.console import escape, render, save_report, table
from _qwquanto.fit import peak_bytes
from _qwquanto.report import alerts, hardware, report, row_label
from _qwquanto.results import Benchmark, Result, from_json
from _qwquanto.stats import (
    TOO_WIDE,
    basis,
    is_about_one,
    kl_difference,
    kl_interval,
    on_one_basis,
    speed_interval,
)
from _qwquanto.text import format_3g, gib, kl_text, plural, rate_text


def file_facts(benchmark: Benchmark) -> dict[str, Any]:
    """What a file's figures depend on: date, script, devices, versions and settings."""
    first = benchmark.described
    known = {"date": benchmark.date, "qwquanto": benchmark.version, "devices": ", ".join(first.devices)}
    settings = {key.upper(): value for key, value in dataclasses.asdict(first.settings).items()}
    for own in ("WEIGHTS", "RESULTS", "REPORT", "CHART"):
        del settings[own]
    return known | first.environment | settings


def speed_change(interval: tuple[float, float] | None) -> str:
    """A ratio of speeds in words: the same, its interval where that excludes 1, or that it is open."""
    if not interval:
        return "–"
    low, high = interval
    span = f"{format_3g(low)} to {format_3g(high)} x"
    if is_about_one(interval):
        return "about the same"
    if low > 1 or high < 1:
        return span
    return f"too noisy ({span}): measure again" if high > TOO_WIDE * low else f"borderline ({span})"


def compare_with(r: Result, base: Result) -> list[str]:
    """How a saved result stands to another one: speed, the compiled step's speed, peak of memory and KL."""
    same_machine = hardware(r)[:1] == hardware(base)[:1]
    cells = [speed_change(speed_interval(r, base, compiled, same_machine)) for compiled in (False, True)]
    cells += ["–", "–"]
    peak, kind = peak_bytes(r)
    before, base_kind = peak_bytes(base)
    if peak and before and kind == base_kind:
        cells[2] = f"{format_3g(peak / before)} x"
    if r.quality and base.quality:
        cells[3] = kl_change(r, base)
    return cells


def kl_change(r: Result, base: Result) -> str:
    """Whether KL is less or more than another result's: in pairs of prompts where the text is the same."""
    q, other = r.quality, base.quality
    if difference := kl_difference(q, other):
        low, high = difference
        return "less" if high < 0 else "more" if low > 0 else "about the same"
    prompts = [(s.question, s.chat, s.quality_text) for s in (r.settings, base.settings)]
    if prompts[0] != prompts[1] or q.reference != other.reference or q.text_id == other.text_id:
        return "–"  # scales of different texts do not compare
    low, high = kl_interval(q)
    least, most = kl_interval(other)
    return "less" if high < least else "more" if low > most else "about the same"


def names_of(files: list[str]) -> list[str]:
    """What files are called: shortly, if that tells them apart."""
    names = [Path(file).stem for file in files]
    return names if len(set(names)) == len(names) else files


def files_report(files: list[str], benchmarks: list[Benchmark]) -> list[Any]:
    """What differs between saved files, and a table of their results."""
    names = [escape(name) for name in names_of(files)]
    facts = [file_facts(b) for b in benchmarks]
    lines = []
    rows = []
    for key in dict.fromkeys(key for known in facts for key in known):
        values = [escape(str(known.get(key, "–"))) for known in facts]
        if len(set(values)) > 1:
            lines.append(f"{key}: {'; '.join(map(' '.join, zip(names, values, strict=True)))}")
    everything = on_one_basis([r for b in benchmarks for r in b.results])
    rest = iter(everything)
    files_results = [[next(rest) for _ in b.results] for b in benchmarks]
    first = {r.name: r for r in files_results[0]}
    other = files_results[0][0]
    changes: list[list[str]] = []
    for name, results in zip(names, files_results, strict=True):
        for r in results:
            rates = [rate_text(r.runs), rate_text(r.compiled.runs if r.compiled else [])]
            sizes = [gib(r.weight_bytes), gib(peak_bytes(r)[0])]
            base = first.get(r.name, other)
            rows.append([f"{name} {row_label(r)}", *rates, *sizes, kl_text(r.quality)])
            changes += [[f"{name} {r.label}", *compare_with(r, base)]] if r is not base else []
    columns = ("result", "decode tok/s", "compiled", "weights", "peak", "KL nats")
    groups = [one.runs for r in everything for one in (r, r.compiled) if one]
    over = f" over the first {basis(*groups) + 1} tokens" * bool(basis(*groups))
    parts = table(f"Decode eager and compiled{over}, memory in GiB, answers", columns, rows)
    if changes:
        new = any(r.name not in first for b in benchmarks for r in b.results)
        title = f"Against the same WEIGHTS in {names[0]}" + f", or its {other.label}" * new
        title += "; speeds as 95 % intervals"
        parts += table(title, ("result", "eager speed", "compiled speed", "peak", "KL"), changes, left=5)
    for name, file, benchmark in zip(names, files, benchmarks, strict=True):
        if said := alerts(benchmark):
            told = f"{plural(len(said), 'warning')} with these figures: --show {escape(file)}"
            lines.append(f"[bold yellow]! {name}: {told}[/]")
    return ["[bold]# Saved results, and what differs between them[/]", "", *lines, "", *parts]


def show(files: list[str], picture: str | None = None, chart: str | None = None) -> int:
    """Report saved results: one file as it was printed, several as one table; also as pictures."""
    benchmarks = []
    for file in files:
        try:
            benchmarks.append(from_json(Path(file).read_text(encoding="utf-8")))
            if not benchmarks[-1].results:
                raise Failure("holds no results")
        except (OSError, UnicodeDecodeError, Failure) as error:
            print(f"qwquanto: {file}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            return 2
    parts = report(benchmarks[0]) if len(files) == 1 else files_report(files, benchmarks)
    render(parts, sys.stdout)
    problems = save_report(parts, picture, " ".join(["python qwquanto.py --show", *files]))
    problems += save_chart(names_of(files), benchmarks, chart)
    for problem in problems:
        print(f"qwquanto: {problem}", file=sys.stderr)
    return len(problems)
