"""Whole reports of fixed Results as text, in tests/reports.

`PYTHONPATH=. python tests/test_report.py` writes them anew: read the diff.
"""

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from results import (
    BENCHMARKS,
    comparison,
    compiled_comparison,
    files,
    piped,
    quality,
    result,
    run,
    settings,
    text,
)
from rich.cells import cell_len

from _qwquanto.console import render
from _qwquanto.report import cudnn_lines, host_bound, report
from _qwquanto.results import Benchmark, Result
from _qwquanto.saved import files_report
from _qwquanto.settings import PRECISIONS
from _qwquanto.stats import gpu_share
from _qwquanto.verdicts import warnings_for

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


def test_a_result_of_nothing_but_a_failure_has_a_report():
    lost = Result(settings(), failure="no such model")
    assert piped(Benchmark([lost])).split("\n\n")[:2] == [
        "# Qwen/Qwen2.5-3B: int8, batch 1",
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
    assert (
        "### Answers against int8's, 200 tokens of 16 prompts, KL ± s.e., the most precise one that ran\n"
        in piped(Benchmark(made))
    )
    assert "most precise" not in piped(BENCHMARKS["comparison"])


def test_an_answer_is_shown_in_one_line_as_it_is_and_cut():
    assert "| The [bold] answer is :key: 42. |\n" in piped(BENCHMARKS["single"])
    cut = result(runs=[run(text="如何\n计" * 99 + "xx" + "\ufffd" * 9)])
    assert piped(Benchmark([cut])).rstrip().endswith("计xx |")


def test_figures_of_runs_are_of_those_made():
    shown = piped(BENCHMARKS["interrupted"])
    assert (
        "median ± s.d. of 1 to 2 runs, first 40 tokens" in shown
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
    assert (
        "! Random weights" in shown
        and "a recommendation needs real ones" in shown
        and "reference" not in shown
    )


def test_share_of_a_step_in_which_the_gpu_works():
    r = result(rates=(20, 20), kernel_s=0.01)
    assert gpu_share(r) == pytest.approx(0.2)
    assert gpu_share(result(rates=(20, 20))) is None and gpu_share(result(rates=(), kernel_s=0.01)) is None
    (line, _) = host_bound([r, result("none", rates=(10, 10))])
    assert "int8 20.0 %" in line and "bf16" not in line and "Python on the host" in line
    (line, _) = host_bound([result(rates=(20, 20), kernel_s=0.04)])
    assert "80.0 %" in line and "Python" not in line
    assert host_bound([result()]) == []
    warned = [warnings_for(result(rates=(10, 12, 10), kernel_s=s))[0] for s in (0.01, 0.08)]
    assert "the host" in warned[0] and "busy?" in warned[1]


def test_what_cudnn_costs_is_told_where_it_costs():
    costs = {"first": 0.058, "again": 0.0221}
    told = " ".join(cudnn_lines([result("none", cudnn_attention_s=costs), result()]))
    assert "bf16 58.0, repeated 22.1" in told and "enable_cudnn_sdp(False)" in told and "int8" not in told
    assert cudnn_lines([result(cudnn_attention_s={"first": 0.0225, "again": 0.0221}), result()]) == []


if __name__ == "__main__":
    for kind, parts in REPORTS.items():
        file_of(kind).write_text(text(parts) + "\n", encoding="utf-8")


def shown(*results):
    return piped(Benchmark([*results]))


def test_greedy_answers_say_how_long_they_are_the_references():
    both = {"compare": ["none", "int8"]}
    reference = result("none", greedy_answer="The answer is 42.", **both)
    int8 = result("int8", greedy_answer="The answer\nis 41.", **both)
    int8.quality = quality(0.004, same_greedy_tokens=41, greedy_tokens=64)
    told = shown(reference, int8)
    assert "### Greedy answers to the question\n" in told
    assert "| int8    | 41 of 64 tokens | The answer is 41. |\n" in told
    assert "| bf16    | –               | The answer is 42. |\n" in told


def test_the_users_text_has_its_perplexities():
    s = settings(compare=["none", "int8"], quality_text="/some/where/mine.txt")
    reference = result("none", settings=replace(s, weights=None))
    int8 = result("int8", settings=s, quality=quality(0.004, perplexity=12.94, reference_perplexity=12.31))
    told = shown(reference, int8)
    assert "### Answers against bf16's, 200 tokens of mine.txt, KL ± s.e.\n" in told
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if "±0.0001" in line
    ]
    assert ["int8", "0.00400 ±0.0001", "12.9", "90 (85–93)", "kept"] in rows
    assert "| bf16    |               – |       12.3 |                – | reference |" in told


def test_the_floor_is_told_where_the_reference_was_compiled():
    told = shown(*compiled_comparison())
    assert "The floor: KL 0.000200 ±0.0001 of bf16 compiled against bf16 eager, which is rounding.\n" in told
    assert "KL of the compiled step's answers: int8 0.00400" in told
