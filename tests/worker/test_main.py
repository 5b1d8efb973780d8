"""The worker's first lines: its channel, its parent's end; with a measurement that needs no torch."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import wait_for_end
from results import settings

WORKER = """
import importlib.machinery, importlib.util, os, subprocess, sys, time
sys.path.append({root!r})

class Measure:  # finds and is the module that measures
    def find_spec(self, name, *_):
        if name == "_qwquanto.worker.measure":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        {importing}
    def exec_module(self, module):
        module.measure = measure

def measure(result, reference, on_terminal, debug):
    from _qwquanto.channel import save
    {acts}

sys.meta_path.insert(0, Measure())
from _qwquanto.worker import main
main()
"""


def start(acts="pass", importing="pass", reference=None, **options):
    """A worker that has its job, and measures by doing `acts`."""
    code = WORKER.format(root=str(ROOT), acts=acts, importing=importing)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, start_new_session=True, **pipes | options
    )
    job = {"settings": dataclasses.asdict(settings()), "folder": "/models/it", "reference": reference}
    process.stdin.write(json.dumps(job | {"on_terminal": False, "debug": False}) + "\n")
    process.stdin.flush()
    return process


def test_prints_within_a_worker_are_no_messages():
    """A library prints in every way there is."""
    prints = "print('NOISE'); os.write(1, b'NOISE'); os.system('echo NOISE'); sys.stdout.flush()"
    process = start(f"{prints}; save(result); print('NOISE')")
    (message,) = map(json.loads, process.stdout)
    err = process.stderr.read()
    process.communicate()  # closes its input: not before it has ended
    assert message["result"]["folder"] == "/models/it" and message["result"]["settings"]["runs"] == 5
    assert err.count("NOISE") == 4


CHILD = "print(subprocess.Popen(['sleep', '1000']).pid, file=sys.stderr, flush=True); time.sleep(3600)"


@pytest.mark.parametrize("place", ["acts", "importing"])
def test_a_worker_ends_with_its_parent_and_all_that_it_started(tmp_path, place):
    """While it imports torch, too; and the reference answer goes with it, 155 MB for Qwen2.5."""
    reference = tmp_path / "qwquanto-reference"
    reference.mkdir()
    process = start(**{place: CHILD}, reference=str(reference))
    child = int(process.stderr.readline())
    assert os.getsid(child) == process.pid
    process.stdin.close()  # as the parent's end closes it
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not wait_for_end(process.pid, 2) and not reference.exists()


def test_a_worker_that_somebody_calls_takes_nobody_along(tmp_path):
    """Without a session of its own, as from a script: the group is the caller's."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER.format(root=str(ROOT), acts="pass", importing="pass"), encoding="utf-8")
    called = f"'{sys.executable}' {file} </dev/null; echo code $?"
    done = subprocess.run(["sh", "-c", called], stdout=subprocess.PIPE, start_new_session=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"code 1\n")
