"""What a native library prints, seen from outside of the process that it prints in."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, sys
from bptool.native_output import native_output_dropped
libc = ctypes.CDLL(None)
libc.printf(b"before, in C\\n")
print("before, in Python")
try:
    with native_output_dropped():
        libc.printf(b"dropped, in C\\n")
        os.write(1, b"dropped, at once\\n")
        {inside}
except ValueError:
    pass
libc.printf(b"after, in C\\n")
libc.fflush(None)
print("after, in Python")
"""


def printed(inside: str) -> list[str]:
    program = PROGRAM.format(inside=inside)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


@pytest.mark.parametrize("inside", ["pass", "raise ValueError"])
def test_only_what_is_printed_inside_is_dropped(inside: str) -> None:
    """Into a pipe, where the C library writes late."""
    assert printed(inside) == ["after, in C", "after, in Python", "before, in C", "before, in Python"]


def test_a_process_without_standard_output_goes_on() -> None:
    program = "from bptool.native_output import native_output_dropped as dropped\nwith dropped(): raise SystemExit(7)"
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 7
