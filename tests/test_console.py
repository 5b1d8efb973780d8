"""What a terminal, a pipe and a file get of a report."""

from dataclasses import replace

from results import BENCHMARKS, comparison, piped

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
