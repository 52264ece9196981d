"""A file is whole, old or new, whatever goes wrong while it is written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import process_environment

from bptool.errors import StorageError
from bptool.files import is_unfinished, replace_text, replacing


def contents(folder: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in folder.iterdir()}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that notices when it is told to keep what it was given."""

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)


def test_a_file_that_was_not_there(tmp_path: Path) -> None:
    replace_text(tmp_path / "new", "a\r\nü\n")
    assert (tmp_path / "new").read_bytes() == b"a\r\n\xc3\xbc\n"
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode  # what the umask leaves, and not a private file's


def test_a_full_disk_leaves_the_old_text(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "page").write_text("old")
    with pytest.raises(StorageError, match=r"page could not be written: No space left on device") as caught:
        replace_text(tmp_path / "page", "new", then="resume the run")
    assert contents(tmp_path) == {"page": "old"}
    assert caught.value.remedy == "make room or fix permissions, then resume the run"


def test_a_file_that_is_too_large_for_this_process(tmp_path: Path) -> None:
    """The kernel's own refusal in the midst of a large file, in a process of its own."""
    (tmp_path / "page").write_text("old")
    program = (
        "from bptool.files import replace_text; from pathlib import Path; replace_text(Path('page'), 'x' * 200_000)"
    )
    limited = ["prlimit", "--fsize=100000", sys.executable, "-c", program]
    done = subprocess.run(limited, cwd=tmp_path, env=process_environment(), capture_output=True, text=True, check=False)
    assert "StorageError: page could not be written: File too large" in done.stderr
    assert contents(tmp_path) == {"page": "old"}


def test_an_error_of_the_writer_leaves_the_old_text(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with replacing(tmp_path / "page") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    (tmp_path / "page").write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert contents(tmp_path) == {"page": "old"}


def test_a_process_that_is_killed_leaves_the_old_text(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    program = """
import time
from pathlib import Path
from bptool.files import replacing
with replacing(Path("page")) as temporary, temporary.open("w") as file:
    file.write("half")
    file.flush()
    print("written", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=process_environment(), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "page").read_text() == "old"
    (leftover,) = (entry for entry in tmp_path.iterdir() if entry.name != "page")
    assert leftover.read_text() == "half"
    assert is_unfinished(leftover, "page")
    assert not is_unfinished(leftover, "pag")
    replace_text(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "new"


def test_all_or_none(tmp_path: Path) -> None:
    def write(last: OSError | None) -> None:
        with replacing(tmp_path / "config") as config:
            config.write_text("new")
            with replacing(tmp_path / "weights") as weights:
                weights.write_text("new")
                if last:
                    raise last

    for name in ("weights", "config"):
        (tmp_path / name).write_text("old")
    with pytest.raises(StorageError, match="weights could not be written: No space"):
        write(OSError(28, "No space left on device"))
    assert contents(tmp_path) == {"weights": "old", "config": "old"}
    write(None)
    assert contents(tmp_path) == {"weights": "new", "config": "new"}


def test_permissions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("old")
    (tmp_path / "page").chmod(0o640)
    replace_text(tmp_path / "page", "new")
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o640


def test_a_file_that_may_not_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StorageError, match="page could not be written: Permission denied"):
        replace_text(tmp_path / "page", "new")
    assert contents(tmp_path) == {"page": "old"}


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "page").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "page")
    replace_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "there") == {"page": "new"}


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """As `/dev/null` and `/dev/stdout`, which must not become ordinary files."""
    os.mkfifo(tmp_path / "pipe")
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_text()))
    reader.start()
    replace_text(tmp_path / "pipe", "new")
    reader.join(timeout=10)
    assert heard == ["new"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(("place", "words"), [("no/x", "No such file or directory"), ("folder", "Is a directory")])
def test_where_no_file_can_be(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=f"{place} could not be written: {words}"):
        replace_text(tmp_path / place, "")
