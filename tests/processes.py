"""Processes of the script and their ends, for the tests."""

import contextlib
import os
import pty
import re
import threading
import time

import psutil
from conftest import wait_for


def worker_of(process):
    """The worker of a started script, once there is one."""

    def find():
        with contextlib.suppress(psutil.Error):  # one that has just been made, or ended
            children = psutil.Process(process.pid).children()
            return [c for c in children if c.cmdline() != psutil.Process(process.pid).cmdline()]

    return wait_for(find, process)[0]


def wait_for_end(session, seconds):
    """Wait until no process of a session is left; what is, after so many seconds."""

    def of_session():
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        return left

    end = time.monotonic() + seconds
    while (left := of_session()) and time.monotonic() < end:
        time.sleep(0.02)
    return left


class Terminal:
    """The script in the foreground of a terminal of its own, as after an Enter in a shell."""

    def __init__(self, script, **flags):
        self.ours, theirs = pty.openpty()
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)

        def take_terminal():
            os.setsid()
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = script.start(streams=streams | {"preexec_fn": take_terminal}, **flags)
        os.close(theirs)
        self.shown = b""
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self.ours, 4096):
                self.shown += part

    def press_ctrl_c(self):
        os.write(self.ours, b"\x03")

    def end(self):
        """The exit code and all that was shown."""
        code = self.process.wait(timeout=60)
        self.reader.join()
        os.close(self.ours)
        return code, self.shown.decode("utf-8")


def check_interrupted(terminal, session):
    """What holds whenever and however the parent is told to end; what was shown."""
    code, shown = terminal.end()
    assert code == 130 and "Traceback" not in shown and "interrupted" in shown
    assert not wait_for_end(session, 2)
    assert shown.rfind("\x1b[?25l") < shown.rfind("\x1b[?25h"), "the cursor is visible again"
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
