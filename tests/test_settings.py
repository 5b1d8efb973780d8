"""Constants, their flags, what is refused, saved results; and that the program stands without torch."""

import dataclasses
import json
import re
from dataclasses import replace

import pytest
from conftest import ROOT, SCRIPT, start
from results import parse, settings

import qwquanto
from _qwquanto.settings import PRECISIONS, Settings, check, is_writable, unused

SOURCE = SCRIPT.read_text(encoding="utf-8")
CONSTANTS = re.findall(r"^([A-Z_]+): [^=]+ = (.*?)  # (.+)$", SOURCE, re.MULTILINE)


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
    ("name", "value"),
    [
        *[("RUNS", -5), ("RUNS", 2.5), ("RUNS", True), ("MAX_SECONDS", None), ("WEIGHTS", 8), ("DEVICE", 0)],
        *[("COMPARE", "int8"), ("COMPARE", None), ("COMPARE", ["none", None]), ("DTYPE", ["auto"])],
        *[("QUESTION", b"why?"), ("QUESTION", ["why?"]), ("MODEL_NAME", 3), ("COMPILE", "yes")],
        ("REPORT", True),
    ],
)
def test_a_constant_of_another_type_is_named_with_what_is_allowed(monkeypatch, name, value):
    monkeypatch.setattr(qwquanto, name, value)
    (told,) = check(parse([])[0])
    assert re.fullmatch(rf"{name} must be .*, not {re.escape(repr(value))}", told)


def test_a_constant_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(qwquanto, "SEED")
    (told,) = check(parse([])[0])
    assert told.startswith("SEED must be a whole number from 0 on, not ")


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


@pytest.mark.parametrize("content", [None, b"", b" \n", "Größe".encode("latin-1")])
def test_a_text_that_is_none_is_impossible(tmp_path, content):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    s = settings(compare=("int8",), quality_text=str(file))
    assert check(s) == [f"QUALITY_TEXT must be a file with some text in UTF-8, not {str(file)!r}"]


def test_a_text_wants_a_comparison():
    flag = ["--quality-text"]
    assert unused(settings(compare=("int8",)), flag) == []
    assert unused(settings(), flag) == ["--quality-text is of a comparison: add --compare"]
    none = settings(compare=("int8",), quality_tokens=0)
    assert unused(none, flag) == ["--quality-text needs QUALITY_TOKENS above 0"]
