"""The chart: measured or saved Benchmarks as one picture in which the choice can be seen.

Three panels share their rows, one a precision: speed, memory, answers. A bar's colour says what became of the
answers; the grey behind it ends where the memory's bandwidth does, or at the peak of memory. May import
`panels`, `sheet` and the results, their statistics, verdicts and texts; neither rich nor matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from _qwquanto import sheet as paper
from _qwquanto.fit import peak_bytes
from _qwquanto.panels import FAR, Answer, Bar, Row, answers_panel, bar_panel, heading, rule
from _qwquanto.results import Benchmark, Compiled, Result
from _qwquanto.sheet import GREY, MARGIN, TEXT, TITLE, WIDTH, Sheet, box, paragraph, put, width
from _qwquanto.stats import (
    KL_BROKEN,
    KL_KEPT,
    answer_quality,
    coefficient_of_variation,
    decode_rate,
    kl_interval,
    on_one_basis,
)
from _qwquanto.text import format_3g, gib

REFERENCE, NOT_JUDGED, UNFINISHED = "#4b545d", "#0072b2", "#b1bac4"
COLOURS = {"kept": "#009e73", "changed": "#e69f00", "broken": "#d55e00"}  # Okabe and Ito's: for every eye


# ------------------------------------------------------------------------------------------------------- rows


def label(r: Result) -> str:
    """A row's name, marked if its measurement failed or did not end."""
    return r.label + ("" if r.complete else " ✗" if r.failure else " …")


def verdict(r: Result) -> str:
    return "reference" if r.is_reference and not r.quality else answer_quality(r)


def colour(r: Result, compiled: bool = False) -> str:
    """What became of the answers, eager or in the compiled step too; the worst that it may be."""
    said = answer_quality(r)
    if compiled and r.compiled:
        said += answer_quality(replace(r, quality=r.compiled.quality))
    named = [name for name in COLOURS if name in said]
    if r.is_reference and named in ([], ["kept"]):
        return REFERENCE
    return COLOURS[named[-1]] if named else NOT_JUDGED if r.complete else UNFINISHED


def speed_row(r: Result, alike: Result | None = None) -> Row:
    """Decode rates: eager and, where it was asked for, in the compiled step; and what the mark means.

    `alike`: the same with rates of the tokens that all rows reached, see `on_one_basis`.
    """
    row, shown = Row(label(r)), alike or r
    none = Compiled("", 0, 0)
    measured = {"eager": (r, shown)}
    if r.settings.compile or r.compiled:
        measured["compiled"] = (r.compiled or none, shown.compiled or none)
    for kind, (whole, cut) in measured.items():
        rate, variation = decode_rate(cut.runs), coefficient_of_variation(cut.runs)
        bar = Bar(rate, format_3g(rate), colour(r, kind == "compiled"), kind=kind * (len(measured) > 1))
        if rate and variation:
            bar.spread = rate * variation
        if rate and whole.bandwidth_utilization:  # of whole runs
            bar.track = decode_rate(whole.runs) / whole.bandwidth_utilization
            row.column = format_3g(bar.track)
        row.bars.append(bar)
    if not r.complete:
        row.state = ("unavailable" if r.unavailable else "failed") if r.failure else "not finished"
        row.reason = row.state + (f": {r.failure}" if r.failure else "")
    return row


def memory_row(r: Result) -> Row:
    """The weights as stored, and the peak of the runs."""
    peak, size = peak_bytes(r)[0], r.weight_bytes
    bar = Bar(size and size / 2**30, gib(size), colour(r), track=peak and peak / 2**30)
    return Row(label(r), [bar], gib(peak))


def answer(r: Result) -> Answer:
    """KL with its interval, or alone where its error is unknown."""
    row, quality = Answer(label(r), verdict(r), colour(r)), r.quality
    if quality:
        row.kl, row.text = quality.kl_divergence, format_3g(quality.kl_divergence)
        row.ends = kl_interval(quality) if quality.kl_standard_error is not None else (row.kl, row.kl)
    return row


# ------------------------------------------------------------------------------------------------------ words


def model(r: Result) -> str:
    """The model's id, or the name of its folder."""
    path = Path(r.settings.model_name)
    return path.name if path.is_absolute() or len(path.parts) > 2 else r.settings.model_name


def subtitle(benchmarks: list[Benchmark]) -> str:
    """What was done, and on what."""
    places = {}
    for r in (b.described for b in benchmarks):
        devices = [r.environment.get(device, device) for device in r.devices if device != "cpu"]
        places[", ".join(devices) or r.environment.get("cpu", "an unknown machine")] = None
    return f"Quantized by Quanto, on {' and on '.join(places)}"


