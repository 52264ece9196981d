"""A job in a fresh process: begun, waited for, and ended with all that it has started."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import bptool
from bptool.analysis.compare.job import Job, Outcome

_TICK_S = 0.1
_TAIL_BYTES = 4096
_WORDS = 300
_OOM_COUNTERS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
# The worker's bptool is this one, and neither the current folder nor that of a script hides a module of Python's.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); import bptool; del sys.path[0]\n"
    "from bptool.analysis.compare.row_worker import main; main(int(sys.argv[2]))"
)


def run_job(job: Job, *, time_limit_s: float, stopped: Callable[[], bool]) -> Outcome | None:
    """What came of a job, whatever becomes of its process; None where `stopped` said to leave it.

    What the user's code prints is kept from the command's own output; its end is told where the process dies. No
    process is left when this returns.
    """
    ours, theirs = socket.socketpair()
    kills_before = _kernel_kills()
    with ours, _started(theirs) as process:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                ours.sendall(job.model_dump_json().encode() + b"\n")
            seen = _Seen()
            ending = _wait(ours, process, seen, time.monotonic() + time_limit_s, stopped)
        finally:
            # Before it is reaped: until then its number is nobody else's.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if ending == "stopped":
        return None
    if seen.outcome:
        return seen.outcome
    if ending == "late":
        return Outcome(status="timed_out", reason=f"not done after {time_limit_s:g} s, its time limit{seen.words}")
    return _death(seen, _more_kills(kills_before, _kernel_kills()))


@dataclass
class _Seen:
    """What the process has told."""

    outcome: Outcome | None = None
    exit_code: int | None = None
    line: bytes = b""
    output: bytes = b""

    def told(self, received: bytes) -> None:
        *lines, self.line = (self.line + received).split(b"\n")
        for line in lines:
            with suppress(ValueError):  # an answer that was cut short
                message = json.loads(line)
                if "outcome" in message:
                    self.outcome = Outcome.model_validate(message["outcome"])
                self.exit_code = message.get("exit", self.exit_code)

    def printed(self, received: bytes) -> None:
        self.output = (self.output + received)[-_TAIL_BYTES:]

    @property
    def words(self) -> str:
        """The last line that it printed."""
        lines = [line.strip() for line in self.output.decode(errors="replace").splitlines() if line.strip()]
        return f"; it last said: {lines[-1][-_WORDS:]}" if lines else ""


def _started(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C at the terminal is the command's."""
    with theirs:
        home = str(Path(bptool.__file__).parent.parent)
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, home, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )


def _wait(
    channel: socket.socket,
    process: subprocess.Popen[bytes],
    seen: _Seen,
    deadline: float,
    stopped: Callable[[], bool],
) -> str:
    """Until it has `ended`, is `late`, or `stopped`."""
    assert process.stdout is not None, "it was asked for"
    output = process.stdout.fileno()
    os.set_blocking(output, False)
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(output, selectors.EVENT_READ)
        while True:
            if stopped():
                return "stopped"
            ready = [key.fileobj for key, _ in selector.select(_TICK_S)]
            if output in ready and not _read(output, seen):
                selector.unregister(output)
            if channel in ready:
                received = _received(channel)
                seen.told(received)
                if not received or seen.exit_code is not None:
                    _read(output, seen)
                    return "ended"
            if time.monotonic() > deadline:
                return "late"


def _received(channel: socket.socket) -> bytes:
    """Nothing where the other end is closed."""
    try:
        return channel.recv(65536)
    except ConnectionResetError:  # it had not read its job yet
        return b""


def _read(output: int, seen: _Seen) -> bool:
    """What there is to read by now; whether more may come."""
    with suppress(BlockingIOError):
        while received := os.read(output, 65536):
            seen.printed(received)
        return False
    return True


def _death(seen: _Seen, kernel_killed: bool | None) -> Outcome:
    """Of a process that gave no answer.

    Args:
        kernel_killed: whether the kernel has killed a process for its memory meanwhile; None where it does not count.
    """
    code = seen.exit_code
    if code is None:
        return Outcome(status="failed", reason=f"its process was killed from outside{seen.words}")
    if code >= 0:
        return Outcome(status="failed", reason=f"its process left with exit code {code}{seen.words}")
    name = _signal_name(-code)
    if name == "SIGKILL" and kernel_killed is not False:
        return Outcome(
            status="out_of_memory", reason="the kernel killed its process (SIGKILL), as it does where memory runs out"
        )
    return Outcome(status="failed", reason=f"its process was ended by {name}{seen.words}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _kernel_kills() -> list[int | None]:
    """How often the kernel has killed a process for its memory, on this machine and in this control group."""
    return [_counter(path) for path in _OOM_COUNTERS]


def _counter(path: Path) -> int | None:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return int(fields["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _more_kills(before: list[int | None], after: list[int | None]) -> bool | None:
    known = [new > old for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    return any(known) if known else None
