"""Whole reports of fixed Results as text, in tests/reports.

`PYTHONPATH=. python tests/test_report.py` writes them anew: read the diff.
"""

import dataclasses
import io
import json
import math
import queue
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from results import (
    BENCHMARKS,
    GIB,
    comparison,
    compiled,
    compiled_comparison,
    files,
    piped,
    quality,
    result,
    run,
    runs,
    settings,
    text,
)
from rich.cells import cell_len

from _qwquanto import console
from _qwquanto.console import render, save_report
from _qwquanto.report import report
from _qwquanto.results import Benchmark, Result, from_json, to_json
from _qwquanto.saved import files_report
from _qwquanto.settings import PRECISIONS
from _qwquanto.supervisor import follow
from _qwquanto.text import format_3g, plus_minus, rate_text

REPORTS = {
    kind.replace(" ", "_"): report(BENCHMARKS[kind]) for kind in ("single", "compiled", "gpu comparison")
}
REPORTS["files"] = files_report(*files())


def file_of(kind):
    return Path(__file__).parent / "reports" / f"{kind}.txt"


@pytest.mark.parametrize("kind", REPORTS)
def test_report_as_text(kind):
    assert text(REPORTS[kind]) + "\n" == file_of(kind).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [*BENCHMARKS, "files"])
def test_80_columns_hold_all_that_a_pipe_gets(kind):
    parts = REPORTS["files"] if kind == "files" else report(BENCHMARKS[kind])
    shown, out = text(parts, 80), io.StringIO()
    render(parts, out)
    assert max(map(cell_len, shown.splitlines())) <= 80
    printed = Counter(shown), Counter(out.getvalue())
    assert {c: n for c, n in printed[0].items() if c not in " |-\n"} == {
        c: n for c, n in printed[1].items() if c not in " |-\n"
    }


def test_a_pipe_gets_long_lines_uncut():
    failed = replace(comparison()[2], failure="why " * 999 + "[not] markup :key:")
    assert "why " * 999 + "[not] markup :key:\n" in piped(Benchmark([comparison()[0], failed]))


def figures(plain, path=()):
    """The paths of all floats in what `asdict` made of a Result; of a list the first one's."""
    if isinstance(plain, dict | list):
        items = plain.items() if isinstance(plain, dict) else enumerate(plain[:1])
        return [found for key, value in items for found in figures(value, (*path, key))]
    return [path] if isinstance(plain, float) and path[0] != "settings" else []


def said(plain):
    """The Result that the program has of one that a worker sends."""
    lines = queue.Queue()
    lines.put(json.dumps({"result": plain}))
    lines.put(None)
    view = SimpleNamespace(status=lambda *_: None)
    return follow(lines, Result(settings()), view, lambda result: None)[0]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_figure_that_is_no_number_costs_neither_the_report_nor_the_file(number):
    """Any one of them: it is null in the file, or what it belongs to is left out; the report says so."""
    for r in (replace(compiled_comparison()[1], warmup=[run(9)]), result(compiled=compiled(20, 21))):
        for path in figures(dataclasses.asdict(r)):
            plain = place = dataclasses.asdict(r)
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = number
            benchmark = Benchmark([compiled_comparison()[0], said(plain)])
            file, shown = to_json(benchmark), piped(benchmark)  # to_json raises ValueError for a NaN
            assert not re.search(r"\b(nan|inf)\b", shown) and "A figure was no number" in shown, path
            assert piped(from_json(file)) == shown, path
    assert said(dataclasses.asdict(r)) == r


def test_a_quality_without_its_kl_is_unknown_and_a_run_without_a_time_is_none():
    plain = dataclasses.asdict(compiled_comparison()[1])
    plain["quality"]["kl_divergence"] = plain["runs"][0]["inter_token_s"][3] = math.nan
    r = said(plain)
    assert r.quality is None and len(r.runs) == 1 and r.compiled.quality is not None


def test_a_result_of_nothing_but_a_failure_has_a_report():
    lost = Result(settings(), failure="no such model")
    assert piped(Benchmark([lost])).split("\n\n")[:2] == [
        "# Qwen/Qwen2.5-3B: int8",
        "FAILED: no such model",
    ]
    assert "### Speed" not in piped(Benchmark([lost]))
    compared = [replace(lost, settings=settings(weights=None, compare=("none", "int8"))), comparison()[1]]
    assert "| unquantized ✗ |" in piped(Benchmark(compared))


def test_the_reference_is_named_where_it_is_not_the_unquantized_model():
    made = [
        result("int8", is_reference=True, compare=("int8", "int4")),
        result("int4", kl=0.2, compare=("int8", "int4")),
    ]
    assert "### Answers against int8's, 200 tokens, the most precise one that ran\n" in piped(Benchmark(made))
    assert "most precise" not in piped(BENCHMARKS["comparison"])


