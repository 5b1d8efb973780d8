"""Both ends of the pipe between the program and a worker, and an exception in the user's words.

Imports the standard library alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

SILENCE_S = 900  # a step that is silent for so long counts as hung; loading may take as long as it takes


class Failure(Exception):
    """What went wrong and what to do about it, in one line for the user."""


def read_lines(stream: Any, lines: queue.Queue) -> None:
    """Everything that a worker says, then None."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def listen_to_parent(jobs: queue.Queue) -> None:
    """Hand on the job, then wait for the parent's end: no orphan keeps a GPU or a reference answer."""
    job: dict[str, Any] = {}
    if line := sys.stdin.readline():
        job = json.loads(line)
        jobs.put(job)
    sys.stdin.read()
    if folder := job.get("reference"):
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix" and os.getpgrp() == os.getpid():  # else the group is of whoever called
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Channel:
    """A worker's end of the pipe: JSON lines to the program; nowhere, where no worker runs."""

    def __init__(self) -> None:
        self.file: Any = None
        self.timeout_s: float | None = SILENCE_S  # of the step under way

    def send(self, **message: Any) -> None:
        """A line to the program."""
        if self.file:
            self.file.write(json.dumps(message) + "\n")
            self.file.flush()

    def log(self, text: str) -> None:
        """A line of progress for good."""
        self.send(log=text)

    def status(self, text: str, fraction: float | None = None) -> None:
        """A line of progress that the next one replaces; `fraction` of the work is done."""
        self.send(status=text, fraction=fraction, timeout_s=self.timeout_s)

    def reading_status(self, title: str) -> None:
        """Says that a prompt is being read: as with loading, that takes as long as it takes.

        But not in a step with a limit of its own, within which torch may compile.
        """
        limit = None if self.timeout_s == SILENCE_S else self.timeout_s
        self.send(status=f"{title}: reading the prompt", fraction=None, timeout_s=limit)

    def save(self, result: Any) -> None:
        """Hand on a Result of what has been measured so far, so that nothing of it can be lost."""
        self.send(result=dataclasses.asdict(result))

    @contextlib.contextmanager
    def step(self, doing: str, timeout_s: float | None = SILENCE_S) -> Iterator[None]:
        """A part of the measurement: its status line, how long it may be silent, the place of an error."""
        self.timeout_s = timeout_s
        self.status(doing)
        try:
            yield
        except Exception as error:
            error.step = getattr(error, "step", doing)
            raise


CHANNEL = Channel()
log, status, reading_status = CHANNEL.log, CHANNEL.status, CHANNEL.reading_status
save, step = CHANNEL.save, CHANNEL.step


def first_line(error: BaseException) -> str:
    """An exception's own words, cut to a line."""
    lines = str(error).strip().splitlines() or [""]
    return (lines[0] or type(error).__name__)[:300].rstrip(".: ")


# of CUDA and MPS, of the CPU on Linux and on Windows, of cuBLAS
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
MACHINE_LACKS = {  # what an error's text says -> what the user is told: not a failure of the model
    "No working C++ compiler": "needs a C++ compiler (apt install g++; Windows: Visual Studio Build Tools)",
    "Failed to find C compiler": "needs a C compiler (Linux: apt install gcc)",
    "Python.h": "needs Python's headers (apt install python3-dev)",
    "working triton": "needs a working Triton (pip install triton; on Windows triton-windows)",
    "No module named 'triton'": "needs Triton (pip install triton; on Windows triton-windows)",
}
KNOWN_ERRORS = {  # the same for failures
    "recognize this architecture": "this transformers does not know the model's architecture: upgrade it",
    "trust_remote_code": "the model runs code of its repository: read it, then add --trust-remote-code",
    # transformers integrations/quanto.py:42 takes one tensor a layer
    "automatic conversion": "transformers cannot quantize this checkpoint by Quanto: --weights none runs it",
    # Quanto tensor/weights/qbytes.py:294
    "Tensor cannot be changed": "Quanto cannot run this model: a layer reads weights in another dtype",
}


def describe_error(error: Exception, advice: str) -> tuple[str, bool]:
    """An exception in the user's words, and whether this machine lacks something (else it is a failure)."""
    text = str(error)
    doing = getattr(error, "step", "starting")
    if isinstance(error, Failure):
        return text, False
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return f"out of memory while {doing}: {advice}", False
    for sign, told in (MACHINE_LACKS | KNOWN_ERRORS).items():
        if sign.lower() in text.lower():
            return told, sign in MACHINE_LACKS
    told = f"{type(error).__name__} while {doing}: {first_line(error)} (--debug shows more)"
    return told, isinstance(error, NotImplementedError)  # no such operation on MPS
