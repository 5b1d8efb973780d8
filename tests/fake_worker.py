"""Workers that speak the protocol, measure nothing and end as a test likes; the script with one of them."""

import dataclasses
import json
import sys
import textwrap

from conftest import ROOT, SCRIPT
from results import result

HEAD = """import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
weights = job["settings"]["weights"] or "none"
RESULT = json.loads({plain!r}) | {{"settings": job["settings"]}}
UNFINISHED = RESULT | {{"runs": RESULT["runs"][:1], "eager_complete": False, "complete": False}}

def say(**message):
    print(json.dumps(message), flush=True)

def step(doing, timeout_s=60):
    say(status=doing, fraction=None, timeout_s=timeout_s)

"""
PROGRAM = """import functools, runpy, sys
sys.path.insert(0, {root!r})
from _qwquanto import supervisor
supervisor.run_worker = functools.partial(supervisor.run_worker, command={command!r})
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def fake_worker(acts, **fields):
    """The command of a worker that does `acts`: Python that knows `weights`, the precision's name; RESULT, a
    complete one with these fields; UNFINISHED, one of a single run; `say` and `step`."""
    plain = json.dumps(dataclasses.asdict(result(**fields)))
    return [sys.executable, "-c", HEAD.format(plain=plain) + textwrap.dedent(acts)]


def with_worker(folder, command):
    """The path of a program that is the script, but for the worker that it starts."""
    path = folder / "with_worker.py"
    text = PROGRAM.format(root=str(ROOT), command=list(command), script=str(SCRIPT))
    path.write_text(text, encoding="utf-8")
    return path
