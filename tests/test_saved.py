"""Saved results shown again, one file or several beside each other."""

import io

import pytest
from conftest import SCRIPT, start
from results import BENCHMARKS, GIB, piped, quality, quality_of, result, settings, text

from _qwquanto.console import render
from _qwquanto.report import print_report
from _qwquanto.results import Benchmark, to_json, write_results
from _qwquanto.saved import files_report, kl_change, show


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
        *("1.87 to 2.14 x", "–", "–", "more"),
    ]
    assert rows["c int4"][4:] == ["–", "about the same", "–", "1.00 x", "–"]


def test_the_bandwidths_of_two_machines_are_their_difference_not_noise():
    fast = {"rates": (20, 20), "memory_bytes_per_s": {"cpu": 4e10}}
    other = result("int8", **fast, environment={"cpu": "Another CPU", "ram": "8 GiB"})
    rows, shown = table_of(result("int8"), result("int8", **fast), other)
    same_machine = "too noisy (0.933 to 2.14 x): measure again"  # its memory was twice as fast
    assert rows["b int8"][5] == same_machine and rows["c int8"][5] == "1.87 to 2.14 x"
    assert (
        "cpu: a Some CPU; b Some CPU; c Another CPU\n" in shown
        and "torch: a 2.13.0; b 2.13.0; c –\n" in shown
    )
    assert "ram" not in shown and "RUNS" not in shown


def test_files_of_one_name_are_told_apart():
    made = [Benchmark([result(quality=quality(0.01), stored=GIB)])] * 2
    shown = text(files_report(["a/x.json", "b/x.json"], made), 200)
    assert "| a/x.json int8" in shown and "| b/x.json int8" in shown


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_show_prints_the_report_byte_for_byte(tmp_path, capsys, kind):
    write_results(str(tmp_path / "x.json"), BENCHMARKS[kind])
    print_report(settings(), BENCHMARKS[kind])
    printed = capsys.readouterr().out
    assert show([str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == printed != ""


def test_show_as_a_process(tmp_path):
    first, second, none = (tmp_path / name for name in ("before.json", "after.json", "none.json"))
    write_results(str(first), BENCHMARKS["comparison"])
    write_results(str(second), BENCHMARKS["single"])
    none.write_text(to_json(Benchmark([])), encoding="utf-8")
    one, both = start("--show", first), start("--show", first, second)
    assert (one.returncode, one.stdout, one.stderr) == (0, piped(BENCHMARKS["comparison"]), "")
    assert both.returncode == 0 and "| before int8" in both.stdout and "| after int8" in both.stdout
    picture = tmp_path / "both.svg"
    drawn = start("--show", first, second, "--report", picture)
    assert (drawn.returncode, drawn.stdout) == (0, both.stdout) and "<svg" in picture.read_text(
        encoding="utf-8"
    )
    refused = start("--show", first, "--report", tmp_path / "both.pdf")
    assert (refused.returncode, refused.stdout) == (2, "") and "ends in .svg or .html" in refused.stderr
    wrong = {SCRIPT: "holds no results that this version of the script can read", none: "holds no results"}
    for file, reason in (wrong | {tmp_path / "gone.json": "No such file or directory"}).items():
        done = start("--show", first, file)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"qwquanto: {file}: {reason}\n")


def test_saved_files_are_paired_where_the_text_is_the_same():
    base = [[0.01 * 1.2**i] for i in range(16)]
    more = [[1.1 * prompt[0]] for prompt in base]
    change = lambda a, b, **constants: kl_change(
        result(quality=a, settings=settings(**constants)), result(quality=b)
    )
    assert (
        change(quality_of(more), quality_of(base)) == "more"
        and change(quality_of(base), quality_of(more)) == "less"
    )
    assert change(quality_of(base), quality_of(base)) == "about the same"
    assert change(quality_of(more, text_id="other"), quality_of(base)) == "about the same", (
        "their intervals overlap"
    )
    far = [[9 * prompt[0]] for prompt in base]
    assert change(quality_of(far, text_id="other"), quality_of(base)) == "more"
    assert change(quality_of(far, text_id="other"), quality_of(base), question="Another one?") == "–"
    assert change(quality_of(far, text_id="other"), quality_of(base), quality_text="mine.txt") == "–"
    assert change(quality_of(far, reference="int8"), quality_of(base)) == "–"
