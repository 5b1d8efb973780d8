"""The chart: measured or saved Benchmarks as one picture in which the choice can be seen.

Three panels share their rows, one a precision: speed, memory, answers. A bar's colour says what became of the
answers; the grey behind it ends where the memory's bandwidth does, or at the peak of memory. May import
`panels`, `sheet` and the results, their statistics, verdicts and texts; neither rich nor matplotlib.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import qwquanto as q
from _qwquanto import sheet as paper
from _qwquanto.panels import Answer, Bar, Row, answers_panel, bar_panel, heading, rule
from _qwquanto.sheet import GREY, MARGIN, TEXT, TITLE, WIDTH, Sheet, box, paragraph, put, width

REFERENCE, NOT_JUDGED, UNFINISHED = "#4b545d", "#0072b2", "#b1bac4"
COLOURS = {"kept": "#009e73", "changed": "#e69f00", "broken": "#d55e00"}  # Okabe and Ito's: for every eye


def check_chart(path: str) -> str | None:
    """Why no chart can be made at this path, in one line; None if it can."""
    if not path.endswith((".svg", ".png")) or not q.is_writable(path):
        return f"CHART must be a file that can be written, and ends in .svg or .png, not {path!r}"
    if importlib.util.find_spec("matplotlib") is None:
        return "CHART is drawn by matplotlib, which this Python lacks: pip install matplotlib"
    return None


# ------------------------------------------------------------------------------------------------------- rows


def label(r: q.Result) -> str:
    """A row's name, marked if its measurement failed or did not end."""
    return r.label + ("" if r.complete else " ✗" if r.failure else " …")


def verdict(r: q.Result) -> str:
    return "reference" if r.is_reference and not r.quality else q.verdict(r)


def colour(r: q.Result, compiled: bool = False) -> str:
    """What became of the answers, eager or in the compiled step too; the worst that it may be."""
    said = q.verdict(r)
    if compiled and r.compiled:
        said += q.verdict(replace(r, quality=r.compiled.quality))
    named = [name for name in COLOURS if name in said]
    if r.is_reference and named in ([], ["kept"]):
        return REFERENCE
    return COLOURS[named[-1]] if named else NOT_JUDGED if r.complete else UNFINISHED


def speed_row(r: q.Result) -> Row:
    """Decode rates: eager and, where it was asked for, in the compiled step; and what the mark means."""
    row, step = Row(label(r)), r.compiled or q.Compiled("", 0, 0)
    measured = [("eager", r.runs, r.bandwidth_utilization)]
    measured.append(("compiled", step.runs, step.bandwidth_utilization))
    both = r.settings.compile or r.compiled is not None
    for kind, runs, used in measured if both else measured[:1]:
        rate, variation = q.decode_rate(runs), q.coefficient_of_variation(runs)
        bar = Bar(rate, q.format_3g(rate), colour(r, kind == "compiled"))
        bar.kind = kind if both else ""
        if rate and variation:
            bar.spread = rate * variation
        if rate and used:
            bar.track = rate / used
            row.column = q.format_3g(bar.track)
        row.bars.append(bar)
    if not r.complete:
        row.state = ("unavailable" if r.unavailable else "failed") if r.failure else "not finished"
        row.reason = row.state + (f": {r.failure}" if r.failure else "")
    return row


def memory_row(r: q.Result) -> Row:
    """The weights as stored, and the peak of the runs."""
    peak, size = q.peak_bytes(r)[0], r.weight_bytes
    bar = Bar(size and size / 2**30, q.gib(size), colour(r), track=peak and peak / 2**30)
    return Row(label(r), [bar], q.gib(peak))


def answer(r: q.Result) -> Answer:
    """KL with its interval, or alone where its error is unknown."""
    row, quality = Answer(label(r), verdict(r), colour(r)), r.quality
    if quality:
        row.kl, row.text = quality.kl_divergence, q.format_3g(quality.kl_divergence)
        row.ends = q.kl_interval(quality) if quality.kl_standard_error is not None else (row.kl, row.kl)
    return row


# ------------------------------------------------------------------------------------------------------ words


def model(r: q.Result) -> str:
    """The model's id, or the name of its folder."""
    path = Path(r.settings.model_name)
    return path.name if path.is_absolute() or len(path.parts) > 2 else r.settings.model_name


def subtitle(benchmarks: list[q.Benchmark]) -> str:
    """What was done, and on what."""
    places = {}
    for r in (b.described for b in benchmarks):
        devices = [r.environment.get(device, device) for device in r.devices if device != "cpu"]
        places[", ".join(devices) or r.environment.get("cpu", "an unknown machine")] = None
    return f"Quantized by Quanto, on {' and on '.join(places)}"


def notes(names: list[str], benchmarks: list[q.Benchmark]) -> Iterator[str]:
    """What must be known before the figures are believed."""
    for name, benchmark in zip(names, benchmarks, strict=True):
        whose = f"{name}: " if name else ""
        if benchmark.interrupted:
            yield f"! {whose}interrupted, this is what had been measured"
        if benchmark.described.settings.random_weights:
            yield f"! {whose}random weights: the answers mean nothing"


