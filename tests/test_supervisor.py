"""However a worker ends, what was measured stands: fake workers that speak the protocol."""

import dataclasses
import json
import math
import os
import pty
import queue
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import BANDWIDTH, QUESTION, edited, wait_for
from processes import LONG, Terminal, check_interrupted, wait_for_end, worker_of
from results import (
    compiled,
    compiled_comparison,
    piped,
    result,
    run,
    settings,
)

from _qwquanto.results import Benchmark, Result, from_json, to_json
from _qwquanto.supervisor import describe_exit, follow


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


# edits of the script: each gives a worker a fault, or a place to wait in
RUN = "    torch.manual_seed(seed)\n    energy = energy_j(bench.handles)\n"


MEASURED = '    measure(started, job["reference"], job["on_terminal"], job["debug"])\n'


STEP = "        self.timeout_s = timeout_s\n        self.status(doing)\n"


HANG = (
    STEP,
    STEP + "        if doing == os.environ.get('HANG_IN'):\n            __import__('time').sleep(3600)\n",
)


def test_prints_within_a_worker_stay_there_and_a_complete_result_is_complete(script, tiny, tmp_path):
    """A library prints in every way there is; the process exits with 1 after the last measurement."""
    prints = "    print('NOISE')\n    os.write(1, b'NOISE')\n    os.system('echo NOISE')\n"
    copy = edited(tmp_path, BANDWIDTH, (RUN, prints + RUN), (MEASURED, MEASURED + "    os._exit(1)\n"))
    ended = script(path=copy, model_name=tiny, question=QUESTION, max_length=40, results="-")
    assert ended.code == 0, ended.err
    (found,) = json.loads(ended.out)["results"]
    assert found["complete"] and found["failure"] is None and len(found["runs"]) == 2
    assert "### Speed" in ended.err and "NOISE" not in ended.out + ended.err


def test_a_picture_is_saved_though_nobody_reads_the_report(script, tiny, tmp_path):
    read, write = os.pipe()
    picture = tmp_path / "report.svg"
    flags = {"model_name": tiny, "question": QUESTION, "max_length": 40, "runs": 1, "report": picture}
    process = script.start(**flags, streams={"stdout": write})
    os.close(write)
    os.close(read)
    assert not script.end(process).code and "<svg" in picture.read_text(encoding="utf-8")


def test_progress_that_nobody_reads_ends_nothing(script, tiny, tmp_path):
    """As in `2>&1 >report | head -1`, and with a log on a full disk."""
    read, write = os.pipe()
    flags = {"path": edited(tmp_path, BANDWIDTH), "model_name": tiny, "question": QUESTION, "max_length": 40}
    process = script.start(**flags, streams={"stderr": write})
    os.close(write)
    os.close(read)
    ended = script.end(process)
    assert ended.code == 0 and "### Runs" in ended.out and ended.results[0]["complete"]
    with open("/dev/full", "wb") as full:
        ended = script.end(script.start(**flags, streams={"stderr": full}))
    assert ended.code == 0 and "### Runs" in ended.out and ended.results[0]["complete"]


def test_a_report_that_cannot_be_written_is_told(script, tiny, tmp_path):
    flags = {"path": edited(tmp_path, BANDWIDTH), "model_name": tiny, "question": QUESTION, "max_length": 40}
    with open("/dev/full", "wb") as full:
        ended = script.end(script.start(**flags, streams={"stdout": full}))
    assert ended.code == 1 and ended.results[0]["complete"]
    told = "qwquanto: cannot write to standard output: No space left on device"
    assert ended.err.splitlines()[-1] == told


def test_a_worker_killed_in_the_third_run_leaves_two(script, tiny, tmp_path):
    copy = edited(tmp_path, BANDWIDTH)
    process = script.start(
        path=copy, model_name=tiny, question=QUESTION, runs=300, temperature=50.0, max_length=400
    )
    worker = worker_of(process)
    wait_for(lambda: script.results and len(script.results[0]["runs"]) >= 2, process)
    worker.kill()
    ended = script.end(process)
    (found,) = ended.results
    assert ended.code == 1 and len(found["runs"]) >= 2
    assert not found["eager_complete"] and not found["complete"]
    assert found["failure"] == "its process was killed by SIGKILL (out of memory?)"
    assert ended.out.count("SIGKILL") == 1 and re.search(r"^\| 2 ", ended.out, re.MULTILINE)


def test_every_way_a_worker_can_end(script, tiny, tmp_path):
    """Each precision has an end of its own; none takes what was measured along, none holds up the others."""
    in_second_run = (
        "    if seed == 1 and bench.settings.weights is None:\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if seed == 1 and bench.settings.weights == 'int8':\n        time.sleep(3600)\n"
        "    if seed == 1 and bench.settings.weights == 'int2':\n        sys.exit(3)\n"
    )
    loading = '    with step("loading the model", timeout_s=None):\n'
    fails = "        if s.weights == 'float8':\n            raise ValueError('odd')\n"
    running = '        with step("running the model"):\n            result.warmup'
    copy = edited(
        tmp_path, BANDWIDTH, (RUN, in_second_run + RUN), (loading, loading + fails),
        (running, running.replace('model"', 'model", timeout_s=6')),
        ("EXIT_GRACE_S = 10 ", "EXIT_GRACE_S = 2 "),
        # hangs at exit, complete (int4) or failed (float8)
        (MEASURED, MEASURED + "    __import__('time').sleep(3600)\n"),
    )  # fmt: skip
    ended = script(
        path=copy, model_name=tiny, question=QUESTION, compare=("none", "int8", "float8", "int4", "int2"),
        compare_tokens=8, quality_tokens=0,
    )  # fmt: skip
    assert ended.code == 1
    failures = {r["settings"]["weights"]: r["failure"] for r in ended.results}
    # a machine under load gets to a line of progress first
    assert re.fullmatch(r'said nothing for 6 s after "run.*", and was ended', failures.pop("int8"))
    assert failures == {
        None: "its process was killed by SIGSEGV",
        "float8": "ValueError while loading the model: odd (--debug shows more)",
        "int4": None,
        "int2": "its process ended with exit code 3",
    }
    assert [len(r["runs"]) for r in ended.results] == [1, 1, 0, 2, 1]
    assert [r["complete"] for r in ended.results] == [False, False, False, True, False]
    for line in ("bf16 FAILED: its process was killed by SIGSEGV", "int2 FAILED: its process ended"):
        assert line in ended.out


