"""A run's folder: who may write it, and the files that a run is known by."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bptool.config.loading import parse_config
from bptool.config.schema import Config
from bptool.errors import ResumeError, RunInUse, StorageError, UsageError

CONFIG, METRICS, RESULT, TOKENIZER, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "result.json",
    "tokenizer.json",
    "checkpoints",
)
_LOCK = ".lock"


class RunFolder:
    """`runs/NAME`, locked by this process while it is open.

    The lock is the kernel's (`flock`): it goes with the process, however that ends, so no stale lock is ever left.
    """

    def __init__(self, path: Path, lock: TextIOWrapper) -> None:
        self.path = path
        self._lock = lock

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

        Raises:
            UsageError: it holds a run already, and `force` is not given.
            RunInUse: another process writes it.
            StorageError: it cannot be made.
        """
        path = Path(config.run.directory) / config.run.name
        occupied = path.exists() and any(entry.name != _LOCK for entry in _entries(path))
        if occupied and not force:
            raise UsageError(
                f"{path} holds a run already",
                f"continue it: bptool train --resume {path}; or choose another run.name, or overwrite it with --force",
            )
        run = cls._open(path)
        for entry in _entries(path):
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        run.write(CONFIG, config.model_dump(mode="json"))
        return run

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Lock the folder of a run that is there.

        Raises:
            ResumeError: there is no run at `path`.
            RunInUse: another process writes it.
        """
        read_run_config(path)
        return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> Self:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / _LOCK).open("a+")
        except OSError as error:
            raise StorageError(
                f"the run's folder {path} cannot be written: {error.strerror}",
                "choose another place with run.directory=FOLDER",
            ) from error
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
        temporary = self.path / f".{name}.writing"
        try:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise StorageError(f"{self.path / name} could not be written: {error.strerror}") from error

    def close(self) -> None:
        """Let the folder go."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
        raise ResumeError(f"no run at {path}: {file} is missing", remedy) from None
    except (OSError, ValueError) as error:
        raise ResumeError(f"{file} cannot be read: {error}") from error
    return parse_config(values, str(file))


def find_run(text: str, directory: str) -> Path:
    """The run that a user names: a folder, or a name below the runs' directory."""
    path = Path(text)
    return path if (path / CONFIG).is_file() or not (Path(directory) / text).is_dir() else Path(directory) / text


def free_name(directory: str, stem: str) -> str:
    """`stem`, or `stem-2`, `stem-3` ... where that is taken."""
    name, number = stem, 1
    while (Path(directory) / name / CONFIG).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []
