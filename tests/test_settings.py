"""Constants, their flags, what is refused, saved results; and that the program stands without torch."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, SCRIPT
from results import BENCHMARKS, parse, piped, settings

import qwquanto
from _qwquanto import __version__
from _qwquanto.channel import Failure
from _qwquanto.report import print_report
from _qwquanto.results import SCHEMA, Benchmark, from_json, to_json, write_results
from _qwquanto.saved import show
from _qwquanto.settings import PRECISIONS, Settings, check, is_writable, unused

SOURCE = SCRIPT.read_text(encoding="utf-8")
CONSTANTS = re.findall(r"^([A-Z_]+): [^=]+ = (.*?)  # (.+)$", SOURCE, re.MULTILINE)


def start(*argv, path=SCRIPT):
    return subprocess.run(
        [sys.executable, str(path), *map(str, argv)], capture_output=True, encoding="utf-8", check=False
    )


@pytest.fixture
def edited(tmp_path):
    """Starts a copy of the script with edited constants: edited({old line's beginning: new line}, *argv)."""

    def start_copy(edits, *argv):
        text = SOURCE
        for name, line in edits.items():
            text, count = re.subn(rf"^{name}: .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
            assert count == 1
        copy = tmp_path / "qwquanto.py"
        copy.write_text(text, encoding="utf-8")
        if not (tmp_path / "_qwquanto").exists():
            (tmp_path / "_qwquanto").symlink_to(ROOT / "_qwquanto")
        return start(*argv, path=copy)

    return start_copy


def test_every_constant_is_a_setting_a_flag_and_documented():
    assert [name.lower() for name, _, _ in CONSTANTS] == [f.name for f in dataclasses.fields(Settings)]
    assert all(callable(f.metadata["holds"]) for f in dataclasses.fields(Settings))
    told = start("--help").stdout
    for name, _, comment in CONSTANTS:
        assert f"--{name.lower().replace('_', '-')}" in told
        assert "".join(comment.split()) in "".join(told.split())


def test_flags_override_constants():
    flags = "--weights none --runs 3 --max-seconds 1.5 --chat --no-do-sample --results - --debug"
    s, args = parse(flags.split())
    assert (s.weights, s.runs, s.max_seconds, s.chat, s.do_sample, s.results) == (
        None,
        3,
        1.5,
        True,
        False,
        "-",
    )
    assert args.debug and not args.show
    values = {name.lower(): eval(value) for name, value, _ in CONSTANTS}
    assert parse([])[0] == Settings(**values | {"compare": []})
    assert parse(["--compare"])[0].compare == [*PRECISIONS]
    assert parse(["--compare", "int8", "none"])[0].compare == ["int8", "none"]


def test_every_problem_is_told_at_once(tmp_path):
    wrong = {"weights": "int7", "compare": ("int8", "int3"), "device": "gpu", "dtype": "half", "runs": 0}
    wrong |= {"warmup_runs": -1, "max_length": 1, "max_seconds": 0, "compare_tokens": 1, "quality_tokens": -1}
    wrong |= {"temperature": 0, "model_name": "./nothing", "question": " ", "chat": 1, "seed": -1}
    wrong |= {"results": str(tmp_path / "no" / "x"), "report": str(tmp_path / "report.pdf")}
    told = check(replace(settings(), **wrong))
    assert sorted(text.split()[0] for text in told) == sorted(name.upper() for name in wrong)
    assert check(settings()) == []


def test_a_results_file_must_be_a_file(tmp_path):
    assert is_writable(str(tmp_path / "x.json")) and list(tmp_path.iterdir()) == []
    assert not is_writable(str(tmp_path)) and not is_writable("/dev/null")


@pytest.mark.parametrize(
    "line",
    [
        *("RUNS = -5", "RUNS = 2.5", "RUNS = True", "MAX_SECONDS = None", "# SEED is gone", "WEIGHTS = 8"),
        *("COMPARE = 'int8'", "COMPARE = None", "COMPARE = ['none', None]", "DTYPE = ['auto']", "DEVICE = 0"),
        *("QUESTION = b'why?'", "QUESTION = ['why?']", "MODEL_NAME = 3", "COMPILE = 'yes'", "REPORT = True"),
    ],
)
def test_a_constant_of_another_type_is_named_with_what_is_allowed(edited, line):
    name = re.search(r"[A-Z_]+", line).group()
    done = edited({name: line})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"qwquanto: {name} must be .*, not .*\n", done.stderr)


def test_a_constant_without_its_annotation_is_served(edited):
    lines = {
        "RUNS": 'RUNS = "7"  # as text',
        "COMPARE": 'COMPARE = ["none", "int8"]',
        "WEIGHTS": 'WEIGHTS = "none"',
    }
    lines |= {
        "MAX_SECONDS": "MAX_SECONDS = 30",
        "SEED": "SEED = -1  # named below, so that nothing is measured",
    }
    told = edited(lines, "--help").stdout
    assert "(now: 7)" in told and "as text" in told and "(now: ['none', 'int8'])" in told
    assert edited(lines).stderr == "qwquanto: SEED must be a whole number from 0 on, not -1\n"


@pytest.mark.parametrize("constant", [["none", "int8"], {"none", "int8"}, [None, "int8"]])
def test_a_comparison_may_be_any_collection(monkeypatch, constant):
    monkeypatch.setattr(qwquanto, "COMPARE", constant)
    s = parse([])[0]
    assert check(s) == [] and {p or "none" for p in s.compare} == {"none", "int8"}
    json.dumps(dataclasses.asdict(s))  # as the worker is sent it


def test_an_empty_comparison_constant_compares_nothing(monkeypatch):
    monkeypatch.setattr(qwquanto, "COMPARE", [])
    assert parse([])[0].compare == []
    assert parse(["--compare"])[0].compare == [*PRECISIONS]


def test_a_precision_as_a_flag_is_a_single_run_whatever_the_file_compares(monkeypatch):
    monkeypatch.setattr(qwquanto, "COMPARE", ("none", "int8"))
    for flags in (["--weights", "int4"], ["--weights=int4"]):
        s = parse(flags)[0]
        assert (s.weights, s.compare) == ("int4", [])
    assert parse(["--runs", "2"])[0].compare == ["none", "int8"]
    assert parse(["--weights", "int4", "--compare", "none", "int4"])[0].compare == ["none", "int4"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--compare-tokens 64", "--compare-tokens is of a comparison: add --compare, or take --max-length"),
        ("--quality-tokens=64", "--quality-tokens is of a comparison: add --compare"),
        (
            "--weights int4 --compare none int8",
            "--weights is of a single run: name its precision behind --compare",
        ),
    ],
)
def test_a_flag_that_would_do_nothing_is_told(flags, told):
    done = start(*flags.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"qwquanto: {told}\n")


def test_flags_that_do_something_are_not_told():
    for flags in ("--compare --compare-tokens 64 --quality-tokens 0", "--weights int4 --max-length 64", ""):
        s, args = parse(flags.split())
        assert unused(s, args.given) == []


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--max-lenght=100", "unexpected argument --max-lenght: did you mean --max-length?"),
        ("--run", "unexpected argument --run: did you mean --runs?"),
        ("--shwo", "unexpected argument --shwo: did you mean --show?"),
        ("--xyzzy", "unexpected argument --xyzzy"),
        ("./my-model", "unexpected argument ./my-model: did you mean --model-name ./my-model?"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(capsys, flag, answer):
    with pytest.raises(SystemExit, match="2"):
        parse([flag, "100"])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {answer}")


# ---------------------------------------------------------------------------------------------- saved results


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_saved_results_are_the_results(kind):
    benchmark = BENCHMARKS[kind]
    again = from_json(to_json(benchmark))
    assert again == benchmark
    assert piped(again) == piped(benchmark)


def test_saved_results_are_written_whole_and_readable(tmp_path):
    file = tmp_path / "x.json"
    write_results(str(file), BENCHMARKS["single"])
    plain = json.loads(file.read_text(encoding="utf-8"))
    assert [plain["schema"], plain["version"], plain["interrupted"]] == [SCHEMA, __version__, False]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", plain["date"])
    assert plain["results"][0]["settings"]["runs"] == 5 and len(plain["results"][0]["runs"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "{}", "\0", '{"schema": []}', '{"schema": 2}', '{"schema": 2, "results": [{}]}'),
        *('{"schema": 2, "results": [3]}', '{"schema": 2, "results": [{"settings": {}}]}'),
    ],
)
def test_a_file_of_something_else_is_no_results(text):
    with pytest.raises(Failure, match="holds no results"):
        from_json(text)


@pytest.mark.parametrize(
    ("schema", "reader"), [(1, "qwquanto 2.0.0"), (3, "the version that wrote it"), ("x", "the version")]
)
def test_another_schema_is_told_with_the_version_that_reads_it(schema, reader):
    other = json.loads(to_json(BENCHMARKS["single"])) | {"schema": schema}
    with pytest.raises(Failure, match=f"schema {schema}, which {reader}.* reads; this one reads 2"):
        from_json(json.dumps(other))


def test_fields_of_a_later_version_are_left_out_and_those_with_a_default_may_lack():
    """So that a new field need not raise SCHEMA: in every part of a file."""
    kept = BENCHMARKS["compiled comparison"]
    plain = json.loads(to_json(kept)) | {"new": {"a": 1}}
    for r in plain["results"]:
        for part in (r, r["settings"], *r["runs"], r["compiled"] or {}, r["quality"] or {}):
            part["of_2030"] = [1, 2]
        assert r.pop("notes") == [] and r.pop("skipped_layers") == 0
    assert from_json(json.dumps(plain)) == kept


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


@pytest.mark.parametrize("argv", [["--help"], ["--runs", "0"], ["--nonsense"], ["--show", __file__]])
def test_what_needs_no_model_imports_nothing_heavy(argv):
    code = "import sys, runpy; sys.argv = {!r}\ntry: runpy.run_path(sys.argv[0], run_name='__main__')"
    code += "\nexcept SystemExit as end:"
    code += "\n    print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)), end.code)"
    done = start(code.format([str(SCRIPT), *argv]), path="-c")
    assert done.stdout.splitlines()[-1] == f"[] {0 if argv == ['--help'] else 2}"
    assert "Traceback" not in done.stderr


def test_inline_metadata_lists_the_requirements():
    """PEP 723, for `uv run qwquanto.py`: the packages of requirements.txt, in the file."""
    lines = re.search(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", SOURCE).group(1).splitlines()
    listed = re.findall(r'"([^"]+==[^"]+)"', "\n".join(lines))
    assert listed == (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert '# requires-python = ">=3.11"' in lines and ast.get_docstring(ast.parse(SOURCE))
