"""From a command line to a run's locked folder and its config: a new run, or one that is continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bptool.config.asked import read_command_line
from bptool.config.loading import load
from bptool.config.overrides import override, parse_overrides
from bptool.config.schema import Config, RunSettings
from bptool.config.target import CodeTarget, FileTarget, Target, resolve_target
from bptool.errors import ResumeError
from bptool.training.resume import check_resumable
from bptool.training.run_folder import CONFIG, RunFolder, find_run, free_name, read_run_config, resume_command


@dataclass(frozen=True)
class OpenedRun:
    """A run that this process alone may write.

    Attributes:
        code: the user's own model; None for the built-in transformer.
        resumed: whether it continues from a checkpoint.
        data_may_change: whether the command line says anything about the data.
    """

    folder: RunFolder
    config: Config
    code: CodeTarget | None
    resumed: bool = False
    data_may_change: bool = False

    def keep_config(self) -> None:
        """Write config.json, once it is sure that the run begins or goes on: what is refused must leave no trace.

        Raises:
            StorageError: it could not be written.
        """
        self.folder.write(CONFIG, self.config.model_dump(mode="json"))
        self.folder.settle()


def open_new(
    target_text: str | None, overrides: Sequence[str], note: Callable[[str], None], *, force: bool
) -> OpenedRun:
    """Make a new run's folder; without a name of its own it is named after the target.

    Args:
        note: told what was taken for granted, in sentences.

    Raises:
        UsageError: the config is wrong, or the folder holds a run already.
        RunInUse, StorageError: the folder cannot be had.
    """
    asked = read_command_line(target_text, overrides, command="train")
    config = asked.config
    named = "run.name" in parse_overrides(overrides) or not _is_run(asked.target)
    if not (named and config.run.name):
        stem = asked.target.name or "run"
        name = stem if force else free_name(config.run.directory, stem)
        config = override(config, {"run.name": name})
    folder = RunFolder.create(config, force=force)
    for sentence in asked.notes:
        note(sentence)
    return OpenedRun(folder, config, asked.code)


def open_resumed(run: str, target_text: str | None, overrides: Sequence[str], note: Callable[[str], None]) -> OpenedRun:
    """Open the run that `run` names, with the changes that the command line (or another TARGET) makes.

    Raises:
        ResumeError: there is no such run, or a change is not possible or not named.
        RunInUse: another process writes it.
    """
    changes = parse_overrides(overrides)
    path = find_run(run, str(changes.get("run.directory", RunSettings().directory)))
    before = read_run_config(path)
    stored = FileTarget(path.name, path / CONFIG)
    target = resolve_target(target_text) if target_text else stored
    code = _code(target)
    if before.run.workload and code is None:
        raise ResumeError(
            f"{path} trains the user's own model, and code is run only when it is named",
            resume_command(run, before.run.workload),
        )
    own = {"run.name": path.name, "run.directory": str(path.parent), "run.workload": str(code or "")}
    loaded = load(stored if code else target, overrides)  # code has a model, and no settings
    config = override(loaded.config, own)
    differences = check_resumable(before, config, changes.keys())
    for sentence in loaded.notes:
        note(sentence)
    for key, (old, new) in differences.items():
        note(f"{key}: {old} -> {new}")
    data_may_change = any(key.startswith("data.") for key in changes)
    return OpenedRun(RunFolder.resume(path), config, code, resumed=True, data_may_change=data_may_change)


def _is_run(target: Target) -> bool:
    """Whether the target is another run, whose settings are taken and whose name is not."""
    return isinstance(target, FileTarget) and target.path.suffix != ".toml"


def _code(target: Target) -> CodeTarget | None:
    return target if isinstance(target, CodeTarget) else None