def test_a_complete_result_is_complete_though_its_process_hangs(script, tiny, tmp_path):
    """And a later write makes up for one that failed: nothing is said of it then."""
    write = "    temporary = target.with_name("
    fails = "    if not benchmark.results[0].runs:\n        raise OSError(28, 'No space left on device')\n"
    hangs = (
        (MEASURED, MEASURED + "    __import__('time').sleep(3600)\n"),
        ("EXIT_GRACE_S = 10 ", "EXIT_GRACE_S = 2 "),
    )
    copy = edited(tmp_path, BANDWIDTH, (write, fails + write), *hangs)
    ended = script(path=copy, model_name=tiny, question=QUESTION, max_length=40, runs=1)
    assert ended.code == 0 and ended.results[0]["complete"]
    assert "FAILED" not in ended.out and "No space" not in ended.err


def test_a_package_that_is_missing_is_named(script, tiny, tmp_path):
    copy = edited(tmp_path, ("import huggingface_hub\n", "import no_such_package\n"))
    ended = script(path=copy, model_name=tiny)
    (line,) = ended.err.strip().splitlines()
    assert ended.code == 1 and ended.out == ""
    assert "No module named 'no_such_package'" in line and line.endswith("pip install -r requirements.txt")


@pytest.mark.parametrize("end", ["0x03", "SIGTERM", "SIGHUP"])
def test_an_end_during_runs_keeps_those_that_were_made(script, tiny, tmp_path, end):
    terminal = Terminal(script, path=edited(tmp_path, BANDWIDTH), model_name=tiny, **LONG)
    worker = worker_of(terminal.process)
    wait_for(lambda: script.results and script.results[0]["runs"], terminal.process)
    terminal.press_ctrl_c() if end == "0x03" else terminal.process.send_signal(signal.Signals[end])
    shown = check_interrupted(terminal, worker.pid)
    assert "### Runs" in shown and re.search(r"^\| 1 ", shown, re.MULTILINE)


def ignore_signals():
    """As `nohup` leaves SIGHUP to what it starts, and a plain sh Ctrl-C to what runs in its background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_signals_that_were_ignored_stay_so(script, tiny, tmp_path):
    copy, streams = edited(tmp_path, BANDWIDTH), {"preexec_fn": ignore_signals}
    process = script.start(path=copy, model_name=tiny, question=QUESTION, max_length=40, streams=streams)
    process.send_signal(signal.SIGINT)  # before main() takes over, too
    wait_for(lambda: script.results, process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    ended = script.end(process)
    assert ended.code == 0 and len(ended.results[0]["runs"]) == 2 and "interrupted" not in ended.err


def test_a_terminal_that_is_closed_ends_nothing_after_nohup(script, tiny, tmp_path):
    """Whatever is written to it fails from then on: progress, the status line and the report."""
    ours, theirs = pty.openpty()
    streams = {"stdout": theirs, "stderr": theirs, "preexec_fn": ignore_signals}
    copy = edited(tmp_path, BANDWIDTH)
    process = script.start(path=copy, model_name=tiny, question=QUESTION, max_length=40, streams=streams)
    os.close(theirs)
    wait_for(lambda: script.results, process)
    os.close(ours)
    assert process.wait(timeout=120) == 0 and script.results[0]["complete"]
    assert len(script.results[0]["runs"]) == 2


@pytest.mark.parametrize("place", ["loading the model", "measuring quality"])
def test_ctrl_c_prints_what_has_finished(script, tiny, tmp_path, place):
    copy = edited(tmp_path, BANDWIDTH, HANG)
    flags = {"compare": ("none", "int8"), "compare_tokens": 8, "quality_tokens": 8, "question": QUESTION}
    terminal = Terminal(script, path=copy, env={"HANG_IN": place}, model_name=tiny, **flags)
    worker = worker_of(terminal.process)
    wait_for(lambda: place.encode() in terminal.shown, terminal.process)
    terminal.press_ctrl_c()
    shown = check_interrupted(terminal, worker.pid)
    assert ("8 new tokens" in shown) == (place == "measuring quality")
    assert not list(script.temporary.glob("qwquanto-*"))


@pytest.mark.parametrize("place", ["importing", "running the model"])
def test_a_killed_parent_leaves_no_worker(script, tiny, tmp_path, place):
    """Its worker is gone within 2 s, and so is what that had started."""
    child = "    if not seed:\n        subprocess.Popen(['sleep', '1000'])\n"
    copy = edited(tmp_path, BANDWIDTH, (RUN, child + RUN))
    process = script.start(path=copy, model_name=tiny, **LONG)
    worker = worker_of(process)
    if place == "importing":
        wait_for(lambda: worker.memory_info().rss > 60e6, process)
    else:
        wait_for(lambda: script.results and script.results[0]["runs"], process)
        assert worker.children()
    process.kill()
    process.communicate()
    assert not wait_for_end(worker.pid, 2)
