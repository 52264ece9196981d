from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bptool.config.loading import parse_config
from bptool.config.schema import Config
from bptool.errors import ConfigError, ResumeError, RunInUse, StorageError, UsageError
from bptool.training.run_folder import RunFolder, find_run, free_name, read_run_config

HOLDER = """
import sys, time
from pathlib import Path
from bptool.training.run_folder import RunFolder
run = RunFolder.resume(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def config_of(directory: Path, name: str = "first") -> Config:
    return parse_config({"run.directory": str(directory), "run.name": name}, "a test")


def make(directory: Path, name: str = "first", *, force: bool = False) -> RunFolder:
    return RunFolder.create(config_of(directory, name), force=force)


def contents(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def held_by_another_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.communicate()


class TestLock:
    def test_two_processes_cannot_hold_one_folder(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        before = (tmp_path / "first" / "config.json").read_bytes()
        with held_by_another_process(tmp_path / "first") as holder:
            with pytest.raises(RunInUse, match=f"being written by another process \\(pid {holder.pid}\\)"):
                RunFolder.resume(tmp_path / "first")
            with pytest.raises(RunInUse):
                make(tmp_path, force=True)
        assert (tmp_path / "first" / "config.json").read_bytes() == before

    def test_the_lock_goes_with_a_killed_process(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        with held_by_another_process(tmp_path / "first") as holder:
            holder.send_signal(signal.SIGKILL)
            assert holder.wait(10) == -signal.SIGKILL
            RunFolder.resume(tmp_path / "first").close()

    def test_nor_can_one_process_hold_it_twice(self, tmp_path: Path) -> None:
        with make(tmp_path), pytest.raises(RunInUse, match=f"pid {os.getpid()}"):
            RunFolder.resume(tmp_path / "first")
        RunFolder.resume(tmp_path / "first").close()


class TestCreate:
    def test_a_new_run(self, tmp_path: Path) -> None:
        with make(tmp_path / "deep" / "runs", "mine") as run:
            assert run.path == tmp_path / "deep" / "runs" / "mine"
            assert run.name == "mine"
            assert read_run_config(run.path) == config_of(tmp_path / "deep" / "runs", "mine")

    def test_a_run_is_not_overwritten_unasked(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        (tmp_path / "first" / "metrics.jsonl").write_text("kept")
        with pytest.raises(UsageError, match=f"{tmp_path}/first holds a run already") as caught:
            make(tmp_path)
        assert "--force" in caught.value.remedy
        assert f"bptool train --resume {tmp_path}/first" in caught.value.remedy
        assert (tmp_path / "first" / "metrics.jsonl").read_text() == "kept"

    def test_force_leaves_nothing_of_the_old_run(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        (tmp_path / "first" / "checkpoints" / "step-1").mkdir(parents=True)
        (tmp_path / "first" / "metrics.jsonl").write_text("old")
        with make(tmp_path, force=True) as run:
            run.settle()
            assert contents(run.path) == [".lock", "config.json"]

    @pytest.mark.parametrize("force", [False, True])
    def test_what_is_no_run_is_never_deleted(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
        with pytest.raises(UsageError, match="holds files that are no run's"):
            make(tmp_path, "thesis", force=force)
        assert [entry.name for entry in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]

    @pytest.mark.parametrize("leftovers", [[], [".lock"], [".lock", ".config.json.writing"]])
    def test_a_folder_of_a_run_that_was_killed_while_it_was_made(self, tmp_path: Path, leftovers: list[str]) -> None:
        (tmp_path / "first").mkdir()
        for name in leftovers:
            (tmp_path / "first" / name).touch()
        with make(tmp_path) as run:
            run.settle()
            assert contents(run.path) == [".lock", "config.json"]

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "first").write_text("in the way")
        with pytest.raises(StorageError, match="first cannot be written: File exists") as caught:
            make(tmp_path)
        assert "run.directory" in caught.value.remedy
        with pytest.raises(StorageError, match="cannot be written: Not a directory"):
            make(tmp_path / "first", "below")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_directory_that_may_not_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="cannot be written: Permission denied"):
            make(tmp_path)


class TestUndo:
    """Until a new run can begin, an error leaves the place as it was."""

    def test_the_folder_goes_again(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), make(tmp_path):
            raise ZeroDivisionError
        assert contents(tmp_path) == []

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_what_was_to_be_overwritten_comes_back(self, tmp_path: Path, error: type[BaseException]) -> None:
        make(tmp_path).close()
        (tmp_path / "first" / "checkpoints").mkdir()
        (tmp_path / "first" / "checkpoints" / "kept").write_text("old")
        config = (tmp_path / "first" / "config.json").read_text()

        def fail() -> None:
            with make(tmp_path, force=True) as run:
                run.write("config.json", {})
                run.write("tokenizer.json", {})
                raise error

        with pytest.raises(error):
            fail()
        assert contents(tmp_path / "first") == [".lock", "checkpoints", "config.json"]
        assert (tmp_path / "first" / "checkpoints" / "kept").read_text() == "old"
        assert (tmp_path / "first" / "config.json").read_text() == config

    def test_not_after_it_began(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        (tmp_path / "first" / "metrics.jsonl").write_text("old")

        def fail() -> None:
            with make(tmp_path, force=True) as run:
                run.settle()
                run.write("result.json", {})
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert contents(tmp_path / "first") == [".lock", "config.json", "result.json"]

    def test_nor_where_a_run_is_continued(self, tmp_path: Path) -> None:
        make(tmp_path).close()
        with pytest.raises(ZeroDivisionError), RunFolder.resume(tmp_path / "first"):
            raise ZeroDivisionError
        assert contents(tmp_path / "first") == [".lock", "config.json"]


class TestWrite:
    def test_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with make(tmp_path) as run:
            run.write("result.json", {"loss": 1.5})

            def refuse(*arguments: object) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(Path, "replace", refuse)
            with pytest.raises(StorageError, match=r"result\.json could not be written: No space left on device"):
                run.write("result.json", {"loss": 0.5})
            monkeypatch.undo()
            assert json.loads((run.path / "result.json").read_text()) == {"loss": 1.5}
            assert contents(run.path) == [".lock", "config.json", "result.json"]


class TestReadConfig:
    def test_no_run(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            make(tmp_path, name).close()
        with pytest.raises(ResumeError, match=f"no run at {tmp_path}/c: ") as caught:
            RunFolder.resume(tmp_path / "c")
        assert caught.value.remedy == f"runs in {tmp_path}: a, b"
        assert not (tmp_path / "c").exists()

    def test_no_run_anywhere(self, tmp_path: Path) -> None:
        with pytest.raises(ResumeError) as caught:
            read_run_config(tmp_path / "c")
        assert caught.value.remedy == "start one with `bptool train`"

    @pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"text"', "\xff"])
    def test_a_config_that_is_no_json_object(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ResumeError, match=r"config\.json cannot be read: "):
            read_run_config(tmp_path)

    def test_a_config_with_mistakes(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"training": {"steps": 0}, "modle": 1}')
        with pytest.raises(ConfigError, match=r"config\.json: 2 problems"):
            read_run_config(tmp_path)


def test_find_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "runs", "mine").close()
    monkeypatch.chdir(tmp_path)
    for text in ("mine", "runs/mine", str(tmp_path / "runs" / "mine")):
        assert (find_run(text, "runs") / "config.json").is_file()
    assert find_run("other", "runs") == Path("runs/other")
    assert find_run("elsewhere/other", "runs") == Path("elsewhere/other")


def test_free_name(tmp_path: Path) -> None:
    taken = []
    for _ in range(3):
        taken.append(free_name(str(tmp_path), "tiny"))
        make(tmp_path, taken[-1]).close()
    assert taken == ["tiny", "tiny-2", "tiny-3"]