def test_an_answer_is_shown_in_one_line_as_it_is_and_cut():
    assert "| The [bold] answer is :key: 42. |\n" in piped(BENCHMARKS["single"])
    cut = result(runs=[run(text="如何\n计" * 99 + "xx" + "\ufffd" * 9)])
    assert piped(Benchmark([cut])).rstrip().endswith("计xx |")


def test_figures_of_runs_are_of_those_made():
    shown = piped(BENCHMARKS["interrupted"])
    assert (
        "medians of 1 to 2 runs of up to 40 new tokens" in shown
        and "! Interrupted" in shown
        and "| int8 …" in shown
    )
    assert "Answers against" not in shown


def test_a_note_names_its_precision_unless_it_is_everyones():
    notes = {"none": ["no NVML"], "int8": ["no NVML", "other programs use 35 % of the processor"]}
    shown = piped(Benchmark([result(name, notes=told, compare=PRECISIONS) for name, told in notes.items()]))
    assert shown.count("no NVML") == 1 and "! no NVML" in shown and "! int8: other programs" in shown


def test_random_weights_have_no_quality_and_say_so():
    s = settings(random_weights=True, compare=("none", "int8"))
    made = [result("none", settings=replace(s, weights=None), is_reference=False), result("int8", settings=s)]
    shown = piped(Benchmark(made))
    assert "! Random weights" in shown and "Quality was not measured" in shown and "reference" not in shown


def test_pages_and_pictures_whatever_the_locale(tmp_path, monkeypatch):
    plain = open
    ascii_open = lambda path, mode="r", *rest, encoding="ascii", **more: plain(
        path, mode, *rest, encoding=encoding, **more
    )
    monkeypatch.setattr(console, "open", ascii_open, raising=False)
    for name, sign in (("x.svg", "<svg"), ("x.html", "<!DOCTYPE html>")):
        save_report(report(BENCHMARKS["single"]), str(tmp_path / name), "title")
        assert sign in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (0.00213, "0.00213"),
        (0.5, "0.500"),
        (3.14159, "3.14"),
        (44.94, "44.9"),
        (1234.5, "1234"),
    ],
)
def test_three_significant_digits(value, shown):
    assert format_3g(value) == shown


def test_spread_is_as_fine_as_its_figure():
    assert plus_minus(24.123, 0.3123) == "24.1 ±0.3" and plus_minus(0.0312, 0.00046, 0.001) == "31.2 ±0.5"
    assert (
        plus_minus(377, 3.4) == "377 ±3" and plus_minus(24.1, None) == "24.1" and plus_minus(None, 1) == "–"
    )
    assert rate_text(runs(9, 10, 11)) == "10.0 ±1.0" and rate_text([run(10)]) == "10.0"


# ---------------------------------------------------------------------------------------------- several files


def table_of(*results):
    """First column -> the others of both tables, of one file a result; the files are a, b, c and so on."""
    benchmarks = [Benchmark([r]) for r in results]
    out = io.StringIO()
    render(files_report([f"{name}.json" for name in "abcd"[: len(results)]], benchmarks), out)
    rows = {}
    for line in out.getvalue().splitlines():
        if line.startswith("| "):
            label, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            rows.setdefault(label, []).extend(cells)
    return rows, out.getvalue()


def test_files_are_held_against_the_first():
    rows, _ = table_of(
        result("int8", (10, 10), 0.01), result("int8", (20, 20), 0.02, memory={}), result("int4", (10, 10.1))
    )
    assert rows["a int8"] == ["10.0 ±0.0", "–", "1.00", "3.00", "0.0100 ±0.0001"]
    assert rows["b int8"] == [
        *("20.0 ±0.0", "–", "1.00", "–", "0.0200 ±0.0001"),
        *("2.00 to 2.00 x", "–", "–", "more"),
    ]
    assert rows["c int4"][4:] == ["–", "about the same", "–", "1.00 x", "–"]


def test_the_bandwidths_of_two_machines_are_their_difference_not_noise():
    fast = {"rates": (20, 20), "memory_bytes_per_s": {"cpu": 4e10}}
    other = result("int8", **fast, environment={"cpu": "Another CPU", "ram": "8 GiB"})
    rows, shown = table_of(result("int8"), result("int8", **fast), other)
    assert rows["b int8"][5] == "1.00 to 2.00 x"  # the same machine, with memory that was twice as fast
    assert rows["c int8"][5] == "2.00 to 2.00 x"
    assert (
        "cpu: a Some CPU; b Some CPU; c Another CPU\n" in shown
        and "torch: a 2.13.0; b 2.13.0; c –\n" in shown
    )
    assert "ram" not in shown and "RUNS" not in shown


def test_files_of_one_name_are_told_apart():
    made = [Benchmark([result(quality=quality(0.01), stored=GIB)])] * 2
    shown = text(files_report(["a/x.json", "b/x.json"], made), 200)
    assert "| a/x.json int8" in shown and "| b/x.json int8" in shown


if __name__ == "__main__":
    for kind, parts in REPORTS.items():
        file_of(kind).write_text(text(parts) + "\n", encoding="utf-8")
