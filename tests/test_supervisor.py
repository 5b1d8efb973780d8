"""However a worker ends, what was measured stands: fake workers that speak the protocol, and no torch."""

import dataclasses
import json
import math
import os
import pty
import queue
import re
import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import wait_for
from fake_worker import fake_worker, with_worker
from processes import Terminal, check_interrupted, worker_of
from results import compiled, compiled_comparison, piped, result, run, settings

from _qwquanto import supervisor
from _qwquanto.results import Benchmark, Result, from_json, to_json
from _qwquanto.supervisor import (
    REFERENCE,
    Interruption,
    describe_exit,
    follow,
    measure_all,
    remove_leftovers,
    run_worker,
)


class Seen:
    """A View that remembers."""

    def __init__(self):
        self.console = SimpleNamespace(is_terminal=False)
        self.prefix, self.logs, self.steps = "", [], []

    def log(self, text):
        self.logs.append(self.prefix + text)

    def status(self, text, fraction=None):
        self.steps.append(self.prefix + text)


@pytest.fixture
def stop():
    """An Interruption that takes no signal along when the test is over."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield Interruption()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def end_of(stop, monkeypatch):
    """The Result of a worker that does `acts`, and all Results that were saved meanwhile."""
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 1)

    def run_it(acts, **options):
        saved = []
        command = options.pop("command", None) or fake_worker(acts)
        made = run_worker(
            settings(), None, options.pop("view", Seen()), saved.append, stop, False, command=command
        )
        return made, saved

    return run_it


# --------------------------------------------------------------------------------------------- a worker's end


HANGS = "time.sleep(3600)"


@pytest.mark.parametrize(
    ("last", "failure"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process was killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL (out of memory?)"),
        ("sys.exit(3)", "its process ended with exit code 3"),
        ("sys.exit('odd\\nnews')", "its process ended with exit code 1 (news)"),
        ("print('{\"resu', flush=True)", "its process ended with exit code 0"),
        (
            "import no_such_package",
            "ModuleNotFoundError: No module named 'no_such_package': pip install -r requirements.txt",
        ),
        (
            f"step('run 2 of 2', timeout_s=1); {HANGS}",
            'said nothing for 1 s after "run 2 of 2", and was ended',
        ),
        (f"os.close(1); {HANGS}", "its process closed its output and did not end, so it was ended"),
    ],
)
def test_what_was_measured_stands_however_a_worker_ends(end_of, last, failure):
    made, saved = end_of(f"say(result=UNFINISHED)\n{last}")
    assert made.failure == failure and len(made.runs) == 1
    assert not made.eager_complete and not made.complete
    assert [r.failure for r in saved][-1] == failure and len(saved[0].runs) == 1


@pytest.mark.parametrize("last", ["sys.exit(1)", HANGS, f"step('leaving', timeout_s=0.1); {HANGS}"])
def test_a_complete_result_is_complete_whatever_its_process_does_afterwards(end_of, last):
    made, saved = end_of(f"say(result=UNFINISHED); say(result=RESULT)\n{last}")
    assert made.complete and made.failure is None and len(made.runs) == 2
    assert [len(r.runs) for r in saved] == [1, 2]


def test_a_failure_that_the_worker_told_stays_though_it_hangs_at_its_exit(end_of):
    told = "ValueError while loading the model: odd (--debug shows more)"
    made, _ = end_of(f"say(result=UNFINISHED | {{'failure': {told!r}}}); {HANGS}")
    assert made.failure == told and len(made.runs) == 1


def test_noise_between_the_messages_is_left_out(end_of):
    view = Seen()
    acts = "print('NOISE'); step('run 1 of 2'); print('[1, 2'); say(log='run 1: done'); say(result=RESULT)"
    made, _ = end_of(acts, view=view)
    assert made.complete and view.logs == ["run 1: done"]
    assert view.steps == ["importing torch and transformers", "run 1 of 2"]


def followed(monkeypatch, *said, view=None):
    """What `follow` makes of messages, and of seconds of silence between them; by a clock of its own."""
    now, rest = [0.0], list(said)

    def get(timeout):
        if rest and isinstance(rest[0], dict):
            return json.dumps(rest.pop(0))
        if not rest:
            return None  # the end
        now[0] += timeout
        rest[0] -= timeout
        if rest[0] <= 0:
            del rest[0]
        raise queue.Empty

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return follow(SimpleNamespace(get=get), Result(settings()), view or Seen(), lambda result: None)


def working(doing, timeout_s):
    return {"status": doing, "fraction": None, "timeout_s": timeout_s}


def test_a_step_may_be_silent_for_as_long_as_it_says(monkeypatch):
    """Loading takes as long as it takes; each line of progress begins the silence anew."""
    run = [working("run", 900), 890.0]
    assert followed(monkeypatch, 899.0, working("loading", None), 9999.0, *run, *run)[1] is None
    told = 'said nothing for 15 min after "{}", and was ended'
    assert followed(monkeypatch, 901.0)[1] == told.format("importing torch and transformers")
    assert followed(monkeypatch, working("loading", None), 9999.0, *run, 11.0)[1] == told.format("run")


def test_a_worker_that_has_ended_its_work_is_not_waited_for(monkeypatch):
    for fields in ({"complete": True}, {"complete": False, "failure": "odd"}):
        told = {"result": dataclasses.asdict(result(**fields))}
        said, view = [working("run", None), told, 11.0, {"log": "too late"}], Seen()
        made, failure = followed(monkeypatch, *said, view=view)
        assert made.complete == fields["complete"] and failure is None and view.logs == []


def test_a_workers_end_in_words():
    assert describe_exit(-9) == "its process was killed by SIGKILL (out of memory?)"
    assert describe_exit(3) == "its process ended with exit code 3"
    assert describe_exit(-11, "in kernel x") == "its process was killed by SIGSEGV (in kernel x)"
    number = signal.SIGRTMIN + 1  # has no name
    assert describe_exit(-number) == f"its process was killed by signal {number}"


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


# ---------------------------------------------------------------------------------------------- a comparison


def compare(monkeypatch, stop, acts, **constants):
    """The last Results of a comparison of all precisions whose workers do `acts`; and what was seen."""
    real, results, view = run_worker, {}, Seen()
    worker = fake_worker(acts)
    monkeypatch.setattr(supervisor, "EXIT_GRACE_S", 1)
    monkeypatch.setattr(supervisor, "run_worker", lambda *args: real(*args, command=worker))
    s = settings(compare=["int2", "int4", "int8", "float8", "none"], **constants)
    assert measure_all(s, lambda r: results.__setitem__(r.name, r), view, stop, False) == []
    return results, view


def test_no_precision_takes_the_others_along(stop, monkeypatch):
    acts = """
        if weights in ("float8", "int2"):
            say(result=UNFINISHED | {"failure": "odd", "unavailable": weights == "int2"})
            time.sleep(3600)
        say(result=UNFINISHED)
        if weights == "none":
            os.kill(os.getpid(), signal.SIGSEGV)
        if weights == "int8":
            step("run 2 of 2", timeout_s=1)
            time.sleep(3600)
        say(result=RESULT)
    """
    results, _ = compare(monkeypatch, stop, acts)
    assert {name: r.failure for name, r in results.items()} == {
        "none": "its process was killed by SIGSEGV",
        "int8": 'said nothing for 1 s after "run 2 of 2", and was ended',
        "float8": "odd",
        "int4": None,
        "int2": "odd",
    }
    assert [r.complete for r in results.values()] == [False, False, False, True, False]
    shown = piped(Benchmark([*results.values()]))
    assert "bf16 FAILED: its process was killed by SIGSEGV" in shown
    assert "float8 FAILED: odd" in shown and "int2 unavailable: odd" in shown


def test_a_comparison_begins_with_the_unquantized_model_and_says_how_far_it_is(stop, monkeypatch):
    results, view = compare(monkeypatch, stop, "say(log='here'); say(result=RESULT)", runs=3)
    assert list(results) == ["none", "int8", "float8", "int4", "int2"]
    assert view.logs[0].startswith("none, int8, float8, int4, int2: 3 runs each; the time to go follows")
    assert view.logs[1:3] == ["none (1 of 5)", "none: here"]
    assert re.fullmatch(r"int2 \(5 of 5, about .* to go\)", view.logs[-2]) and view.logs[-1] == "int2: here"


def test_the_hub_is_asked_once(stop, monkeypatch):
    """A push between two precisions would compare two revisions: the first folder is handed on."""
    acts = "say(result=RESULT | {'folder': job['folder'] or 'the folder that ' + weights + ' got'})"
    results, _ = compare(monkeypatch, stop, acts)
    assert {r.folder for r in results.values()} == {"the folder that none got"}


def test_a_model_that_no_precision_can_load_is_tried_once(stop, monkeypatch):
    acts = "say(result=UNFINISHED | {'failure': 'no such model', 'ends_comparison': True})"
    assert list(compare(monkeypatch, stop, acts)[0]) == ["none"]


def test_the_reference_answer_is_of_all_and_gone_at_the_end(stop, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))
    acts = """
        open(os.path.join(job["reference"], weights), "w").close()
        say(result=RESULT | {"notes": os.listdir(job["reference"])})
    """
    results, _ = compare(monkeypatch, stop, acts)
    assert {*results["int2"].notes} == {"none", "int8", "float8", "int4", "int2"}
    assert not list(tmp_path.iterdir())


def test_reference_answers_of_killed_programs_are_removed_and_no_others(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    kept = [f"{REFERENCE}{os.getpid()}-abc", "qwquanto-another_machine-1-abc", f"{REFERENCE}x-abc"]
    for name in (*kept, f"{REFERENCE}{gone.pid}-abc"):
        (tmp_path / name).mkdir()
    remove_leftovers()
    assert {path.name for path in tmp_path.iterdir()} == {*kept}


def test_a_worker_that_cannot_be_started_is_told(stop, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path / "gone"))
    for compared in ([], ["none", "int8"]):
        (told,) = measure_all(settings(compare=compared), None, Seen(), stop, False)
        assert told.startswith("cannot start a worker: No such file or directory") and "TMPDIR" in told


# -------------------------------------------------------------------------------------------- an interruption


def test_an_interruption_ends_the_worker_and_keeps_what_it_had_said(end_of, stop):
    class Impatient(Seen):
        def status(self, text, fraction=None):
            if text == "run 2 of 2":
                stop()

    made, saved = end_of(f"say(result=UNFINISHED); step('run 2 of 2'); {HANGS}", view=Impatient())
    assert stop.seen and stop.process is None
    assert len(made.runs) == 1 and made.failure is None and len(saved) == 1
    made, saved = end_of(HANGS)  # one that came before the worker was there
    assert not made.complete and made.failure is None and saved == []


@pytest.mark.parametrize("end", ["0x03", "SIGTERM", "SIGHUP"])
def test_an_end_during_runs_keeps_those_that_were_made(script, tmp_path, end):
    path = with_worker(tmp_path, fake_worker(f"say(result=UNFINISHED); step('run 2'); {HANGS}"))
    terminal = Terminal(script, path=path)
    worker = worker_of(terminal.process)
    wait_for(lambda: script.results, terminal.process)
    terminal.press_ctrl_c() if end == "0x03" else terminal.process.send_signal(signal.Signals[end])
    shown = check_interrupted(terminal, worker.pid)
    assert "### Runs" in shown and re.search(r"^\| 1 ", shown, re.MULTILINE)


def test_an_end_before_the_workers_first_word_has_no_report(script, tmp_path):
    terminal = Terminal(script, path=with_worker(tmp_path, fake_worker(HANGS)))
    worker = worker_of(terminal.process)
    wait_for(lambda: b"importing" in terminal.shown, terminal.process)
    terminal.press_ctrl_c()
    assert "###" not in check_interrupted(terminal, worker.pid)


def test_an_end_within_a_comparison_prints_what_has_finished(script, tmp_path):
    acts = f"if weights == 'int8': step('loading the model'); {HANGS}\nsay(result=RESULT)"
    terminal = Terminal(script, path=with_worker(tmp_path, fake_worker(acts)), compare=("none", "int8"))
    wait_for(lambda: b"loading the model" in terminal.shown, terminal.process)
    worker = worker_of(terminal.process)
    terminal.press_ctrl_c()
    shown = check_interrupted(terminal, worker.pid)
    assert "first 40 tokens" in shown and re.search(r"^\| bf16 ", shown, re.MULTILINE)
    assert [r["settings"]["weights"] for r in script.results] == [None]
    assert not list(script.temporary.glob("qwquanto-*"))


def ignore_signals():
    """As `nohup` leaves SIGHUP to what it starts, and a plain sh Ctrl-C to what runs in its background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


SLOW = "say(result=UNFINISHED); time.sleep(1.5); say(result=RESULT)"


def test_signals_that_were_ignored_stay_so(script, tmp_path):
    path, streams = with_worker(tmp_path, fake_worker(SLOW)), {"preexec_fn": ignore_signals}
    process = script.start(path=path, streams=streams)
    process.send_signal(signal.SIGINT)  # before main() takes over, too
    wait_for(lambda: script.results, process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    ended = script.end(process)
    assert ended.code == 0 and len(ended.results[0]["runs"]) == 2 and "interrupted" not in ended.err


def test_a_terminal_that_is_closed_ends_nothing_after_nohup(script, tmp_path):
    """Whatever is written to it fails from then on: progress, the status line and the report."""
    ours, theirs = pty.openpty()
    streams = {"stdout": theirs, "stderr": theirs, "preexec_fn": ignore_signals}
    process = script.start(path=with_worker(tmp_path, fake_worker(SLOW)), streams=streams)
    os.close(theirs)
    wait_for(lambda: script.results, process)
    os.close(ours)
    assert process.wait(timeout=120) == 0 and script.results[0]["complete"]
    assert len(script.results[0]["runs"]) == 2
