"""A process for each precision, and how it ended. No torch: workers load and measure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _qwquanto.channel import SILENCE_S, read_lines
from _qwquanto.console import View
from _qwquanto.results import Result, from_plain
from _qwquanto.settings import PRECISIONS, Settings
from _qwquanto.text import duration, plural

NO_NUMBER = (
    "A figure was no number (NaN or infinite): it, or the run or judgement it belongs to, is left out."
)
EXIT_GRACE_S = 10  # for a worker to end by itself once it has measured everything

# The package is searched last and the user's folder never (-P): none of their files may shadow a library.
START = f"import sys; sys.path.append({str(Path(__file__).parent.parent)!r}); "
START += "from _qwquanto.worker import main; main()"
COMMAND = (sys.executable, "-P", "-c", START)

# The folders of reference answers; the process that made one, and its machine, stand in its name.
REFERENCE = f"qwquanto-{platform.node()}-"


class Interruption:
    """Ctrl-C, SIGTERM or SIGHUP, remembered: nothing is raised, the worker is ended, its figures stand.

    A signal that was ignored stays so: SIGHUP after `nohup`, Ctrl-C in the background of a plain sh.
    """

    def __init__(self) -> None:
        self.seen = False
        self.process = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)

    def __call__(self, *_: Any) -> None:
        self.seen = True
        if self.process:
            kill_group(self.process)

    def watch(self, process: subprocess.Popen) -> None:
        """The process that an interruption ends from now on; at once, if it came before."""
        self.process = process
        if self.seen:
            kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """End a worker and all that it started."""
    with contextlib.suppress(OSError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


def start_worker(
    job: dict[str, Any], errors: Any, stop: Interruption, command: Sequence[str]
) -> tuple[subprocess.Popen, queue.Queue]:
    """A worker in a session of its own, which Ctrl-C does not reach; and what it says."""
    quiet = {
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "critical",
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "6",  # torch's profiler, whose lines would pass for the last words of a crash
    }
    new_group = {"start_new_session": True} if os.name == "posix" else {"creationflags": 0x200}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if job["debug"] else errors,
        encoding="utf-8",
        env=({} if job["debug"] else quiet) | os.environ,
        **new_group,
    )
    stop.watch(process)
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
    with contextlib.suppress(OSError):  # it has died already, and says how
        # left open: its end tells the worker that this process is gone
        os.write(process.stdin.fileno(), (json.dumps(job) + "\n").encode())
    return process, lines


def follow(
    lines: queue.Queue, result: Result, view: View, save: Callable[[Result], None]
) -> tuple[Result, str | None]:
    """Pass on what a worker says until it ends: its last Result, and a failure if it fell silent instead."""
    step = "importing torch and transformers"
    limit = SILENCE_S
    heard = time.monotonic()
    view.status(step)
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            silent = time.monotonic() - heard
            ended = result.complete or result.failure
            if ended and silent > EXIT_GRACE_S:
                return result, None
            if not ended and limit is not None and silent > limit:
                return result, f'said nothing for {duration(limit)} after "{step}", and was ended'
            continue
        if line is None:
            return result, None
        heard, unknown = time.monotonic(), []
        try:
            message = json.loads(line, parse_constant=unknown.append)  # NaN and infinities become None
        except ValueError:  # it was killed in the middle of a line
            continue
        if "result" in message:
            result = from_plain(Result, message["result"])
            result.notes += [NO_NUMBER] * bool(unknown)
            save(result)
        elif "log" in message:
            view.log(message["log"])
        else:
            step, limit = message["status"], message["timeout_s"]
            view.status(step, message["fraction"])


def run_worker(
    s: Settings,
    reference: str | None,
    view: View,
    save: Callable[[Result], None],
    stop: Interruption,
    debug: bool,
    folder: str | None = None,
    command: Sequence[str] = COMMAND,
) -> Result:
    """Measure one precision in a process of its own; `save` gets its Result whenever it has grown.

    `folder` has the model's files, if another worker got them already. `command` starts the worker: a test
    gives one that behaves badly.

    However the process ends, the Result holds what it had said, and one line about the end if it was no good
    one. A Result marked complete is complete whatever the process does afterwards.
    """
    job = {"settings": dataclasses.asdict(s), "folder": folder, "reference": reference, "debug": debug}
    job["on_terminal"] = view.console.is_terminal
    with tempfile.TemporaryFile() as errors:
        process, lines = start_worker(job, errors, stop, command)
        result, failure = follow(lines, Result(s), view, save)
        if not (failure or result.complete or result.failure):
            try:
                process.wait(EXIT_GRACE_S)
            except subprocess.TimeoutExpired:  # the signal that ends it now is ours, and no lack of memory
                failure = "its process closed its output and did not end, so it was ended"
        kill_group(process)
        code = process.wait()
        stop.process = None
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
    if not result.complete and not stop.seen:
        result.failure = result.failure or failure or describe_exit(code, *said)
        save(result)
    return result


def describe_exit(code: int, said: str = "") -> str:
    """A worker's exit code in words, with the last line that it wrote to standard error."""
    if "No module named" in said:
        return f"{said}: pip install -r requirements.txt"
    said = f" ({said[:300]})" if said else ""
    if code >= 0:
        return f"its process ended with exit code {code}{said}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-code, f"signal {-code}")  # a real-time signal has no name
    return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else said)


def is_alive(process: int) -> bool:
    """Whether a process of this number runs; always true on Windows, which has no harmless signal."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def remove_leftovers() -> None:
    """Remove reference answers whose program and worker were killed: 155 MB each for Qwen2.5."""
    for folder in Path(tempfile.gettempdir()).glob(f"{REFERENCE}*-*"):
        number = folder.name.removeprefix(REFERENCE).split("-")[0]
        if number.isdigit() and not is_alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def measure_each(
    s: Settings, save: Callable[[Result], None], view: View, stop: Interruption, debug: bool
) -> None:
    """Measure each precision in a worker of its own, the unquantized model first; or the one asked for."""
    if not s.compare:
        run_worker(s, None, view, save, stop, debug)
        return
    names = sorted((p or "none" for p in s.compare), key=PRECISIONS.index)
    began = time.monotonic()
    both = " eager, and the same of the compiled step" if s.compile else ""
    view.log(
        f"{', '.join(names)}: {plural(s.runs, 'run')} each{both}; the time to go follows after the first"
    )
    folder = None  # asked of the Hub once: a push in between would compare two revisions
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix=f"{REFERENCE}{os.getpid()}-") as reference:
        for i, name in enumerate(names):
            view.prefix = ""
            rest = f", about {duration((time.monotonic() - began) / i * (len(names) - i))} to go" if i else ""
            view.log(f"{name} ({i + 1} of {len(names)}{rest})")
            view.prefix = f"{name}: "
            mine = dataclasses.replace(s, weights=None if name == "none" else name)
            result = run_worker(mine, reference, view, save, stop, debug, folder)
            folder = folder or result.folder
            if stop.seen or result.ends_comparison:
                return


def measure_all(
    s: Settings, save: Callable[[Result], None], view: View, stop: Interruption, debug: bool
) -> list[str]:
    """Measure what is asked for; what kept a worker from being started."""
    try:
        measure_each(s, save, view, stop, debug)
    except OSError as error:
        place = f"the temporary folder is {tempfile.gettempdir()}, TMPDIR sets another"
        return [f"cannot start a worker: {error.strerror or error} ({place})"]
    return []
