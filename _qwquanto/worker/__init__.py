"""The process that loads and measures one precision, and says all it learns in JSON lines; see `main`."""

from __future__ import annotations

import os
import queue
import threading
import warnings

from _qwquanto.channel import CHANNEL, listen_to_parent
from _qwquanto.results import Result
from _qwquanto.settings import Settings


def main() -> None:
    """Measure the job that comes on standard input; a Result goes out whenever it has grown.

    Standard output becomes the channel, and whatever a library prints goes to standard error.
    """
    CHANNEL.file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=listen_to_parent, args=(jobs,), daemon=True).start()
    # here: torch takes seconds to import, and the parent's end must be noticed meanwhile
    from _qwquanto.worker.measure import measure

    job = jobs.get()
    warnings.filterwarnings("default" if job["debug"] else "ignore")
    started = Result(Settings(**job["settings"]), job["folder"])
    measure(started, job["reference"], job["on_terminal"], job["debug"])