def command(s: q.Settings) -> str:
    """What was typed, as far as settings tell: the flags that differ from the script's constants."""
    parts = ["python qwquanto.py --model-name", shlex.quote(s.model_name)]
    parts += ["--compare", *s.compare] if s.compare else ["--weights", s.weights or "none"]
    for name, value in vars(s).items():
        flag, usual = name.replace("_", "-"), getattr(q, name.upper())
        if name in ("model_name", "compare", "weights", "results", "report", "chart") or value == usual:
            continue
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(parts)


def footer(name: str, benchmark: q.Benchmark) -> list[str]:
    """Date, machine, versions and command of a file."""
    r = benchmark.described
    machine = {key: text for key, text in r.environment.items() if key in ("cpu", "ram", *r.devices)}
    versions = [f"{key} {text}" for key, text in r.environment.items() if key not in machine]
    begin = f"{name}: {model(r)}, measured" if name else "Measured"
    begin += f" on {benchmark.date[:10]} by qwquanto {benchmark.version}"
    return [begin, "; ".join(machine.values()), ", ".join(versions), command(r.settings)]


# ------------------------------------------------------------------------------------------------ the picture


def legend(sheet: Sheet, y: float, results: list[q.Result]) -> float:
    """What the colours mean, as far as they appear."""
    if not any(r.quality for r in results):
        put(sheet, MARGIN, y, "The answers were not judged.", color=GREY)
        return y + 24
    meanings = {"reference": REFERENCE} | COLOURS | {"not judged": NOT_JUDGED}
    used = {colour(r, compiled) for r in results for compiled in (False, True)}
    x = MARGIN + put(sheet, MARGIN, y, "Answers:", color=GREY) + 14
    for name, paint in meanings.items():
        if paint in used:
            box(sheet, x, y, 16, 16, paint)
            x += 23 + put(sheet, x + 23, y, name) + 18
    return y + 24


def fill(sheet: Sheet, names: list[str], benchmarks: list[q.Benchmark]) -> float:
    """Draw everything, from the top down; how high it is."""
    names = names if len(benchmarks) > 1 else [""]
    results = [r for b in benchmarks for r in b.results]
    rows_of = lambda row: [(name, [*map(row, b.results)]) for name, b in zip(names, benchmarks, strict=True)]
    speed, memory = rows_of(speed_row), rows_of(memory_row)
    widest = lambda texts: max(width(sheet, text) for text in texts)
    sheet.left = MARGIN + widest(map(label, results)) + 16
    sheet.right -= widest(f"→ {row.column}" for _, rows in speed + memory for row in rows) + 16

    models = ", ".join(dict.fromkeys(map(model, results)))
    y = paragraph(sheet, MARGIN + 12, models, TITLE, 2, weight="bold")
    y = paragraph(sheet, y - 4, subtitle(benchmarks), TEXT, 2, color=GREY)
    for text in notes(names, benchmarks):
        y = paragraph(sheet, y, text, TEXT, 2, weight="bold")
    y = legend(sheet, y + 4, results)

    y = heading(sheet, y, "Speed", "decode, tokens/s: more is better", "bandwidth limit")
    y = bar_panel(sheet, y, speed)
    kinds = sorted({kind for size, kind in map(q.peak_bytes, results) if size})
    peak = f"peak of {' or '.join(kinds) or 'memory'}"
    y = heading(sheet, y, "Memory", "weights, GiB: less is better", peak)
    y = bar_panel(sheet, y, memory)
    said = "Whiskers: standard deviation of the runs"
    if any(r.quality for r in results):
        said += ", 95 % interval of KL"
        unit = "KL from the reference, nats: less is better"
        y = heading(sheet, y, "Answers", unit, "verdict", marked=False)
        sheet.right = WIDTH - MARGIN - widest(map(verdict, results)) - 16
        y = answers_panel(sheet, y, rows_of(answer), (q.KL_KEPT, q.KL_BROKEN), tuple(COLOURS))

    rule(sheet, y)
    y = paragraph(sheet, y + 22, f"{said}.", color=GREY)
    for name, benchmark in zip(names, benchmarks, strict=True):
        for text in footer(name, benchmark):
            y = paragraph(sheet, y, text, color=GREY)
        y += 6
    return y + 8


def draw(names: list[str], benchmarks: list[q.Benchmark]) -> Any:
    """The picture of one or several Benchmarks, as matplotlib's Figure."""
    return paper.make(lambda sheet: fill(sheet, names, benchmarks))


def save_chart(names: list[str], benchmarks: list[q.Benchmark], path: str) -> str | None:
    """Write the picture; a warning, if there is one. Raises OSError where it cannot be written."""
    return paper.save(lambda sheet: fill(sheet, names, benchmarks), path)
