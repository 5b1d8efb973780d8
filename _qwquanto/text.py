"""Figures as the text that tables and sentences show. Pure; imports stats and results."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from _qwquanto.results import Quality, Result, Run
from _qwquanto.stats import coefficient_of_variation, decode_rate, deviation, median


def row_label(r: Result, compiled: bool = False) -> str:
    """A row's name, marked if what it shows failed or was not finished."""
    if r.complete or (r.eager_complete and not compiled):
        return r.label
    return f"{r.label} [red]✗[/]" if r.failure else f"{r.label} [yellow]…[/]"


def format_3g(value: float | None, scale: float = 1) -> str:
    """Three significant digits; a dash for the unknown."""
    if value is None:
        return "–"
    value /= scale
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".") if value else "0"


def plus_minus(value: float | None, spread: float | None, scale: float = 1) -> str:
    """A figure and its spread, "24.1 ±0.3", equally fine; a decimal more where the spread would be 0."""
    text = format_3g(value, scale)
    if value is None or spread is None:
        return text
    decimals = len(text.partition(".")[2])
    if 0 < spread / scale < 0.5 * 10**-decimals:
        decimals += 1
        text = f"{value / scale:.{decimals}f}"
    return f"{text} ±{spread / scale:.{decimals}f}"


def plural(number: int, noun: str) -> str:
    """ "1 run", "5 runs"."""
    return f"{number} {noun}" + "s" * (number != 1)


def gib(value: float | None) -> str:
    return format_3g(value, 2**30)


def mib(value: float | None) -> str:
    return format_3g(value, 2**20)


def percent(value: float | None) -> str:
    return format_3g(value, 0.01)


def duration(seconds: float) -> str:
    """ "45 s", "12 min"."""
    return f"{max(1, seconds):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def interval_text(interval: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    """The ends of a ratio's interval behind a figure; none where the runs differ too much to say anything."""
    if not interval or interval[1] > 10 * interval[0]:
        return ""
    return f" ({form(interval[0])} to {form(interval[1])})"


def kl_text(q: Quality | None) -> str:
    if q is None or q.kl_standard_error is None:
        return format_3g(q and q.kl_divergence)
    return f"{format_3g(q.kl_divergence)} ±{q.kl_standard_error:.2g}"


def rate_text(runs: list[Run]) -> str:
    """The median decode rate and its spread."""
    rate, variation = decode_rate(runs), coefficient_of_variation(runs)
    return plus_minus(rate, variation * rate if rate and variation is not None else None)


def spread_text(values: Iterable[float | None], scale: float = 1) -> str:
    """The median of what is known and its spread."""
    known = list(values)
    return plus_minus(median(known), deviation(known), scale)
