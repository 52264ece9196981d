"""The process that does a job: a small one that keeps watch, and below it the one that works.

The keeper leads a process group. When the command that started it is gone, however it went, the kernel closes its end
of their socket, and the keeper kills the group: the worker, and whatever the user's code has started. The session's
folder goes too, as nobody else will delete it. The group is killed also when the worker has ended.

The worker is forked before anything is imported, so the keeper needs hardly any memory, no library's lock, and no turn
of a worker that hangs.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

FOLDER_PREFIX = "bptool-compare-"
"""Of the names of sessions' folders."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LEFT_BY_PARENT = 70


def main(descriptor: int) -> None:
    """Read a job from the socket, have it done, and tell how the worker ended."""
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    job = _line(channel)
    if not job:
        return
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        _work(channel, job, keeper)
    gone = threading.Event()
    watch = threading.Thread(target=_end_with_the_command, args=(channel, gone, worker, job), daemon=True)
    watch.start()
    _, status = os.waitpid(worker, 0)
    if gone.is_set():
        watch.join()  # which ends this process
    with suppress(OSError):
        # Whatever part of an answer went before stands on a line of its own.
        channel.sendall(b"\n" + json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    _end_group()


def _line(channel: socket.socket) -> bytes:
    """Up to a line's end; nothing where the command has gone meanwhile."""
    received = b""
    while not received.endswith(b"\n"):
        part = channel.recv(65536)
        if not part:
            return b""
        received += part
    return received


def _end_with_the_command(channel: socket.socket, gone: threading.Event, worker: int, job: bytes) -> None:
    with suppress(OSError):
        while channel.recv(1):
            pass
    gone.set()
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    folder = Path(json.loads(job)["folder"])
    if folder.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
    _end_group()


def _end_group() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _work(channel: socket.socket, job: bytes, keeper: int) -> NoReturn:
    try:
        _die_with(keeper)
        _be_first_out_of_memory()
        from bptool.analysis.compare.job import Job
        from bptool.analysis.compare.work import done

        outcome = done(Job.model_validate_json(job))
        channel.sendall(json.dumps({"outcome": outcome.model_dump(mode="python")}).encode() + b"\n")
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)  # threads and exit handlers of the user's code may never end


def _die_with(keeper: int) -> None:
    """On Linux also where the keeper is killed; elsewhere the keeper is small and nobody's aim."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(_LEFT_BY_PARENT)


def _be_first_out_of_memory() -> None:
    """Where the kernel must kill a process for its memory, it is to be this one, and not the command."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
