"""The chart's panels: bars on tracks, and dots between limits, row by row under a heading.

May import `sheet` alone: what is drawn comes as plain figures, texts and colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from _qwquanto.sheet import (
    GREY,
    INK,
    MARGIN,
    RULE,
    SMALL,
    WASH,
    WIDTH,
    Sheet,
    box,
    dot,
    line,
    put,
    width,
    wrap,
)

BAR, GAP, ROW_GAP = 21, 4, 14  # a bar; between the bars of a row; between rows
CAP = 9  # of a whisker, which looks like a minus without it
FAR = 3  # times a panel's largest figure: a longer track leaves the picture, as an arrow says
LEAST_KL = 1e-4  # nats: what is less stands at the left end of the axis


@dataclass
class Bar:
    """A figure in the panel's unit and as text, its standard deviation, and where its track ends."""

    value: float | None
    text: str
    colour: str
    spread: float = 0.0
    track: float | None = None
    kind: str = ""  # "eager" or "compiled", where a row has both


@dataclass
class Row:
    """A precision in a panel of bars."""

    label: str
    bars: list[Bar] = field(default_factory=list)
    column: str = "–"  # what stands at the right
    state: str = ""  # behind the figure of a row that failed or is not finished
    reason: str = "–"  # in place of a figure


@dataclass
class Answer:
    """A precision in the panel of answers: KL and the ends of its interval in nats, where it is known."""

    label: str
    verdict: str
    colour: str
    kl: float | None = None
    ends: tuple[float, float] = (0.0, 0.0)
    text: str = ""


def rule(sheet: Sheet, y: float) -> None:
    """A line between panels."""
    line(sheet, (MARGIN, WIDTH - MARGIN), (y, y), RULE, 0.8)


def mark(sheet: Sheet, x: float, y: float, height: float = BAR) -> None:
    """The end of a track."""
    line(sheet, (x, x), (y - height / 2, y + height / 2), INK, 1.8)


def whisker(sheet: Sheet, y: float, begin: float, end: float) -> None:
    """What a figure is uncertain by: a line between two caps, with an edge that shows on dark bars."""
    for colour, thick in (("white", 3.0), (INK, 1.3)):
        line(sheet, (begin, end), (y, y), colour, thick)
        for x in (begin, end):
            line(sheet, (x, x), (y - CAP / 2, y + CAP / 2), colour, thick)


def heading(sheet: Sheet, y: float, title: str, unit: str, column: str, marked: bool = True) -> float:
    """A panel's name and unit, and what its column holds: where the tracks end, if it has their mark."""
    rule(sheet, y)
    used = put(sheet, MARGIN, y + 24, title, weight="bold")
    put(sheet, MARGIN + used + 10, y + 24, unit, SMALL, color=GREY)
    used = put(sheet, WIDTH - MARGIN, y + 24, column, SMALL, color=GREY, ha="right")
    if marked:
        mark(sheet, WIDTH - MARGIN - used - 10, y + 24, SMALL)
    return y + 38


def group_name(sheet: Sheet, y: float, name: str) -> float:
    """A file's name above its rows, if it has one; where these begin."""
    if name:
        look = {"size": SMALL, "weight": "bold"}
        put(sheet, MARGIN, y + 24, wrap(sheet, name, WIDTH - 2 * MARGIN, 1, **look)[0], color=GREY, **look)
    return y + 30 * bool(name) + ROW_GAP


# ------------------------------------------------------------------------------------------------------- bars


def bar_panel(sheet: Sheet, y: float, groups: list[tuple[str, list[Row]]], far: float = FAR) -> float:
    """Rows of bars, file by file; where the next panel begins."""
    scale = scale_of(sheet, [row for _, rows in groups for row in rows], far)
    for name, rows in groups:
        y = group_name(sheet, y, name)
        for row in rows:
            y = draw_row(sheet, y, row, scale)
    return y + 6


def words_behind(row: Row, bar: Bar) -> str:
    """What is said behind a bar's figure."""
    return " ".join(filter(None, (bar.kind, row.state if bar is row.bars[-1] else "")))


def scale_of(sheet: Sheet, rows: list[Row], times: float) -> float:
    """Pixels a unit, so that bars, their figures and the tracks that end near by have room."""
    known = [(row, bar) for row in rows for bar in row.bars if bar.value]
    far = times * max((bar.value for _, bar in known), default=1)
    room, scales = sheet.right - sheet.left, []
    for row, bar in known:
        end = bar.value + bar.spread
        track = bar.track if bar.track and bar.track <= far else 0
        text = width(sheet, f"{bar.text} {words_behind(row, bar)}") + 20
        scales.append(room / max(end, track))
        scales.append((room - text) / (track if end <= track < 1.5 * end else end))
    return min(scales, default=1.0)


def draw_row(sheet: Sheet, y: float, row: Row, scale: float) -> float:
    """A row: its label; its bars, or the reason why there are none; its column."""
    bare, reason = not any(bar.value for bar in row.bars), []
    if bare:
        reason = wrap(sheet, row.reason, WIDTH - MARGIN - sheet.left, 2, size=SMALL)
    middle = y + (len(reason or row.bars) * (BAR + GAP) - GAP) / 2
    put(sheet, MARGIN, middle, row.label)
    y += BAR / 2
    for text in reason:
        put(sheet, sheet.left, y, text, SMALL, color=GREY)
        y += BAR + GAP
    for bar in row.bars if not bare else ():
        if bar.value:
            draw_bar(sheet, y, row, bar, scale)
        else:
            text = wrap(sheet, f"{bar.kind} {row.reason}", sheet.right - sheet.left, 1, size=SMALL)[0]
            put(sheet, sheet.left, y, text, SMALL, color=GREY)
        y += BAR + GAP
    if not bare:
        off = any(sheet.left + (bar.track or 0) * scale > sheet.right + 1 for bar in row.bars)
        put(sheet, WIDTH - MARGIN, middle, "→ " * off + row.column, color=GREY, ha="right")
    return y - BAR / 2 - GAP + ROW_GAP


