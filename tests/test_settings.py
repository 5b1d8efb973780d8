"""Constants, their flags, and what is refused: without importing torch or transformers."""

import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from conftest import SCRIPT

import qwquanto as q

LIGHT = "import sys, runpy; sys.argv = {argv!r}\ntry: runpy.run_path({path!r}, run_name='__main__')\nexcept SystemExit as end:\n    code = end.code\nprint('torch' in sys.modules, 'transformers' in sys.modules, code)"


def test_every_constant_is_a_setting_a_flag_and_documented():
    constants = re.findall(
        r"^([A-Z_]+): [^=]+ = (.*?)  # (.+)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [name.lower() for name, _, _ in constants] == [f.name for f in fields(q.Settings)]
    told = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, encoding="utf-8", check=True
    ).stdout
    for name, _, comment in constants:
        assert f"--{name.lower().replace('_', '-')}" in told
        assert "".join(comment.split()) in "".join(told.split())


@pytest.mark.parametrize("argv", [["--help"], ["--runs", "0"], ["--nonsense"]])
def test_help_and_wrong_values_import_nothing_heavy(argv):
    code = LIGHT.format(argv=["qwquanto.py", *argv], path=str(SCRIPT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == f"False False {0 if argv == ['--help'] else 2}"
    assert "Traceback" not in done.stderr


def test_flags_override_constants():
    s, debug = q.parse(
        ["--weights", "none", "--runs", "3", "--max-seconds", "1.5", "--chat", "--no-do-sample", "--debug"]
    )
    assert (s.weights, s.runs, s.max_seconds, s.chat, s.do_sample, debug) == (None, 3, 1.5, True, False, True)
    assert q.parse([])[0] == q.Settings()
    assert q.parse(["--compare"])[0].compare == q.PRECISIONS
    assert q.parse(["--compare", "int8", "none"])[0].compare == ("int8", "none")


def test_every_problem_is_told_at_once(tmp_path):
    wrong = {"weights": "int7", "compare": ("int8", "int3"), "device": "gpu", "dtype": "half", "runs": 0}
    wrong |= {
        "warmup_runs": -1,
        "max_length": 1,
        "max_seconds": 0,
        "compare_tokens": 1,
        "quality_tokens": -1,
        "seed": -1,
    }
    wrong |= {
        "temperature": 0,
        "model_name": "./nothing",
        "question": " ",
        "chat": 1,
        "results": str(tmp_path / "no" / "x"),
    }
    told = q.check(replace(q.Settings(), **wrong))
    assert sorted(text.split()[0] for text in told) == sorted(name.upper() for name in wrong)
    assert q.check(q.Settings()) == []


def test_an_empty_comparison_constant_compares_nothing(monkeypatch):
    monkeypatch.setattr(q, "COMPARE", [])
    assert q.parse([])[0].compare == ()
    assert q.parse(["--compare"])[0].compare == q.PRECISIONS


def test_a_results_file_must_be_a_file():
    assert not q.writable("/dev/null")


@pytest.mark.parametrize(
    "edit", [{"runs": "five"}, {"compare": "int8"}, {"temperature": None}, {"device": 0}]
)
def test_a_constant_of_the_wrong_type_is_told_too(edit):
    assert len(q.check(replace(q.Settings(), **edit))) == 1


def test_a_constant_edited_in_the_file_counts(tmp_path):
    copy = tmp_path / "qwquanto.py"
    text = SCRIPT.read_text(encoding="utf-8")
    copy.write_text(text.replace("RUNS: int = 5 ", "RUNS: int = -5 "), encoding="utf-8")
    done = subprocess.run([sys.executable, copy], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qwquanto: RUNS must be a whole number from 1 on, not -5\n"