def notes(names: list[str], benchmarks: list[Benchmark]) -> Iterator[str]:
    """What must be known before the figures are believed."""
    for name, benchmark in zip(names, benchmarks, strict=True):
        whose = f"{name}: " if name else ""
        if benchmark.interrupted:
            yield f"! {whose}interrupted, this is what had been measured"
        if benchmark.described.settings.random_weights:
            yield f"! {whose}random weights: the answers mean nothing"


def remarks(sheet: Sheet, benchmarks: list[Benchmark]) -> list[str]:
    """What a look at the picture leaves open."""
    results = [r for b in benchmarks for r in b.results]
    found = []
    if any(text.get_text().startswith("→") for text in sheet.axes.texts):
        found.append("→: the limit or peak lies outside the picture")
    if any(r.compiled or r.settings.compile for r in results):
        found.append("Pale: eager. Compiled: this script's own step, not Quanto's")
    if any(r.devices == ["cpu"] for r in results):
        found.append("RSS: of the whole process, with libraries and freed memory")
    for benchmark in benchmarks:
        for device in benchmark.described.devices:
            known = [r.memory_bytes_per_s for r in benchmark.results if device in r.memory_bytes_per_s]
            low, high = (end((speeds[device] for speeds in known), default=0) for end in (min, max))
            if high > 1.1 * low:
                span = f"{format_3g(low, 1e9)} to {format_3g(high, 1e9)} GB/s"
                found.append(f"Memory delivered {span}, so equally large weights have different limits")
    return list(dict.fromkeys(found))


def footer(name: str, benchmark: Benchmark) -> list[str]:
    """Date, machine, versions and command of a file."""
    r = benchmark.described
    machine = {key: text for key, text in r.environment.items() if key in ("cpu", "ram", *r.devices)}
    versions = [f"{key} {text}" for key, text in r.environment.items() if key not in machine]
    begin = f"{name}: {model(r)}, measured" if name else "Measured"
    begin += f" on {benchmark.date[:10]} by qwquanto {benchmark.version}"
    return [begin, "; ".join(machine.values()), ", ".join(versions), benchmark.command]


# ------------------------------------------------------------------------------------------------ the picture


def any_judged(results: list[Result]) -> bool:
    return any(r.quality for r in results)


def legend(sheet: Sheet, y: float, results: list[Result]) -> float:
    """What the colours mean, as far as they appear."""
    if not any_judged(results):
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


def fill(sheet: Sheet, names: list[str], benchmarks: list[Benchmark]) -> float:
    """Draw everything, from the top down; how high it is."""
    names = names if len(benchmarks) > 1 else [""]
    results = [r for b in benchmarks for r in b.results]
    rows_of = lambda row: [(name, [*map(row, b.results)]) for name, b in zip(names, benchmarks, strict=True)]
    alike = iter(on_one_basis(results))
    speed, memory = rows_of(lambda r: speed_row(r, next(alike))), rows_of(memory_row)
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
    kinds = sorted({kind for size, kind in map(peak_bytes, results) if size})
    peak = f"peak of {' or '.join(kinds) or 'memory'}"
    y = heading(sheet, y, "Memory", "weights, GiB: less is better", peak)
    y = bar_panel(sheet, y, memory, far=2 * FAR)  # a small model's process is large beside its weights
    said = [
        "Whiskers, where wide enough: standard deviation of the runs"
        + ", 95 % interval of KL" * any_judged(results)
    ]
    if any_judged(results):
        unit = "KL from the reference, nats: less is better"
        y = heading(sheet, y, "Answers", unit, "verdict", marked=False)
        sheet.right = WIDTH - MARGIN - widest(map(verdict, results)) - 16
        y = answers_panel(sheet, y, rows_of(answer), (KL_KEPT, KL_BROKEN), tuple(COLOURS))

    rule(sheet, y)
    y = paragraph(sheet, y + 22, f"{'. '.join(said + remarks(sheet, benchmarks))}.", lines=5, color=GREY)
    for name, benchmark in zip(names, benchmarks, strict=True):
        for text in footer(name, benchmark):
            y = paragraph(sheet, y, text, lines=5, color=GREY)
        y += 6
    return y + 8


def draw(names: list[str], benchmarks: list[Benchmark]) -> Any:
    """The picture of one or several Benchmarks, as matplotlib's Figure."""
    return paper.make(lambda sheet: fill(sheet, names, benchmarks))


def save_chart(names: list[str], benchmarks: list[Benchmark], path: str | None) -> list[str]:
    """Write the picture, if a path is given; what could not be written. Warns of letters without a font."""
    if not path:
        return []
    try:
        warning = paper.save(lambda sheet: fill(sheet, names, benchmarks), path)
    except (OSError, ImportError) as error:  # matplotlib is there, but what it needs may not be
        return [f"cannot write {path}: {getattr(error, 'strerror', None) or error}"]
    if warning:
        print(f"qwquanto: {warning}", file=sys.stderr)
    return []