def draw_bar(sheet: Sheet, y: float, row: Row, bar: Bar, scale: float) -> None:
    """A bar: its track, itself, its whisker, and its figure behind them."""
    left, end, half = sheet.left, sheet.left + bar.value * scale, bar.spread * scale
    reach, words = left + (bar.track or 0) * scale, words_behind(row, bar)
    box(sheet, left, y, min(reach, sheet.right) - left, BAR, WASH)
    box(sheet, left, y, end - left, BAR, bar.colour, alpha=0.5 if bar.kind == "eager" else 1)
    if half >= 3:
        whisker(sheet, y, max(left, end - half), end + half)
    at = end + half + (12 if half >= 3 else 8)
    if bar.track and reach <= sheet.right + 1:
        mark(sheet, reach, y)
        if at - 8 < reach < at + width(sheet, f"{bar.text} {words}") + 6:
            at = reach + 8
    used = put(sheet, at, y, bar.text)
    if words:
        put(sheet, at + used + 6, y, words, SMALL, color=GREY)


# ---------------------------------------------------------------------------------------------------- answers


def answers_panel(
    sheet: Sheet,
    y: float,
    groups: list[tuple[str, list[Answer]]],
    limits: tuple[float, float],
    zones: tuple[str, str, str],
) -> float:
    """KL on a logarithmic axis with two limits, and what answers are called beside them; where it ends."""
    shown = [kl for _, answers in groups for a in answers if a.kl is not None for kl in (a.kl, *a.ends)]
    high = math.ceil(math.log10(max(2.0, *shown)))
    low = math.floor(math.log10(max(LEAST_KL, min(0.005, *shown))))
    judged = [a for _, answers in groups for a in answers if a.kl is not None]

    def axis(low: int) -> Callable[[float], float]:
        decade = (sheet.right - sheet.left) / (high - low)
        return lambda kl: sheet.left + decade * (math.log10(max(kl, 10.0**low)) - low)

    def free_spots(low: int) -> int:
        place = axis(low)
        return sum(spot(sheet, a, place, [*map(place, limits)])[1] for a in judged)

    if 10.0**low > LEAST_KL:
        low = max((low, low - 1), key=free_spots)  # a decade more, if figures then stand off the limits
    place = axis(low)
    first, second = map(place, limits)
    for x, zone, side in (
        (first - 8, zones[0], "right"),
        ((first + second) / 2, zones[1], "center"),
        (second + 8, zones[2], "left"),
    ):
        put(sheet, x, y + 18, zone, SMALL, color=GREY, ha=side)
    y += 22
    for name, answers in groups:
        y = group_name(sheet, y, name)
        for x in (first, second):
            line(sheet, (x, x), (y - 8, y + len(answers) * (BAR + ROW_GAP) - 4), INK, 0.9)
        for answer in answers:
            draw_answer(sheet, y + BAR / 2, answer, place, (first, second))
            y += BAR + ROW_GAP
    for kl in limits:
        put(sheet, place(kl), y + 13, f"{kl:g}", SMALL, ha="center")
    for kl in (10.0**n for n in range(low, high + 1)):
        if min(abs(place(kl) - first), abs(place(kl) - second)) > 50:
            put(sheet, place(kl), y + 13, f"{kl:g}", SMALL, color=GREY, ha="center")
    return y + 32


def draw_answer(
    sheet: Sheet, y: float, answer: Answer, place: Callable[[float], float], limits: Sequence[float]
) -> None:
    """A row: KL as a dot with its interval, its figure beside it; the verdict."""
    known = answer.kl is not None
    put(sheet, MARGIN, y, answer.label)
    put(sheet, WIDTH - MARGIN, y, answer.verdict, ha="right", color=INK if known else GREY)
    line(sheet, (sheet.left, sheet.right), (y, y), WASH, 1.2)
    if not known:
        return
    x, begin, end = map(place, (answer.kl, *answer.ends))
    whisker(sheet, y, begin, end)
    dot(sheet, x, y, answer.colour)
    at, _ = spot(sheet, answer, place, limits)
    put(sheet, at, y, answer.text, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})


def spot(
    sheet: Sheet, answer: Answer, place: Callable[[float], float], limits: Sequence[float]
) -> tuple[float, bool]:
    """Where the figure of a KL stands, right of its dot or left, and whether it is off the limits there."""
    x, begin, end = map(place, (answer.kl, *answer.ends))
    used = width(sheet, answer.text)
    right, left = max(end + 12, x + 15), min(begin - 12, x - 15) - used

    def is_free(at: float) -> bool:
        struck = any(at - 6 < limit < at + used + 8 for limit in limits)
        return sheet.left <= at <= sheet.right - used - 8 and not struck

    free = [at for at in (right, left) if is_free(at)]
    return (free or [right])[0], bool(free)
