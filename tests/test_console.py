"""What a terminal, a pipe and a file get of a report."""

from dataclasses import replace

from results import BENCHMARKS, comparison, piped, text

from _qwquanto import console
from _qwquanto.console import save_report
from _qwquanto.report import report
from _qwquanto.results import Benchmark


def test_a_pipe_gets_long_lines_uncut():
    failed = replace(comparison()[2], failure="why " * 999 + "[not] markup :key:")
    assert "why " * 999 + "[not] markup :key:\n" in piped(Benchmark([comparison()[0], failed]))


def test_pages_and_pictures_whatever_the_locale(tmp_path, monkeypatch):
    plain = open
    ascii_open = lambda path, mode="r", *rest, encoding="ascii", **more: plain(
        path, mode, *rest, encoding=encoding, **more
    )
    monkeypatch.setattr(console, "open", ascii_open, raising=False)
    for name, sign in (("x.svg", "<svg"), ("x.html", "<!DOCTYPE html>")):
        save_report(report(BENCHMARKS["single"]), str(tmp_path / name), "title")
        assert sign in (tmp_path / name).read_text(encoding="utf-8")


def test_bars_are_in_eighths_of_a_cell_and_no_figure_is_without():
    values = [32.0, 31.0, 8.0, 2.6, 0.001, None, 0.0]
    cells = text(console.bars(values, ["x"] * 7, 32.0)).splitlines()
    assert [cell[:4] for cell in cells] == ["████", "███▉", "█   ", "▍   ", "▏   ", "    ", "    "]
    assert all(cell[4:] == " x" for cell in cells)
    steps = console.bars([*map(float, range(1, 9)), 32.0], ["x"] * 9)
    assert "".join(cell[0] for cell in text(steps).splitlines()) == "▏▎▍▌▋▊▉██"
    assert console.bars([32.0, 31.0], ["a", "bc"], 32.0) == ["[green]████[/]  a", "[cyan]███▉[/] bc"]
