"""All that touches rich: tables and bars, the report printed and saved, the status line of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich import box, markup
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

BAR_CELLS = 4  # of a table's bars
escape = markup.escape  # for text of the user's in a report


def table(title: str, columns: Iterable[str], rows: list[list[str]], left: int = 1) -> list[Any]:
    """A title and a table with Markdown borders; the first `left` columns are text, the others numbers."""
    made = Table(box=box.MARKDOWN, header_style="none")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return [f"[bold]### {title}[/]", made]


def bars(values: list[float | None], texts: list[str], best: float | None = None) -> list[str]:
    """Each text behind a bar of its figure's size, in eighths of a cell; that of the best figure is green."""
    largest = max((v for v in values if v), default=0)
    width = max(map(len, texts), default=0)
    cells = []
    for value, text in zip(values, texts, strict=True):
        eighths = max(1, round(8 * BAR_CELLS * value / largest)) if value else 0
        drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8] * (eighths % 8 > 0)
        style = "green" if value and value == best else "cyan"
        cells.append(f"[{style}]{drawn}[/]{' ' * (BAR_CELLS - len(drawn))} {text:>{width}}")
    return cells


def render(parts: list[Any], file: Any) -> None:
    """Print a report: coloured and wrapped in a terminal, uncut anywhere else."""
    console = Console(file=file, highlight=False, emoji=False)  # an answer's :key: is no emoji
    console.width = console.width if console.is_terminal else 100_000
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    print(*(line.rstrip() for line in captured.get().splitlines()), sep="\n", file=file)


def save_report(parts: list[Any], path: str | None, title: str) -> list[str]:
    """The report as a picture (.svg) or a page (.html), if a path is given; what could not be written."""
    if not path:
        return []
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=110, file=nowhere, highlight=False, emoji=False)
        console.print(*parts, sep="\n")
    try:
        console.save_svg(path, title=title) if path.endswith(".svg") else console.save_html(path)
    except OSError as error:
        return [f"cannot write {path}: {error.strerror or error}"]
    return []


class LastingStream:
    """Standard error, whose reader may go: a closed terminal must not end a measurement."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            discard(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            discard(self.stream)


def discard(stream: Any) -> None:
    """What is written to a stream, and what it still holds, goes nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class View:
    """Progress on standard error: lines that stay and, on a terminal, a status with its time."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        # half of rich's own rate: drawing takes half a millisecond from the runs each time
        options = {"transient": True, "refresh_per_second": 5, "disable": not self.console.is_terminal}
        self.progress = Progress(*columns, console=self.console, **options)
        self.task = self.progress.add_task("starting")
        self.prefix = ""

    def log(self, text: str) -> None:
        self.console.print(self.prefix + text, markup=False, soft_wrap=not self.console.is_terminal)

    def status(self, text: str, fraction: float | None = None) -> None:
        drawn = f"{'█' * round(10 * fraction):░<10} " if fraction is not None else ""
        self.progress.update(self.task, description=drawn + self.prefix + text)
