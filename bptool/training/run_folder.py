"""A run's folder: who may write it, and the files that a run is known by."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bptool.config.loading import parse_config
from bptool.config.schema import Config
from bptool.errors import ResumeError, RunInUse, StorageError, UsageError, nearest
from bptool.files import is_unfinished, replace_text

CONFIG, METRICS, RESULT, TOKENIZER, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "result.json",
    "tokenizer.json",
    "checkpoints",
)
_LOCK, _REPLACED = ".lock", ".replaced"


class RunFolder:
    """`runs/NAME`, locked by this process while it is open.

    The lock is the kernel's (`flock`): it goes with the process, however that ends, so no stale lock is ever left.
    """

    def __init__(self, path: Path, lock: TextIOWrapper) -> None:
        self.path = path
        self._lock = lock
        self._may_be_undone = False

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / METRICS

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run's text went through."""
        return self.path / TOKENIZER

    @classmethod
    def create(cls, config: Config, *, force: bool) -> Self:
        """Make and lock the folder `config.run` names, and write its config.json.

        Until `settle()` is called an error undoes this: the folder goes, or holds again the run that it held.

        Raises:
            UsageError: it holds a run already, and `force` is not given; or other files, which are never deleted.
            RunInUse: another process writes it.
            StorageError: it cannot be made.
        """
        path = Path(config.run.directory) / config.run.name
        with _storage_errors(path):
            _refuse_occupied(path, config.run.workload, force=force)
            run = cls._open(path)
        run._may_be_undone = True
        with ExitStack() as undo, _storage_errors(path):
            undo.enter_context(run)
            _set_aside(path)
            run.write(CONFIG, config.model_dump(mode="json"))
            undo.pop_all()
        return run

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Lock the folder of a run that is there.

        Raises:
            ResumeError: there is no run at `path`.
            RunInUse: another process writes it.
            StorageError: it cannot be written.
        """
        read_run_config(path)
        with _storage_errors(path):
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> Self:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise RunInUse(
                f"{path} is being written by another process (pid {holder})",
                "wait for it, stop it, or choose another run.name",
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return cls(path, lock)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all.

        Raises:
            StorageError: it could not be written.
        """
        replace_text(self.path / name, json.dumps(content, indent=1) + "\n")

    def settle(self) -> None:
        """The run can begin: what it overwrites is deleted."""
        self._may_be_undone = False
        shutil.rmtree(self.path / _REPLACED, ignore_errors=True)

    def close(self) -> None:
        """Let the folder go."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A new run that was interrupted can be resumed; but to overwrite another may have been a mistake.
        if self._may_be_undone and kind and (issubclass(kind, Exception) or (self.path / _REPLACED).exists()):
            with suppress(OSError):
                _put_back(self.path)
        self.close()


def read_run_config(path: Path) -> Config:
    """The complete config of the run at `path`.

    Raises:
        ResumeError: there is no run there.
        ConfigError: its config.json is not valid.
    """
    file = path / CONFIG
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        known = sorted(p.parent.name for p in path.parent.glob(f"*/{CONFIG}"))
        remedy = f"runs in {path.parent}: {', '.join(known)}" if known else "start one with `bptool train`"
        raise ResumeError(f"no run at {path}: {file} is missing{nearest(path.name, known)}", remedy) from None
    except (OSError, ValueError) as error:
        raise ResumeError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ResumeError(f"{file} cannot be read: it holds no JSON object")
    return parse_config(values, str(file))


def find_run(text: str, directory: str) -> Path:
    """The run that a user names: a folder, or a name below the runs' directory; it need not be there."""
    path = Path(text)
    return path if (path / CONFIG).is_file() or len(path.parts) != 1 else Path(directory) / path


def resume_command(run: Path | str, workload: str | None) -> str:
    """What continues a run, ready to paste; `workload` is the user's own model, which only a TARGET runs."""
    target = f" {shlex.quote(workload)}" if workload else ""
    return f"bptool train{target} --resume {shlex.quote(str(run))}"


def free_name(directory: str, stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3` ... where that is taken."""
    name, number = stem, 1
    while (Path(directory) / name / CONFIG).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def _refuse_occupied(path: Path, workload: str, *, force: bool) -> None:
    entries = [entry for entry in _entries(path) if not is_unfinished(entry, CONFIG)]  # one killed while it was made
    if entries and not (path / CONFIG).exists():
        raise UsageError(f"{path} holds files that are no run's", "choose another run.name or run.directory")
    if entries and not force:
        raise UsageError(
            f"{path} holds a run already",
            f"continue it: {resume_command(path, workload)}\nor choose another run.name, or overwrite it with --force",
        )


def _set_aside(path: Path) -> None:
    """Move what the folder holds out of the way of a new run."""
    replaced, entries = path / _REPLACED, _entries(path)
    if replaced.exists():  # a process was killed before its own new run had begun: this is what was there before
        _delete(entries)
    elif entries:
        replaced.mkdir()
        for entry in entries:
            entry.rename(replaced / entry.name)


def _put_back(path: Path) -> None:
    """Undo `_set_aside`, and what was written since."""
    _delete(_entries(path))
    replaced = path / _REPLACED
    if replaced.exists():
        for entry in replaced.iterdir():
            entry.rename(path / entry.name)
        replaced.rmdir()
    else:
        (path / _LOCK).unlink()
        path.rmdir()


def _delete(entries: Iterable[Path]) -> None:
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _entries(path: Path) -> list[Path]:
    """What the folder holds of a run; config.json, by which a run is known, comes last."""
    entries = [entry for entry in path.iterdir() if entry.name not in (_LOCK, _REPLACED)] if path.is_dir() else []
    return sorted(entries, key=lambda entry: entry.name == CONFIG)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the run's folder {path} cannot be written: {error.strerror}",
            "choose another place with run.directory=FOLDER",
        ) from error
