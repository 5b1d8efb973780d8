"""A sheet to draw on: the only room that knows matplotlib, which is optional, so imported when needed.

Imports nothing of the package. All lengths are pixels of a picture 800 wide, y downwards; text is large,
since a phone shows it at half that size.
"""

from __future__ import annotations

import bisect
import logging
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WIDTH, MARGIN = 800, 28
TITLE, TEXT, SMALL = 28, 20, 18  # sizes of text
DPI = 96  # of these pixels; a PNG has twice as many, for sharp screens
INK, GREY, RULE, WASH = "#1f2328", "#59636e", "#c5ccd3", "#e6eaee"


@dataclass
class Sheet:
    """Matplotlib's axes, in pixels; and where the rows' bars begin and must end."""

    axes: Any
    left: float = MARGIN
    right: float = WIDTH - MARGIN


def put(sheet: Sheet, x: float, y: float, text: str, size: float = TEXT, **look: Any) -> float:
    """Write one line of text at x, its middle at y; how wide it is."""
    look = {"color": INK, "parse_math": False, "fontsize": size * 72 / DPI, "va": "baseline"} | look
    sheet.axes.text(x, y + 0.36 * size, text, **look)
    return width(sheet, text, size, look.get("weight", "normal"))


def width(sheet: Sheet, text: str, size: float = TEXT, weight: str = "normal") -> float:
    """How wide a line of text is. Chinese counts as squares: a reader's font of it is unknown."""
    narrow = "".join(c for c in text if unicodedata.east_asian_width(c) not in "WF")
    tried = sheet.axes.text(0, 0, narrow, fontsize=size * 72 / DPI, weight=weight, parse_math=False)
    measured = tried.get_window_extent().width if narrow else 0.0
    tried.remove()
    return measured + size * (len(text) - len(narrow))


def fitting(sheet: Sheet, text: str, room: float, **look: Any) -> int:
    """How many of the text's characters there is room for: at least one, at most 200."""
    lengths = range(1, min(len(text), 200) + 1)
    return max(1, bisect.bisect_right(lengths, room, key=lambda n: width(sheet, text[:n], **look)))


def wrap(sheet: Sheet, text: str, room: float, lines: int, **look: Any) -> list[str]:
    """The text in lines that end between words or folders if they can; "…" stands for what is left."""
    made: list[str] = []
    # lines of their own, or half characters of another encoding, are in no line here
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    while text and len(made) < lines:
        end = fitting(sheet, text, room, **look)
        if end < len(text) and len(made) + 1 == lines:
            end = fitting(sheet, text, room - width(sheet, "…", **look), **look)
            return [*made, text[:end].rstrip() + "…"]
        if end < len(text):
            end = max(text.rfind(" ", 1, end + 1), 0) or text.rfind("/", 1, end) + 1 or end
        made.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return made


def paragraph(sheet: Sheet, y: float, text: str, size: float = SMALL, lines: int = 3, **look: Any) -> float:
    """Write a text over the sheet's width; where the next one goes."""
    weight = look.get("weight", "normal")
    for line in wrap(sheet, text, WIDTH - 2 * MARGIN, lines, size=size, weight=weight):
        put(sheet, MARGIN, y, line, size, **look)
        y += 1.4 * size
    return y


def box(sheet: Sheet, x: float, y: float, length: float, height: float, colour: str, **look: Any) -> None:
    """A filled bar to the right of x, its middle at y."""
    sheet.axes.barh(y, max(0.0, length), height, x, color=colour, lw=0, **look)


def line(sheet: Sheet, xs: tuple[float, float], ys: tuple[float, float], colour: str, thick: float) -> None:
    """A straight line; a thin one lies under whatever else is there."""
    depth = 2 if thick > 1.2 else 0.5
    sheet.axes.plot(xs, ys, color=colour, lw=thick, solid_capstyle="butt", zorder=depth)


def dot(sheet: Sheet, x: float, y: float, colour: str) -> None:
    sheet.axes.plot([x], [y], "o", color=colour, markersize=8)


def make(fill: Callable[[Sheet], float]) -> Any:
    """Matplotlib's Figure of a sheet on which `fill` drew, from the top down; it says how high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / DPI, 1), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # it measures text
    sheet = Sheet(figure.add_axes((0, 0, 1, 1)))
    sheet.axes.axis("off")
    height = fill(sheet)
    sheet.axes.set_xlim(0, WIDTH)
    sheet.axes.set_ylim(height, 0)
    figure.set_size_inches(WIDTH / DPI, height / DPI)
    return figure


def save(fill: Callable[[Sheet], float], path: str) -> str | None:
    """Draw and write a picture; a warning, if there is one. Raises OSError where it cannot be written."""
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it talks of fonts
    fonts = {"svg.fonttype": "none", "svg.hashsalt": "", "font.sans-serif": ["DejaVu Sans", "Verdana"]}
    with matplotlib.rc_context(), warnings.catch_warnings(action="ignore"):
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(fonts)
        figure = make(fill)
        texts = figure.axes[0].texts
        font, missing = font_for({c for text in texts for c in text.get_text() if not c.isspace()})
        for text in texts:
            text.set_family(["sans-serif", *font])
        is_svg = path.endswith(".svg")
        figure.savefig(path, dpi=2 * DPI, metadata={"Date": None} if is_svg else None)
    if missing and not is_svg:
        some = missing if len(missing) < 9 else f"{missing[:8]} …"
        return f"no font on this machine has {some}: take a .svg, or install a font (Noto Sans CJK)"
    return None


def font_for(characters: set[str]) -> tuple[list[str], str]:
    """The font that has most of what the usual one lacks (Chinese), if any; and what it lacks too."""
    from matplotlib import font_manager

    def lacking(file: str, wanted: set[str]) -> set[str]:
        try:
            font = font_manager.get_font(file)
        except (OSError, RuntimeError):  # one that matplotlib cannot open
            return wanted
        return {c for c in wanted if not font.get_char_index(ord(c))}

    wanted = lacking(font_manager.findfont("DejaVu Sans"), characters)
    best, missing = [], wanted
    for font in font_manager.fontManager.ttflist if wanted else ():
        lacks = lacking(font.fname, wanted)
        is_usual = (font.style, font.weight) == ("normal", 400) and not font.name.startswith("Last Resort")
        if is_usual and len(lacks) < len(missing):
            best, missing = [font.name], lacks
    return best, "".join(sorted(missing))
